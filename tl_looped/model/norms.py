"""The norms."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import LoopedConfig
from .slots import is_observed, same_bits


class RMSNorm(nn.Module):
    """`x / rms(x)` in fp32, cast back, times a weight if there is one.

    Args:
        width: number of entries.
        eps: added to the mean square; None for the resolution of the dtype.
        weight: whether there is a weight.
    """

    HELD: tuple[str, ...] = ("hook_scale",)  # what `frozen` is given of a run

    def __init__(self, width: int, eps: float | None, weight: bool = True):
        super().__init__()
        self.eps = eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(width)) if weight else None
        self.hook_scale: nn.Module = nn.Identity()
        self.hook_normalized: nn.Module = nn.Identity()

    def forward(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        wide, power = self._power(x)
        inverse = torch.rsqrt(power)
        if is_observed(self.hook_scale):  # as with the attention pattern, only an edit changes the bits
            scale = self.hook_scale(power.sqrt())
            unedited = torch.equal(scale, power.sqrt())
            inverse = same_bits(inverse, scale.reciprocal()) if unedited else scale.reciprocal()
        normalized = self.hook_normalized((wide * inverse).to(x.dtype))
        return normalized if self.weight is None else self.weight * normalized

    def unhooked(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """The norm without its slots, for uses that are not the one occurrence a hook name stands for."""
        wide, power = self._power(x)
        normalized = (wide * torch.rsqrt(power)).to(x.dtype)
        return normalized if self.weight is None else self.weight * normalized

    def frozen(self, x: Float[Tensor, "*rows width"], scale: Float[Tensor, "*shape one"]) -> Float[Tensor, "*rows width"]:
        """The norm with its scale held, a linear map.

        Args:
            x: what is normed; it may have more axes in front than the scale.
            scale: what `hook_scale` was in a run.
        """
        x = x / scale
        return x if self.weight is None else x * self.weight.detach().to(x.device, x.dtype)

    def inner(self, x: Float[Tensor, "*rows width"], y: Float[Tensor, "*others width"]) -> Float[Tensor, "... 1"]:
        """The product of two vectors whose square root is the size that the norm divides by."""
        return (x * y).mean(-1, keepdim=True)

    def _power(self, x: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return wide, self.inner(wide, wide) + eps


class L2Norm(RMSNorm):
    """`x / |x|`, the same with the sum of squares."""

    def inner(self, x: Float[Tensor, "*rows width"], y: Float[Tensor, "*others width"]) -> Float[Tensor, "... 1"]:
        """Their sum of products."""
        return (x * y).sum(-1, keepdim=True)


NORMS: dict[str, type[RMSNorm]] = {"rms": RMSNorm, "l2": L2Norm}


def norm_of(cfg: LoopedConfig, width: int = 0) -> RMSNorm:
    """A norm of the kind that a model has.

    Args:
        cfg: the structure.
        width: number of entries; 0 for that of the stream.
    """
    return NORMS[cfg.norm_kind](width or cfg.d_model, cfg.norm_eps, cfg.norm_weight)
