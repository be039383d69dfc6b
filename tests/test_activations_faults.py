"""A store of activations after faults: flipped bits, a lost record, prompts that lacked memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError, collect, load_activations
from tl_looped._writing import draft_of
from tl_looped.activations.record import RECORD
from tl_looped.activations.shards import Shard

PROMPTS = [random_tokens(1, 3 + k % 3, seed=k)[0] for k in range(8)]
QUIET: dict[str, Any] = {"verbose": False, "shard_bytes": 4000}
LONGEST = 5


@pytest.fixture
def model() -> LoopedBridge:
    return random_bridge("ouro", n_core=1)


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("shard-*"))


def test_any_flipped_bit_is_noticed_and_its_shard_is_collected_again(model: LoopedBridge, tmp_path: Path) -> None:
    store = collect(model, PROMPTS, "resid_post", out=tmp_path, **QUIET)
    file = shards(tmp_path)[1]
    whole, others = file.read_bytes(), {path: path.stat().st_mtime_ns for path in shards(tmp_path) if path != file}
    expected = [store.of_prompt(name, k) for name in store.names for k in range(len(PROMPTS))]
    header = int.from_bytes(whole[:8], "little") + 8
    draw = torch.Generator().manual_seed(0)
    spots = torch.randint(header, len(whole), (20,), generator=draw).tolist()
    spots += torch.randint(8, whole.index(b"  ", 8), (20,), generator=draw).tolist()
    spots += [whole.index(b'"checksum":"') + 15, len(whole) - 1]
    for at in spots:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        try:
            assert not Shard(file).is_whole(), at
        except LoopedError as error:
            assert "shard" in str(error) or "damaged" in str(error)
    again = collect(model, PROMPTS, "resid_post", out=tmp_path, **QUIET)
    assert file.read_bytes() == whole and {path: path.stat().st_mtime_ns for path in others} == others
    found = [again.of_prompt(name, k) for name in again.names for k in range(len(PROMPTS))]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_swap_of_pieces_and_a_lost_end_are_noticed(
    model: LoopedBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tl_looped.activations.shards._PIECE", 256)
    collect(model, PROMPTS, "resid_post", out=tmp_path, **QUIET)
    file = shards(tmp_path)[0]
    whole, start = file.read_bytes(), Shard(file)._start
    assert Shard(file).is_whole() and len(whole) > start + 512
    file.write_bytes(whole[:start] + whole[start + 256 : start + 512] + whole[start : start + 256] + whole[start + 512 :])
    assert not Shard(file).is_whole()


def test_a_lost_record_is_written_again_for_the_same_model_only(model: LoopedBridge, tmp_path: Path) -> None:
    collect(model, PROMPTS, "resid_post", out=tmp_path, **QUIET)
    record = (tmp_path / RECORD).read_bytes()
    times = [path.stat().st_mtime_ns for path in shards(tmp_path)]
    (tmp_path / RECORD).unlink()
    other = random_bridge("ouro", n_core=1)
    with torch.no_grad():
        other.blocks[0].attn.q.weight[0, 0] += 1
    for asked, settings in ((other, {}), (model, {"positions": 1})):
        with pytest.raises(LoopedError, match=f"has no {RECORD}, and shard-000000.safetensors in it is of another"):
            collect(asked, PROMPTS, "resid_post", out=tmp_path, **QUIET, **settings)
    collect(model, PROMPTS, "resid_post", out=tmp_path, **QUIET)
    assert (tmp_path / RECORD).read_bytes() == record
    assert [path.stat().st_mtime_ns for path in shards(tmp_path)] == times
    assert load_activations(tmp_path, model).prompts == list(range(8))


def test_a_record_that_is_removed_meanwhile_is_there_in_the_end(model: LoopedBridge, tmp_path: Path) -> None:
    def prompts() -> Any:
        for k, prompt in enumerate(PROMPTS):
            if k == 6:
                (tmp_path / RECORD).unlink()
            yield prompt

    assert collect(model, prompts(), "resid_post", out=tmp_path, **QUIET).prompts == list(range(8))


def test_prompts_without_memory_are_tried_again_and_others_when_errors_are_raised(
    model: LoopedBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, lacking = type(model).forward, [torch.OutOfMemoryError("CUDA out of memory")]

    def short(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if lacking and isinstance(tokens, torch.Tensor) and tokens.shape[-1] >= LONGEST:
            raise lacking[0]
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", short)
    store = collect(model, PROMPTS, "resid_post", out=tmp_path, on_error="skip", **QUIET)
    assert sorted(store.failed) == [2, 5] and "does not fit into memory" in store.failed[2]
    with pytest.raises(LoopedError, match=r"prompt 2 failed: it does not fit into memory .*take fewer positions"):
        collect(model, PROMPTS, "resid_post", out=tmp_path, **QUIET)
    lacking.clear()
    store = collect(model, PROMPTS, "resid_post", out=tmp_path, on_error="skip", **QUIET)
    assert store.failed == {} and store.prompts == list(range(8))


def test_a_bad_prompt_is_named(model: LoopedBridge, tmp_path: Path) -> None:
    bad = [*PROMPTS[:2], torch.tensor([1, 900])]
    with pytest.raises(LoopedError, match=r"prompt 2.*900"):
        collect(model, bad, "resid_post", out=tmp_path, **QUIET)


def test_what_killed_processes_left_of_any_shard_is_removed(model: LoopedBridge, tmp_path: Path) -> None:
    collect(model, PROMPTS, "resid_post", out=tmp_path, **QUIET)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    mine = draft_of(tmp_path / "shard-000001.safetensors")
    killed = mine.with_name(mine.name.replace(str(os.getpid()), dead.stdout.strip()))
    for draft in (mine, killed):
        draft.write_bytes(b"")
    collect(model, PROMPTS, "resid_post", out=tmp_path, **QUIET)
    assert mine.exists() and not killed.exists()
