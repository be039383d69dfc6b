"""From a checkpoint to a `LoopedModel`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import families
from ..config import LoopedConfig
from ..errors import CheckpointError, LoopedError
from ..families import Computed, Family, Source
from ..model import LoopedModel
from ..schedule import check_count
from .open import Checkpoint

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
) -> LoopedModel:
    """Build the model of a checkpoint and read its parameters, one after the other, straight to where they belong.

    Args:
        checkpoint: from `open_checkpoint`, or a `MemoryCheckpoint`, whose memory is shared where device and dtype allow.
        device: where the parameters go; by default where they are (files: the CPU).
        dtype: their dtype; by default that of the stored embedding.
        n_loops: how often the looped stack runs, instead of what the checkpoint says.
        l_cycles: runs of the L stack per loop (HRM-Text).
        cfg: what the checkpoint computes, where its config.json does not say it (looped layers of an ordinary decoder).

    Raises:
        CheckpointError: config.json, names, shapes or values that do not fit together.
        LoopedError: `n_loops`, `l_cycles` or `dtype` that this model cannot have.
    """
    device = _usable(device)
    family = families.detect(checkpoint.config, checkpoint.shapes)
    try:
        cfg = cfg or family.looped_config(checkpoint.config, checkpoint.shapes)
        with torch.device("meta"):
            model = LoopedModel(cfg)
    except LoopedError as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # values of the wrong kind
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"the config.json of {checkpoint} cannot be understood ({reason}). Restore the published one."
        ) from error
    if n_loops is not None or l_cycles is not None:
        cfg = _with_counts(cfg, n_loops, l_cycles)
        with torch.device("meta"):
            model = LoopedModel(cfg)
    sources = family.sources(cfg, checkpoint.shapes)
    _check_tensors(checkpoint, family, model, sources)
    dtype = dtype or stored_dtype(checkpoint, sources)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoopedError(f"dtype={dtype!r} was asked; pass a floating-point torch.dtype such as torch.bfloat16.")
    empty = {name: (sources[name], tuple(parameter.shape)) for name, parameter in model.canonical_parameters().items()}
    # All memory for tensors to convert is taken before the first is read: taken in between, it would leave gaps in the heap.
    converted = {
        name: torch.empty(shape, dtype=dtype, device=device or checkpoint.devices[source.name])
        for name, (source, shape) in empty.items()
        if isinstance(source, Source) and checkpoint.dtypes[source.name] != dtype
    }
    total = sum(math.prod(shape) * dtype.itemsize for _, shape in empty.values())
    broken: list[str] = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading", disable=total < _SHOW_PROGRESS_FROM) as bar:
        for name, (source, shape) in empty.items():
            if isinstance(source, Computed):
                tensor = _compute(checkpoint, source, name, shape, device, dtype)
            elif name in converted:
                tensor = _convert(checkpoint, source.name, source.first * math.prod(shape[1:]), converted.pop(name))
            else:
                tensor = checkpoint.read(source.name, source.first * math.prod(shape[1:]), shape).to(device)
            if tensor.min().isnan():
                broken += _stored(source)
            model.set_parameter(name, nn.Parameter(tensor))
            bar.update(tensor.nbytes)
    if broken:
        raise CheckpointError(f"{checkpoint} holds NaN in {', '.join(dict.fromkeys(broken))}. Download or convert it again.")
    if cfg.tied:
        _check_tied_copies(checkpoint, family.TIED)
    return model.eval()


def stored_dtype(checkpoint: Checkpoint, sources: Mapping[str, Source | Computed]) -> torch.dtype:
    """The dtype of the stored embedding, in which a model is loaded if none is asked for.

    Args:
        checkpoint: a checkpoint.
        sources: where its family finds every parameter.
    """
    return checkpoint.dtypes[next(iter(_stored(sources["embed.weight"])))]


def _stored(source: Source | Computed, shape: tuple[int, ...] = ()) -> Mapping[str, tuple[int, ...]]:
    """The stored tensors that a parameter of some shape is read from, and their shapes."""
    return source.stored if isinstance(source, Computed) else {source.name: source.shape or shape}


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
    tensor = source.compute(*(checkpoint.read(stored).to(device, dtype) for stored in source.stored)).contiguous()
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


def _usable(device: torch.device | str | None) -> torch.device | None:
    """The device to load to; CUDA where there is one is the bridge's choice, not this function's."""
    if device is None:
        return None
    try:
        asked = torch.device(device)
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise LoopedError(f"device={device!r} was asked, which cannot be used here ({error}). Choose another.") from error
    if asked.type == "meta":
        raise LoopedError("device='meta' holds no values; choose a device to compute on.")
    return asked


def _with_counts(cfg: LoopedConfig, n_loops: int | None, l_cycles: int | None) -> LoopedConfig:
    if l_cycles is not None and cfg.l_cycles is None:
        raise LoopedError(
            f"l_cycles={l_cycles!r} was asked, but a {cfg.family} model has one looped stack; n_loops= says how often it runs."
        )
    changes = {"n_loops": n_loops, "l_cycles": l_cycles}
    return cfg.replace(**{name: check_count(name, count) for name, count in changes.items() if count is not None})


def _check_tensors(
    checkpoint: Checkpoint, family: Family, model: LoopedModel, sources: Mapping[str, Source | Computed]
) -> None:
    """Compare names and shapes with what the config asks for, before any data is read."""
    expected: dict[str, tuple[tuple[int, ...], list[str]]] = {}
    parameters = model.canonical_parameters()
    if unknown := [name for name in sources if name not in parameters]:
        near = difflib.get_close_matches(unknown[0], parameters, n=3)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise CheckpointError(
            f"sources() of the family {model.cfg.family} names {', '.join(map(repr, unknown[:4]))}, for which this model has "
            f"no parameter.{hint} All: LoopedModel(cfg).canonical_parameters()."
        )
    for name, parameter in parameters.items():
        for stored, shape in _stored(sources.get(name, Source(name)), tuple(parameter.shape)).items():
            fields = expected.setdefault(stored, (shape, []))[1]
            fields += [field for field in _shape_fields(name) if field not in fields]
    problems = [f"missing: {name} {list(shape)}" for name, (shape, _) in expected.items() if name not in checkpoint.shapes]
    known = {*expected, *(family.TIED if model.cfg.tied else ())}
    for name, found in checkpoint.shapes.items():
        if name not in known and not any(fnmatch(name, pattern) for pattern in family.IGNORED):
            problems.append(f"unexpected: {name} {list(found)}")
        if name in expected and found != expected[name][0]:
            shape, fields = expected[name]
            follows = ", ".join(f"{field}={getattr(model.cfg, field)}" for field in fields)
            problems.append(f"wrong shape: {name} should be {list(shape)} from {follows}, but is {list(found)}")
        elif name in expected and not checkpoint.dtypes[name].is_floating_point:
            problems.append(
                f"not floating point: {name} is {checkpoint.dtypes[name]}; quantised checkpoints are not implemented"
            )
    if problems:
        raise CheckpointError(
            f"{checkpoint} does not hold the tensors of the {model.cfg.family} model in its config.json "
            f"({model.cfg.schedule.describe()}):\n  "
            + "\n  ".join(problems)
            + "\nUse the config.json these tensors were saved with."
        )


def _shape_fields(name: str) -> list[str]:
    """The `LoopedConfig` fields that the shape of a parameter follows from."""
    if re.search(r"embed|unembed", name):
        return ["d_vocab", *(["n_kv_heads", "d_head"] if "value" in name else ["d_model"])]
    if match := re.search(r"attn\.(\w+?)(_norm)?\.", name):
        return ["n_kv_heads" if match[1] in ("k", "v", "value_gate") else "n_heads", "d_head", "d_model"]
    return ["d_mlp", "d_model"] if ".mlp." in name else ["d_model"]


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
