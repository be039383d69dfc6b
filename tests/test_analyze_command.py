"""`tl-looped analyze` and `tl-looped merge`, as a user calls them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import random_bridge

from tl_looped import load_result
from tl_looped.activations import load_activations
from tl_looped.bridge.ordinary import looped_or_ordinary
from tl_looped.cli import main
from tl_looped.cli.analyze import _setting

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("ouro")
    random_bridge("ouro").save_pretrained(place)
    return str(place)


def test_shares_of_token_ids_become_results_and_tables(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, out = tmp_path / "ids.jsonl", tmp_path / "run"
    lines.write_text("[3, 1, 4]\n[1, 5]\n[9, 2, 6, 5]\n", encoding="utf-8")
    asked = [
        "analyze",
        checkpoint,
        "--analysis",
        "fixed_points,stages",
        "--prompts",
        str(lines),
        "--loops",
        "5",
        "--out",
        str(out),
    ]
    asked += ["--set", "stages.tau=0.1", "--set", "fixed_points.reduction=matrix"]
    assert main([*asked, "--shard", "1/2"]) == 0 and main(["merge", str(out)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "minutes left" in said.err and "are not done" in said.err
    assert main([*asked, "--shard", "2/2"]) == 0
    assert f"{out / 'stages'}.safetensors" in capsys.readouterr().out
    stages = load_result(out / "stages.safetensors")
    assert stages.result.tau == 0.1 and stages.result.colsum.count == 3 and stages.result.schedule.n_loops == 5
    assert load_result(out / "fixed_points.safetensors").result.reduction == "matrix"
    assert len(pd.read_csv(out / "stages.csv")) == stages.result.schedule.n_layers
    assert main(asked) == 0 and main(["merge", str(out)]) == 0
    assert main([*asked[:-1], "fixed_points.reduction=token"]) == 1
    assert "with reduction='matrix', not 'token'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--analysis", "fixed_pints"], "did you mean fixed_points"),
        (["--analysis", "stages", "--set", "stages.tua=1"], "stages has the settings .*tau"),
        (["--analysis", "stages", "--set", "fixed_points.stack=L"], "--analysis asks for stages"),
        (["--analysis", "stages", "--set", "tau=1"], "ANALYSIS.KEY=VALUE"),
        (["--analysis", "stages", "--shard", "8/3"], "8/3"),
    ],
)
def test_what_was_asked_wrongly_is_refused(
    more: list[str], says: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text("[1, 2, 3]\n", encoding="utf-8")
    assert main(["analyze", checkpoint, "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "run"), *more]) == 1
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert not (tmp_path / "run").exists()


def test_a_setting_to_pass_is_told_as_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text("[1, 2, 3]\n", encoding="utf-8")
    asked = ["analyze", str(GOLDEN / "hrm_text"), "--prompts", f"{tmp_path}/p.jsonl", "--out", f"{tmp_path}/run"]
    asked += ["--analysis", "fixed_points", "--loops", "3"]
    assert main(asked) == 1
    option = "--set fixed_points.stack=L"
    assert f"On the command line it is {option}." in capsys.readouterr().err
    assert main([*asked, *option.split()]) == 0


@pytest.mark.parametrize("command", ["analyze", "paper", "collect"])
def test_half_of_a_character_is_one_bad_prompt(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('"the list is"\n"\\ud800 the list"\n', encoding="utf-8")
    more = {
        "analyze": ["--analysis", "fixed_points", "--loops", "3"],
        "paper": ["--loops", "8"],
        "collect": ["--sites", "resid_post", "--layers", "-1", "--on-error", "skip"],
    }
    asked = [command, "toy:text", "--prompts", f"{tmp_path}/p.jsonl", "--out", f"{tmp_path}/run", *more[command]]
    assert main(asked) == 0
    said = capsys.readouterr().err if command != "collect" else str(load_activations(tmp_path / "run").failed)
    assert "half of a character" in said


def test_settings_are_read_as_python_writes_them() -> None:
    for text, value in (
        ("3", 3),
        ("1:", slice(1, None)),
        ("(0, 1)", (0, 1)),
        ("None", None),
        ("matrix", "matrix"),
        ("'3'", "3"),
    ):
        assert _setting(f"a.b={text}") == ("a", "b", value)


def test_an_ordinary_decoder_is_one_loop_over_its_layers(tmp_path: Path) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).eval()
    llama.save_pretrained(tmp_path)
    model, tokens = looped_or_ordinary(tmp_path, device="cpu"), torch.tensor([[1, 5, 3]])
    assert model.n_loops == 1 and model.schedule.n_layers == 3
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), llama(tokens).logits, atol=1e-5, rtol=1e-4)
    (tmp_path / "p.jsonl").write_text("[1, 2, 3]\n", encoding="utf-8")
    asked = ["analyze", str(tmp_path), "--analysis", "stages", "--prompts", f"{tmp_path}/p.jsonl", "--out", f"{tmp_path}/run"]
    assert main(asked) == 0 and load_result(tmp_path / "run" / "stages.safetensors").result.schedule.n_layers == 3
