"""From a checkpoint to a `LoopedModel`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import CheckpointError, LoopedError
from ..families import Computed, Source
from ..model import LoopedModel
from ..model.config import LoopedConfig
from .open import Checkpoint
from .placement import DeviceMap, MaxMemory, place, usable
from .plan import check_depth, make_plan, stored

_SHOW_PROGRESS_FROM = 1_000_000_000  # bytes
_BUFFER = 1 << 20  # elements


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    n_loops: int | None = None,
    l_cycles: int | None = None,
    cfg: LoopedConfig | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
) -> LoopedModel:
    """Build the model of a checkpoint and read its parameters, one after the other, straight to where they belong.

    Args:
        checkpoint: from `open_checkpoint`, or a `MemoryCheckpoint`, whose memory is shared where device and dtype allow.
        device: where the parameters go; by default where they are (files: the CPU).
        dtype: their dtype; by default that of the stored embedding.
        n_loops: how often the looped stack runs, instead of what the checkpoint says.
        l_cycles: runs of the L stack per loop (HRM-Text).
        cfg: what the checkpoint computes, where its config.json does not say it (looped layers of an ordinary decoder).
        device_map: "auto" or "balanced", or the device of every part, instead of one device for all.
        max_memory: what every device may hold under such a plan, as accelerate takes it.

    Raises:
        CheckpointError: config.json, names, shapes or values that do not fit together.
        LoopedError: `n_loops`, `l_cycles` or `dtype` that this model cannot have; devices that cannot be used.
    """
    if device is not None and device_map is not None:
        raise LoopedError(f"device={device!r} and device_map={device_map!r} were given; each says where everything goes.")
    if max_memory is not None and device_map is None:
        raise LoopedError('max_memory was given without a plan that it limits; pass device_map="auto" too.')
    one, is_given = None if device is None else usable(device, f"device={device!r}"), cfg is not None
    family, cfg, sources = make_plan(checkpoint, n_loops=n_loops, l_cycles=l_cycles, cfg=cfg)
    if not is_given:
        check_depth(checkpoint, cfg, n_loops, l_cycles)
    with torch.device("meta"):
        model = LoopedModel(cfg)
    dtype = dtype or stored_dtype(checkpoint, sources)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoopedError(f"dtype={dtype!r} was asked; pass a floating-point torch.dtype such as torch.bfloat16.")
    empty = {name: (sources[name], tuple(parameter.shape)) for name, parameter in model.canonical_parameters().items()}
    shapes = {name: shape for name, (_, shape) in empty.items()}
    places = dict.fromkeys(shapes, one) if device_map is None else place(cfg, shapes, device_map, dtype, max_memory)
    # All memory for tensors to convert is taken before the first is read: taken in between, it would leave gaps in the heap.
    converted = {
        name: torch.empty(shape, dtype=dtype, device=places[name] or checkpoint.devices[source.name])
        for name, (source, shape) in empty.items()
        if isinstance(source, Source) and checkpoint.dtypes[source.name] != dtype
    }
    total = sum(math.prod(shape) * dtype.itemsize for _, shape in empty.values())
    if checkpoint.quantised is not None:
        warnings.warn(f"{checkpoint} {checkpoint.quantised.told(total, dtype)}.", stacklevel=2)
    broken: list[str] = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading", disable=total < _SHOW_PROGRESS_FROM) as bar:
        # The largest first: what reading or computing them takes for a moment has room in what is not read yet.
        for name, (source, shape) in sorted(empty.items(), key=lambda item: -math.prod(item[1][1])):
            if isinstance(source, Computed):
                tensor = _compute(checkpoint, source, name, shape, places[name], dtype)
            elif name in converted:
                tensor = _convert(checkpoint, source.name, source.first * math.prod(shape[1:]), converted.pop(name))
            else:
                tensor = checkpoint.read(source.name, source.first * math.prod(shape[1:]), shape).to(places[name])
            if not all(bool(end.isfinite()) for end in tensor.aminmax()):
                broken += stored(source)
            model.set_parameter(name, nn.Parameter(tensor))
            bar.update(tensor.nbytes)
    if broken:
        raise CheckpointError(
            f"{checkpoint} holds NaN or infinity in {', '.join(dict.fromkeys(broken))}, read as {dtype}. Download or convert "
            "it again, or choose a dtype that holds larger numbers."
        )
    if cfg.tied:
        _check_tied_copies(checkpoint, family.TIED)
    _ = model.device_map  # refuses a layer that lies on several devices
    return model.eval()


def stored_dtype(checkpoint: Checkpoint, sources: Mapping[str, Source | Computed]) -> torch.dtype:
    """The dtype of the stored embedding, in which a model is loaded if none is asked for.

    Args:
        checkpoint: a checkpoint.
        sources: where its family finds every parameter.
    """
    return checkpoint.dtypes[next(iter(stored(sources["embed.weight"])))]


@torch.no_grad()
def _compute(
    checkpoint: Checkpoint,
    source: Computed,
    name: str,
    shape: tuple[int, ...],
    device: torch.device | None,
    dtype: torch.dtype,
) -> Tensor:
    """A parameter that is computed from stored tensors, converted first: a reference computes in the dtype it runs in."""
    device = device or checkpoint.devices[next(iter(source.stored))]
    tensor = source.compute(*(checkpoint.read(name).to(device, dtype) for name in source.stored)).contiguous()
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CheckpointError(
            f"the family computes {name} from {', '.join(source.stored)} as {list(tensor.shape)} of {tensor.dtype}; "
            f"the model needs {list(shape)} of {dtype}. Correct its sources()."
        )
    return tensor


def _convert(checkpoint: Checkpoint, name: str, start: int, out: Tensor) -> Tensor:
    """Fill `out` with a part of a tensor of another dtype, piece by piece."""
    for at in range(0, out.numel(), _BUFFER):
        count = min(_BUFFER, out.numel() - at)
        out.view(-1)[at : at + count] = checkpoint.read(name, start + at, (count,))
    return out


def _check_tied_copies(checkpoint: Checkpoint, copies: tuple[str, str]) -> None:
    first, second = copies
    if first not in checkpoint.shapes or second not in checkpoint.shapes:
        return
    shape, count = checkpoint.shapes[first], math.prod(checkpoint.shapes[first])
    parts = [(at, (min(_BUFFER, count - at),)) for at in range(0, count, _BUFFER)]
    if checkpoint.shapes[second] != shape or not all(
        torch.equal(checkpoint.read(first, *part).float(), checkpoint.read(second, *part).float()) for part in parts
    ):
        raise CheckpointError(
            f"config.json of {checkpoint} ties the embeddings, but {first} and {second} differ. "
            "If the model was trained untied, say so in config.json; otherwise remove the wrong copy."
        )
