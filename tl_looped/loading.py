"""Checkpoints: a directory or Hub repository of tensors becomes a `LoopedModel`, and back."""

from __future__ import annotations

import difflib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import families
from .config import LoopedConfig
from .errors import CheckpointError, LoopedError
from .families import Computed, Family, Source
from .model import LoopedModel
from .schedule import check_count

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
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_SHOW_PROGRESS_FROM = 1_000_000_000  # bytes
_BUFFER = 1 << 20  # elements
_TOYS = Path(__file__).parent / "toys" / "checkpoints"


@dataclass(frozen=True)
class _InSafetensors:
    """A tensor in a safetensors file. Its bytes are read into fresh memory: a memory map would count twice while loading."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    device = torch.device("cpu")

    def read(self, start: int, count: int) -> Tensor:
        out = torch.empty(count, dtype=self.dtype, device="cpu")
        with self.file.open("rb") as stream:
            stream.seek(self.offset + start * self.dtype.itemsize)
            if stream.readinto(out.view(torch.uint8).numpy().data) != out.nbytes:
                raise CheckpointError(f"{self.file} ended while a tensor was read: it has changed. Load again.")
        return out


@dataclass(frozen=True)
class _InPickle:
    """A tensor in a .bin file, mapped anew for every read so that pages do not pile up."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str
    device = torch.device("cpu")

    def read(self, start: int, count: int) -> Tensor:
        return _load_pickle(self.file)[self.name].reshape(-1)[start : start + count].clone()


@dataclass(frozen=True)
class _InMemory:
    """A tensor that somebody else holds; reading shares its memory."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def read(self, start: int, count: int) -> Tensor:
        return self.tensor.detach().reshape(-1)[start : start + count]


class Checkpoint:
    """A config and named tensors, none of which is read before it is asked for.

    Args:
        config: the content of config.json.
        stored: the tensors.
        path: the directory they lie in, if any.
    """

    def __init__(
        self, config: dict[str, Any], stored: Mapping[str, _InSafetensors | _InPickle | _InMemory], path: Path | None = None
    ):
        self.config: dict[str, Any] = config
        self.path: Path | None = path
        self._stored = stored
        self.shapes: dict[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in stored.items()}
        self.dtypes: dict[str, torch.dtype] = {name: tensor.dtype for name, tensor in stored.items()}
        self.devices: dict[str, torch.device] = {name: tensor.device for name, tensor in stored.items()}

    def read(self, name: str, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor, or the part of it that holds `shape` elements from element `start` on.

        Args:
            name: its stored name.
            start: the first element, counted through the whole tensor.
            shape: the shape of the part; None for the whole tensor.

        Raises:
            CheckpointError: there is no such tensor, or its file has changed.
        """
        if name not in self._stored:
            raise CheckpointError(f"tensor {name!r} was asked; {self} has {', '.join(sorted(self._stored))}.")
        shape = self.shapes[name] if shape is None else shape
        return self._stored[name].read(start, math.prod(shape)).view(shape)

    def __str__(self) -> str:
        return f"the checkpoint in {self.path}" if self.path else "the model in memory"


class MemoryCheckpoint(Checkpoint):
    """The config and the tensors of a model that is already in memory. Parameters read from it share its memory."""

    def __init__(self, config: dict[str, Any], tensors: Mapping[str, Tensor]):
        super().__init__(config, {name: _InMemory(tensor) for name, tensor in tensors.items()})


def open_checkpoint(name_or_dir: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a local directory, a Hub repository or a bundled toy; no tensor is read and no code of the repository is run.

    Args:
        name_or_dir: a directory, a Hub id such as "ByteDance/Ouro-1.4B", or "toy:" and a name in `tl_looped.toys.TOYS`.
        revision: a branch, tag or commit of the Hub repository.

    Raises:
        CheckpointError: there is no such checkpoint, or its files are incomplete or damaged.
    """
    if not isinstance(name_or_dir, (str, Path)) or not str(name_or_dir).strip():
        raise CheckpointError(f"{name_or_dir!r} was asked; pass a directory or a Hub id such as 'ByteDance/Ouro-1.4B'.")
    path = _toy(name_or_dir) if str(name_or_dir).startswith("toy:") else Path(name_or_dir).expanduser()
    looks_like_a_path = path.is_absolute() or len(path.parts) > 2 or str(name_or_dir).startswith(".")
    if path.is_file() or (looks_like_a_path and not path.is_dir()):
        kind = "a file" if path.is_file() else "not a directory: it does not exist"
        raise CheckpointError(
            f"{str(name_or_dir)!r} was asked; it is {kind}. Pass the directory that holds config.json and the tensors."
        )
    if not path.is_dir():
        path = _download(str(name_or_dir), revision)
    elif revision is not None:
        raise CheckpointError(
            f"revision={revision!r} was asked of the local directory {path}; revisions belong to Hub ids. Leave it out."
        )
    config = _read_json(path / "config.json")
    stored: dict[str, _InSafetensors | _InPickle] = {}
    files, index = _weight_files(path)
    for file in files:
        stored |= _safetensors_header(file) if file.suffix == ".safetensors" else _pickle_header(file)
    if lost := sorted(name for name, file in index.items() if name not in stored or stored[name].file.name != file):
        raise CheckpointError(
            f"the index in {path} promises tensors that their files do not hold: {', '.join(lost)} in "
            f"{', '.join(sorted({index[name] for name in lost}))}. Download these files again."
        )
    return Checkpoint(config, stored, path)


def _toy(name: str | Path) -> Path:
    """The directory of a bundled checkpoint."""
    toys = {f"toy:{directory.name}": directory for directory in sorted(_TOYS.iterdir())}
    if str(name) not in toys:
        raise CheckpointError(f"{str(name)!r} was asked; the bundled toys are {', '.join(toys)}.")
    return toys[str(name)]


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))

    small = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
    asked = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        path = fetch(*small)
        return path if any(path.glob("*.safetensors")) else fetch(*small, "*.bin")
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{asked} was asked; it is not a directory, it is not in the local Hub cache, and the Hub could not be reached "
            "(no network, or HF_HUB_OFFLINE is set). Check the spelling, go online, or pass a directory."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{asked} was asked; it is not a directory, and the Hub does not provide it: {reason}. "
            "Check the spelling, pass a directory, or log in if the repository is gated."
        ) from error


def _listing(directory: Path) -> str:
    """What a directory holds, for an error; of many entries the first."""
    names = sorted(p.name for p in directory.iterdir())
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        found = _listing(file.parent)
        raise CheckpointError(
            f"{file.parent} has no {file.name}; it has {found}. Pass the directory that holds the checkpoint."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not an object. Download it again.")
    return cast("dict[str, Any]", content)


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the tensors, and the file each tensor must be in if there is an index."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (path / whole).is_file():
            return [path / whole], {}
        if (path / f"{whole}.index.json").is_file():
            index = _read_json(path / f"{whole}.index.json").get("weight_map")
            if not isinstance(index, dict) or not index:
                raise CheckpointError(f"{path / whole}.index.json has no weight_map. Download it again.")
            names = sorted(set(index.values()))
            if missing := [name for name in names if Path(name).name != name or not (path / name).is_file()]:
                raise CheckpointError(
                    f"{path} lacks {len(missing)} of the {len(names)} files in its index: {', '.join(missing)}. Download them."
                )
            return [path / name for name in names], index
    found = _listing(path)
    raise CheckpointError(
        f"{path} holds no weights: model.safetensors or pytorch_model.bin, or the index of either, was looked for; "
        f"it has {found}. Download them, or rename the file that holds them."
    )


def _safetensors_header(file: Path) -> dict[str, _InSafetensors]:
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
        tensors[name] = _InSafetensors(file, dtype, shape, 8 + length + first)
    return tensors


def _pickle_header(file: Path) -> dict[str, _InPickle]:
    warnings.warn(f"{file} is a pickle; it is read with weights_only=True. Safetensors would be safer.", stacklevel=3)
    return {name: _InPickle(file, t.dtype, tuple(t.shape), name) for name, t in _load_pickle(file).items()}


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


def save_model(model: LoopedModel, directory: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json and model.safetensors (above `max_shard_bytes`: shards and their index), every parameter once.

    Args:
        model: the model.
        directory: created if needed; weights that an earlier save left there are replaced.
        max_shard_bytes: size above which the weights are split.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = model.canonical_parameters()
    config = {
        "model_type": "tl_looped",
        "dtype": str(parameters["embed.weight"].dtype).removeprefix("torch."),
        "looped_config": model.cfg.to_dict(),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for old in directory.glob("model*.safetensors*"):
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name):
            old.unlink()
    shards = list(_shards(parameters, max_shard_bytes))
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: parameters[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(parameter.nbytes for parameter in parameters.values())
        index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        content = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(content + "\n", encoding="utf-8")


def _shards(parameters: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, parameter in parameters.items():
        if names and size + parameter.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += parameter.nbytes
    yield names


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer that lies in a directory, without running code of the repository; None if there is none."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about keys of config.json that no tokenizer reads
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # what an unknown model_type raises differs between versions of transformers
        try:
            return PreTrainedTokenizerFast.from_pretrained(path)
        except Exception:  # damaged files raise anything
            warnings.warn(f"the tokenizer in {path} cannot be loaded ({error}); pass tokenizer= yourself.", stacklevel=3)
            return None
