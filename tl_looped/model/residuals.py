"""How what a branch returns gets into the residual stream."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import LoopedConfig
from .lean import Lean


class Add:
    """The sum of the two."""

    def __call__(
        self, x: Float[Tensor, "*rows d_model"], read: Float[Tensor, "*rows d_model"], out: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """The stream after a branch.

        Args:
            x: the stream before it.
            read: what the branch read of it: the stream after the norm, where there is one.
            out: what the branch returned, after the norm on its output.
        """
        return x + out


class Interpolate(Lean):
    """A step from what the branch read towards what it returned, at a rate of its own in every entry (nGPT, Dory).

    Args:
        width: that of the stream.
    """

    def __init__(self, width: int):
        super().__init__()
        self.rate: nn.Parameter = nn.Parameter(torch.ones(width))

    def forward(
        self, x: Float[Tensor, "*rows d_model"], read: Float[Tensor, "*rows d_model"], out: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        return read + self.rate * (out - read)

    def kept(self, read: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What stays of the stream that the branch read, where attribution follows it."""
        return (1 - self.rate.detach().to(read.device, read.dtype)) * read

    def added(self, out: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What is added of that which the branch returned."""
        return self.rate.detach().to(out.device, out.dtype) * out


def residual_write(cfg: LoopedConfig) -> Add | Interpolate:
    """The write of one branch of a model.

    Args:
        cfg: the structure.
    """
    return Interpolate(cfg.d_model) if cfg.residual == "interpolate" else Add()
