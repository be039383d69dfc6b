"""Runs of a part of the canonical model, and the states from which its loops start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_options import EVERY, OPTIONS, build, close, config, hooked, injections, passes, tokens_for
from torch import Tensor

from tl_looped.errors import LoopedError
from tl_looped.model import LoopedModel


@EVERY
def test_stopping_and_restarting_at_any_layer_changes_nothing(name: str, no_grad: None) -> None:
    model = build(config(name))
    schedule, tokens = model.cfg.schedule, tokens_for(model.cfg)
    logits, injected = model(tokens).logits, injections(model, tokens)
    stream: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[Any, Any], None]:
        return lambda _module, args: stream.__setitem__(index, args[0])

    handles = [block.register_forward_pre_hook(keep(i)) for i, block in enumerate(model.blocks)]
    model(tokens)
    for handle in handles:
        handle.remove()
    for i in range(schedule.n_layers):
        resid = model(tokens, stop=i).logits
        assert torch.equal(resid, stream[i])
        assert torch.equal(model(tokens, stop=i - schedule.n_layers).logits, resid)
        entry = schedule.pass_of_layer(i)
        injection = None if entry is None else injected[entry.index]
        needed = entry is not None and injection is not None and entry is not schedule.passes[-1]
        if entry is not None and name in ("anchored", "loopus"):
            with pytest.raises(LoopedError, match=r"loop( of the kind 'gated')?, whose (output|state) also needs"):
                model(tokens, inputs_embeds=resid, start=i)
            continue
        if needed:
            with pytest.raises(LoopedError, match=rf"cache\['{schedule.pass_prefix(entry)}\.hook_injection'\]"):
                model(tokens, inputs_embeds=resid, start=i)
        assert torch.equal(model(tokens, inputs_embeds=resid, start=i, injection=injection).logits, logits)
        assert torch.equal(model(tokens, inputs_embeds=resid, start=i - schedule.n_layers, injection=injection).logits, logits)
        if not needed:
            assert torch.equal(model(tokens, inputs_embeds=resid, start=i).logits, logits)
        later = schedule.n_layers - 1
        part = model(tokens, inputs_embeds=resid, start=i, stop=later, injection=injection).logits
        assert torch.equal(part, stream[later])


@EVERY
def test_a_part_runs_only_its_layers(name: str, no_grad: None) -> None:
    model = build(config(name))
    schedule, tokens = model.cfg.schedule, tokens_for(model.cfg)
    n, ran = schedule.n_layers, []
    injected = injections(model, tokens)
    embeds = model.embed(tokens, position_ids=torch.arange(tokens.shape[1]))

    def layers_of(**part: Any) -> list[int]:
        ran.clear()
        model(tokens, **part)
        return list(ran)

    with hooked(*((block, lambda _, i=i: ran.append(i)) for i, block in enumerate(model.blocks))):
        assert layers_of() == list(range(n))
        for stop in range(n + 1):
            assert layers_of(stop=stop) == list(range(stop))
        for loop in range(schedule.n_loops):
            last = schedule.pass_of_loop(loop).layers.stop
            assert layers_of(loop=loop) == [*range(last), *range(schedule.first_coda_layer, n)]
        for start in range(n):
            entry = schedule.pass_of_layer(start)
            if entry is None or name not in ("anchored", "loopus"):
                part = {"inputs_embeds": embeds, "start": start, "injection": entry and injected[entry.index]}
                assert layers_of(**part) == list(range(start, n))
                assert layers_of(**part, stop=n - 1) == list(range(start, n - 1))


@EVERY
def test_stopping_after_the_last_layer_returns_its_output(name: str, no_grad: None) -> None:
    model = build(config(name))
    outputs: list[Tensor] = []
    with hooked((model.blocks[-1], outputs.append)):
        stream = model(tokens_for(model.cfg), stop=model.cfg.schedule.n_layers).logits
    assert torch.equal(stream, outputs[0])


def test_caches_work_in_parts_but_not_across_different_ones(no_grad: None) -> None:
    model = build(config("ouro"))
    tokens = tokens_for(model.cfg)
    shallow = model(tokens[:, :5], loop=0, use_cache=True).past_key_values
    with pytest.raises(LoopedError, match=r"holds \[0, 5\] positions, depending on the layer.*make a new cache"):
        model(tokens[:, 5:6], past_key_values=shallow)
    step = model(tokens[:, 5:6], loop=0, past_key_values=shallow).logits
    close(step[:, 0], model(tokens[:, :6], loop=0).logits[:, -1])

    stream = model(tokens, stop=3).logits
    upper = model(inputs_embeds=stream[:, :8], start=3, use_cache=True).past_key_values
    close(model(inputs_embeds=stream[:, 8:], start=3, past_key_values=upper).logits[:, 0], model(tokens).logits[:, -1])


# The initial state


def first_state(model: LoopedModel, tokens: Tensor, **kwargs: Any) -> Tensor:
    states: list[Tensor] = []
    with torch.no_grad(), hooked((passes(model)[0].hook_state, states.append)):
        model(tokens, **kwargs)
    return states[0]


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if o.get("initial_state") == "noise"])
def test_random_states_are_reproducible(name: str) -> None:
    model = build(config(name))
    cfg, tokens = model.cfg, tokens_for(model.cfg)
    state = first_state(model, tokens)
    assert torch.equal(first_state(model, tokens), state)
    assert torch.equal(first_state(build(cfg, seed=5), tokens), state)  # a function of the seed, not of the parameters
    assert torch.equal(first_state(model, tokens, initial_state=0), state)
    other = first_state(model, tokens, initial_state=1)
    assert torch.equal(other, first_state(model, tokens, initial_state=1)) and not torch.equal(other, state)
    assert state.abs().max() <= 3 * cfg.noise_std * cfg.noise_scale
    wide = first_state(model, torch.zeros(1, cfg.n_ctx, dtype=torch.long))
    # 24 x 24 draws; the std of a normal cut at 3 is 0.9866, and its estimate is off by about 1 / sqrt(2 * 576) = 3%.
    assert wide.std() / (0.9866 * cfg.noise_std * cfg.noise_scale) == pytest.approx(1, abs=0.12)
    assert len({tuple(row) for row in wide[0].tolist()}) == cfg.n_ctx
    assert torch.equal(wide[0, :9], state[0])  # a longer prompt starts from the same rows


@pytest.mark.parametrize("name", ["huginn", "parcae"])
def test_a_generator_gives_the_state_of_the_published_code(name: str) -> None:
    model = build(config(name))
    cfg, tokens = model.cfg, tokens_for(model.cfg)
    shape = (*tokens.shape, cfg.d_model)
    torch.manual_seed(11)
    torch.randn(shape)  # drawn and thrown away
    std = cfg.noise_std
    wanted = torch.nn.init.trunc_normal_(torch.empty(shape), std=std, a=-3 * std, b=3 * std) * cfg.noise_scale
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(first_state(model, tokens, initial_state=generator), wanted)
    assert not torch.equal(first_state(model, tokens, initial_state=generator), wanted)  # it has been advanced


@EVERY
def test_a_state_may_be_given(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    given = torch.randn(*tokens.shape, model.cfg.d_model)
    shown = given / (given.square().sum(-1, keepdim=True) + 1e-6).sqrt() if model.cfg.entry_norm else given
    torch.testing.assert_close(
        first_state(model, tokens, initial_state=given), shown, rtol=0, atol=1e-6 if name == "dory" else 0
    )
    assert not first_state(model, tokens, initial_state="zero").any()
    default = first_state(model, tokens)  # of a vector of length 1 the norm takes 5e-7, its epsilon over 2
    again, logits = model(tokens, initial_state=default).logits, model(tokens).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-4 if name == "dory" else 0)
    assert not torch.equal(model(tokens, initial_state=given).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        (
            "huginn",
            torch.zeros(2, 8, 24),
            r"shape \(2, 8, 24\) was asked; this run needs .* = \(2, 9, 24\)",
        ),
        ("huginn", "ones", r"initial_state='ones' was asked; pass a tensor, an int seed"),
        ("huginn", 1.5, "initial_state=1.5 was asked"),
        ("huginn", True, "initial_state=True was asked"),
        ("ouro", 3, "the ouro initial state is not random"),
        ("hrm_text", torch.Generator(), "the hrm_text initial state is not random"),
    ],
)
def test_other_states_are_refused(name: str, asked: Any, message: str, unchecked: None) -> None:
    model = build(config(name))
    with pytest.raises(LoopedError, match=message):
        model(tokens_for(model.cfg), initial_state=asked)
