"""The norms."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import LoopedError
from ..running import is_observed
from .config import LoopedConfig
from .lean import Lean
from .slots import observe, same_bits


class RMSNorm(Lean):
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

    def frozen(self, x: Float[Tensor, "*rows width"], scale: Float[Tensor, "*shape one"]) -> Float[Tensor, "*both width"]:
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


class ConditionedNorm(RMSNorm):
    """`x / rms(x)` times a factor that comes from elsewhere, such as the loop; it passes through `hook_by`.

    Args:
        width: number of entries.
        eps: added to the mean square; None for the resolution of the dtype.
    """

    HELD: tuple[str, ...] = ("hook_scale", "hook_by")

    def __init__(self, width: int, eps: float | None):
        super().__init__(width, eps, weight=False)
        self.hook_by: nn.Module = nn.Identity()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "*shape width"], by: Float[Tensor, "*shape width"]
    ) -> Float[Tensor, "*shape width"]:
        """The norm of an input times a factor on every entry."""
        return super().forward(x) * observe(self.hook_by, by)

    def unhooked(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """Refused: outside a layer nothing says by what to multiply.

        Raises:
            LoopedError: always.
        """
        raise LoopedError(
            "use_split_qkv_input or use_attn_in was asked, which norm the inputs of every head apart, but the norms here "
            "also read what conditions the loop; patch attn.hook_q, hook_k and hook_v instead."
        )

    def frozen(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "*rows width"], scale: Float[Tensor, "*shape one"], by: Float[Tensor, "*shape width"]
    ) -> Float[Tensor, "*both width"]:
        """The norm with its scale and its factor held."""
        return x / scale * by


class Gain(Lean):
    """A factor, from elsewhere, on every entry of what a branch returned; it passes through `hook_gain`."""

    HELD: tuple[str, ...] = ("hook_gain",)

    def __init__(self) -> None:
        super().__init__()
        self.hook_in: nn.Module = nn.Identity()
        self.hook_gain: nn.Module = nn.Identity()
        self.hook_out: nn.Module = nn.Identity()

    def forward(self, x: Float[Tensor, "*shape width"], gain: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """The product."""
        return self.hook_out(observe(self.hook_in, x) * observe(self.hook_gain, gain))

    def frozen(self, x: Float[Tensor, "*rows width"], gain: Float[Tensor, "*shape width"]) -> Float[Tensor, "*both width"]:
        """The product with the gain of a run."""
        return x * gain


NORMS: dict[str, type[RMSNorm]] = {"rms": RMSNorm, "l2": L2Norm}


def norm_of(cfg: LoopedConfig, width: int = 0) -> RMSNorm:
    """A norm of the kind that a model has.

    Args:
        cfg: the structure.
        width: number of entries; 0 for that of the stream.
    """
    return NORMS[cfg.norm_kind](width or cfg.d_model, cfg.norm_eps, cfg.norm_weight)
