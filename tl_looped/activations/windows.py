"""Samples mixed while they are read: blocks from anywhere in the files, a window of them at a time."""

from __future__ import annotations

import hashlib
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2**19  # bytes that are read from one place: with less, a disk is slower
FEWEST = 256  # blocks of a selection, so that a small one is mixed too where processes share it

Range = tuple[int, int]  # the first of samples that follow each other in the files, and the one after the last


class Window:
    """Room for samples, where they are read to.

    Args:
        n_samples: how many.
        n_sides: how many activations stand side by side in each.
        width: how many numbers an activation has.
        dtype: of the numbers.
    """

    def __init__(self, n_samples: int, n_sides: int, width: int, dtype: torch.dtype):
        self.values: Shaped[Tensor, "sample side width"] = _empty((n_samples, n_sides, width), dtype)
        # prompt, position, token and kind
        self.columns: Int[Tensor, "sample 4"] = _empty((n_samples, 4), torch.int32)

    def picked(self, at: Int[Tensor, " pick"]) -> tuple[Shaped[Tensor, "pick side width"], Int[Tensor, "pick 4"]]:
        """Copies of the values of some samples, and of their columns."""
        return take(self.values, at), take(self.columns, at)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor. A large one lies on huge pages where there are: picking from it takes two thirds of the time."""
    n = torch.Size(shape).numel() * dtype.itemsize
    if n < 2**25 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    room = mmap.mmap(-1, n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=dtype).view(shape)


def take(rows: Shaped[Tensor, "row ..."], at: Int[Tensor, " pick"]) -> Shaped[Tensor, "pick ..."]:
    """Copies of some rows, bit by bit: as `index_select`, and faster with short ones."""
    found = rows.new_empty(len(at), *rows.shape[1:])
    if found.numel():
        np.take(_bytes(rows), at.numpy(), 0, out=_bytes(found), mode="clip")
    return found


def _bytes(rows: Tensor) -> NDArray[np.uint8]:
    return rows.view(len(rows), -1).view(torch.uint8).numpy()


class Mixed:
    """A random order of samples that a disk can follow: blocks at random, and the samples of a window of blocks at random.

    Args:
        n_samples: how many there are.
        block: how many a block has at most.
        seed: of the order.
        epoch: every one has an order of its own.
    """

    def __init__(self, n_samples: int, block: int, seed: int, epoch: int):
        self._seed: str = f"{seed} {epoch}"
        block = max(1, min(block, n_samples // FEWEST))
        self._begins: Tensor = torch.randperm(-(-n_samples // block), generator=self._generator("blocks")) * block
        self._ends: Tensor = (n_samples - self._begins).clamp(max=block).cumsum(0)  # counted in the new order

    def _generator(self, of: object) -> torch.Generator:
        mixed = int.from_bytes(hashlib.sha256(f"{self._seed} {of}".encode()).digest()[:8], "little") >> 1
        return torch.Generator("cpu").manual_seed(mixed)

    def ranges(self, start: int, stop: int) -> list[Range]:
        """Where a window has its samples from, in the order of the files.

        Args:
            start: its first sample, counted in the new order.
            stop: the one after its last.
        """
        first, last = torch.searchsorted(self._ends, torch.tensor([start, stop - 1]), right=True).tolist()
        found, here = list[Range](), int(self._ends[first - 1]) if first else 0
        for begin, end in zip(*(column[first : last + 1].tolist() for column in (self._begins, self._ends)), strict=True):
            found.append((begin + max(start - here, 0), begin + min(stop, end) - here))
            here = end
        return sorted(found)

    def within(self, start: int, stop: int) -> Int[Tensor, " sample"]:
        """The order of the samples of a window."""
        n = stop - start  # the order of few is drawn in less than half the time
        return torch.randperm(n, generator=self._generator(start), dtype=torch.int32 if n < 2**31 else torch.int64)


def windows(
    rooms: Sequence[Window], asked: Iterable[tuple[Mixed, int, int]], fill: Callable[[Window, list[Range]], object]
) -> Iterator[tuple[Window, Int[Tensor, " sample"]]]:
    """Windows of mixed samples, and the order of those in each. While one is used, a thread reads the next.

    Args:
        rooms: two, which are used in turn.
        asked: of every window the order of all samples, its first sample in that order, and the one after its last.
        fill: reads samples.
    """

    def read(room: Window, order: Mixed, start: int, stop: int) -> tuple[Window, Tensor]:
        fill(room, order.ranges(start, stop))
        return room, order.within(start, stop)

    with ThreadPoolExecutor(1, "tl_looped reading") as pool:
        coming = deque[Future[tuple[Window, Tensor]]]()
        for room, (order, start, stop) in zip(cycle(rooms), asked, strict=False):
            coming.append(pool.submit(read, room, order, start, stop))
            if len(coming) == len(rooms):
                yield coming.popleft().result()
        yield from (window.result() for window in coming)
