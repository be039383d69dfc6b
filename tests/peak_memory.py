"""How many bytes of tensors are alive at once during a run."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations return, from their birth to their end; those of parameters are left out."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.alive: dict[int, int] = {}
        self.nbytes = 0
        self.largest = 0  # bytes of the largest one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and not tensor._is_zerotensor():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
                    self.largest = max(self.largest, storage.nbytes())
                    self.nbytes = max(self.nbytes, sum(self.alive.values()))
        return out
