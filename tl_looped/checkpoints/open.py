"""A checkpoint: the config and the named tensors of a directory, a Hub repository, a bundled toy or a model in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor

from ..errors import CheckpointError
from .files import InMemory, InPickle, InSafetensors, pickle_header, safetensors_header
from .quantised import Quantised, dequantised

SAVE = "save_id"  # in config.json and in the metadata of weights: which save they are of
_TOYS = Path(__file__).parents[1] / "toys" / "checkpoints"


class Checkpoint:
    """A config and named tensors, none of which is read before it is asked for.

    Args:
        config: the content of config.json.
        stored: the tensors.
        path: the directory they lie in, if any.
        save_id: which save they are of, if that is known.

    Attributes:
        quantised: what is stored in few bits and dequantised when it is read; None if nothing is.

    Raises:
        CheckpointError: tensors are quantised in a way that is not implemented.
    """

    def __init__(
        self,
        config: dict[str, Any],
        stored: Mapping[str, InSafetensors | InPickle | InMemory],
        path: Path | None = None,
        save_id: object = None,
    ):
        self.path: Path | None = path
        self.save_id: object = save_id
        self.config: dict[str, Any]
        self.quantised: Quantised | None
        self.config, self._stored, self.quantised = dequantised(config, stored, self)
        self.shapes: dict[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self._stored.items()}
        self.dtypes: dict[str, torch.dtype] = {name: tensor.dtype for name, tensor in self._stored.items()}
        self.devices: dict[str, torch.device] = {name: tensor.device for name, tensor in self._stored.items()}

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

    def with_files(self, names: Iterable[str]) -> dict[str, Any]:
        """The content of config.json, and of files that lie beside it under their names, where they do.

        Args:
            names: the files, JSON or YAML.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        files = [] if self.path is None else [self.path / name for name in names if (self.path / name).is_file()]
        return self.config | {file.name: _read_json(file) if file.suffix == ".json" else _read_yaml(file) for file in files}

    def check_unchanged(self) -> None:
        """Refuse a directory into which another model has been saved since it was opened.

        Raises:
            CheckpointError: its config.json is of another save.
        """
        if self.path is not None and _read_json(self.path / "config.json").get(SAVE) != self.save_id:
            raise CheckpointError(f"another model was saved in {self.path} while this one was loaded. Load it again.")

    def __str__(self) -> str:
        return f"the checkpoint in {self.path}" if self.path else "the model in memory"


class MemoryCheckpoint(Checkpoint):
    """The config and the tensors of a model that is already in memory. Parameters read from it share its memory."""

    def __init__(self, config: dict[str, Any], tensors: Mapping[str, Tensor]):
        super().__init__(config, {name: InMemory(tensor) for name, tensor in tensors.items()})


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
    _refuse_adapters(path)
    _refuse_think_at_hard(path)
    config = _read_json(path / "config.json")
    stored: dict[str, InSafetensors | InPickle] = {}
    files, index, saves = _weight_files(path)
    save_id = config.pop(SAVE, None)
    if "quantization_config" not in config and (path / "hf_quant_config.json").is_file():
        said = _read_json(path / "hf_quant_config.json").get("quantization")
        config["quantization_config"] = {"quant_method": "modelopt", **(said if isinstance(said, dict) else {})}
    saves["config.json"] = save_id
    for file in files:
        held, metadata = safetensors_header(file) if file.suffix == ".safetensors" else (pickle_header(file), {})
        if again := sorted(held.keys() & stored.keys()):
            raise CheckpointError(
                f"{', '.join(again[:8])} lies in {stored[again[0]].path.name} and in {file.name}, in {path}. Download the "
                "checkpoint again."
            )
        stored |= held
        saves[file.name] = metadata.get(SAVE)
    if len({json.dumps(of) for of in saves.values()}) > 1:
        raise CheckpointError(
            f"the files in {path} are not of one save ({', '.join(f'{name}: {of}' for name, of in saves.items())}): a save was "
            "interrupted or is under way, or a file was replaced. Save the model again; after replacing weights on purpose, "
            f"delete {SAVE!r} from config.json and save them without metadata."
        )
    if lost := sorted(name for name, file in index.items() if name not in stored or stored[name].path.name != file):
        raise CheckpointError(
            f"the index in {path} promises tensors that their files do not hold: {', '.join(lost)} in "
            f"{', '.join(sorted({index[name] for name in lost}))}. Download these files again."
        )
    return Checkpoint(config, stored, path, save_id)


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


def _refuse_adapters(path: Path) -> None:
    """Refuse an adapter beside the weights: without it, the model is another one."""
    patterns = ("adapter_config.json", "adapter_model*", "adapters*.safetensors", "adapters*.npz")
    if found := sorted(file.name for pattern in patterns for file in path.glob(pattern)):
        raise CheckpointError(
            f"{path} holds an adapter ({', '.join(found)}), which is not read: the weights beside it alone are another model. "
            "Merge it (PEFT: merge_and_unload(), then save_pretrained) and load the result, or move the adapter away to load "
            "the model without it."
        )


def _refuse_think_at_hard(path: Path) -> None:
    """Refuse a Think-at-Hard model, whose config.json and weights are those of the plain decoder of its first iteration."""
    if (path / "tah_config.json").is_file():
        raise CheckpointError(
            f"{path} holds a Think-at-Hard model (tah_config.json). What its config.json describes is its first iteration "
            "alone; the adapter, the decider and the way from logits back to embeddings are not read. Load it with its own "
            "code, and trace that model: LoopedBridge.trace."
        )


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
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}. Download it again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not an object. Download it again.")
    return cast("dict[str, Any]", content)


def _read_yaml(file: Path) -> object:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} cannot be read as YAML ({' '.join(str(error).split())}). Restore it.") from error


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str], dict[str, object]]:
    """The files that hold the tensors; if there is an index, the file each tensor must be in, and of which save it is."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (path / whole).is_file():
            return [path / whole], {}, {}
        if (path / f"{whole}.index.json").is_file():
            content = _read_json(path / f"{whole}.index.json")
            index, metadata = content.get("weight_map"), content.get("metadata")
            save_id = metadata.get(SAVE) if isinstance(metadata, dict) else None
            if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
                raise CheckpointError(f"{path / whole}.index.json has no weight_map. Download it again.")
            names = sorted(set(index.values()))
            if missing := [name for name in names if Path(name).name != name or not (path / name).is_file()]:
                raise CheckpointError(
                    f"{path} lacks {len(missing)} of the {len(names)} files in its index: {', '.join(missing)}. Download them."
                )
            return [path / name for name in names], index, {f"{whole}.index.json": save_id}
    found = _listing(path)
    raise CheckpointError(
        f"{path} holds no weights: model.safetensors or pytorch_model.bin, or the index of either, was looked for; "
        f"it has {found}. Download them, or rename the file that holds them."
    )
