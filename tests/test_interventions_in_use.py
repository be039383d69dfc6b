"""Interventions where text is written, gradients are taken, calls fail, or what was asked cannot be meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interventions_by_hand import OTHER, TOKENS, bridge_of, close, new_bridge, stack_of, write_text
from torch import Tensor
from zoo import FAMILIES, FEW, slow_but

from tl_looped import LoopedBridge, LoopedError, exits
from tl_looped.interventions import (
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


@pytest.mark.parametrize("name", slow_but(FEW))
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
