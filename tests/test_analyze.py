"""Many processes: their shares add up to the numbers of one process, whatever was killed, lost or asked at once."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same
from linear import deep_loop
from peak_memory import PeakMemory

from tl_looped import LoopedBridge, LoopedConfig, analyze
from tl_looped._writing import write_first
from tl_looped.analysis import fixed_points
from tl_looped.analysis.by_name import ANALYSES
from tl_looped.errors import LoopedError
from tl_looped.results import Estimate, load_result
from tl_looped.runs import Asked, merge
from tl_looped.runs.progress import Progress
from tl_looped.runs.shares import Share
from tl_looped.runs.units import cut, share_of

pytestmark = pytest.mark.usefixtures("by_hand")
CFG: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_vocab": 11, "n_core": 2, "n_loops": 3, "n_ctx": 16}
ASKED: dict[str, Any] = {"fixed_points": {"n_loops": 4}, "limiting_behaviour": {"n_loops": 24}}
QUIET: dict[str, Any] = {"verbose": False}


def prompts(n: int) -> list[torch.Tensor]:
    """Of different lengths."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(11, (2 + k % 7,), generator=draw) for k in range(n)]


@pytest.fixture(scope="module")
def model() -> LoopedBridge:
    return LoopedBridge.from_config(LoopedConfig(**CFG), seed=0)


def whole(model: LoopedBridge, folder: Path, **settings: Any) -> dict[str, Any]:
    found = analyze(ASKED, model, prompts(9), out=folder, **QUIET, **settings)
    assert found is not None
    return found


def test_shares_of_any_number_add_up_to_the_bits_of_one_process(model: LoopedBridge, tmp_path: Path) -> None:
    one = whole(model, tmp_path / "one")
    alone = fixed_points(model, prompts(9), n_loops=4, **QUIET)
    assert same(one["fixed_points"].result, alone) and one["fixed_points"].done == one["fixed_points"].n_prompts == 9
    assert [example.labels.shape[1] for example in one["limiting_behaviour"].result.examples] == [len(p) for p in prompts(9)]
    out = tmp_path / "many"
    for shard in ("3/3", "1/3"):
        assert analyze(ASKED, model, prompts(9), out=out, shard=shard, **QUIET) is None
    with pytest.raises(LoopedError, match=r"of 9 parts of fixed_points in .* are not done, .*same command"):
        merge(out)
    for shard in ("1/4", "2/4", "3/4"):
        analyze(ASKED, model, prompts(9), out=out, shard=shard, **QUIET)
    found = analyze(ASKED, model, prompts(9), out=out, shard="4/4", **QUIET)
    assert found is not None and merge(out).keys() == found.keys()
    for name, run in one.items():
        assert same(found[name], run) and same(load_result(out / f"{name}.safetensors", model), run)


def test_every_prompt_is_in_one_share_and_their_work_is_alike(model: LoopedBridge) -> None:
    asked = prompts(40)
    for size in (1, 3):
        units = cut(model, asked, size)
        assert sorted(p for unit in units for p in unit.prompts) == list(range(40))
        for of in (1, 2, 5):
            shares = [share_of(units, Share(k, of)) for k in range(of)]
            assert sorted(unit.index for share in shares for unit in share) == list(range(len(units)))
            loads = [sum(unit.weight for unit in share) for share in shares]
            assert max(loads) - min(loads) <= max(unit.weight for unit in units)
    half = share_of(cut(model, asked, 1), Share(0, 2))
    first = sum(unit.weight for unit in half[:5]) / 5
    assert abs(first / (sum(unit.weight for unit in half) / len(half)) - 1) < 0.2  # the first few are like all


def test_a_prompt_that_is_too_long_weighs_nothing(model: LoopedBridge) -> None:
    asked = prompts(40)
    asked[3] = torch.zeros(900, dtype=torch.long)  # the context is 16
    for of in (2, 3, 4):
        shares = [share_of(cut(model, asked, 1), Share(k, of)) for k in range(of)]
        loads = [sum(len(asked[p]) for unit in share for p in unit.prompts if p != 3) for share in shares]
        assert sum(loads) == sum(map(len, asked)) - 900 and max(loads) - min(loads) <= 8 + 1  # the longest, and the one


def test_an_analysis_may_have_any_name(model: LoopedBridge, tmp_path: Path) -> None:
    ask = {name: Asked(fixed_points, {"n_loops": 4}) for name in ("model", "asked")}
    for _ in range(2):
        found = analyze(ask, model, prompts(2), out=tmp_path, **QUIET)
        assert found is not None
        assert all(same(load_result(tmp_path / f"{name}.safetensors", model), found[name]) for name in ask)


def test_what_is_lost_or_damaged_is_measured_again(model: LoopedBridge, tmp_path: Path) -> None:
    found = whole(model, tmp_path)
    shutil.rmtree(tmp_path / "fixed_points")
    part = tmp_path / "limiting_behaviour" / "00003.safetensors"
    content = part.read_bytes()
    part.unlink()  # what was read from it is still mapped
    part.write_bytes(content[:-5])
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "limiting_behaviour").glob("0*")}
    again = whole(model, tmp_path)
    assert all(same(again[name], found[name]) for name in ASKED)
    assert [file for file, then in kept.items() if file.stat().st_mtime_ns != then] == [part]


def test_what_is_removed_meanwhile_is_measured_again(model: LoopedBridge, tmp_path: Path) -> None:
    calls: list[int] = []

    def asked(model: Any, prompt: torch.Tensor) -> Estimate:
        calls.append(len(prompt))
        if len(calls) == 6:
            shutil.rmtree(tmp_path / "run")
        return Estimate.of(torch.ones(1), (), {}, "prompts")

    found = analyze({"mine": asked}, model, prompts(7), out=tmp_path / "run", **QUIET)
    assert found is not None and found["mine"].result.count == 7 and 7 < len(calls) <= 7 + 6


def test_another_run_is_refused_and_more_analyses_are_not(model: LoopedBridge, tmp_path: Path) -> None:
    whole(model, tmp_path)
    other = LoopedBridge.from_config(LoopedConfig(**CFG), seed=1)

    def ask(analyses: Any = ASKED, model: Any = model, n: int = 9, **settings: Any) -> Any:
        return analyze(analyses, model, prompts(n), out=tmp_path, **QUIET, **settings)

    for call, says in (
        (lambda: ask(n=8), "of other prompts"),
        (lambda: ask(model=other), "of other weights"),
        (lambda: ask(model=model.unroll(5)), "with loops of the model=3, not 5"),
        (lambda: ask({"fixed_points": {"n_loops": 5}}), "of 'fixed_points' with n_loops=4, not 5"),
        (lambda: ask(batch_size=2), "with batch_size=1, not 2"),
    ):
        with pytest.raises(LoopedError, match=says):
            call()
    asked = json.loads((tmp_path / "asked.json").read_text())
    (tmp_path / "asked.json").write_text(json.dumps(asked | {"torch": "1.0"}))
    with pytest.raises(LoopedError, match=r"with torch=1\.0, not"):
        ask()
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    more = ask({"inference_stages": {}})
    assert more["inference_stages"].asked["tau"] == "0.3" and merge(tmp_path).keys() == {*ASKED, "inference_stages"}


def test_prompts_of_one_length_go_together_and_the_order_is_told(model: LoopedBridge, tmp_path: Path) -> None:
    found = whole(model, tmp_path, batch_size=2)
    one = fixed_points(model, prompts(9), n_loops=4, **QUIET)
    torch.testing.assert_close(found["fixed_points"].result.norm.values, one.norm.values)
    order = found["limiting_behaviour"].order
    assert sorted(order) == list(range(9)) and order != tuple(range(9))
    lengths = [example.labels.shape[1] for example in found["limiting_behaviour"].result.examples]
    assert lengths == [len(prompts(9)[k]) for k in order]


def test_a_prompt_that_fails_is_left_out_and_told(
    model: LoopedBridge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = prompts(6)
    asked[4] = torch.zeros(17, dtype=torch.long)  # longer than the context
    found = analyze({"fixed_points": {"n_loops": 4}}, model, asked, out=tmp_path / "skip", batch_size=2)
    assert found is not None and found["fixed_points"].failed[0][0] == 4 and "n_ctx=16" in found["fixed_points"].failed[0][1]
    assert "prompt 4 is left out" in capsys.readouterr().err
    good = fixed_points(model, asked[:4] + asked[5:], n_loops=4, **QUIET)
    assert found["fixed_points"].result.norm.count == 5 and found["fixed_points"].done == 6
    torch.testing.assert_close(found["fixed_points"].result.norm.values, good.norm.values)
    with pytest.raises(LoopedError, match=r"of prompt 4 failed: .*n_ctx=16.* What is done is kept"):
        analyze({"fixed_points": {"n_loops": 4}}, model, asked, out=tmp_path / "raise", on_error="raise", **QUIET)


def test_a_batch_out_of_memory_is_halved(model: LoopedBridge, tmp_path: Path) -> None:
    rows: list[int] = []

    def hungry(model: Any, prompt: torch.Tensor) -> Any:
        rows.append(len(prompt) if prompt.ndim > 1 else 1)
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return fixed_points(model, prompt, n_loops=4, **QUIET)

    asked = [*torch.arange(21).view(7, 3) % 11]
    found = analyze({"mine": Asked(hungry, {})}, model, asked, out=tmp_path / "run", batch_size=7, **QUIET)
    assert found is not None and found["mine"].result.norm.count == 7 and found["mine"].failed == ()
    assert rows == [7, 3, 1, 2, 4, 2, 2] and found["mine"].order == tuple(range(7))
    whole = fixed_points(model, torch.stack(asked), n_loops=4, **QUIET)
    torch.testing.assert_close(found["mine"].result.norm.values, whole.norm.values)


def test_one_prompt_out_of_memory_is_left_out(model: LoopedBridge, tmp_path: Path) -> None:
    def hungry(model: Any, prompt: torch.Tensor) -> Any:
        if len(prompt) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return fixed_points(model, prompt, n_loops=4, **QUIET)

    found = analyze({"mine": hungry}, model, prompts(4), out=tmp_path / "run", **QUIET)
    assert found is not None and [index for index, _ in found["mine"].failed] == [3]
    assert "(5,) tokens does not fit into memory" in found["mine"].failed[0][1]


def test_calls_that_no_prompt_can_mend_are_refused_before_the_first(model: LoopedBridge, tmp_path: Path) -> None:
    for asked, says in (
        ("fixed_point", "did you mean fixed_points. There are .*trajectories"),
        ({"fixed_points": {"n_lops": 3}}, "unexpected keyword argument 'n_lops'"),
        ({"limiting_behaviour": {"n_loops": 8}}, "window=24"),
        ({"injection_effect": {"from_loop": 1}}, "injection_effect was asked"),
        ({"more_loops": {"answers": [1, 2]}}, "answers, which belong to all prompts"),
        ({"a/b": fixed_points}, "names of results become files"),
        ([], "of no analysis"),
    ):
        with pytest.raises(LoopedError, match=says):
            analyze(asked, model, prompts(2), out=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists() and {"fixed_points", "inference_stages"} <= ANALYSES.keys()


def test_the_minutes_left_are_learned_from_the_first_tenth() -> None:
    seconds = {"a": 0.3, "b": 0.02}  # of a token
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 200, (40,), generator=draw).tolist()
    weights = {(name, unit): length for unit, length in enumerate(lengths) for name in seconds}
    work, now = sum(length * seconds[name] for (name, _), length in weights.items()), [0.0]
    order = [(name, unit) for unit in torch.randperm(40, generator=draw).tolist() for name in seconds]
    progress = Progress(weights, weights, "", verbose=False, clock=lambda: now[0])
    for done, (name, unit) in enumerate(order):
        progress.begin()
        now[0] += weights[name, unit] * seconds[name] * (3 if done < 2 else 1)  # the first of each is slower
        progress.done((name, unit))
        left = sum(weights[key] * seconds[key[0]] for key in progress.left)
        if left < 0.9 * work:
            assert abs(progress.seconds() - left) <= 0.01 * left + 1e-6


def test_the_minutes_left_are_told_once_every_measure_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    now, weights = [0.0], {(name, unit): 10 for name in "ab" for unit in range(3)}
    progress = Progress(weights, weights, "both", clock=lambda: now[0])
    for key, seconds in ((("a", 0), 60), (("b", 0), 600), (("a", 1), 60), (("b", 1), 600)):
        now[0] += 1000  # of other work
        progress.begin()
        now[0] += seconds
        progress.done(key)
    progress.drop(("b", 2))  # another process has done it
    assert progress.seconds() == pytest.approx(60)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "both: 1 of 2 measures begun",
        "both:  33 % done, 22 minutes left",
        "both:  36 % done, 21 minutes left",
        "both:  66 % done, 11.0 minutes left",
    ]


def test_a_full_disk_keeps_what_is_done(model: LoopedBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, fsync = [0], os.fsync

    def full(fd: int) -> None:
        written[0] += 1
        if written[0] > 8:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoopedError, match=r"No space left on device. What is done is kept"):
        whole(model, tmp_path)
    files = sorted(file.name for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.setattr(os, "fsync", fsync)
    assert len(files) == 8 and not any(name.startswith(".") for name in files)
    other = analyze(ASKED, model, prompts(9), out=tmp_path.parent / f"{tmp_path.name}-other", **QUIET)
    assert other is not None and all(same(run, other[name]) for name, run in whole(model, tmp_path).items())


def test_the_first_of_two_processes_says_what_a_directory_is_of(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_first(tmp_path / "asked", text)
    assert (tmp_path / "asked").read_text() == "first" and len([*tmp_path.iterdir()]) == 1


@pytest.mark.slow  # many loops
def test_memory_is_that_of_one_batch(tmp_path: Path) -> None:
    deep, asked = deep_loop(), [torch.arange(k) % 11 for k in (32, 20, 9, 31, 5)]
    analyses: dict[str, Any] = {"fixed_points": {"patterns": True}, "limiting_behaviour": {}, "inference_stages": {}}
    with PeakMemory(deep) as one:
        for name in analyses:
            ANALYSES[name](deep, asked[0], **analyses[name], **QUIET)
    with PeakMemory(deep) as all_of_them:
        assert analyze(analyses, deep, asked, out=tmp_path / "run", **QUIET) is not None
    assert all_of_them.nbytes <= 1.3 * one.nbytes


def command(out: Path, lines: Path, *starter: str) -> list[str]:
    asked = f"analyze toy:hop --analysis fixed_points,stages --prompts {lines} --loops 24 --out {out}"
    return [sys.executable, *starter, "-m", "tl_looped", *asked.split()]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def hop_prompts(n: int, file: Path) -> Path:
    """Of different lengths."""
    draw = random.Random(0)
    pairs = ["A b", "B c", "C d", "D a"]
    file.write_text("\n".join(" ".join(draw.choices(pairs, k=1 + k % 9)) + " ? A" for k in range(n)), encoding="utf-8")
    return file


@pytest.mark.slow  # many processes
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed by a signal that this system does not have")
def test_processes_that_are_killed_and_started_again_in_other_numbers_find_what_one_finds(tmp_path: Path) -> None:
    lines, draw = hop_prompts(60, tmp_path / "prompts.txt"), random.Random(2)
    subprocess.run(command(tmp_path / "one", lines), env=environment(), check=True)
    out, processes = tmp_path / "killed", itertools.cycle((2, 3, 1, 2))
    for kills in itertools.count():
        starter = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(next(processes)))
        before = len([*out.rglob("0*")])
        with subprocess.Popen(command(out, lines, *starter), env=environment(), start_new_session=True) as child:
            while child.poll() is None and len([*out.rglob("0*")]) < before + 10 + draw.randrange(15) and kills < 6:
                time.sleep(0.01)
            if child.poll() is None and kills < 6:
                os.killpg(child.pid, signal.SIGKILL)
        if child.returncode == 0:
            break
    assert kills >= 3
    for name in ("fixed_points", "stages"):
        found, whole = (load_result(folder / f"{name}.safetensors") for folder in (out, tmp_path / "one"))
        assert same(found, whole) and found.done == 60


@pytest.mark.slow
def test_one_process_dies_and_the_others_go_on(tmp_path: Path) -> None:
    lines, out = hop_prompts(30, tmp_path / "prompts.txt"), tmp_path / "run"
    asked = {shard: [*command(out, lines), "--shard", shard] for shard in ("1/3", "2/3", "3/3")}
    children = {shard: subprocess.Popen(asked[shard], env=environment(), stderr=subprocess.PIPE, text=True) for shard in asked}
    while len([*out.rglob("0*")]) < 3:
        time.sleep(0.01)
    children["2/3"].kill()
    said = {shard: child.communicate()[1] for shard, child in children.items()}
    assert [child.returncode == 0 for child in children.values()] == [True, False, True]
    assert "parts of other shares are not there yet" in said["1/3"] and not (out / "stages.safetensors").exists()
    subprocess.run(asked["2/3"], env=environment(), check=True)
    assert load_result(out / "stages.safetensors").done == load_result(out / "stages.safetensors").result.norm.count == 30


@pytest.mark.slow
def test_two_processes_on_one_share_at_once(tmp_path: Path) -> None:
    lines, out = hop_prompts(6, tmp_path / "prompts.txt"), tmp_path / "run"
    children = [subprocess.Popen(command(out, lines), env=environment(), stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert load_result(out / "stages.safetensors").result.norm.count == 6
    assert not [file for file in out.rglob("*") if file.name.startswith(".")]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="MKL is what splits sums among threads")
def test_the_command_finds_the_same_with_any_number_of_threads() -> None:
    code = """
from tl_looped.cli._process import any_number_of_threads
any_number_of_threads()
import torch
from torch.nn.functional import linear
for rows, width, out in ((1, 64, 64), (7, 128, 384), (11, 512, 256)):
    draw = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, width, generator=draw), torch.randn(out, width, generator=draw)
    found = [(torch.set_num_threads(n), linear(x, weight))[1] for n in (1, 2, 3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), rows
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={k: v for k, v in os.environ.items() if k != "MKL_CBWR"})
