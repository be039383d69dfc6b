"""Tensors of a model that lies on several devices, brought to one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def stacked(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
    """`torch.stack`, on the device of the first.

    Args:
        tensors: tensors of one shape.
        dim: the new axis.
    """
    first, *others = tensors
    return torch.stack([first, *(tensor.to(first.device) for tensor in others)], dim)


def joined(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, on the device of the first.

    Args:
        tensors: tensors that differ along one axis.
        dim: that axis.
    """
    first, *others = tensors
    return torch.cat([first, *(tensor.to(first.device) for tensor in others)], dim)
