"""The forward of a model of the zoo, written out step by step, with the changes that interventions make."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from zoo import random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedBridge
from tl_looped.interventions import (
    ablate,
    freeze_attention,
    skip_layer,
)
from tl_looped.model import LoopedModel
from tl_looped.model.inputs import masks_of
from tl_looped.model.layers import Inputs

TOKENS, OTHER = random_tokens(2, 6), random_tokens(2, 6, seed=1)
GREEDY = {"do_sample": False, "stop_at_eos": False, "verbose": False}


def new_bridge(name: str, **changes: Any) -> LoopedBridge:
    return random_bridge(name, torch.float64, **changes)


def bridge_of(name: str, **changes: Any) -> LoopedBridge:
    """For tests that leave it as it is."""
    return _changed(name, **changes) if changes else shared_bridge(name, torch.float64)


_changed = cache(new_bridge)


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


def drop_and_freeze(bridge: LoopedBridge) -> list:
    return (
        ablate(bridge, "head", loops=0, layers=0, heads=0) + freeze_attention(bridge, 0) + skip_layer(bridge, loops=2, layers=0)
    )
