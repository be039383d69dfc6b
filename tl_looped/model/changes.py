"""What the modules on the way of the residual stream make of changes of their inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .frozen import apply_module
from .jvp import jvp
from .norms import RMSNorm


class NormAt:
    """A norm where it stands in a run, and what it makes of changes of its input.

    Args:
        norm: the norm; None for none.
        x: its input in the run, [..., d_model], in fp32 or wider.
        dtype: that of the run, on which an epsilon may depend.
        weight: what the norm multiplies by; None for its weight.
    """

    def __init__(self, norm: Any, x: Tensor, dtype: torch.dtype, weight: Tensor | None = None):
        self.norm: Any = getattr(norm, "_original_component", norm)
        self.x: Tensor = x
        self.out: Tensor = x
        if norm is not None:
            self.eps: float = torch.finfo(dtype).eps if self.norm.eps is None else self.norm.eps
            weight = norm.weight if weight is None else weight
            self.weight: Any = 1.0 if weight is None else weight.detach().to(x.device, x.dtype)
            self.inverse: Tensor = self._inverse(x)
            self.unit: Tensor = x * self.inverse
            self.out = self.unit * self.weight

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.rsqrt(self.norm.inner(x, x) + self.eps)

    def exactly(self, change: Float[Tensor, "*row batch pos d_model"]) -> Float[Tensor, "*row batch pos d_model"]:
        """The change of the output, its scale computed anew."""
        if self.norm is None:
            return change
        moved = self.x + change
        return moved * self._inverse(moved) * self.weight - self.out

    def to_first_order(self, change: Float[Tensor, "*row batch pos d_model"]) -> Float[Tensor, "*row batch pos d_model"]:
        """The change of the output for a small change of the input: the part along the input is lost."""
        return change if self.norm is None else self._across(change) * self.weight

    def pull_back(self, gradient: Float[Tensor, "*row batch pos d_model"]) -> Float[Tensor, "*row batch pos d_model"]:
        """The gradient by the input, from that by the output."""
        return gradient if self.norm is None else self._across(gradient * self.weight)

    def _across(self, x: Tensor) -> Tensor:
        return (x - self.unit * self.norm.inner(self.unit, x)) * self.inverse


def changes_after(module: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, to_first_order: bool) -> Tensor:
    """Changes after a module, and in the last row what the run has after it.

    Args:
        module: the module, or a component around it.
        inputs: changes of its inputs, and in the last row what they are in the run, [row, batch, pos, d_model].
        dtype: that of the run, on which an epsilon may depend.
        to_first_order: take the changes for small.
    """
    plain: Any = getattr(module, "_original_component", module)
    if not hasattr(plain, "frozen"):
        return apply_module(plain, *inputs)
    changes, of_run = tuple(x[:-1] for x in inputs), tuple(x[-1] for x in inputs)
    if isinstance(plain, RMSNorm):
        at = NormAt(plain, of_run[0], dtype)
        changed = at.to_first_order(changes[0]) if to_first_order else at.exactly(changes[0])
        return torch.cat((changed, at.out[None]))
    at_run = apply_module(plain, *of_run)
    if to_first_order:
        each = [jvp(partial(apply_module, plain), of_run, some) for some in zip(*changes, strict=True)]
        return torch.stack([*each, at_run])
    moved = apply_module(plain, *(x + change for x, change in zip(of_run, changes, strict=True)))
    return torch.cat((moved - at_run, at_run[None]))
