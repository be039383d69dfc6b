"""Numbers as JSON: an array is its shape and its bytes, so that thousands of cells are one string."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor


def packed(values: Tensor) -> dict[str, Any]:
    """A tensor as a dict that JSON can hold: 32-bit floats, or 32-bit ints, in little-endian order.

    Args:
        values: the tensor.

    Example:
        >>> packed(torch.tensor([[1, 2]]))
        {'kind': 'int32', 'shape': [1, 2], 'data': 'AQAAAAIAAAA='}
    """
    kind = "float32" if values.is_floating_point() else "int32"
    raw = values.detach().cpu().to(torch.float32 if kind == "float32" else torch.int32).contiguous().numpy()
    return {
        "kind": kind,
        "shape": list(raw.shape),
        "data": base64.b64encode(raw.astype(f"<{raw.dtype.str[1:]}").tobytes()).decode("ascii"),
    }


def unpacked(message: dict[str, Any]) -> Tensor:
    """The tensor that an array in a reply of `Session` stands for, in 32 bits.

    Args:
        message: the array, {"kind", "shape", "data"}.

    Example:
        >>> unpacked({"kind": "int32", "shape": [1, 2], "data": "AQAAAAIAAAA="})
        tensor([[1, 2]], dtype=torch.int32)
    """
    raw = np.frombuffer(base64.b64decode(message["data"]), dtype=f"<{'f4' if message['kind'] == 'float32' else 'i4'}")
    return torch.from_numpy(raw.copy()).reshape(message["shape"])
