"""Short causal convolutions over positions, every channel by itself, which keep what they read beside the keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .depth_mix import wide
from .layers import Inputs
from .lean import Lean
from .slots import observe


class ShortConv(Lean):
    """`(sum of taps * earlier inputs + input) / sqrt(taps + 1)`; padding and what lies before the text count as zeros.

    Args:
        width: number of channels.
        taps: how many positions it reads, its own included.
    """

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.taps: int = taps
        self.slot: int = -1  # of a key-value cache, for the inputs of earlier calls
        self.weight: nn.Parameter = self._weight(width)
        self.hook_in: nn.Module = nn.Identity()
        self.hook_out: nn.Module = nn.Identity()

    def _weight(self, width: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(width, 1, self.taps))

    def forward(self, x: Float[Tensor, "batch pos width"], inputs: Inputs, *beside: Tensor) -> Float[Tensor, "batch pos width"]:
        """The convolution, in fp32 and cast back."""
        x = observe(self.hook_in, x)
        return self.hook_out(self._summed(wide(x), self.lagged(x, inputs), *beside).to(x.dtype))

    def lagged(self, x: Float[Tensor, "batch pos *width"], inputs: Inputs) -> Float[Tensor, "lag batch pos *width"]:
        """What it reads, by how many positions ago.

        Args:
            x: its input at the positions of this run.
            inputs: what the layer reads beside the stream.
        """
        n_new, past = x.shape[1], inputs.past
        if inputs.real is not None:
            real = inputs.real[:, past : past + n_new].repeat(len(x) // len(inputs.real), 1)
            x = x * real.view(*real.shape, *[1] * (x.ndim - 2)).to(x.device, x.dtype)
        if inputs.cache is not None:
            x = inputs.cache.update(x[:, None], x[:, None, :, :0], self.slot)[0][:, 0]
        return shifted(wide(x), self.taps, n_new)

    def _summed(self, x: Tensor, lagged: Tensor, *beside: Tensor) -> Tensor:
        return sum((tap * before for tap, before in zip(self.by_lag(), lagged, strict=True)), x) * (self.taps + 1) ** -0.5

    def by_lag(self) -> Float[Tensor, "lag width"]:
        """The taps by how many positions ago they read; the stored ones end with the current position."""
        return wide(self.weight)[:, 0].mT.flip(0)


class DynamicConv(ShortConv):
    """The same, with taps of which a part is computed from what the layer reads, one for each lag and group of channels.

    Args:
        width: number of channels.
        taps: how many positions it reads, its own included.
        n_groups: how many groups of channels there are.
        d_model: width of what the taps are computed from.
    """

    def __init__(self, width: int, taps: int, n_groups: int, d_model: int):
        super().__init__(width, taps)
        self.n_groups: int = n_groups
        self.tap: nn.Linear = nn.Linear(d_model, n_groups * taps, bias=False)

    def _weight(self, width: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(self.taps, width))

    def _summed(self, x: Tensor, lagged: Tensor, *beside: Tensor) -> Tensor:
        computed = wide(self.tap(beside[0])).unflatten(-1, (self.n_groups, self.taps))  # [batch, pos, group, lag]
        for lag, before in enumerate(lagged):
            more = computed[..., lag].repeat_interleave(x.shape[-1] // self.n_groups, dim=-1)
            x = x + (wide(self.weight[lag]) + more) * before
        return x * (2 * self.taps + 1) ** -0.5


def shifted(x: Float[Tensor, "batch key *width"], n_lags: int, n_new: int) -> Float[Tensor, "lag batch pos *width"]:
    """The values that lie 0, 1, ... positions before each of the last ones; zeros before the first.

    Args:
        x: the values.
        n_lags: how many lags.
        n_new: of how many last positions.
    """
    before = F.pad(x, (*[0, 0] * (x.ndim - 2), n_lags - 1, 0))
    end = before.shape[1]
    return torch.stack([before[:, end - lag - n_new : end - lag] for lag in range(n_lags)])
