"""Loops that run some positions only: a mask of active positions, and attention among them.

At a position that is not active the stream is zero. A layer without biases makes zero of zero, so every activation of the
position is zero there, but for its attention pattern, which is 1 at the position itself. What is patched in has no effect.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..running import running
from .config import LoopedConfig
from .layers import Attention, Block, Inputs, causal

ACTIVE = "active"  # under which the active positions of the whole text up to now are carried, in a pass


class Remembered(nn.Module):
    """The active positions of the whole text: those of earlier calls, kept in a key-value cache, and those that are run."""

    BESIDE: bool = True  # no part of the stream goes through it

    def __init__(self) -> None:
        super().__init__()
        self.slot: int = -1  # of the cache

    def forward(self, active: Float[Tensor, "batch pos one"]) -> Float[Tensor, "batch key one"]:
        """The positions of the whole text, from those that are run."""
        run = running()
        if run is None or run.cache is None:
            return active
        return run.cache.update(active[:, None], active[:, None, :, :0], self.slot)[0][:, 0]


class RoutedAttention(Attention):
    """Attention among the active positions of a pass; outside the loop, among all."""

    def attend(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        v: Float[Tensor, "batch kv_head key d_head"],
        inputs: Inputs,
        *beside: Tensor,
    ) -> Float[Tensor, "batch head query d_head"]:
        """What the heads read."""
        mask = inputs.masks[self.window]
        if ACTIVE in inputs.carried:
            mask = among(inputs.carried[ACTIVE][..., 0] != 0, causal(q, k)[None, None] if mask is None else mask)
        return self.mix(q, k, v, mask)


def among(active: Bool[Tensor, "batch key"], mask: Bool[Tensor, "#batch 1 query key"]) -> Bool[Tensor, "batch 1 query key"]:
    """A mask of attention among active positions; every other one looks at itself, or it would look at nothing.

    Args:
        active: of the whole text.
        mask: among all positions; the queries are the last ones.
    """
    n_query, n_key = mask.shape[-2:]
    itself = torch.arange(n_key, device=mask.device) == torch.arange(n_key - n_query, n_key, device=mask.device)[:, None]
    return mask & active[:, None, None, :] & active[:, None, -n_query:, None] | itself


class RoutedBlock(Block):
    """A layer with such attention.

    Args:
        cfg: the structure.
        physical: which layer.
    """

    def __init__(self, cfg: LoopedConfig, physical: int):
        super().__init__(cfg, physical)
        self.attn: Attention = RoutedAttention(cfg, physical)
