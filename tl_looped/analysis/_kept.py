"""Activations that are kept until the end of a run, apart from what is freed meanwhile."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
PIECE = 2**26  # bytes; so large an allocation is one of its own, of which only what is written to takes memory
_ALIGNED = 64


class Kept(Generic[Key]):
    """Copies of activations, up to a number of bytes in all; with more, none are kept.

    Each as it is would lie among what the layers allocate and free, and leave holes too small for it: twice the memory again.

    Args:
        room: how many bytes.
    """

    def __init__(self, room: int):
        self.room: int = room
        self._values: dict[Key, Tensor] = {}
        self._pieces: dict[torch.device, Tensor] = {}  # what is free of the latest piece

    @property
    def is_full(self) -> bool:
        """Whether there was more than there is room for."""
        return self.room < 0

    def put(self, key: Key, value: Shaped[Tensor, ...]) -> None:
        """Keep an activation.

        Args:
            key: under which it is found again.
            value: the activation.
        """
        self.room -= value.nbytes
        if self.is_full:
            self._values.clear()
            self._pieces.clear()
            return
        free, n = self._pieces.get(value.device), value.nbytes
        if free is None or len(free) < n:
            free = torch.empty(max(PIECE, n), dtype=torch.uint8, device=value.device)
        kept = self._values[key] = free[:n].view(value.dtype).view(value.shape)
        kept.copy_(value)
        self._pieces[value.device] = free[-(-n // _ALIGNED) * _ALIGNED :]

    def items(self) -> Iterator[tuple[Key, Tensor]]:
        """All that are kept, in the order in which they came."""
        yield from self._values.items()
