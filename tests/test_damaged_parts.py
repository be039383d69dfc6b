"""Files of a run that were removed or damaged, or that killed processes left, while others go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same
from zoo import random_tokens

from tl_looped import LoopedBridge, LoopedConfig, analyze
from tl_looped._writing import draft_of, write_text
from tl_looped.errors import LoopedError
from tl_looped.results import Estimate, load_result
from tl_looped.runs import merge

pytestmark = pytest.mark.usefixtures("by_hand")
ASK: dict[str, Any] = {"fixed_points": {"n_loops": 2}}
PROMPTS = [random_tokens(1, n, seed=n)[0] for n in (3, 4, 2)]
QUIET: dict[str, Any] = {"verbose": False}


@pytest.fixture(scope="module")
def model() -> LoopedBridge:
    return LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=31, n_core=2, n_loops=3, n_ctx=16), seed=0)


def damage(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.unlink()  # what was read from it is still mapped
    file.write_bytes(content)


def test_a_bit_that_flipped_is_noticed(model: LoopedBridge, tmp_path: Path) -> None:
    def made() -> Any:
        found = analyze(ASK, model, PROMPTS[:2], out=tmp_path, **QUIET)
        assert found is not None
        return found["fixed_points"]

    found = made()
    part, result = tmp_path / "fixed_points" / "00001.safetensors", tmp_path / "fixed_points.safetensors"
    content = part.read_bytes()
    for place in (-1, content.index(b"n_prompts")):  # a number, and what stands beside
        damage(part, place)
        with pytest.raises(LoopedError, match=r"1 of 2 parts of fixed_points .* not done, such as 00001"):
            merge(tmp_path)
        assert same(made(), found) and part.read_bytes() == content
    damage(result, -1)
    with pytest.raises(LoopedError, match="is damaged: it is not what was written"):
        load_result(result)


def test_what_tells_the_weights_is_written_again(model: LoopedBridge, tmp_path: Path) -> None:
    out, calls = tmp_path / "run", list[int]()

    def asked(model: Any, prompt: torch.Tensor) -> Estimate:
        calls.append(len(prompt))
        if len(calls) == 2:
            shutil.rmtree(out)
        return Estimate.of(torch.ones(1), (), {}, "prompts")

    def made() -> None:
        analyze({"mine": asked}, model, PROMPTS, out=out, **QUIET)
        assert load_result(out / "mine.safetensors", model).result.count == 3

    made()
    assert len(calls) == 4
    weights = out / "model.fingerprint.safetensors"
    content = weights.read_bytes()
    damage(weights, -1)
    with pytest.raises(LoopedError, match="The same command as before writes it again"):
        merge(out)
    made()
    assert weights.read_bytes() == content and len(calls) == 4


@pytest.mark.parametrize("content", ["", "[]", '{"units": "many"}', "{}"])
def test_a_damaged_record_of_what_was_asked_loses_nothing(content: str, model: LoopedBridge, tmp_path: Path) -> None:
    analyze(ASK, model, PROMPTS[:2], out=tmp_path, **QUIET)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/0*")}
    (tmp_path / "asked.json").write_text(content)
    for call in (lambda: merge(tmp_path), lambda: analyze(ASK, model, PROMPTS[:2], out=tmp_path, **QUIET)):
        with pytest.raises(LoopedError, match=r"asked.json' cannot be read .* remove it and run the same command again"):
            call()
    (tmp_path / "asked.json").unlink()
    assert analyze(ASK, model, PROMPTS[:2], out=tmp_path, **QUIET) is not None
    assert {file: file.stat().st_mtime_ns for file in kept} == kept and len(kept) == 2


@pytest.mark.skipif(os.name != "posix", reason="processes are asked for by their numbers")
def test_what_a_killed_process_left_of_a_file_is_removed_by_who_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "result"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    drafts = [file.with_name(draft_of(file).name.replace(str(os.getpid()), str(pid))) for pid in (gone.pid, os.getppid())]
    for draft in drafts:
        draft.write_text("half")
    write_text(file, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([file, drafts[1]])  # the other process may still write
