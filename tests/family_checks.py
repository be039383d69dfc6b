"""Models for `check_family`, whose checks are what every family must pass."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.testing import check_family

__all__ = ["check_family", "close", "random_model"]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def random_model(cfg: LoopedConfig, seed: int = 1) -> LoopedBridge:
    """A float64 bridge whose parameters are far from neutral, so that none can go unnoticed."""
    bridge, generator = LoopedBridge.from_config(cfg), torch.Generator().manual_seed(seed)
    for name, parameter in bridge.plain.canonical_parameters().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.data = 0.8 * noise / parameter.shape[-1] ** 0.5
        else:
            parameter.data = 0.3 * noise + (1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0)
    return bridge.to(torch.float64)
