"""From a `LoopedModel` to a checkpoint.

At every moment of a save, a directory holds the old checkpoint whole, the new one whole, or what `open_checkpoint` refuses. All
files are written beside the old ones. Then config.json is replaced first and the weights last, and both name the save that they
are of; in between they name different ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LoopedError
from ..model import LoopedModel
from .open import SAVE
from .tokenizer import TOKENIZER_FILES

try:
    import fcntl
except ImportError:  # Windows, where two savers at a time are not kept apart
    fcntl = None

_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_DRAFT = ".tl_looped-save-"  # and a random name: the directory in which a save is prepared


def save_model(
    model: LoopedModel, directory: str | Path, tokenizer: Any = None, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write config.json, every parameter once, in model.safetensors or in shards with their index, and the tokenizer.

    A checkpoint that lies there is replaced as a whole: its tokenizer goes too if the new one has none. Other files stay.
    Symbolic links are replaced, and what they point to is left alone. Until the new files are written, twice the space is
    needed.

    Args:
        model: the model.
        directory: created if needed.
        tokenizer: a transformers tokenizer, or None.
        max_shard_bytes: size above which the weights are split.

    Raises:
        LoopedError: the directory cannot be written, or the disk is full; what lay there is then unchanged.
    """
    directory = Path(directory)
    changed = False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _draft(directory) as draft:
            _write(model, draft, tokenizer, max_shard_bytes)
            with _locked(directory):
                changed = True
                _replace(directory, draft)
    except (OSError, SafetensorError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        left = "An earlier checkpoint there may be lost" if changed else "What lay there is unchanged"
        raise LoopedError(
            f"the model cannot be saved in {str(directory)!r}: {reason}. {left}; make room there, or choose another place."
        ) from error


def _write(model: LoopedModel, draft: Path, tokenizer: Any, max_shard_bytes: int) -> None:
    save_id, parameters = uuid4().hex, model.canonical_parameters()
    config = {
        "model_type": "tl_looped",
        "dtype": str(parameters["embed.weight"].dtype).removeprefix("torch."),
        "looped_config": model.cfg.to_dict(),
        SAVE: save_id,
    }
    _write_json(draft / "config.json", config)
    shards = list(_shards(parameters, max_shard_bytes))
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: parameters[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, draft / file, metadata={"format": "pt", SAVE: save_id})
    if len(files) > 1:
        total = sum(parameter.nbytes for parameter in parameters.values())
        index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        metadata = {"total_size": total, SAVE: save_id}
        _write_json(draft / "model.safetensors.index.json", {"metadata": metadata, "weight_map": index})
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(draft)
        except Exception as error:  # its library has no class of its own for a full disk
            raise OSError(f"its tokenizer cannot be written ({error})") from error
    for file in draft.rglob("*"):
        if file.is_file():
            _sync(file)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _replace(directory: Path, draft: Path) -> None:
    """Put the new files in the place of the old ones."""
    new = {file.name for file in draft.iterdir()}
    weights = sorted(name for name in new if re.fullmatch(_WEIGHTS, name))  # an index comes after its shards
    _put(draft / "config.json", directory)
    _sync(directory)
    for name in TOKENIZER_FILES - new:
        _remove(directory / name)
    for name in sorted(new - {"config.json", *weights}):
        _put(draft / name, directory)
    for name in weights:
        _put(draft / name, directory)
    # A file with all weights is preferred to shards, so that an old one goes first.
    for name in sorted((file.name for file in directory.glob("model*.safetensors*")), key=lambda name: (len(name), name)):
        if re.fullmatch(_WEIGHTS, name) and name not in weights:
            _remove(directory / name)
    _sync(directory)


def _put(file: Path, directory: Path) -> None:
    place = directory / file.name
    if place.is_dir() and not place.is_symlink() and file.is_dir():
        shutil.rmtree(place)
    elif place.is_file() and not place.is_symlink():
        file.chmod(stat.S_IMODE(place.stat().st_mode))
    os.replace(file, place)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _sync(place: Path) -> None:
    """Wait until a file or directory is on the disk; a rename that overtakes it would show an empty file after a power cut."""
    if fcntl is None:  # Windows opens no directories, and syncs files that are open for writing only
        return
    opened = os.open(place, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _draft(directory: Path) -> Generator[Path, None, None]:
    """A directory in which a save is prepared; those that killed saves have left are removed."""
    draft = directory / f"{_DRAFT}{uuid4().hex}"
    with _locked(directory):
        for left in directory.glob(f"{_DRAFT}*"):
            with _locked(left, wait=False) as is_left:
                if is_left:
                    shutil.rmtree(left, ignore_errors=True)
        draft.mkdir()
        alive = _locked(draft)
        alive.__enter__()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        alive.__exit__(None, None, None)


@contextmanager
def _locked(directory: Path, wait: bool = True) -> Generator[bool, None, None]:
    """Keep other savers out of a directory, until the process ends at the latest; False if one is in it and we do not wait."""
    if fcntl is None:
        yield wait
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks
            yield wait
        else:
            yield True
    finally:
        os.close(opened)


def _shards(parameters: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, parameter in parameters.items():
        if names and size + parameter.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += parameter.nbytes
    yield names
