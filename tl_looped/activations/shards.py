"""A shard: one safetensors file, whose rows are written as they are computed, and which is there in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .._writing import draft_of
from ..errors import LoopedError
from . import checksums
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
_WIDEST = 2**62  # no size or offset is longer in the header


class DiskError(LoopedError):
    """A file cannot be written; no prompt is to blame."""


class DamagedError(LoopedError):
    """A shard is not what was written."""

    @classmethod
    def of(cls, path: Path, why: str) -> DamagedError:
        """The error for a file."""
        return cls(f"{str(path)!r} is damaged: {why}. Call the same collect again, which writes it again.")


@contextmanager
def _writing(place: Path) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DiskError(
            f"{str(place)!r} was removed while it was written. Call again, which writes it again and keeps what is whole."
        ) from error
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
        self.metadata: dict[str, str] = metadata
        self.shapes: dict[str, tuple[int, ...]] = dict(shapes)
        self.row_bytes: dict[str, int] = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        widest = {name: (self.dtype, (_WIDEST, *shape)) for name, shape in shapes.items()}
        widest |= {name: (torch.float64, (_WIDEST,)) for name in index_names}
        self._reserved: int = len(_header(widest, metadata, [checksums.BLANK] * len(widest), _WIDEST)) + 16 + _LINE
        self._reserved += -self._reserved % _LINE
        self._starts: dict[str, int] = {}
        end = self._reserved
        for name, size in self.row_bytes.items():
            self._starts[name] = end
            end += size * capacity
        self.path: Path = draft_of(place)
        with _writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it meanwhile
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
        # Rows came in any order, and were moved: what a tensor has is read again once it stands, from the system's memory.
        ends = [*accumulate((prod(shape) * dtype.itemsize for dtype, shape in tensors.values()), initial=self._reserved)]
        sums = [checksums.of_file(self._file, *part) for part in pairwise(ends)]
        header = _header(tensors, self.metadata, sums).ljust(self._reserved - 8)
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


def _header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str],
    sums: list[str],
    widest: int | None = None,
) -> bytes:
    """What safetensors has before the data; all offsets as wide as one number, if there is one."""
    said = {**metadata, checksums.TENSORS: " ".join(sums)}
    content: dict[str, Any] = {"__metadata__": said}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        content[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [widest or start, widest or end]}
    said[checksums.HEADER] = checksums.of_header(content)
    return json.dumps(content, separators=(",", ":")).encode()


class Shard:
    """A shard that is read: its index at once, its activations by memory map.

    Args:
        path: the file.

    Raises:
        DamagedError: the file is no whole shard.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                content: dict[str, Any] = json.loads(file.read(min(length, size)))
            self.metadata: dict[str, str] = content["__metadata__"]
            whole = checksums.of_header(content)
            said, sums = (self.metadata.pop(key, "") for key in (checksums.HEADER, checksums.TENSORS))
            if (said or sums) and said != whole:  # files of before have neither
                raise ValueError("its header is not what was written")
            del content["__metadata__"]
            self._sums: dict[str, str] = dict(zip(content, sums.split(), strict=bool(sums)))
            self._start: int = 8 + length
            self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {
                name: (BY_NAME[at["dtype"]], tuple(at["shape"]), *at["data_offsets"]) for name, at in content.items()
            }
            n_bytes = self._start + max(end for *_, end in self.tensors.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError.of(path, f"it cannot be read as a shard of activations ({error!r})") from error
        if size != n_bytes:
            raise DamagedError.of(path, f"it has {size} bytes and should have {n_bytes}")
        self._mapped: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}  # another process maps the file itself

    def index(self, name: str) -> Tensor:
        """A copy of a tensor of the index.

        Args:
            name: without what all of them begin with.

        Raises:
            DamagedError: it is not what was written.
        """
        dtype, shape, start, end = self.tensors[INDEX + name]
        with self.path.open("rb") as file:
            file.seek(self._start + start)
            content = bytearray(file.read(end - start))
        self._compare(INDEX + name, checksums.of_bytes(content))
        return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)

    def check(self) -> None:
        """Read all of it once; a shard of before checksums passes.

        Raises:
            DamagedError: it is not what was written.
        """
        with self.path.open("rb") as file:
            for name in self._sums:
                *_, start, end = self.tensors[name]
                self._compare(name, checksums.of_file(file.fileno(), self._start + start, self._start + end))

    def _compare(self, name: str, found: str) -> None:
        if self._sums.get(name, found) != found:
            raise DamagedError.of(self.path, f"{name} is not what was written")

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
                raise DamagedError.of(self.path, f"it ends {len(left)} bytes before its activations do")
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
