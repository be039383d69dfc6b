"""`tl-looped report`: its options, its refusals, and what an interruption leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reporting import TINY, TOKENS, only
from zoo import GOLDEN

from tl_looped import LoopedBridge, LoopedError
from tl_looped._writing import write_text
from tl_looped.cli import main
from tl_looped.report import Report, report, sections
from tl_looped.report.section import Part, Section


def test_an_unexpected_error_costs_one_part_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, "model", "attention", "exits")
    monkeypatch.setattr("tl_looped.report.sections.attention.attention_distances", lambda *_, **__: [][1])
    out = tmp_path / "report.html"
    assert main(["report", str(GOLDEN / "ouro"), "--prompt", "5,17,3", "--n-loops", "4", "--out", str(out), "--json"]) == 1
    assert "'Attention across loops' failed: IndexError" in capsys.readouterr().err.strip().splitlines()[-1]
    _, attention, exits = json.loads(out.with_suffix(".json").read_text())["sections"]
    assert attention["failed"] == ["IndexError: list index out of range"] and attention["reading"] and exits["reading"]
    assert "Failed: IndexError: list index out of range" in out.read_text(encoding="utf-8")


def test_an_interrupted_write_leaves_the_old_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "page", "old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_looped._writing.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "page", "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_the_command_has_the_options_of_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.html"
    command = (
        "toy:hop --tokens --clean 0,2,11,3,10,1,2 --corrupted 0,2,10,3,11,1,2 --answer 11 --wrong 10 --at-loop 1 --n-loops 2"
    )
    assert (
        main(["report", *command.split(), "--sections", "patching, exits", "--skip-first-token", "--out", str(out), "--json"])
        == 0
    )
    found = {section["name"]: section for section in json.loads(out.with_suffix(".json").read_text())["sections"]}
    words = LoopedBridge.from_pretrained("toy:hop").tokenizer
    assert [*found] == ["patching", "exits"] and capsys.readouterr().err.count("not measured") == 0
    assert [found["patching"]["numbers"][name] for name in ("right", "wrong")] == [words.decode([11]), words.decode([10])]
    assert len(found["patching"]["numbers"]["entering_layers"]["values"]) == 5  # a prelude and two loops of two layers
    assert main(["report", str(GOLDEN / "ouro"), "--prompt", "5,17,3", "--sections", "patching", "--out", str(out)]) == 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("tl-looped: not measured: Where the answer is made.") and "--clean 5,17,3 --corrupted 5,18,3" in said


@pytest.mark.parametrize(("arguments", "says"), [
    (["--out", "/no/such/place/report.html"], "no directory '/no/such/place'"),
    (["--out", "."], "it is a directory"),
    (["--out", "/proc/report.html"], "cannot be written"),
    (["--json", "/proc/numbers.json"], "'/proc/numbers.json' cannot be written"),
    (["--prompt", ""], "empty"),
    (["--prompt", " "], "nothing but whitespace"),
    (["--prompt", "A b Z y ? A"], "Z"),
    (["--prompts", "no-such-file"], "no-such-file.*cannot be read"),
    (["--clean", "A b B a ? A"], "only one of clean and corrupted"),
    (["--clean", "A b B a ? A", "--corrupted", "A b ? A"], "same number of tokens"),
    (["--n-loops", "1"], "n_loops=1"),
    (["toy:nothing"], "the bundled toys are"),
    ([str(GOLDEN / "ouro")], "no tokenizer"),
    ([str(GOLDEN / "ouro"), "--prompt", "hello"], "no tokenizer.*'hello' is no list of token ids"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line_before_the_work(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    unchecked: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(Section, "attempt", lambda *_: pytest.fail("the work began"))
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "report.html")]
    assert main(["report", *arguments, *out]) == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and re.search(says, error), error
    assert not list(tmp_path.iterdir())


def test_prompts_come_from_a_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_text("5,17,3\n\n9,2,4,4\n")
    out, beside = tmp_path / "r.html", tmp_path / "n.json"
    command = ["report", str(GOLDEN / "nanbeige"), "--prompt", "8,9,10", "--prompts", str(tmp_path / "prompts")]
    assert main([*command, "--n-loops", "3", "--out", str(out), "--json", str(beside)]) == 0
    model, answers = (s["numbers"] for s in json.loads(beside.read_text())["sections"][:2])
    assert model["examples"] == 3 and answers["prompt"] == ["8", "9", "10"] and len(answers["answers"]) == 3
    assert capsys.readouterr().out.split() == [str(out), str(beside)]


def test_an_interruption_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sections.SECTIONS, "trajectories", ("The path of the state", (Part(interrupt),)))
    out = tmp_path / "report.html"
    assert main(["report", str(GOLDEN / "ouro"), "--prompt", "5,17,3", "--n-loops", "4", "--out", str(out), "--json"]) == 130
    text, found = out.read_text(encoding="utf-8"), json.loads(out.with_suffix(".json").read_text())
    assert [section["name"] for section in found["sections"]] == ["model", "answers", "patching", "fixed_points"]
    assert found["missing"][0] == "The path of the state" and "Interrupted: The path of the state, Attention" in text
    assert "not done: The path of the state" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.slow
def test_ctrl_c_and_a_kill_keep_what_is_done(tmp_path: Path) -> None:
    for how, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        out = tmp_path / f"{how.name}.html"
        run = subprocess.Popen(
            [sys.executable, "-m", "tl_looped.cli", "report", "--n-loops", "64", "--out", str(out)], stderr=subprocess.PIPE
        )
        while not out.exists() and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(how)
        run.communicate(timeout=120)
        assert run.returncode == status and out.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_an_error_of_the_page_is_no_traceback(tmp_path: Path) -> None:
    found = report(LoopedBridge.from_config(TINY, seed=0), TOKENS, n_loops=2, verbose=False)
    with pytest.raises(LoopedError, match="cannot be written"):
        found.save(tmp_path / "none" / "report.html")


def test_a_report_replaces_regular_files_only_and_keeps_their_permissions(tmp_path: Path) -> None:
    page, target, link = Report("title", "lead", "prompt"), tmp_path / "target.html", tmp_path / "link.html"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    page.save(link)
    assert link.is_symlink() and "lead" in target.read_text() and target.stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for place in (tmp_path / "pipe", Path(os.devnull), tmp_path / "nowhere", tmp_path):
        kind = place.lstat().st_mode
        with pytest.raises(LoopedError, match="cannot be written"):
            page.save(place)
        assert main(["report", "toy:hop", "--out", str(place)]) == 1  # before the work begins
        assert place.lstat().st_mode == kind
