"""A store of activations that lost something, or was damaged: what is noticed, and what the same call mends."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from collecting import SIZES, TINY, content, quiet, same, tiny
from safetensors.torch import load_file, save_file
from zoo import random_tokens

from tl_looped import LoopedBridge, LoopedError, load_activations
from tl_looped._writing import draft_of
from tl_looped.activations import ActivationStore, collector, shards

PROMPTS = list(random_tokens(6, 5))
NAME = "loops.2.blocks.1.hook_resid_post"
RECORD = "collection.safetensors"


def collected(out: Path, prompts: Any = PROMPTS, model: LoopedBridge | None = None, **settings: Any) -> ActivationStore:
    return quiet(model or tiny(), prompts, "resid_post", out, layers=-1, **{"shard_bytes": 1000, **settings})


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}


@pytest.mark.parametrize("where", ["metadata", "shape", "values", "last values", "token", "failed"])
def test_a_flipped_bit_is_noticed_by_the_same_call_which_writes_that_shard_again(where: str, tmp_path: Path) -> None:
    whole = collected(tmp_path)
    expected, before = content(whole), times(tmp_path)
    shard = whole.shards[1]
    length = int.from_bytes(shard.path.read_bytes()[:8], "little")
    *_, start, end = shard.tensors[{"token": "index.row.token", "failed": "index.failed"}.get(where, NAME)]
    header = {"metadata": b'"block":"', "shape": b'"shape":['}
    if where in header:
        at = shard.path.read_bytes().index(header[where]) + len(header[where])
    else:
        at = 8 + length + (end - 1 if where == "last values" else start)
    flip(shard.path, at)
    if where in header:
        with pytest.raises(LoopedError, match=r"shard-000001.* is damaged: .*Call the same collect again"):
            load_activations(tmp_path)
    elif where == "token":
        with pytest.raises(LoopedError, match=r"index\.row\.token is not what was written"):
            load_activations(tmp_path).to_dataframe()
    store = collected(tmp_path)
    found, after = content(store), times(tmp_path)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert [name for name in after if after[name] != before[name]] == ["shard-000001.safetensors"]


def test_shards_of_before_checksums_are_read_and_kept(tmp_path: Path) -> None:
    whole = collected(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    (tmp_path / "old" / "extent.json").unlink()
    for shard in whole.shards:
        path = tmp_path / "old" / shard.path.name
        save_file(load_file(path), path, {name: text for name, text in shard.metadata.items() if name != "weights"})
    before = times(tmp_path / "old")
    assert same(load_activations(tmp_path / "old"), whole) and same(collected(tmp_path / "old"), whole)
    assert times(tmp_path / "old") == before
    damaged = tmp_path / "old" / "shard-000001.safetensors"
    flip(damaged, damaged.read_bytes().rindex(b"{}"))  # no prompt failed
    with pytest.raises(LoopedError, match=r"index\.failed is not what was written"):
        _ = load_activations(tmp_path / "old").failed
    assert same(collected(tmp_path / "old"), whole)


@pytest.mark.parametrize("how", ["removed", "damaged", "emptied"])
def test_a_lost_record_is_written_again_where_the_shards_are_of_this_collection(how: str, tmp_path: Path) -> None:
    whole = collected(tmp_path)
    expected, before, record = content(whole), times(tmp_path), tmp_path / RECORD
    for other in ({"positions": -1}, {"model": LoopedBridge.from_config(TINY, seed=1)}, {"n_loops": 4, "loops": slice(3)}):
        if how == "removed":
            record.unlink(missing_ok=True)
        elif how == "damaged":
            flip(record, record.stat().st_size // 2)
        else:
            record.write_bytes(b"")
        with pytest.raises(LoopedError, match=r"is no store of activations: .* call the same collect again"):
            load_activations(tmp_path)
        with pytest.raises(LoopedError, match="does not say that it is of this collection and of these weights"):
            collected(tmp_path, **other)
        found = content(collected(tmp_path))
        assert all(torch.equal(found[key], expected[key]) for key in expected) and times(tmp_path) == before


def losing(monkeypatch: pytest.MonkeyPatch, lose: Any, at: int) -> None:
    """Has something lost before the writing of a block begins."""
    write = collector.Collector.write

    def writes(self: Any, number: int, *given: Any) -> None:
        if number == at:
            given[1].wait()  # until the shards before it are there
            lose()
        write(self, number, *given)

    monkeypatch.setattr(collector.Collector, "write", writes)


def test_a_record_that_is_removed_meanwhile_is_there_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, (tmp_path / RECORD).unlink, 1)
    assert collected(tmp_path).prompts == list(range(6))


def test_a_directory_that_is_removed_meanwhile_is_told_of_and_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "store"
    losing(monkeypatch, lambda: shutil.rmtree(place), 1)
    with pytest.raises(LoopedError, match=r"lost 1 shard while collect ran, such as shard-000000.*call it again"):
        collected(place)
    monkeypatch.undo()
    assert same(collected(place), collected(tmp_path / "whole"))


def test_a_draft_that_is_removed_meanwhile_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = shards.Draft.commit

    def removed(self: Any, *given: Any) -> None:
        self.path.unlink()
        commit(self, *given)

    monkeypatch.setattr(shards.Draft, "commit", removed)
    with pytest.raises(LoopedError, match=r"shard-000000.* was removed while it was written. Call again") as raised:
        collected(tmp_path)
    assert "room" not in str(raised.value)


def test_the_loss_of_the_last_shards_is_seen(tmp_path: Path) -> None:
    store = collected(tmp_path)
    last = len(store.shards) - 1
    store.shards[-1].path.unlink()
    assert last > 1 and load_activations(tmp_path).missing == [last] and "1 shard missing" in repr(load_activations(tmp_path))
    (tmp_path / "extent.json").write_text("{")
    assert load_activations(tmp_path).missing == [] and collected(tmp_path).missing == []
    assert json.loads((tmp_path / "extent.json").read_text()) == {"shards": last + 1}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), MemoryError()])
def test_prompts_that_lacked_memory_are_tried_again(error: Exception, tmp_path: Path) -> None:
    room, model = {"is": 4}, tiny()

    def full(x: torch.Tensor, hook: Any) -> None:
        if x.shape[1] > room["is"]:
            raise error

    model.add_hook("blocks.1.hook_resid_pre", full)
    prompts = [PROMPTS[0][:3], PROMPTS[1], PROMPTS[2][:4]]
    with pytest.raises(LoopedError, match=r"prompt 1 failed: .*It ran alone: load the model with a smaller dtype="):
        collected(tmp_path, prompts, model)
    with pytest.raises(LoopedError, match=r"prompt 0 failed: .*It ran alone"):
        collected(tmp_path / "one", prompts[1:2], model)
    store = collected(tmp_path, prompts, model, on_error="skip")
    assert list(store.failed) == [1]
    room["is"] = 9
    store = collected(tmp_path, prompts, model, on_error="skip")
    assert not store.failed and store.prompts == [0, 1, 2]


def test_raise_over_a_store_that_left_prompts_out_names_them(tmp_path: Path) -> None:
    model = LoopedBridge.from_config(TINY.replace(n_ctx=4), seed=0)
    for wrong, why in ((torch.tensor([99]), "token 99 was given"), (PROMPTS[1], "the context of this model")):
        prompts, place = [PROMPTS[0][:3], wrong, PROMPTS[2][:4]], tmp_path / str(len(wrong))
        store, before = collected(place, prompts, model, on_error="skip"), times(place)
        assert list(store.failed) == [1]
        collected(place, prompts, model, on_error="skip")
        assert times(place) == before  # what cannot be otherwise is not tried again
        with pytest.raises(LoopedError, match=f"prompt 1 failed: .*{why}"):
            collected(place, prompts, model)


@pytest.mark.skipif(os.name != "posix", reason="whether a process is alive is asked on posix systems only")
def test_drafts_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    collected(tmp_path, **SIZES)
    living = draft_of(tmp_path / "shard-000007.safetensors")
    host, _, rest = living.name.partition(f".{os.getpid()}.")
    dead = [tmp_path / f"{host}.{2**22 + 1}.{rest}", tmp_path / f".{RECORD}.{host.rsplit('.', 1)[1]}.{2**22 + 1}.{rest}"]
    elsewhere = tmp_path / f".shard-000007.safetensors.abcdef.{2**22 + 1}.{rest}"
    for draft in (living, elsewhere, *dead):
        draft.write_bytes(b"half")
    collected(tmp_path, **SIZES)
    assert {path for path in tmp_path.iterdir() if path.name.startswith(".")} == {living, elsewhere}
