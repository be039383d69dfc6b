"""What is read, edited or differentiated inside the canonical model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_options import EVERY, OPTIONS, blocks, build, close, config, hooked, injections, passes, tokens_for
from torch import Tensor, nn

from tl_looped.model.norms import RMSNorm
from tl_looped.model.passes import PassEnds

# Gradients


@EVERY
def test_gradients_reach_every_pass(name: str) -> None:
    """Directional derivatives in the input of each pass against central differences.

    With steps of 1e-4 in float64 the differences are off by about 1e-8 (the third derivative) and 1e-11 (rounding).
    """
    model = build(config(name), dtype=torch.float64)
    tokens = tokens_for(model.cfg, pos=5)
    readout = torch.randn(2, 5, model.cfg.d_vocab, dtype=torch.float64)
    grads: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[Any, Any, Any], None]:
        return lambda _module, _inputs, outputs: grads.__setitem__(index, outputs[0])

    handles = [ends.hook_in.register_full_backward_hook(keep(i)) for i, ends in enumerate(passes(model))]
    (model(tokens).logits * readout).sum().backward()
    for handle in handles:
        handle.remove()
    for i, ends in enumerate(passes(model)):
        direction = torch.randn_like(grads[i])
        direction /= direction.norm()

        def loss(step: float, ends: PassEnds = ends, direction: Tensor = direction) -> float:
            with torch.no_grad(), hooked((ends.hook_in, lambda out: out + step * direction)):
                return float((model(tokens).logits * readout).sum())

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        assert abs(slope) > 1e-3
        assert float((grads[i] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)


@EVERY
def test_the_gradient_of_a_shared_weight_is_the_sum_over_passes(name: str) -> None:
    tied, untied = (build(config(name), dtype=torch.float64) for _ in range(2))
    schedule, tokens = tied.cfg.schedule, tokens_for(tied.cfg)
    own: dict[int, list[nn.Parameter]] = {}
    for physical, block in zip(schedule.physical, blocks(untied), strict=True):
        block.attn.q.weight = nn.Parameter(block.attn.q.weight.detach().clone())
        own.setdefault(physical, []).append(block.attn.q.weight)
    for model in (tied, untied):
        model(tokens).logits.logsumexp(-1).sum().backward()
    for physical, block in zip(schedule.physical, blocks(tied), strict=True):
        grads = [weight.grad for weight in own[physical] if weight.grad is not None]
        assert len(grads) == len(own[physical]) and all(grad.any() for grad in grads)
        torch.testing.assert_close(block.attn.q.weight.grad, torch.stack(grads).sum(0))


# Hooks


@EVERY
def test_observing_attention_does_not_change_a_bit(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    patterns: list[Tensor] = []
    slots = [slot for block in blocks(model) for slot in (block.attn.hook_pattern, block.attn.hook_attn_scores)]
    for attention_mask in (None, mask):
        logits = model(tokens, attention_mask=attention_mask).logits
        for observed in (slots[::2], slots[1::2], slots):
            with hooked(*((slot, patterns.append) for slot in observed)):
                assert torch.equal(model(tokens, attention_mask=attention_mask).logits, logits)
    pattern = patterns[0]
    assert pattern.shape == (2, model.cfg.n_heads, 9, 9)
    assert not pattern.triu(1).any()
    close(pattern.sum(-1), torch.ones(2, model.cfg.n_heads, 9), atol=1e-6)


@EVERY
def test_the_explicit_attention_equals_the_fused_one(name: str) -> None:
    """A gradient that flows through the pattern takes the explicit path."""
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    used: list[Tensor] = []
    with hooked(*((block.attn.hook_pattern, used.append) for block in blocks(model))):
        logits = model(tokens).logits
    close(logits, model(tokens).logits)
    grads = torch.autograd.grad(logits.sum(), used)
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["plain", "retrofit_llama", "hrm_text"])
def test_editing_attention_does_what_a_hand_computation_says(name: str, no_grad: None) -> None:
    """All heads look at position 0: every position gets the values of position 0, through the output matrix."""
    model = build(config(name))
    cfg, tokens = model.cfg, tokens_for(model.cfg)
    attn = blocks(model)[-1].attn
    seen: list[Tensor] = []
    handle = attn.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    first = torch.nn.functional.one_hot(torch.zeros(9, dtype=torch.long), 9).float()
    outputs: list[Tensor] = []
    edits = [
        (attn.hook_pattern, lambda pattern: first.expand_as(pattern)),
        (attn.hook_attn_scores, lambda scores: scores + 1e4 * first),
        (attn.hook_attn_scores, lambda scores: scores - 7.0),  # softmax does not see a constant
    ]
    model(tokens)
    for slot, edit in edits:
        with hooked((slot, edit), (attn, outputs.append)):
            model(tokens)
    handle.remove()
    x = seen[0]
    values = attn.v(x)[:, :1].unflatten(-1, (-1, cfg.d_head)).repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=2)
    z = values.flatten(-2).expand(-1, 9, -1)
    wanted = attn.o(z if attn.gate is None else z * torch.sigmoid(attn.gate(x)))
    close(outputs[0], wanted, atol=1e-5)
    close(outputs[1], wanted, atol=1e-5)
    with hooked((attn, outputs.append)):
        model(tokens)
    close(outputs[2], outputs[3], atol=1e-5)


@EVERY
def test_an_edit_leaves_earlier_passes_alone(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)

    def outputs(*edits: tuple[nn.Module, Callable[[Tensor], Tensor]]) -> list[Tensor]:
        states: list[Tensor] = []
        with hooked(*edits, *((ends.hook_out, lambda out: states.append(out.clone())) for ends in passes(model))):
            model(tokens)
        return states

    clean = outputs()
    for p in model.cfg.schedule.passes:
        edited = outputs((blocks(model)[p.first].hook_resid_mid, lambda out: out + 1))
        assert all(torch.equal(a, b) for a, b in zip(clean[: p.index], edited[: p.index], strict=True))
        assert not torch.equal(clean[p.index], edited[p.index])


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if o.get("injection", "none") != "none"])
def test_editing_an_injection_concerns_one_pass(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    clean = injections(model, tokens)
    edited: list[Tensor] = []
    slots = [ends.hook_injection for ends in passes(model)]
    with hooked((slots[1], lambda out: out + 1), *((slot, lambda out: edited.append(out.clone())) for slot in slots)):
        model(tokens)
    assert torch.equal(edited[0], clean[0]) and torch.equal(edited[1], clean[1] + 1)
    if model.cfg.l_cycles is None:
        assert all(torch.equal(edited[k], clean[k]) for k in range(2, len(slots)))


@pytest.mark.parametrize("name", ["ouro", "anchored"])
def test_the_exit_gate_reads_the_state_leaving_the_pass(name: str, no_grad: None) -> None:
    model = build(config(name))
    states: list[Tensor] = []
    gates: list[Tensor] = []
    ends = passes(model)
    with hooked(*((e.hook_out, states.append) for e in ends), *((e.hook_exit_logit, gates.append) for e in ends)):
        model(tokens_for(model.cfg))
    parameters = model.canonical_parameters()
    for state, gate in zip(states, gates, strict=True):
        assert gate.shape == (2, 9)
        close(gate, state @ parameters["exit_gate.weight"][0] + parameters["exit_gate.bias"], atol=1e-5)


def test_a_norm_shows_its_scale(no_grad: None) -> None:
    norm = RMSNorm(6, 1e-6)
    norm.weight = nn.Parameter(torch.randn(6))
    x = torch.randn(2, 3, 6)
    scales: list[Tensor] = []
    with hooked((norm.hook_scale, scales.append)):
        out = norm(x)
    close(scales[0], (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-6)
    close(out, x / scales[0] * norm.weight, atol=1e-6)
    with hooked((norm.hook_scale, lambda scale: scale * 2)):
        close(norm(x), out / 2, atol=1e-6)
