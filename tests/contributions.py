"""What contributions are compared with."""

from __future__ import annotations

from torch import Tensor

from tl_looped import LoopedCache

UNITS = ("component", "layer", "head")


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected entry."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def chosen_logits(cache: LoopedCache, tokens: Tensor) -> Tensor:
    return cache["unembed.hook_out"].gather(-1, tokens[..., None]).squeeze(-1)
