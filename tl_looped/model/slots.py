"""Slots for hooks: they let values through, and looking at a value never changes the bits of a result."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..running import is_observed


def observe(slot: nn.Module, x: Tensor) -> Tensor:
    """Pass `x` through a slot. A hook gets a tensor of its own: edited in place, it must not change what others read."""
    return slot(x.clone() if is_observed(slot) else x)


class _ValueWithGradientOf(torch.autograd.Function):
    """The bits of `value`, with the gradient of `graph`, which is the same number computed in another order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, graph: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[1]


def same_bits(value: Tensor, graph: Tensor) -> Tensor:
    """`value`, through which gradients reach what hooks saw on the way to `graph`."""
    return cast(Tensor, _ValueWithGradientOf.apply(value.detach(), graph)) if graph.requires_grad else value
