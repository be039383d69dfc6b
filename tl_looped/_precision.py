"""In which precision numbers are compared."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def wide(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """In fp32 or wider: differences of half-precision states round away.

    Args:
        x: the numbers.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
