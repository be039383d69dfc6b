"""Looped models whose states are known in closed form."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from peak_memory import PeakMemory
from zoo import SMALL, random_bridge

from tl_looped import LoopedBridge, LoopedConfig

D = SMALL["d_model"]


def linear_loop(
    state: torch.Tensor, injection: torch.Tensor | None = None, n_loops: int = 4, n_core: int = 1, **changes: Any
) -> LoopedBridge:
    """Every pass maps its state `x` to `state @ x + injection @ e`, `e` the embedding; the layers write nothing."""
    cfg = LoopedConfig(**SMALL, n_core=n_core, n_loops=n_loops, injection="concat", initial_state="noise", **changes)
    bridge = LoopedBridge.from_config(cfg)
    injection = torch.zeros(D, D) if injection is None else injection
    for name, parameter in bridge.original_model.canonical_parameters().items():
        if name == "inject.weight":
            parameter.data = torch.cat((state, injection), 1)
        elif name.endswith(("attn.o.weight", "mlp.down.weight")):
            parameter.data.zero_()
        elif name == "embed.weight":
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return bridge.to(torch.float64)


def rotation(angle: float) -> torch.Tensor:
    """A rotation of every pair of neighbouring directions by the same angle."""
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return torch.block_diag(*[turn] * (D // 2))


@cache
def model(name: str, n_loops: int = 4) -> LoopedBridge:
    """A model of the zoo in fp64; whoever hooks it takes the hooks off."""
    return random_bridge(name, torch.float64, n_loops=n_loops)


@cache
def deep_loop() -> LoopedBridge:
    """A model of 128 loops, made once."""
    return random_bridge("retrofit_llama", n_core=1, n_coda=1, n_loops=128)


def one_loop_bytes(tokens: torch.Tensor, patterns: bool = False) -> int:
    """The most bytes of tensors that a run of one loop of `deep_loop()` needs when nothing is kept.

    Args:
        tokens: what it runs on.
        patterns: whether attention patterns are looked at, which fused attention does not make.
    """
    one = deep_loop().unroll(1)
    hooks = [("loops.*.blocks.*.attn.hook_pattern", lambda value, hook: None)] if patterns else []
    with PeakMemory(one) as peak, torch.no_grad():
        one.run_with_hooks(tokens, fwd_hooks=hooks)
    return peak.nbytes
