"""A shard: one safetensors file, whose rows are written as they are computed, and which is there in one step."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .._writing import draft_of
from ..errors import LoopedError
from .windows import take

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
INDEX = "index."  # what the names of tensors begin with that are no activations
SPARSE = 8  # rows that are further apart are read one by one
_LINE = 64  # where data begin is a multiple of it
_PIECE = 2**23  # bytes that are moved at once
CHECKSUM, _BLANK = "checksum", "0" * 24  # of the file with this in its place
_WIDEST = 2**62  # no size or offset is longer in the header


class DiskError(LoopedError):
    """A file cannot be written; no prompt is to blame."""


@contextmanager
def _writing(place: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{str(place)!r} cannot be written: {error.strerror or error}. The shards before it are whole; make room and call "
            "again, which goes on there."
        ) from error


class Draft:
    """A shard while it is written, under a name that no reader takes for a shard.

    Every activation has a place for as many rows as there can be. Rows are written there in any order, and those that are not
    kept are closed up in the end.

    Args:
        place: the file that it becomes.
        shapes: of a row, by the name of the activation.
        dtype: of all activations.
        capacity: how many rows there can be.
        index_names: of every tensor that the index may have.
        metadata: texts for the header.
    """

    def __init__(
        self,
        place: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        capacity: int,
        index_names: list[str],
        metadata: dict[str, str],
    ):
        self.place: Path = place
        self.dtype: torch.dtype = dtype
        self.capacity: int = capacity
        self.metadata: dict[str, str] = {**metadata, CHECKSUM: _BLANK}
        self.shapes: dict[str, tuple[int, ...]] = dict(shapes)
        self.row_bytes: dict[str, int] = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        widest = {name: (self.dtype, (_WIDEST, *shape)) for name, shape in shapes.items()}
        widest |= {name: (torch.float64, (_WIDEST,)) for name in index_names}
        self._reserved: int = len(_header(widest, self.metadata, _WIDEST)) + 16 + _LINE
        self._reserved += -self._reserved % _LINE
        self._starts: dict[str, int] = {}
        end = self._reserved
        for name, size in self.row_bytes.items():
            self._starts[name] = end
            end += size * capacity
        self.path: Path = draft_of(place)
        with _writing(place):
            self._file: int = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)

    def write(self, rows: Iterable[tuple[str, int, Tensor]]) -> None:
        """Write rows of activations.

        Args:
            rows: the activation, the first row, and the values, contiguous and on the CPU, [row, ...].
        """
        with _writing(self.place):
            for name, row, values in rows:
                self._write(self._starts[name] + row * self.row_bytes[name], values)

    def commit(self, kept: Mapping[str, Tensor | None], index: Mapping[str, Tensor]) -> None:
        """Close up what is not kept, add the index, and put the shard in its place.

        Args:
            kept: for every activation the rows to keep, ascending; None for all.
            index: what is kept beside the activations.
        """
        with _writing(self.place):
            self._commit(kept, index)

    def _commit(self, kept: Mapping[str, Tensor | None], index: Mapping[str, Tensor]) -> None:
        end, tensors = self._reserved, dict[str, tuple[torch.dtype, tuple[int, ...]]]()
        for name, shape in self.shapes.items():
            size, rows = self.row_bytes[name], kept[name]
            for first, n in [(0, self.capacity)] if rows is None else runs(rows):
                self._move(self._starts[name] + first * size, end, n * size)
                end += n * size
            tensors[name] = self.dtype, (self.capacity if rows is None else len(rows), *shape)
        for name, values in sorted(index.items(), key=lambda item: -item[1].dtype.itemsize):
            self._write(end, values.contiguous())
            end += values.numel() * values.dtype.itemsize
            tensors[name] = values.dtype, tuple(values.shape)
        os.ftruncate(self._file, end)
        header = _header(tensors, self.metadata).ljust(self._reserved - 8)
        header = header.replace(_BLANK.encode(), _checksum(self._file, header, self._reserved).encode(), 1)
        self._write_bytes(0, memoryview(len(header).to_bytes(8, "little") + header))
        os.fsync(self._file)
        self._close()
        os.replace(self.path, self.place)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._close()
        with suppress(OSError):
            self.path.unlink()

    def _close(self) -> None:
        if self._file >= 0:
            self._file, file = -1, self._file
            os.close(file)

    def _write(self, at: int, values: Tensor) -> None:
        if values.numel():
            content: Any = values.reshape(-1).view(torch.uint8).numpy()
            self._write_bytes(at, memoryview(content))

    def _write_bytes(self, at: int, content: memoryview) -> None:
        while content:
            n = os.pwrite(self._file, content, at)
            content, at = content[n:], at + n

    def _move(self, start: int, to: int, n: int) -> None:
        """Move bytes towards the beginning."""
        while n and start != to:
            piece = os.pread(self._file, min(n, _PIECE), start)
            if not piece:  # rows that nobody has written
                raise LoopedError(f"a shard lacks {n} bytes at {start}; this is a fault of tl_looped, please report it.")
            self._write_bytes(to, memoryview(piece))
            start, to, n = start + len(piece), to + len(piece), n - len(piece)


def runs(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Ascending rows as (first, how many) of those that follow each other."""
    if len(rows):
        breaks = (rows.diff() != 1).nonzero().flatten() + 1
        ends = [0, *breaks.tolist(), len(rows)]
        first = rows.tolist()
        yield from ((first[a], b - a) for a, b in pairwise(ends))


def _checksum(file: int, header: bytes, start: int) -> str:
    """What a flipped bit changes: of a header without its checksum, and of what follows it in a file.

    Integer sums of pieces, in their order, take a tenth of the time of a digest.
    """
    total = zlib.crc32(header)
    while piece := os.pread(file, _PIECE, start):
        start += len(piece)
        numbers = np.frombuffer(piece.ljust(-(-len(piece) // 8) * 8, b"\0"), dtype=np.uint64)
        total = (total * 1_000_003 + int(numbers.sum(dtype=np.uint64))) % 2**96
    return f"{total:024x}"


def _header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str], widest: int | None = None
) -> bytes:
    """What safetensors has before the data; all offsets as wide as one number, if there is one."""
    content: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        content[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [widest or start, widest or end]}
    return json.dumps(content, separators=(",", ":")).encode()


class Shard:
    """A shard that is read: its index at once, its activations by memory map.

    Args:
        path: the file.

    Raises:
        LoopedError: the file is no whole shard.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                content: dict[str, Any] = json.loads(file.read(min(length, size)))
            self.metadata: dict[str, str] = content.pop("__metadata__")
            self._start: int = 8 + length
            self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {
                name: (BY_NAME[at["dtype"]], tuple(at["shape"]), *at["data_offsets"]) for name, at in content.items()
            }
            whole = self._start + max(end for *_, end in self.tensors.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoopedError(f"{str(path)!r} is no shard of activations, or a damaged one ({error!r}).") from error
        if size != whole:
            raise LoopedError(f"{str(path)!r} is damaged: it has {size} bytes and should have {whole}.")
        self._mapped: Tensor | None = None

    def is_whole(self) -> bool:
        """Whether all of it is what was written, which takes reading it; files of before do not tell."""
        if (said := self.metadata.get(CHECKSUM)) is None:
            return True
        with self.path.open("rb") as file:
            header = file.read(self._start)[8:].replace(said.encode(), _BLANK.encode(), 1)
            return said == _checksum(file.fileno(), header, self._start)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}  # another process maps the file itself

    def index(self, name: str) -> Tensor:
        """A copy of a tensor of the index.

        Args:
            name: without what all of them begin with.
        """
        dtype, shape, start, end = self.tensors[INDEX + name]
        with self.path.open("rb") as file:
            file.seek(self._start + start)
            content = bytearray(file.read(end - start))
        return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)

    def rows(self, name: str) -> Tensor:
        """The rows of an activation, where the file is mapped; not to be written to.

        Args:
            name: the activation.
        """
        dtype, shape, start, end = self.tensors[name]
        first = (self._start + start) // dtype.itemsize
        return self._elements(dtype)[first : first + (end - start) // dtype.itemsize].view(shape)

    def gather(self, starts: Tensor, into: Tensor) -> None:
        """Read rows of any activations that have one width.

        Args:
            starts: where each begins, from `first`.
            into: where they are written, [row, width].
        """
        elements, width = self._elements(into.dtype), into.shape[1]
        torch.index_select(elements.as_strided((len(elements) - width + 1, width), (1, 1)), 0, starts, out=into)

    def read(self, file: BinaryIO, start: int, rows: Tensor, into: Tensor) -> None:
        """Read rows of one activation, from the file where they lie close together.

        Args:
            file: this one, open without a buffer.
            start: where the activation begins, from `first`.
            rows: which ones, ascending.
            into: where they are written, [row, width].
        """
        width, first = into.shape[1], int(rows[0])
        span = int(rows[-1]) + 1 - first
        if span > SPARSE * len(rows):
            self.gather(start + rows.long() * width, into)
            return
        room = into if span == len(rows) and into.is_contiguous() else into.new_empty(span, width)
        self._read_into(file, (start + first * width) * into.dtype.itemsize, room)
        if room is not into:
            into.copy_(room if span == len(rows) else take(room, rows - first))

    def _read_into(self, file: BinaryIO, at: int, into: Tensor) -> None:
        content: Any = into.view(-1).view(torch.uint8).numpy()
        left = memoryview(content)
        file.seek(at)
        while left:
            n = file.readinto(left)  # pyright: ignore[reportAttributeAccessIssue]
            if not n:
                raise LoopedError(f"{str(self.path)!r} is damaged: it ends {len(left)} bytes before its activations do.")
            left = left[n:]

    def first(self, name: str) -> int:
        """Where the rows of an activation begin, in numbers from the beginning of the file."""
        dtype, _, start, _ = self.tensors[name]
        return (self._start + start) // dtype.itemsize

    def n_rows(self, name: str) -> int:
        """How many rows an activation has."""
        return self.tensors[name][1][0]

    def _elements(self, dtype: torch.dtype) -> Tensor:
        if self._mapped is None:
            size = self.path.stat().st_size // dtype.itemsize
            self._mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=dtype)
        return self._mapped
