"""Long runs: what is done is kept, and going on gives what one run gives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.analysis import fixed_points, limiting_behaviour
from tl_looped.errors import LoopedError
from tl_looped.interventions import steer
from tl_looped.results import load_result
from tl_looped.runs import Run, run

CFG: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_vocab": 11, "n_core": 2, "n_loops": 3, "n_ctx": 16}
SETTINGS: dict[str, Any] = {"n_loops": 4, "verbose": False}


def prompts(n: int) -> list[torch.Tensor]:
    """Of different lengths."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(11, (2 + k % 7,), generator=draw) for k in range(n)]


@pytest.fixture(scope="module")
def model() -> LoopedBridge:
    return LoopedBridge.from_config(LoopedConfig(**CFG), seed=0)


def test_the_sum_is_that_of_one_call_and_a_second_call_reads_it(model: LoopedBridge, tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    found = run(fixed_points, model, prompts(7), out=out, every=3, **SETTINGS)
    assert (found.done, found.n_prompts, found.failed, found.result.norm.count) == (7, 7, (), 7)
    whole = fixed_points(model, prompts(7), **SETTINGS)
    torch.testing.assert_close(found.result.norm.values, whole.norm.values)
    torch.testing.assert_close(found.result.norm.stderr, whole.norm.stderr)
    assert found.to_dataframe().equals(found.result.to_dataframe()) and len(found.plot(quantity="norm").data) > 0
    before = out.stat().st_mtime_ns
    assert same(run(fixed_points, model, prompts(7), out=out, every=3, **SETTINGS), found)
    assert out.stat().st_mtime_ns == before and same(load_result(out, model), found)


def test_examples_follow_each_other(model: LoopedBridge, tmp_path: Path) -> None:
    found = run(limiting_behaviour, model, prompts(5), out=tmp_path / "run", n_loops=24, verbose=False)
    assert [e.labels.shape[1] for e in found.result.examples] == [len(p) for p in prompts(5)]


def test_prompts_that_fail_are_named(model: LoopedBridge, tmp_path: Path) -> None:
    asked = prompts(6)
    asked[4] = torch.zeros(17, dtype=torch.long)  # longer than the context
    with pytest.raises(LoopedError, match=r"^prompt 4 of 6 failed: .*17.* The 4 before it are in"):
        run(fixed_points, model, asked, out=tmp_path / "raise", **SETTINGS)
    kept = load_result(tmp_path / "raise")
    assert kept.done == 4 and kept.result.norm.count == 4
    found = run(fixed_points, model, asked, out=tmp_path / "raise", on_error="skip", **SETTINGS)
    assert found.failed[0][0] == 4 and "n_ctx=16" in found.failed[0][1]
    good = run(fixed_points, model, asked[:4] + asked[5:], out=tmp_path / "good", **SETTINGS)
    assert same(found.result, good.result)


def test_a_run_in_which_everything_failed_has_no_result(model: LoopedBridge, tmp_path: Path) -> None:
    found = run(fixed_points, model, [torch.tensor([99])], out=tmp_path / "run", on_error="skip", **SETTINGS)
    assert found.result is None
    with pytest.raises(LoopedError, match="none of 1 prompts has a result; prompt 0"):
        found.plot()


def test_ctrl_c_keeps_what_is_done(model: LoopedBridge, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def interrupted(model: Any, prompt: Any, **settings: Any) -> Any:
        calls.append(prompt)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fixed_points(model, prompt, **settings, verbose=False)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, model, prompts(6), out=tmp_path / "run", every=100, n_loops=4)
    assert "3 of 6 prompts are in" in capsys.readouterr().err
    found = run(interrupted, model, prompts(6), out=tmp_path / "run", n_loops=4)
    assert len(calls) == 4 + 3  # none of the first three again
    assert same(found.result, run(fixed_points, model, prompts(6), out=tmp_path / "whole", **SETTINGS).result)


def test_a_file_of_another_run_is_refused(model: LoopedBridge, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(fixed_points, model, prompts(3), out=out, **SETTINGS)
    other = LoopedBridge.from_config(LoopedConfig(**CFG), seed=1)
    for call, says in (
        (lambda: run(fixed_points, model, prompts(4), out=out, **SETTINGS), "of other prompts"),
        (lambda: run(fixed_points, model, prompts(3), out=out, n_loops=5, verbose=False), "with n_loops=4, not 5"),
        (lambda: run(fixed_points, model, prompts(3), out=out, reduction="matrix", **SETTINGS), "with reduction=None"),
        (lambda: run(limiting_behaviour, model, prompts(3), out=out, **SETTINGS), "with analysis=.*fixed_points"),
        (lambda: run(fixed_points, other, prompts(3), out=out, **SETTINGS), "another model"),
    ):
        with pytest.raises(LoopedError, match=says):
            call()
    fixed_points(model, prompts(3), **SETTINGS).save(out, model)
    with pytest.raises(LoopedError, match="no unfinished run"):
        run(fixed_points, model, prompts(3), out=out, **SETTINGS)


@pytest.mark.parametrize("former", ["tl_looped.fixed_points.fixed_points", "tl_looped.analysis.more_loops.more_loops"])
def test_a_file_of_an_analysis_that_lay_elsewhere_is_gone_on_with(former: str, model: LoopedBridge, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = run(fixed_points, model, prompts(2), out=out, **SETTINGS)
    replace(found, asked=found.asked | {"analysis": former}).save(out, model)
    if former.endswith(".fixed_points"):
        assert same(run(fixed_points, model, prompts(2), out=out, **SETTINGS).result, found.result)
    else:
        with pytest.raises(LoopedError, match=r"with analysis=.*more_loops, not"):
            run(fixed_points, model, prompts(2), out=out, **SETTINGS)


def test_rows_of_one_tensor_are_prompts_of_their_own(model: LoopedBridge, tmp_path: Path) -> None:
    rows = torch.arange(12).view(4, 3) % 11
    out = tmp_path / "run"
    found = run(fixed_points, model, list(rows), out=out, **SETTINGS)
    assert same(run(fixed_points, model, [row.clone() for row in rows], out=out, **SETTINGS), found)
    with pytest.raises(LoopedError, match="of other prompts"):
        run(fixed_points, model, list(rows.flip(0)), out=out, **SETTINGS)


def test_what_a_name_leaves_open_is_told_apart(model: LoopedBridge, tmp_path: Path) -> None:
    def counting(n: int) -> Any:
        return lambda model, prompt: fixed_points(model, prompt, n_loops=n, verbose=False)

    out = tmp_path / "run"
    found = run(counting(3), model, prompts(2), out=out, verbose=False)
    assert same(run(counting(3), model, prompts(2), out=out, verbose=False), found)
    with pytest.raises(LoopedError, match="with analysis="):
        run(counting(4), model, prompts(2), out=out, verbose=False)
    with pytest.raises(LoopedError, match="with loops of the model=3, not 4"):
        run(counting(3), model.unroll(4), prompts(2), out=out, verbose=False)
    with model.hooks([("loops.1.hook_state", lambda state, hook: state * 2)]), pytest.raises(LoopedError, match="with hooks="):
        run(counting(3), model, prompts(2), out=out, verbose=False)


def test_hooks_are_told_apart_by_all_their_places_and_by_what_they_are(model: LoopedBridge, tmp_path: Path) -> None:
    def doubled(state: torch.Tensor, hook: object) -> torch.Tensor:
        return state * 2

    def halved(state: torch.Tensor, hook: object) -> torch.Tensor:
        return state / 2

    def asked(*hooks: tuple[str, Any]) -> str:
        with model.hooks(list(hooks)):
            return run(fixed_points, model, prompts(1), out=tmp_path / "run", n_loops=3, verbose=False).asked["hooks"]

    at, later = "loops.1.hook_state", "loops.2.hook_state"
    with model.hooks([(at, doubled)]):
        found = run(fixed_points, model, prompts(1), out=tmp_path / "run", n_loops=3, verbose=False)
    assert found.asked["hooks"].startswith(f"{at} ") and "doubled" in found.asked["hooks"]
    assert asked((at, doubled)) == found.asked["hooks"]
    for hooks in (
        [(at, halved)],
        [(at, doubled), (later, doubled)],
        [(at, doubled), (at, doubled)],
        [],
        steer(model, torch.ones(8), loops=1),
    ):
        with pytest.raises(LoopedError, match="with hooks="):
            asked(*hooks)
    (tmp_path / "run").unlink()
    asked(*steer(model, torch.ones(8), loops=1))
    asked(*steer(model, torch.ones(8), loops=1))
    with pytest.raises(LoopedError, match="with hooks="):
        asked(*steer(model, -torch.ones(8), loops=1))


def test_a_mistake_in_the_analysis_is_not_skipped_prompt_by_prompt(model: LoopedBridge, tmp_path: Path) -> None:
    out, mistakes = tmp_path / "run", [True]

    def analysis(model: Any, prompt: torch.Tensor) -> Any:
        if mistakes[0] or len(prompt) == 5:
            raise TypeError("no such thing")
        return fixed_points(model, prompt, **SETTINGS)

    for n, first in ((2, 2), (6, 3)):
        with pytest.raises(LoopedError, match=rf"^the first {first} of {n} prompts failed alike: TypeError: no such thing"):
            run(analysis, model, prompts(n), out=out, every=1, on_error="skip", verbose=False)
        assert load_result(out).done == 0
        out.unlink()
    mistakes[0] = False
    found = run(analysis, model, prompts(6), out=out, on_error="skip", verbose=False)  # one among others that do not fail
    assert [index for index, _ in found.failed] == [3] and found.done == 6


@pytest.mark.skipif(os.name != "posix", reason="this system does not tell which processes are alive")
def test_what_a_killed_write_leaves_is_removed_by_the_next_run(model: LoopedBridge, tmp_path: Path) -> None:
    out = tmp_path / "run[1].safetensors"
    code = f"""
import os
from tl_looped import _writing
os.replace = lambda *paths: os.kill(os.getpid(), 9)
_writing.write_bytes({str(out)!r}, b"half")
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and left.read_bytes() == b"half"
    others = left.name.rpartition(".")[0].rpartition(".")[0]
    alive = tmp_path / f"{others}.{os.getpid()}.abc"
    for file in (alive, tmp_path / "other"):
        file.touch()
    run(fixed_points, model, prompts(1), out=out, **SETTINGS)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([alive.name, "other", out.name])


def test_a_mistake_in_the_call_is_no_failed_prompt(model: LoopedBridge, tmp_path: Path) -> None:
    with pytest.raises(LoopedError, match="unexpected keyword argument 'n_lops'"):
        run(fixed_points, model, prompts(2), out=tmp_path / "run", on_error="skip", n_lops=4)
    assert not (tmp_path / "run").exists()


def test_what_is_no_list_of_prompts_is_refused(model: LoopedBridge, tmp_path: Path, unchecked: None) -> None:
    for given, says in (("text", "of one prompt"), (torch.tensor([[1]]), "of one prompt"), ([], "of no prompts")):
        with pytest.raises(LoopedError, match=says):
            run(fixed_points, model, given, out=tmp_path / "run", **SETTINGS)
    with pytest.raises(LoopedError, match="on_error='ignore'"):
        run(fixed_points, model, prompts(1), out=tmp_path / "run", on_error="ignore", **SETTINGS)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_runs import CFG, SETTINGS, prompts
from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.analysis import fixed_points
from tl_looped.runs import run
model = LoopedBridge.from_config(LoopedConfig(**CFG), seed=0)
print("ready", flush=True)
run(fixed_points, model, prompts({n}), out={out!r}, every={every}, **SETTINGS)
"""


def killed(model: LoopedBridge, out: Path, n: int, every: int, kills: int, draw: random.Random) -> Run:
    """The run after it was killed some times, each at a random moment, and started again."""
    code = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent), n=n, out=str(out), every=every)
    for _ in range(kills):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as child:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            begun = out.stat().st_mtime_ns if out.exists() else 0
            while (out.stat().st_mtime_ns if out.exists() else 0) == begun and child.poll() is None:
                time.sleep(0.002)  # so that every life gets somewhere
            time.sleep(draw.random() * 0.1)
            child.send_signal(signal.SIGKILL)
    found = run(fixed_points, model, prompts(n), out=out, every=every, **SETTINGS)
    assert found is not None
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed by a signal that this system does not have")
@pytest.mark.parametrize(("n", "every", "kills"), [(24, 2, 1), pytest.param(200, 5, 5, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bits(model: LoopedBridge, tmp_path: Path, n: int, every: int, kills: int) -> None:
    found = killed(model, tmp_path / "killed", n, every, kills, random.Random(n))
    assert found.done == n and found.result.norm.count == n
    assert same(found.result, run(fixed_points, model, prompts(n), out=tmp_path / "whole", **SETTINGS).result)
