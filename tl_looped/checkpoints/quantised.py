"""Tensors stored in few bits, read as floats: NVFP4, MXFP8, float8, and 4 and 8 bits of bitsandbytes.

A stored tensor tells its format by its own name, those of the tensors beside it, and their dtypes and shapes. Nothing is
dequantised before it is read, and then row by row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..facts import human
from ..kinds import shown
from .files import InMemory, InPickle, InSafetensors

Stored = InSafetensors | InPickle | InMemory
Rows = Callable[[int, int], Tensor]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The values of both codes in a byte, the low half first.
_PAIRS = torch.cartesian_prod(*[torch.tensor([*_E2M1, *(-x for x in _E2M1)])] * 2).flip(-1)
_AT_ONCE = 1 << 20  # elements
_INT8_STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes has it
_STATE = ".quant_state.bitsandbytes__"
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "k_scale", "v_scale")
_CODES = {torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}
_EXPONENTS = (torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8))


@dataclass(frozen=True)
class Dequantised:
    """A tensor that is stored in few bits.

    Args:
        format: what its format is called.
        stored: what it is read from, the codes first.
        shape: of the tensor itself.
        width: elements of a row, the smallest part that is read.
        rows: reads rows from one on, up to another.
    """

    format: str
    stored: tuple[Stored, ...]
    shape: tuple[int, ...]
    width: int
    rows: Rows
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def device(self) -> torch.device:
        """As in `torch.Tensor`."""
        return self.stored[0].device

    def read(self, start: int, count: int) -> Tensor:
        """Read `count` elements from element `start` on."""
        first, last = start // self.width, -(-(start + count) // self.width)
        step = max(1, _AT_ONCE // self.width)
        if last - first <= step:
            return self.rows(first, last).reshape(-1)[start - first * self.width :][:count]
        out = torch.empty(count, device=self.device)
        for row in range(first, last, step):  # a piece takes several times its size on the way
            piece = self.rows(row, min(row + step, last)).reshape(-1)
            at = row * self.width - start
            piece = piece[max(0, -at) : count - at]
            out[max(0, at) :][: len(piece)] = piece
        return out


class Quantised(NamedTuple):
    """What is quantised in a checkpoint.

    Args:
        formats: the formats of its tensors.
        n_bytes: what all tensors of the checkpoint take where they are stored.
    """

    formats: tuple[str, ...]
    n_bytes: int

    def told(self, n_bytes: int, dtype: torch.dtype) -> str:
        """What a user has to know of it.

        Args:
            n_bytes: what the parameters take when they are dequantised.
            dtype: to which dtype.
        """
        return (
            f"holds {human(self.n_bytes, 'B')}, in {', '.join(self.formats)}; dequantised, its parameters take "
            f"{human(n_bytes, 'B')} in {str(dtype).removeprefix('torch.')}, and activations are not quantised"
        )


def dequantised(
    config: Mapping[str, Any], stored: Mapping[str, Stored], where: object
) -> tuple[dict[str, Any], dict[str, Stored | Dequantised], Quantised | None]:
    """The config and the tensors of a checkpoint, as if it had never been quantised.

    Args:
        config: the content of config.json.
        stored: the tensors.
        where: what an error calls the checkpoint.

    Returns:
        The config without what it says of the format, the tensors by the names that the model has for them, and what is
        quantised; None if nothing is.

    Raises:
        CheckpointError: a format that is not implemented, or tensors that do not fit together.
    """
    tensors: dict[str, Stored | Dequantised] = dict(stored)
    formats: dict[str, None] = {}
    for name in stored:
        for recognise in (_nvfp4, _float8, _bits_and_bytes_4, _bits_and_bytes_8):
            if (found := recognise(stored, name)) is None:
                continue
            of, tensor, beside = found
            for part in (name, *beside):
                del tensors[part]
            tensors[of] = tensor
            formats[tensor.format] = None
            break
    settings = _settings(config)
    _refuse_others(tensors, settings, where)
    if not formats:
        return dict(config), tensors, None
    for name, tensor in stored.items():
        if name.rpartition(".")[2] in _OF_ACTIVATIONS and math.prod(tensor.shape) == 1:
            tensors.pop(name, None)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return plain, tensors, Quantised(tuple(formats), sum(math.prod(t.shape) * t.dtype.itemsize for t in stored.values()))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the format."""
    found = config.get("quantization_config") or config.get("compression_config")
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _refuse_others(tensors: Mapping[str, Stored | Dequantised], settings: Mapping[str, Any], where: object) -> None:
    """Refuse tensors in few bits that no format explains, and weights that are rotated or thinned out on top."""
    left = [name for name, tensor in tensors.items() if tensor.dtype in _CODES]
    method = settings.get("quant_method")
    also = [key for key in ("transform_config", "sparsity_config") if _acts(settings.get(key))]
    if also or (left and (method is not None or any(tensors[name].dtype.is_floating_point for name in left))):
        what = "quantised" + (" in an unknown way" if method is None else f" with quant_method={shown(method)}")
        because = f"{also[0]} is not implemented" if also else f"{left[0]} ({tensors[left[0]].dtype}) cannot be read"
        raise CheckpointError(
            f"{where} is {what}: {because}. Implemented are NVFP4, MXFP8 and float8 with scales by tensor or row, as ModelOpt "
            "and compressed-tensors write them, and bitsandbytes. Load the checkpoint that it was made from; or load it with "
            "transformers, call dequantize() and load what save_pretrained writes."
        )


def _acts(setting: object) -> bool:
    """Whether something besides quantisation is done to weights."""
    if not isinstance(setting, dict):
        return bool(setting)
    known = cast("dict[str, Any]", setting)
    return bool(known.get("config_groups")) if "config_groups" in known else known.get("format", "dense") != "dense"


Found = tuple[str, Dequantised, list[str]] | None


def _nvfp4(stored: Mapping[str, Stored], name: str) -> Found:
    """Codes of 4 bits, two in a byte; a float8 scale for 16 of them, and a factor for the tensor or for every expert."""
    packed = name.endswith("weight_packed")
    of = name.removesuffix("_packed")
    codes, scales = stored[name], stored.get(f"{of}_scale")
    if scales is None or codes.dtype != torch.uint8 or scales.dtype != torch.float8_e4m3fn or not codes.shape:
        return None
    beside = [f"{of}_global_scale"] if packed else [f"{of}_scale_2"]
    if not packed and f"{of}_amax" in stored:
        beside = [f"{of}_amax", f"{of}_outer_scale_denominator"]
    if any(at not in stored for at in beside):
        return None
    width = 2 * codes.shape[-1]
    shape = (*codes.shape[:-1], width)
    _check_groups(name, shape, scales, 16)
    factors = [stored[at] for at in beside]
    _check_factors(name, shape, factors)

    def rows(first: int, last: int) -> Tensor:
        bytes_ = codes.read(first * width // 2, (last - first) * width // 2).int()
        values = _PAIRS.to(bytes_.device)[bytes_].view(last - first, -1, 16)
        scale = _part(scales, first, last).float().view(last - first, -1, 1)
        factor, *denominator = (_by_row(one, shape, first, last)[:, None, None] for one in factors)
        if denominator:  # in the order in which each format's own code multiplies, whose last bits these are
            return values * scale * (factor / denominator[0])
        return values * (scale / factor if packed else scale * factor)

    return of, Dequantised("NVFP4", (codes, scales, *factors), shape, width, rows), [f"{of}_scale", *beside]


def _float8(stored: Mapping[str, Stored], name: str) -> Found:
    """Numbers of 8 bits; a power of two for 32 of them (MXFP8), or a scale for the tensor or every row."""
    codes, scales = stored[name], stored.get(f"{name}_scale")
    if scales is None or codes.dtype != torch.float8_e4m3fn or not codes.shape:
        return None
    shape, width = codes.shape, codes.shape[-1]
    if scales.dtype in _EXPONENTS:
        _check_groups(name, shape, scales, 32)

        def blocks(first: int, last: int) -> Tensor:
            powers = torch.exp2(_part(scales, first, last).view(torch.uint8).float() - 127)
            by_entry = powers.view(last - first, -1).repeat_interleave(32, dim=1)[:, :width]
            return _part(codes, first, last).float().view(last - first, width) * by_entry

        return name, Dequantised("MXFP8", (codes, scales), shape, width, blocks), [f"{name}_scale"]
    # As many scales as rows may also be those of columns or of square blocks, which only their shape tells.
    if not scales.dtype.is_floating_point or (math.prod(scales.shape) != 1 and not _is_by_row(scales.shape, shape)):
        return None

    def rows(first: int, last: int) -> Tensor:
        values = _part(codes, first, last).float().view(last - first, width)
        return values * _by_row(scales, shape, first, last)[:, None]

    return name, Dequantised("float8", (codes, scales), shape, width, rows), [f"{name}_scale"]


def _bits_and_bytes_4(stored: Mapping[str, Stored], name: str) -> Found:
    """Codes of 4 bits, the first of a byte in its high half; a scale for a block, itself maybe a code of 8 bits."""
    states = [at for at in (f"{name}{_STATE}nf4", f"{name}{_STATE}fp4") if at in stored]
    if not states:
        return None
    state, codes = _state(stored[states[0]], states[0]), stored[name]
    shape, size = tuple(state["shape"]), state["blocksize"]
    beside = [f"{name}.absmax", f"{name}.quant_map"]
    if nested := "nested_blocksize" in state:
        beside += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    n, n_blocks = math.prod(shape), -(-math.prod(shape) // size)
    if missing := [at for at in beside if at not in stored]:
        raise CheckpointError(f"{name} is stored by bitsandbytes, but {', '.join(missing)} is missing. Download it again.")
    if math.prod(codes.shape) != -(-n // 2) or math.prod(stored[beside[0]].shape) != n_blocks:
        raise CheckpointError(
            f"{name} is stored by bitsandbytes as {list(shape)} in blocks of {size}, which do not fit its "
            f"{math.prod(codes.shape)} bytes and {math.prod(stored[beside[0]].shape)} scales. Download the checkpoint again."
        )
    absmax, quant_map, *more = (stored[at] for at in beside)

    def rows(first: int, last: int) -> Tensor:
        scale = absmax.read(first, last - first)
        if nested:
            outer = _whole(more[0]).float()[torch.arange(first, last, device=scale.device) // state["nested_blocksize"]]
            scale = _whole(more[1]).float()[scale.int()] * outer + state["nested_offset"]
        count = min(last * size, n) - first * size
        bytes_ = codes.read(first * size // 2, -(-count // 2)).int()
        halves = torch.stack((bytes_ >> 4, bytes_ & 15), dim=-1).view(-1)[:count]
        return _whole(quant_map).float()[halves] * scale.float().repeat_interleave(size)[:count]

    kind = f"bitsandbytes {states[0].removeprefix(name + _STATE)}"
    return name, Dequantised(kind, (codes, absmax, quant_map, *more), shape, size, rows), [*beside, states[0]]


def _state(stored: Stored, name: str) -> dict[str, Any]:
    """What bitsandbytes writes beside a tensor: its shape and its blocks."""
    try:
        state = json.loads(bytes(_whole(stored).tolist()))
        known: dict[str, Any] = {key: int(state[key]) for key in ("blocksize", "nested_blocksize") if key in state}
        known |= {"shape": [int(n) for n in state["shape"]], "nested_offset": float(state.get("nested_offset", 0.0))}
        if min(*known["shape"], known["blocksize"], known.get("nested_blocksize", 1)) < 1 or known["blocksize"] % 2:
            raise ValueError("sizes that are none")
        return known
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{name} is not the description of one tensor that bitsandbytes writes ({error}): it is damaged, or tensors were "
            "joined when the model was saved. Call dequantize() before saving, or download the checkpoint again."
        ) from error


def _bits_and_bytes_8(stored: Mapping[str, Stored], name: str) -> Found:
    """Ints of 8 bits, and the greatest size in every row."""
    module, _, leaf = name.rpartition(".")
    codes, sizes, layout = stored[name], stored.get(f"{module}.SCB"), stored.get(f"{module}.weight_format")
    if leaf != "weight" or sizes is None or codes.dtype != torch.int8:
        return None
    if layout is not None and (order := int(_whole(layout))) != 0:
        raise CheckpointError(
            f"{name} is stored by bitsandbytes in the layout {order}, of an old kernel; only rows (0) can be read. Load it "
            "with transformers and save it again."
        )
    shape, width = codes.shape, codes.shape[-1]
    _check_factors(name, shape, [sizes])

    def rows(first: int, last: int) -> Tensor:
        values = _part(codes, first, last).float().view(last - first, width)
        return values * _by_row(sizes, shape, first, last)[:, None] * _INT8_STEP

    beside = [f"{module}.SCB", *([] if layout is None else [f"{module}.weight_format"])]
    return name, Dequantised("bitsandbytes int8", (codes, sizes), shape, width, rows), beside


def _check_groups(name: str, shape: tuple[int, ...], scales: Stored, size: int) -> None:
    expected = (*shape[:-1], -(-shape[-1] // size))
    if scales.shape != expected or (size == 16 and shape[-1] % size):
        raise CheckpointError(
            f"{name} has scales of shape {list(scales.shape)}; {list(shape)} numbers in groups of {size} have "
            f"{list(expected)}. Other orders of scales are not implemented; load the checkpoint that it was made from."
        )


def _is_by_row(scales: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether there is a scale for every row of a tensor."""
    return tuple(scales) in (tuple(shape[:-1]), (*shape[:-1], 1))


def _part(stored: Stored, first: int, last: int) -> Tensor:
    """Rows of a tensor."""
    width = stored.shape[-1]
    return stored.read(first * width, (last - first) * width)


def _whole(stored: Stored) -> Tensor:
    return stored.read(0, math.prod(stored.shape))


def _by_row(factor: Stored, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    """One number for each of some rows of a tensor, of which there is one for all, for every expert or for every row."""
    rows_of_one = math.prod(shape[:-1]) // math.prod(factor.shape)
    return _whole(factor).float()[torch.arange(first, last, device=factor.device) // rows_of_one]


def _check_factors(name: str, shape: tuple[int, ...], factors: Iterable[Stored]) -> None:
    n_rows = math.prod(shape[:-1])
    for n in (math.prod(factor.shape) for factor in factors):
        if n not in (1, shape[0], n_rows):
            raise CheckpointError(
                f"{name} of shape {list(shape)} has {n} scales, neither one, nor one for each of its {shape[0]} parts or "
                f"{n_rows} rows. Download the checkpoint again."
            )
