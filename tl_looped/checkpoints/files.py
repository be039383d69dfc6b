"""Tensors in files and in memory, none of which is read before it is asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class InFile:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str
    device: ClassVar[torch.device] = torch.device("cpu")


@dataclass(frozen=True)
class InSafetensors(InFile):
    """A tensor in a safetensors file, whose stamp says which file it was: another one may be put in its place."""

    stamp: tuple[int, ...]

    def read(self, start: int, count: int) -> Tensor:
        """Read `count` elements from element `start` on, into memory of their own."""
        with _opened(self.path, self.stamp) as file:
            if not self.shape or not count:
                return file.get_tensor(self.name).reshape(-1)[start : start + count].clone()
            row = math.prod(self.shape[1:])
            first, last = start // row, -(-(start + count) // row)
            return file.get_slice(self.name)[first:last].reshape(-1)[start - first * row :][:count].clone()


class InPickle(InFile):
    """A tensor in a .bin file, mapped anew for every read so that pages do not pile up."""

    def read(self, start: int, count: int) -> Tensor:
        """Read `count` elements from element `start` on."""
        return _load_pickle(self.path)[self.name].reshape(-1)[start : start + count].clone()


@dataclass(frozen=True)
class InMemory:
    """A tensor that somebody else holds; reading shares its memory."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """As in `torch.Tensor`."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As in `torch.Tensor`."""
        return tuple(self.tensor.shape)

    @property
    def device(self) -> torch.device:
        """As in `torch.Tensor`."""
        return self.tensor.device

    def read(self, start: int, count: int) -> Tensor:
        """Read `count` elements from element `start` on."""
        return self.tensor.detach().reshape(-1)[start : start + count]


def safetensors_header(path: Path) -> tuple[dict[str, InSafetensors], dict[str, str]]:
    """The tensors of a safetensors file, as its own library reads them, and its metadata."""
    stamp, tensors = _stamp(path), dict[str, InSafetensors]()
    with _opened(path, stamp) as content:
        for name in content.keys():
            part = content.get_slice(name)
            if (stored_as := part.get_dtype()) not in _DTYPES:
                raise CheckpointError(f"{path} stores {name} as {stored_as}; readable are {', '.join(_DTYPES)}. Convert it.")
            tensors[name] = InSafetensors(path, _DTYPES[stored_as], tuple(part.get_shape()), name, stamp)
        return tensors, content.metadata() or {}


@contextmanager
def _opened(path: Path, stamp: tuple[int, ...]) -> Generator[Any, None, None]:
    """A safetensors file, opened for one read: while it is open, pages that were read count as memory beside their copies."""
    try:
        with safe_open(path, framework="pt") as file:
            if _stamp(path) != stamp:
                raise _changed(path)
            yield file
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise _changed(path) from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        pointer = ": it is a pointer of Git LFS, not the file itself" if _is_pointer(path) else ""
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}){pointer}. Download it again."
        ) from error


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} has changed while it was read. Load the checkpoint again.")


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Download it again.") from error
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(30).startswith(b"version https://git-lfs")
    except OSError:
        return False


def pickle_header(file: Path) -> dict[str, InPickle]:
    """The tensors of a .bin file, with a warning."""
    warnings.warn(f"{file} is a pickle; it is read with weights_only=True. Safetensors would be safer.", stacklevel=3)
    return {name: InPickle(file, t.dtype, tuple(t.shape), name) for name, t in _load_pickle(file).items()}


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except (RuntimeError, UnpicklingError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as plain tensors (torch.load with weights_only=True and mmap=True): it is damaged, older "
            "than PyTorch 1.6, or holds more than tensors. Download it again or convert it to safetensors."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{file} is not a dictionary of tensors. Save the state_dict alone, as safetensors.")
    return content
