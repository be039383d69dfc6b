"""Interventions, each against the plain model run by hand with the same change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import plain_model
from interventions_by_hand import OTHER, TOKENS, bridge_of, by_hand, close, drop_and_freeze, stack_of, virtual
from torch import Tensor
from zoo import FAMILIES, ZOO, random_bridge

from tl_looped.interventions import (
    ablate,
    drop_injection,
    freeze_attention,
    freeze_injection,
    repeat_loop,
    replace_injection,
    set_initial_state,
    skip_layer,
    skip_loop,
    steer,
)

INJECTED = pytest.mark.parametrize("name", [n for n, cfg in sorted(ZOO.items()) if cfg.injection != "none"])


# Leaving out and running again.


@FAMILIES
def test_the_reference_is_the_model(name: str) -> None:
    bridge = bridge_of(name)
    close(by_hand(plain_model(bridge)), bridge(TOKENS))


@FAMILIES
def test_a_skipped_loop_is_a_model_without_that_pass(name: str) -> None:
    bridge = bridge_of(name)
    for stack in bridge.schedule.core_stacks:
        for loops in (0, "last", [0, -1], slice(1, None)):
            hooks = skip_loop(bridge, loops, stack=stack)
            skipped = {p.index for p in bridge.schedule.passes_of(loops, stack)}
            close(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), by_hand(plain_model(bridge), skip=skipped))
    if bridge.looped_cfg.l_cycles is None:
        fewer = bridge.unroll(bridge.n_loops - 1)(TOKENS)
        for t in range(bridge.n_loops - 1):
            close(bridge.run_with_hooks(TOKENS, fwd_hooks=skip_loop(bridge, t)), fewer)


@FAMILIES
def test_a_skipped_layer_is_no_layer(name: str) -> None:
    bridge, model, stack = bridge_of(name), plain_model(bridge_of(name)), stack_of(name)
    skipped = {virtual(bridge, t, 1, stack) for t in (0, -1)}
    hooks = skip_layer(bridge, loops=[0, -1], layers=1, stack=stack)
    if bridge.schedule.n_prelude:
        hooks, skipped = hooks + skip_layer(bridge, layers=-1, stack="prelude"), {*skipped, bridge.schedule.n_prelude - 1}
    if bridge.schedule.n_coda:
        hooks, skipped = hooks + skip_layer(bridge, stack="coda"), {*skipped, *model._coda}
    wanted = by_hand(model, layer=lambda i, x, inputs: x if i in skipped else model.blocks[i](x, inputs))
    close(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), wanted)


@FAMILIES
def test_a_repeated_loop_runs_again_with_what_hooks_do_in_it(name: str) -> None:
    bridge = bridge_of(name)
    stack = bridge.schedule.core_stacks[-1]
    push = torch.randn(24, dtype=torch.float64)
    edits = steer(bridge, push, loops=[0, 1], decay=0.5, stack=stack) + skip_layer(bridge, loops=-1, layers=0, stack=stack)
    deeper, hooks = repeat_loop(bridge, 0, times=2, fwd_hooks=edits)
    assert deeper.n_loops == bridge.n_loops + 2
    assert deeper.original_model.embed.weight is bridge.original_model.embed.weight
    per_loop = len(bridge.schedule.passes) // bridge.n_loops
    order = [*range(per_loop)] * 2 + [*range(len(bridge.schedule.passes))]
    model, last = plain_model(bridge), virtual(bridge, -1, 0, stack)
    factor = {bridge.schedule.passes_of(t, stack)[0].index: 0.5**t for t in (0, 1)}
    wanted = by_hand(
        model,
        order=order,
        state=lambda k, s: s + push * factor.get(k, 0.0),
        layer=lambda i, x, inputs: x if i == last else model.blocks[i](x, inputs),
    )
    close(deeper.run_with_hooks(TOKENS, fwd_hooks=hooks), wanted)
    same, none = repeat_loop(bridge, -1)
    assert none == [] and torch.equal(same(TOKENS), bridge.unroll(bridge.n_loops + 1)(TOKENS))


def test_the_norm_of_a_repeated_last_loop_is_found() -> None:
    bridge = bridge_of("ouro")
    deeper, hooks = repeat_loop(bridge, -1, fwd_hooks=[("ln_final.hook_out", print), ("loops.1:.hook_out", print)])
    found = [name for name, _ in hooks]
    assert found == [f"loops.{t}.{h}" for t, h in ((2, "norm.hook_out"), (3, "norm.hook_out"))] + [
        f"loops.{t}.hook_out" for t in (1, 2, 3)
    ]
    assert deeper.expand_name(found[1]) == ["ln_final.hook_out"]


# Ablation.


@FAMILIES
def test_zero_ablation_is_a_layer_with_zeroed_output_weights(name: str) -> None:
    bridge, stack = bridge_of(name), stack_of(name)
    written = {"head": ["o"], "attn": ["o"], "neuron": ["down"], "mlp": ["down"], "layer": ["o", "down"]}
    for part, projections in written.items():
        model, units = plain_model(bridge), {"head": [2, 0], "neuron": [3, -1]}.get(part)
        for loop in (0, -1):
            block = model.blocks[virtual(bridge, loop, 1, stack)]
            for letter in projections:
                owner, width = (block.attn, 8) if letter == "o" else (block.mlp, 1)
                old = getattr(owner, letter)
                new = torch.nn.Linear(old.in_features, old.out_features, bias=False, dtype=torch.float64)
                new.weight.data = old.weight.data.clone()
                new.weight.data.unflatten(1, (-1, width))[:, units or slice(None)] = 0
                setattr(owner, letter, new)
        chosen = {} if units is None else {f"{part}s": units}
        hooks = ablate(bridge, part, loops=[0, -1], layers=1, stack=stack, **chosen)
        close(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), by_hand(model))


@FAMILIES
@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_ablation_writes_what_another_run_holds(name: str, mode: str) -> None:
    bridge, model, stack = bridge_of(name), plain_model(bridge_of(name)), stack_of(name)
    _, cache = bridge.run_with_cache(OTHER)
    i = virtual(bridge, 1, 0, stack)
    block = model.blocks[i]
    inner, outer = block.attn.o, block.ln2_post or block.mlp
    positions = torch.tensor([1, 2, 4])
    kept: list[Tensor] = []
    grab = [
        inner.register_forward_pre_hook(lambda module, args: kept.append(args[0])),
        outer.register_forward_hook(lambda module, args, out: kept.append(out)),
    ]
    by_hand(model, OTHER)
    for handle in grab:
        handle.remove()
    z, mlp = (t.mean((0, 1), keepdim=True).expand_as(t) if mode == "mean" else t for t in kept)

    def other_head(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[:, positions, 8:16] = z[:, positions, 8:16]
        return (x,)

    inner.register_forward_pre_hook(other_head)
    outer.register_forward_hook(lambda module, args, out: mlp)
    hooks = ablate(
        bridge, "head", loops=1, layers=0, heads=1, mode=mode, cache=cache, positions=positions.tolist(), stack=stack
    )
    hooks += ablate(bridge, "mlp", loops=1, layers=0, mode=mode, cache=cache, stack=stack)
    close(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), by_hand(model))


@FAMILIES
def test_resampling_from_the_same_run_changes_nothing(name: str) -> None:
    bridge, stack = bridge_of(name), stack_of(name)
    logits, cache = bridge.run_with_cache(TOKENS)
    for part in ("head", "neuron", "layer"):
        hooks = ablate(bridge, part, mode="resample", cache=cache, positions=slice(-3, None), stack=stack)
        assert torch.equal(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), logits)


def test_the_prelude_mlp_can_be_zeroed() -> None:
    bridge = bridge_of("huginn")
    hooks = ablate(bridge, "mlp", layers=1, stack="prelude", positions=0)
    assert [name for name, _ in hooks] == ["prelude.blocks.1.hook_mlp_out"]
    with bridge.hooks(fwd_hooks=hooks):
        _, cache = bridge.run_with_cache(TOKENS)
    _, before = bridge.run_with_cache(TOKENS)
    assert not cache["mlp_out", 1][:, 0].any()
    assert torch.equal(cache["mlp_out", 1][:, 1:], before["mlp_out", 1][:, 1:])


# Attention.


@FAMILIES
@pytest.mark.parametrize("heads", [None, [0, 2]])
def test_frozen_attention_is_the_earlier_pattern_times_the_new_values(name: str, heads: list[int] | None) -> None:
    bridge, model, stack = bridge_of(name, n_loops=4), plain_model(bridge_of(name, n_loops=4)), stack_of(name)
    hooks = freeze_attention(bridge, 1, heads=heads, stack=stack)
    patterns: dict[int, Tensor] = {}
    for p in model.cfg.schedule.passes_of("all", stack)[1:]:
        for j, i in enumerate(p.layers):
            attention = model.blocks[i].attn

            def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, j: int = j, loop: int = p.loop) -> Tensor:
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
                allowed = torch.ones(6, 6, dtype=torch.bool).tril() if mask is None else mask
                pattern = (q @ k.mT / 8**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
                patterns[j] = patterns[j] if loop > 1 else pattern
                pattern = pattern.clone()
                pattern[:, heads or slice(None)] = patterns[j][:, heads or slice(None)]
                return pattern @ v

            attention.mix = mix
    close(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), by_hand(model))
    assert freeze_attention(bridge, -1, stack=stack) == []
    assert len(freeze_attention(bridge, 1, layers=0, stack=stack)) == len(hooks) // bridge.looped_cfg.n_core


# The injection and the state.


@INJECTED
def test_injections_are_frozen_replaced_and_dropped(name: str) -> None:
    bridge, model, stack = bridge_of(name), plain_model(bridge_of(name)), stack_of(name)
    first, *later = [p.index for p in bridge.schedule.passes_of("all", stack)]
    logits, own = bridge.run_with_cache(TOKENS)
    _, other = bridge.run_with_cache(OTHER)
    prefix = "" if stack is None else "L."

    def run(hooks: list) -> Tensor:
        return bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)

    assert torch.equal(run(replace_injection(bridge, own, stack=stack)), logits)
    if stack is None:
        assert torch.equal(run(freeze_injection(bridge, 0)), logits)
        replaced = replace_injection(bridge, other, loops=0)
        wanted = by_hand(model, injection=lambda k, e: other["loops.0.hook_injection"])
        close(run(replaced + freeze_injection(bridge, 0)), wanted)
    at: dict[int, Tensor] = {}

    def frozen(k: int, e: Tensor) -> Tensor:
        at.setdefault(k, e)
        return at[first] if k in later else e

    close(run(freeze_injection(bridge, 0, stack=stack)), by_hand(model, injection=frozen))
    vector = torch.randn(24, dtype=torch.float64)
    mask = (torch.arange(6) < 4)[:, None]
    for source in (other, other[f"{prefix}loops.1.hook_injection"], vector):
        hooks = replace_injection(bridge, source, loops=slice(1, None), positions=slice(0, 4), stack=stack)

        def replaced_at(k: int, e: Tensor, source: Any = source) -> Tensor:
            if k not in later:
                return e
            loop = bridge.schedule.passes[k].loop
            new = source if isinstance(source, Tensor) else source[f"{prefix}loops.{loop}.hook_injection"]
            return torch.where(mask, new, e)

        close(run(hooks), by_hand(model, injection=replaced_at))
    close(run(drop_injection(bridge, loops="last", stack=stack)), by_hand(model, injection=lambda k, e: e * (k != later[-1])))


@FAMILIES
def test_the_initial_state_is_the_one_set(name: str) -> None:
    bridge, stack = bridge_of(name), stack_of(name)
    state = torch.randn(2, 6, 24, dtype=torch.float64)
    for asked in (state, "zero"):
        wanted = bridge(TOKENS, initial_state=asked)
        assert torch.equal(bridge.run_with_hooks(TOKENS, fwd_hooks=set_initial_state(bridge, asked, stack=stack)), wanted)
    hooks = set_initial_state(bridge, state[0, 0], positions=[2, -1], stack=stack)
    mask = torch.zeros(6, 1, dtype=torch.bool)
    mask[[2, 5]] = True
    entrance = plain_model(bridge).loop.entrance  # before the norm of a state, where there is one
    wanted = by_hand(
        plain_model(bridge), state=lambda k, s: torch.where(mask, state[0, 0], s) if k == 0 else s, state_at=entrance
    )
    close(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), wanted)


# Steering.


@FAMILIES
def test_steering_adds_the_direction(name: str) -> None:
    bridge, model, stack = bridge_of(name), plain_model(bridge_of(name)), stack_of(name)
    logits, direction = bridge(TOKENS), torch.randn(24, dtype=torch.float64)
    sites = ["state", "out", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
    for site in sites + (["injection"] if bridge.looped_cfg.injection != "none" else []):
        hooks = steer(bridge, direction, scale=0.0, site=site, relative_to_rms=site == "out", stack=stack)
        assert torch.equal(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), logits)
        moved = steer(bridge, direction, scale=0.5, loops="last", site=site, stack=stack)
        assert not torch.allclose(bridge.run_with_hooks(TOKENS, fwd_hooks=moved), logits)
    loops = {p.index: p.loop for p in bridge.schedule.passes_of(slice(1, None), stack)}
    mask = (torch.arange(6) >= 3)[:, None]

    def push(x: Tensor, loop: int) -> Tensor:
        size = 0.7 * 0.5 ** (loop - 1) * x.square().mean(-1, keepdim=True).sqrt()
        return x + mask * size * direction / direction.square().mean().sqrt()

    hooks = steer(
        bridge,
        direction,
        scale=0.7,
        loops=slice(1, None),
        positions=slice(3, None),
        decay=0.5,
        relative_to_rms=True,
        stack=stack,
    )
    close(
        bridge.run_with_hooks(TOKENS, fwd_hooks=hooks),
        by_hand(model, state=lambda k, s: push(s, loops[k]) if k in loops else s),
    )
    hooks = steer(bridge, direction, scale=-2.0, loops="last", site="resid_post", layers=0, stack=stack)
    steered = virtual(bridge, -1, 0, stack)
    wanted = by_hand(model, layer=lambda i, x, inputs: model.blocks[i](x, inputs) - 2 * direction * (i == steered))
    close(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), wanted)


def test_a_direction_can_be_learned_and_is_added_in_the_dtype_of_the_stream() -> None:
    bridge = bridge_of("ouro")
    direction = torch.zeros(24, dtype=torch.float64, requires_grad=True)
    loss = lambda d: bridge.run_with_hooks(TOKENS, fwd_hooks=steer(bridge, d, loops=1))[:, -1, 3].sum()  # noqa: E731
    (grad,) = torch.autograd.grad(loss(direction), direction)
    probe = torch.randn(24, dtype=torch.float64)
    step = (loss(1e-5 * probe) - loss(-1e-5 * probe)) / 2e-5
    torch.testing.assert_close(grad @ probe, step, rtol=1e-6, atol=1e-8)
    narrow = random_bridge("ouro", torch.bfloat16)
    hooks = steer(narrow, torch.randn(24), relative_to_rms=True) + drop_and_freeze(narrow)
    assert narrow.run_with_hooks(TOKENS, fwd_hooks=hooks).dtype == torch.bfloat16


def test_the_state_of_h_is_what_its_passes_and_those_of_l_before_it_get() -> None:
    bridge = random_bridge("hrm_text")
    zero = set_initial_state(bridge, "zero", stack="H")
    watched = [f"L.loops.{t}.hook_injection" for t in range(bridge.looped_cfg.l_cycles or 0)] + ["H.loops.0.hook_state"]
    with bridge.hooks(fwd_hooks=zero):
        _, cache = bridge.run_with_cache(TOKENS)
    assert all(not cache[name].any() for name in watched)
    later = f"L.loops.{bridge.looped_cfg.l_cycles}.hook_injection"
    assert cache[later].any() and torch.equal(cache[later], cache["H.loops.0.hook_out"])
