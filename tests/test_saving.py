"""Weight files that are broken, half written, or written and read at once."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from zoo import GOLDEN

import tl_looped.checkpoints.open as open_module
import tl_looped.checkpoints.save as save_module
from tl_looped import LoopedBridge, LoopedConfig, LoopedError, checkpoints
from tl_looped.checkpoints import MemoryCheckpoint, load_model, open_checkpoint, save_model
from tl_looped.checkpoints.files import InSafetensors
from tl_looped.errors import CheckpointError
from tl_looped.toys.hop import hop_tokenizer


def _raw_safetensors(header: bytes, data: bytes = bytes(8)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


WHAT_THE_FORMAT_FORBIDS = {  # https://github.com/huggingface/safetensors#format
    "overlap": json.dumps({"a": _entry(), "b": _entry(shape=[1], data_offsets=[4, 8])}).encode(),
    "negative offset": json.dumps({"a": _entry(data_offsets=[-8, 0])}).encode(),
    "a name twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "hole": json.dumps({"a": _entry(shape=[1], data_offsets=[4, 8])}).encode(),
    "float shape": json.dumps({"a": _entry(shape=[2.0])}).encode(),
    "UTF-16": json.dumps({"a": _entry()}).encode("utf-16"),
    "metadata of numbers": json.dumps({"__metadata__": {"a": 1}, "a": _entry()}).encode(),
    "blanks": json.dumps({"a": _entry()}).encode() + b" " * 100_000_001,
    "nothing": b"",
}


@pytest.mark.parametrize("fault", WHAT_THE_FORMAT_FORBIDS)
def test_a_weight_file_that_its_library_refuses_is_refused(fault: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((GOLDEN / "ouro" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(_raw_safetensors(WHAT_THE_FORMAT_FORBIDS[fault]))
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or not a safetensors file"):
        open_checkpoint(tmp_path)


def test_a_pointer_in_place_of_weights_and_a_tensor_in_two_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((GOLDEN / "ouro" / "config.json").read_bytes())
    whole = load_file(GOLDEN / "ouro" / "model.safetensors")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="pointer of Git LFS"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for k in (1, 2):
        save_file(whole, tmp_path / f"model-0000{k}-of-00002.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(whole)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match=r"lies in model-00001-of-00002.safetensors and in model-00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("family", ["ouro", "huginn", "parcae"])
def test_infinity_is_refused_stored_or_made_by_a_dtype(family: str) -> None:
    config = json.loads((GOLDEN / family / "config.json").read_text())
    tensors = load_file(GOLDEN / family / "model.safetensors")
    name = next(name for name in tensors if "lm_head" in name or "wte" in name or "mlp" in name)
    for value, dtype in ((math.inf, None), (-math.inf, None), (1e5, torch.float16)):  # float16 ends at 65504
        broken = {key: tensor.clone() for key, tensor in tensors.items()}
        broken[name].view(-1)[3] = value
        if "lm_head.weight" in broken and "transformer.wte.weight" in broken:  # copies of one matrix
            broken["lm_head.weight"] = broken["transformer.wte.weight"] = broken[name]
        with pytest.raises(CheckpointError, match=rf"infinity in .*{re.escape(name)}|infinity in .*wte.weight"):
            load_model(MemoryCheckpoint(config, broken), dtype=dtype)


class _Killed(BaseException):
    pass


def _small(seed: int) -> LoopedBridge:
    cfg = LoopedConfig(d_model=8 * seed, n_heads=2, d_vocab=12, n_core=seed, n_loops=2)
    return LoopedBridge.from_config(cfg, seed=seed, tokenizer=hop_tokenizer() if seed == 1 else None)


def _which(directory: Path, models: dict[str, LoopedBridge]) -> str:
    """Which of the models a directory answers as, tokenizer included, or "refused"."""
    try:
        found = LoopedBridge.from_pretrained(directory, device="cpu")
    except CheckpointError:
        return "refused"
    for name, model in models.items():
        mine, its = found.original_model.canonical_parameters(), model.original_model.canonical_parameters()
        if mine.keys() == its.keys() and all(torch.equal(p, its[n]) for n, p in mine.items()):
            assert found.looped_cfg == model.looped_cfg and (found.tokenizer is None) == (model.tokenizer is None)
            return name
    raise AssertionError("a mixture")


@pytest.mark.filterwarnings("ignore:the tokenizer in")  # read while it was replaced; then the load is refused
@pytest.mark.parametrize("turn", ["one file, then shards", "shards, then one file"])
def test_a_save_that_is_killed_leaves_the_old_checkpoint_the_new_one_or_what_is_refused(
    turn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the file system is once the last one; before each, somebody else loads the directory."""
    models = {"old": _small(1), "new": _small(2)}
    limits = dict(zip(models, (10**9, 20_000) if turn.startswith("one") else (1_000, 10**9), strict=True))
    calls, last, reads = 0, 0, list[str]()

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                reads.append(_which(directory, models))
            if calls >= last:  # the dead do not tidy up
                raise _Killed
            return function(*args, **kwargs)

        return call

    def save(name: str) -> None:
        save_model(models[name].original_model, directory, models[name].tokenizer, max_shard_bytes=limits[name])

    found = list[str]()
    while not found or found[-1] != "done":
        last += 1
        directory = tmp_path / str(last)
        save("old")
        (directory / "README.md").write_text("mine")
        with monkeypatch.context() as patch:
            calls = 0
            for owner, name in ((os, "replace"), (save_module.shutil, "rmtree"), (save_module, "save_file"), (Path, "unlink")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                save("new")
            except _Killed:
                found.append(_which(directory, models))
            else:
                found.append("done")
        save("new")
        assert _which(directory, models) == "new" and (directory / "README.md").read_text() == "mine"
        assert not list(directory.glob(".*"))  # what a killed save has left is gone
    assert set(found) <= {"old", "refused", "new", "done"} and len(found) > 8
    assert found[0] == reads[0] == "old" and "new" in found


@pytest.mark.filterwarnings("ignore:the tokenizer in")
@pytest.mark.parametrize("at", ["config.json", "a tensor", "the tokenizer"])
def test_a_load_during_which_another_model_is_saved_is_refused(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"old": _small(1), "new": _small(2)}
    models["old"].save_pretrained(tmp_path)

    def then(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            models["new"].save_pretrained(tmp_path)
            return value

        return call

    owner, name = {
        "config.json": (open_module, "_read_json"),
        "a tensor": (InSafetensors, "read"),
        "the tokenizer": (checkpoints, "load_tokenizer"),
    }[at]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, then(getattr(owner, name)))
        assert _which(tmp_path, models) == "refused"
    assert _which(tmp_path, models) == "new"


def test_two_savers_leave_one_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"first": _small(1), "second": _small(2)}
    write = save_module.save_file

    def and_another(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(save_module, "save_file", write)
        models["second"].save_pretrained(tmp_path)
        assert _which(tmp_path, models) == "second" and len(list(tmp_path.glob(".tl_looped-save-*"))) == 1  # that of the first
        write(*args, **kwargs)

    monkeypatch.setattr(save_module, "save_file", and_another)
    models["first"].save_pretrained(tmp_path)
    assert _which(tmp_path, models) == "first" and not list(tmp_path.glob(".*"))


def test_a_save_writes_through_no_link_keeps_permissions_and_removes_a_foreign_tokenizer(tmp_path: Path) -> None:
    models = {"old": _small(1), "new": _small(2)}
    blob, place = tmp_path / "blob", tmp_path / "place"
    models["old"].save_pretrained(place)
    (place / "model.safetensors").chmod(0o600)
    (place / "config.json").rename(blob)
    (place / "config.json").symlink_to(blob)
    before = blob.read_bytes()
    models["new"].save_pretrained(place)
    assert _which(place, models) == "new" and not (place / "tokenizer.json").exists()
    assert blob.read_bytes() == before and not (place / "config.json").is_symlink()
    assert (place / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_what_was_there_and_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"old": _small(1), "new": _small(2)}
    models["old"].save_pretrained(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(save_module, "save_file", full)
        with pytest.raises(LoopedError, match=r"cannot be saved in .*No space left.*What lay there is unchanged"):
            models["new"].save_pretrained(tmp_path)
    assert _which(tmp_path, models) == "old" and not list(tmp_path.glob(".*"))
    (tmp_path / "file").touch()
    with pytest.raises(LoopedError, match="cannot be saved in"):
        models["new"].save_pretrained(tmp_path / "file")
