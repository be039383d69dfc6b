"""Tensors in files and in memory, none of which is read before it is asked for."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
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
}


@dataclass(frozen=True)
class InSafetensors:
    """A tensor in a safetensors file. Its bytes are read into fresh memory: a memory map would count twice while loading."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    device = torch.device("cpu")

    def read(self, start: int, count: int) -> Tensor:
        """Read `count` elements from element `start` on."""
        out = torch.empty(count, dtype=self.dtype, device="cpu")
        with self.file.open("rb") as stream:
            stream.seek(self.offset + start * self.dtype.itemsize)
            if stream.readinto(out.view(torch.uint8).numpy().data) != out.nbytes:
                raise CheckpointError(f"{self.file} ended while a tensor was read: it has changed. Load again.")
        return out


@dataclass(frozen=True)
class InPickle:
    """A tensor in a .bin file, mapped anew for every read so that pages do not pile up."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str
    device = torch.device("cpu")

    def read(self, start: int, count: int) -> Tensor:
        """Read `count` elements from element `start` on."""
        return _load_pickle(self.file)[self.name].reshape(-1)[start : start + count].clone()


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


def safetensors_header(file: Path) -> dict[str, InSafetensors]:
    """The tensors of a safetensors file: 8 bytes with the length of a JSON header, the header, the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length) if 8 + length <= size else b""
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        end = 8 + length + max((last for _, _, _, last in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file: its header cannot be read. Download it again."
        ) from error
    if end != size:
        raise CheckpointError(
            f"{file} is truncated or damaged: its header describes {end} bytes, it has {size}. Download it again."
        )
    tensors = {}
    for name, (stored_as, shape, first, last) in entries.items():
        if stored_as not in _DTYPES:
            raise CheckpointError(f"{file} stores {name} as {stored_as}; readable are {', '.join(_DTYPES)}. Convert it.")
        dtype = _DTYPES[stored_as]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{file} is damaged: {name} {list(shape)} has {last - first} bytes. Download it again.")
        tensors[name] = InSafetensors(file, dtype, shape, 8 + length + first)
    return tensors


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
