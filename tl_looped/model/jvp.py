"""Derivatives along a direction."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def jvp(function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    """The derivative of a function along a direction; exact, in forward mode.

    Args:
        function: of tensors.
        at: where, its arguments.
        along: the direction, one tensor for every argument.
    """
    with warnings.catch_warnings():  # torch warns about its own first use of that mode
        warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)
        derivative: Any = torch.func.jvp(function, at, along)[1]
    return derivative
