"""Interventions, each against the plain model run by hand with the same change."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from helpers import plain_model
from torch import Tensor
from torch.nn.functional import softplus
from transformers import DynamicCache
from zoo import FAMILIES, ZOO, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError, exits
from tl_looped.interventions import (
    SharedKeyValues,
    ablate,
    drop_injection,
    freeze_attention,
    freeze_injection,
    repeat_loop,
    replace_injection,
    set_initial_state,
    share_kv,
    skip_layer,
    skip_loop,
    steer,
)
from tl_looped.model import LoopedModel
from tl_looped.model.inputs import masks_of
from tl_looped.model.layers import Inputs

INJECTED = pytest.mark.parametrize("name", [n for n, cfg in sorted(ZOO.items()) if cfg.injection != "none"])
TOKENS, OTHER = random_tokens(2, 6), random_tokens(2, 6, seed=1)
GREEDY = {"do_sample": False, "stop_at_eos": False, "verbose": False}


def new_bridge(name: str, **changes: Any) -> LoopedBridge:
    return random_bridge(name, torch.float64, **changes)


bridge_of = cache(new_bridge)  # for tests that leave it as it is


def stack_of(name: str) -> str | None:
    return "L" if name == "hrm_text" else None


def unchanged(_: int, x: Tensor) -> Tensor:
    return x


def l2(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def by_hand(
    model: LoopedModel,
    tokens: Tensor = TOKENS,
    skip: set[int] = frozenset(),
    state: Callable[[int, Tensor], Tensor] = unchanged,
    injection: Callable[[int, Tensor], Tensor] = unchanged,
    layer: Callable[[int, Tensor, Inputs], Tensor] | None = None,
    order: list[int] | None = None,
    state_at: str = "hook_state",
) -> Tensor:
    """Logits, step by step; passes (by index in the run) are left out or run in another order, what enters them is changed."""
    cfg, schedule = model.cfg, model.cfg.schedule
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    x = model.embed(tokens)
    inputs = Inputs(model.rotary(positions), masks_of(model.cfg, x, None, None, 0), model._value_embeds(tokens))
    run = layer or (lambda i, x, inputs: model.blocks[i](x, inputs))
    for i in range(schedule.n_prelude):
        x = run(i, x, inputs)
    embed = x if model.prelude_norm is None else model.prelude_norm(x)
    if cfg.l_cycles is not None:
        states = {"L": model.learned_state.expand_as(x), "H": x}
    elif cfg.initial_state == "noise":
        states = {"core": model.noise(0, positions).to(x.dtype)}
    else:
        states = {"core": x if cfg.entry_norm else embed}
    anchor = None
    for k in range(len(schedule.passes)) if order is None else order:
        p, ends = schedule.passes[k], model.passes[k]
        s = states[p.stack]
        if cfg.entry_norm:
            s = l2(state(k, s) if state_at == "entry_norm.hook_in" else s)
        s = x = state(k, s) if state_at == "hook_state" else s
        if cfg.injection != "none":
            other = injection(k, embed if cfg.l_cycles is None else states[{"L": "H", "H": "L"}[p.stack]])
            x = s + other if cfg.injection == "add" else ends.inject(s, other)
        for i in p.layers:
            x = run(i, x, inputs)
        anchor = x if anchor is None else anchor
        if cfg.loop == "gated":
            delta = softplus(ends.gate.up(ends.gate.down(x - s)))
            alpha = torch.exp(-delta * ends.gate.A_log.exp())
            x = alpha * x + (1 - alpha) * s
        elif cfg.strategy == "anchored":
            x = s + (x - s) / cfg.anchor_steps
        elif cfg.pass_norm:
            x = (model.ln_final if cfg.pass_norm_is_final and p is schedule.passes[-1] else ends.norm)(x)
        states[p.stack] = states[p.stack] if k in skip else x
    x = states[schedule.core_stacks[-1]]
    if cfg.strategy == "anchored":
        x = cfg.beta * anchor + (1 - cfg.beta) * x
    x = x if model.after_loop is None else model.after_loop(x)
    for i in range(schedule.first_coda_layer, schedule.n_layers):
        x = run(i, x, inputs)
    return model._logits(x)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)  # fp64, sums of some tens of terms in another order


def virtual(bridge: LoopedBridge, loop: int, layer: int, stack: str | None) -> int:
    return bridge.schedule.passes_of(loop, stack)[0].layers[layer]


def write_text(bridge: LoopedBridge, hooks: list, tokens: Tensor = TOKENS, new: int = 4, **kwargs: Any) -> tuple:
    with bridge.hooks(fwd_hooks=hooks):
        out = bridge.generate(tokens, new, output_logits=True, **GREEDY, **kwargs)
    return out.sequences, torch.stack(out.logits, dim=1)


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


def drop_and_freeze(bridge: LoopedBridge) -> list:
    return (
        ablate(bridge, "head", loops=0, layers=0, heads=0) + freeze_attention(bridge, 0) + skip_layer(bridge, loops=2, layers=0)
    )


# All of them: generation, gradients, repetition, exceptions.


def every(bridge: LoopedBridge, name: str) -> tuple[list, list]:
    """Two lists of interventions that act at the same time, all of them together."""
    stack = stack_of(name)
    _, other = bridge.run_with_cache(OTHER)
    vector = torch.randn(24, dtype=torch.float64)
    one = [
        *steer(bridge, vector, positions=[0, 3], stack=stack),
        *ablate(bridge, "head", loops=1, layers=0, heads=1, stack=stack),
        *freeze_attention(bridge, 0, stack=stack),
        *steer(bridge, vector, scale=0.3, site="resid_mid", positions=slice(6, None), relative_to_rms=True, stack=stack),
        *ablate(bridge, "layer", loops="last", layers=1, mode="mean", cache=other, stack=stack),
        *skip_layer(bridge, loops=[0, -1], layers=0, stack=stack),
    ]
    two = [
        *set_initial_state(bridge, "zero", positions=slice(3, None), stack=stack),
        *ablate(bridge, "attn", loops=0, layers=1, mode="resample", cache=other, positions=slice(0, 6), stack=stack),
        *skip_loop(bridge, 1, stack=stack),
        *ablate(bridge, "neuron", loops=0, layers=0, neurons=[1, 5, 7], stack=stack),
    ]
    if bridge.looped_cfg.injection != "none":
        one += drop_injection(bridge, loops="last", stack=stack)
        two += replace_injection(bridge, other, loops=0, positions=slice(0, 6), stack=stack) + freeze_injection(
            bridge, 0, stack=stack
        )
    return one, two


@FAMILIES
def test_text_is_the_same_with_and_without_cache_and_twice(name: str) -> None:
    bridge = bridge_of(name)
    plain_text, plain_logits = write_text(bridge, [], new=3)
    for hooks in every(bridge, name):
        tokens, logits = write_text(bridge, hooks, new=3)
        again, uncached = write_text(bridge, hooks, new=3, use_past_kv_cache=False)
        assert torch.equal(tokens, again) and not torch.allclose(logits, plain_logits)
        close(logits, uncached)
        whole = bridge.run_with_hooks(tokens[:, :-1], fwd_hooks=hooks)
        close(logits, whole[:, -3:])
        assert torch.equal(write_text(bridge, hooks, new=3)[1], logits)
    later = steer(bridge, torch.ones(24, dtype=torch.float64), positions=[7], stack=stack_of(name))
    _, logits = write_text(bridge, later, new=3)
    assert torch.equal(logits[:, :2], plain_logits[:, :2]) and not torch.allclose(logits[:, 2], plain_logits[:, 2])
    assert torch.equal(write_text(bridge, [], new=3)[0], plain_text)


class OneThenAll:
    """Leave after the first loop at every other step: positions then lack loops, and are caught up."""

    steps = 0

    def __call__(self, history: exits.LoopHistory) -> Tensor:
        self.steps += history.loop == 0
        return torch.full(history.states[-1].shape[:1], bool(self.steps % 2))


@pytest.mark.parametrize("name", ["huginn", "hrm_text", "anchored"])
def test_an_exit_policy_is_followed_or_refused(name: str) -> None:
    bridge = new_bridge(name)
    for hooks in every(bridge, name):
        bridge.exit_policy = None
        _, logits = write_text(bridge, hooks, new=3)
        bridge.exit_policy = exits.StateChange(0.0)  # every loop: positions never lack one
        close(write_text(bridge, hooks, new=3)[1], logits)
    stack, vector = bridge.schedule.core_stacks[-1], torch.randn(24, dtype=torch.float64)
    per_pass = steer(bridge, vector, positions=1, stack=stack) + steer(bridge, -vector, positions=slice(6, 8), stack=stack)
    per_pass += skip_layer(bridge, loops=0, layers=0, stack=stack)
    bridge.exit_policy = OneThenAll()
    tokens, logits = write_text(bridge, per_pass)
    bridge.exit_policy = OneThenAll()
    with bridge.hooks(fwd_hooks=per_pass):
        for step in range(4):
            loop = 0 if step % 2 == 0 else bridge.n_loops - 1
            close(logits[:, step], bridge.readout(tokens[:, : 6 + step], loop=loop)[:, -1])
    with pytest.raises(LoopedError, match="did not compute for the same positions"):
        write_text(bridge, freeze_attention(bridge, 0, stack=stack))


@FAMILIES
def test_gradients_pass_through(name: str) -> None:
    bridge, token = new_bridge(name), int(TOKENS[0, -1])
    weight = bridge.original_model.embed.weight
    for hooks in every(bridge, name):
        out = bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)[:, -1].square().sum()
        (grad,) = torch.autograd.grad(out, weight)
        ends = []
        with torch.no_grad():
            for sign in (1, -2):
                weight[token, 5] += sign * 1e-6
                ends.append(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)[:, -1].square().sum())
            weight[token, 5] += 1e-6
        torch.testing.assert_close(grad[token, 5], (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-4)


@FAMILIES
def test_nothing_is_left_behind_after_an_exception(name: str) -> None:
    bridge = bridge_of(name)
    logits = bridge(TOKENS)
    hooks = [hook for group in every(bridge, name) for hook in group]
    last = bridge.schedule.pass_prefix(bridge.schedule.passes[-1])

    def fail(x: Tensor, hook: Any) -> None:
        raise RuntimeError("in a hook")

    with pytest.raises(RuntimeError, match="in a hook"):
        bridge.run_with_hooks(
            TOKENS, fwd_hooks=[*freeze_attention(bridge, 0, stack=stack_of(name)), (f"{last}.hook_out", fail)]
        )
    with pytest.raises(LoopedError), bridge.hooks(fwd_hooks=[*hooks, *ablate_wrong(bridge, name)]):
        bridge(TOKENS)
    assert not bridge.list_hooks() and torch.equal(bridge(TOKENS), logits)


def ablate_wrong(bridge: LoopedBridge, name: str) -> list:
    _, short = bridge.run_with_cache(OTHER[:, :4])
    return ablate(bridge, "mlp", loops="last", mode="resample", cache=short, stack=stack_of(name))


# Shared keys and values.


def shared_by_hand(bridge: LoopedBridge, policy: str | int, tokens: Tensor, new: int) -> Tensor:
    """Greedy logits: before every step, the cache of an ordinary run is overwritten with what the loops share."""
    schedule = bridge.schedule
    logits, cache = bridge(tokens, return_type="logits_and_cache", use_cache=True)
    own = [(layer.keys, layer.values) for layer in cache.layers]
    found = [logits[:, -1]]
    for _ in range(new - 1):
        filled = DynamicCache()
        for i, (stack, loop, layer) in enumerate(schedule.sites):
            n = 1 if loop is None else schedule.n_loops_of(stack)
            same = [i] if loop is None else [p.layers[layer] for p in schedule.passes_of("all", stack)]
            if loop is None or policy == "mean":
                chosen = same
            elif policy in ("first", "last"):
                chosen = [same[0 if policy == "first" else -1]]
            else:
                chosen = [same[max(t for t in range(n) if t % policy == loop % policy)]]
            filled.update(*(torch.stack([own[c][side] for c in chosen]).mean(0) for side in (0, 1)), i)
        logits, cache = bridge(found[-1].argmax(-1)[:, None], return_type="logits_and_cache", past_key_values=filled)
        new_ones = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers]
        own = [tuple(torch.cat(pair, 2) for pair in zip(a, b, strict=True)) for a, b in zip(own, new_ones, strict=True)]
        found.append(logits[:, -1])
    return torch.stack(found, dim=1)


@FAMILIES
def test_shared_keys_are_those_of_the_policy(name: str) -> None:
    bridge = bridge_of(name, n_loops=2 if name == "hrm_text" else 5)
    plain_logits = write_text(bridge, [], new=3)[1]
    for policy in ("first", "last", "mean", 2) if name in ("huginn", "hrm_text") else ("mean", 2):
        _, logits = write_text(bridge, share_kv(bridge, policy), new=3)
        close(logits, shared_by_hand(bridge, policy, TOKENS, 3))
        assert torch.equal(logits[:, 0], plain_logits[:, 0]) and not torch.allclose(logits, plain_logits)


def test_one_set_is_the_last_and_enough_sets_share_nothing() -> None:
    bridge = bridge_of("huginn")
    one, last, all_loops = (write_text(bridge, share_kv(bridge, policy))[1] for policy in (1, "last", 3))
    assert torch.equal(one, last) and torch.equal(all_loops, write_text(bridge, [])[1])


def test_shared_keys_take_the_memory_they_say() -> None:
    bridge = bridge_of("huginn", n_loops=8)
    for policy, sets in (("mean", 2 + 3 + 1), (4, 2 + 4 * 3 + 1)):
        with bridge.hooks(fwd_hooks=share_kv(bridge, policy)):
            _, cache = bridge(TOKENS, return_type="logits_and_cache", use_cache=True)
        assert isinstance(cache, SharedKeyValues) and cache.n_sets == sets == len(cache._kept) and not cache._new
        assert all(t.shape == (2, 3, 6, 8) for pair in cache._kept.values() for t in pair)
    assert SharedKeyValues(bridge_of("hrm_text").schedule, "last").n_sets == 4


def test_padded_rows_share_like_rows_alone() -> None:
    bridge = bridge_of("retrofit_llama")
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), TOKENS[:1, :4]], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    _, logits = write_text(bridge, share_kv(bridge, "mean"), torch.cat([padded, TOKENS[1:]]), attention_mask=mask)
    close(logits[0], write_text(bridge, share_kv(bridge, "mean"), TOKENS[:1, :4])[1][0])


# What is refused.


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_meant_is_refused() -> None:
    ouro, huginn, hrm = (new_bridge(name) for name in ("ouro", "huginn", "hrm_text"))
    _, cache = huginn.run_with_cache(OTHER, names_filter=["loops.*.hook_injection", "loops.0.blocks.*.hook_mlp_out"])
    direction = torch.ones(24)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("loop 3 is out of range: there are 3 loops", lambda: skip_loop(ouro, 3)),
        ("loop 5 is out of range", lambda: steer(ouro, direction, loops=[0, 5])),
        ("selects nothing", lambda: ablate(ouro, "mlp", loops=slice(3, None))),
        ("from_loop=slice", lambda: freeze_attention(ouro, slice(1, None))),
        ("loop 4 is out of range", lambda: freeze_attention(ouro, 4)),
        ("pass stack='L' or stack='H'", lambda: skip_loop(hrm, 0)),
        ("runs once", lambda: skip_layer(huginn, loops=0, layers=0, stack="prelude")),
        (r"layers 7 is out of range: there are 3 layers \(0\.\.2\)", lambda: skip_layer(huginn, loops=0, layers=7)),
        ("selects nothing: there are 0 layers", lambda: ablate(ouro, "mlp", stack="coda")),
        ("heads 3 is out of range", lambda: ablate(ouro, "head", heads=3)),
        ("heads are those of", lambda: ablate(ouro, "mlp", heads=3)),
        ("neurons are those of", lambda: ablate(ouro, "head", neurons=3)),
        ("choose part from", lambda: ablate(ouro, "heads")),
        ("needs cache=", lambda: ablate(ouro, "mlp", mode="mean")),
        ("needs no cache=", lambda: ablate(huginn, "mlp", cache=cache)),
        ("was not cached in this run", lambda: ablate(huginn, "mlp", mode="mean", cache=cache)),
        ("with its batch dimension", lambda: ablate(huginn, "mlp", mode="mean", cache=dict(cache.items()))),
        ("in this ouro model nothing is injected in the passes", lambda: freeze_injection(ouro, 0)),
        ("in this ouro model nothing is injected in the passes", lambda: drop_injection(ouro)),
        ("in this ouro model nothing is injected in the passes", lambda: steer(ouro, direction, site="injection")),
        (r"source of shape \(2, 6, 23\)", lambda: replace_injection(huginn, torch.ones(2, 6, 23))),
        (r"state of shape \(23,\)", lambda: set_initial_state(huginn, torch.ones(23))),
        ("state=3 was given", lambda: set_initial_state(huginn, 3)),
        (r"direction of shape \(25,\)", lambda: steer(ouro, torch.ones(25))),
        ("direction has norm nan", lambda: steer(ouro, direction * torch.nan)),
        ("relative_to_rms=True not zero", lambda: steer(ouro, direction * 0, relative_to_rms=True)),
        ("scale='much'", lambda: steer(ouro, direction, scale="much")),
        ("belongs to a pass", lambda: steer(ouro, direction, layers=0)),
        ("site='resid' was asked", lambda: steer(ouro, direction, site="resid")),
        ("times=0", lambda: repeat_loop(ouro, 0, times=0)),
        ("a function of names", lambda: repeat_loop(ouro, 0, fwd_hooks=[(lambda n: True, print)])),
        ("policy='median'", lambda: share_kv(ouro, "median")),
        ("policy=0", lambda: share_kv(ouro, 0)),
    ]
    for message, call in cases:
        with pytest.raises(LoopedError, match=message):
            call()
    ouro.exit_policy = exits.KL()
    with pytest.raises(LoopedError, match="under an exit policy"):
        share_kv(ouro, "last")
    ouro.exit_policy = None
    ouro.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(LoopedError, match="given its weight to the unembedding"):
        skip_loop(ouro, "last")
    assert skip_loop(ouro, 0) and skip_loop(hrm, "last", stack="H")


def test_what_does_not_fit_the_run_is_refused() -> None:
    huginn = new_bridge("huginn")
    _, cache = huginn.run_with_cache(OTHER[:, :5])
    resample = lambda **kwargs: ablate(huginn, "mlp", loops=0, mode="resample", cache=cache, **kwargs)  # noqa: E731
    direction = torch.ones(24)

    def run(hooks: list, tokens: Tensor = TOKENS) -> Tensor:
        return huginn.run_with_hooks(tokens, fwd_hooks=hooks)

    for hooks in (resample(), resample(positions=[5]), replace_injection(huginn, cache)):
        with pytest.raises(LoopedError, match=r"\(2, 5, 24\) is to be written to .*\(2, 6, 24\)"):
            run(hooks)
    with pytest.raises(LoopedError, match="the same batch"):
        run(resample(), OTHER[:1, :5])
    assert torch.equal(run(resample(), OTHER[:, :5]), huginn(OTHER[:, :5]))
    with pytest.raises(LoopedError, match="the text of this run has 6"):
        run(steer(huginn, direction, positions=6))
    with pytest.raises(LoopedError, match="a text that grows"):
        write_text(huginn, steer(huginn, direction, positions=-1))
    with pytest.raises(LoopedError, match="is to be written to"):
        write_text(huginn, resample(), OTHER[:, :5])
    with pytest.raises(LoopedError, match="use_past_kv_cache=True"):
        write_text(huginn, share_kv(huginn, "last"), use_past_kv_cache=False)
    with pytest.raises(LoopedError, match="use_past_kv_cache=True"):
        run(share_kv(huginn, "last"))
    _, kept = huginn(TOKENS, return_type="logits_and_cache", use_cache=True)
    with huginn.hooks(fwd_hooks=share_kv(huginn, "last")), pytest.raises(LoopedError, match="another cache holds"):
        huginn(TOKENS[:, :1], past_key_values=kept)
    with huginn.hooks(fwd_hooks=share_kv(huginn, "last")):
        _, kept = huginn(TOKENS, return_type="logits_and_cache", use_cache=True, loop=0)
        with pytest.raises(LoopedError, match="did not run all loops"):
            huginn(TOKENS[:, :1], past_key_values=kept)
    hooks = share_kv(huginn, "last")
    huginn.exit_policy = exits.StateChange(0.1)
    with pytest.raises(LoopedError, match="exit_policy = None"):
        write_text(huginn, hooks)
    middle = huginn.schedule.passes[1].first + 1
    _, cache = huginn.run_with_cache(TOKENS)
    with huginn.hooks(fwd_hooks=skip_loop(huginn, 1)), pytest.raises(LoopedError, match="start_at_layer"):
        huginn(cache["resid_pre", middle], start_at_layer=middle, injection=cache["loops.1.hook_injection"])


def test_the_state_of_h_is_what_its_passes_and_those_of_l_before_it_get() -> None:
    bridge = random_bridge("hrm_text")
    zero = set_initial_state(bridge, "zero", stack="H")
    watched = [f"L.loops.{t}.hook_injection" for t in range(bridge.looped_cfg.l_cycles or 0)] + ["H.loops.0.hook_state"]
    with bridge.hooks(fwd_hooks=zero):
        _, cache = bridge.run_with_cache(TOKENS)
    assert all(not cache[name].any() for name in watched)
    later = f"L.loops.{bridge.looped_cfg.l_cycles}.hook_injection"
    assert cache[later].any() and torch.equal(cache[later], cache["H.loops.0.hook_out"])
