"""The command, run as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import word_tokenizer
from zoo import CHECKPOINTS, FEW, GOLDEN, random_bridge, slow_but

from tl_looped import LoopedBridge, load_activations
from tl_looped.cli import main, parser
from tl_looped.cli._devices import devices_beside


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


@pytest.mark.parametrize("family", slow_but({*FEW, "mor_token", "inkling2_loop"}, CHECKPOINTS))
def test_lens_shows_the_readout_of_every_loop(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["lens", str(GOLDEN / family), "--tokens", "5,17,3", "--n-loops", "3", "--top-k", "2"])
    if family in ("mor_expert", "mor_token"):  # whose earlier answers have no meaning
        assert code == 1 and "trained for all of its recursions" in capsys.readouterr().err
        return
    assert code == 0
    out = capsys.readouterr().out
    header, *rows = out[out.index("loop  ") :].strip().splitlines()
    bridge = LoopedBridge.from_pretrained(GOLDEN / family, n_loops=3)
    tokens = torch.tensor([[5, 17, 3]])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    assert len(rows) == 3
    assert ("exit gate" in header) == (family in ("ouro", "loopus"))
    for loop, row in enumerate(rows):
        shown = cells(row)
        assert shown.pop(0) == str(loop)
        if family in ("ouro", "loopus"):
            assert float(shown.pop(0)) == pytest.approx(
                cache[f"loops.{loop}.hook_exit_logit"][0, -1].sigmoid().item(), abs=6e-4
            )
        with torch.no_grad():
            best = bridge.readout(tokens, loop=loop)[0, -1].softmax(-1).topk(2)
        for cell, token, probability in zip(shown, best.indices, best.values, strict=True):
            assert cell.split()[0] == str(int(token))
            assert float(cell.split()[1]) == pytest.approx(probability.item(), abs=6e-4)


def test_lens_takes_text_when_the_checkpoint_has_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bridge = random_bridge("huginn")
    bridge.tokenizer = word_tokenizer()
    bridge.save_pretrained(tmp_path)
    assert main(["lens", str(tmp_path), "--prompt", "t5 t17 t3"]) == 0
    out = capsys.readouterr().out
    assert "'t17'" in out and len(out[out.index("loop  ") :].strip().splitlines()) == 4


def test_lens_of_a_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, table = tmp_path / "prompts.txt", tmp_path / "table.csv"
    prompts.write_text("A b B c C a ? A\n\nB c C b ? B\n")
    assert main(["lens", "toy:hop", "--prompts", str(prompts), "--csv", str(table), "--top-k", "2", "--n-loops", "3"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()[-3:]
    assert cells(header) == ["prompt", "loop 0", "loop 1", "loop 2"]
    assert [cell.split()[0] for cell in cells(rows[0])[1:]] == ["'b'", "'c'", "'a'"] and rows[1].startswith("B c C b ? B")
    frame = pd.read_csv(table)
    assert len(frame) == 6 and frame.token_1.tolist() == ["b", "c", "a", "c", "b", "c"] and "prob_2" in frame
    ids = tmp_path / "ids.txt"
    ids.write_text("5,17,3\n4\n")
    assert main(["lens", str(GOLDEN / "ouro"), "--prompts", str(ids)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 ")


@pytest.mark.parametrize("device_map", ["auto", '{"": "cpu", "core": "cpu"}'])
def test_a_model_is_spread_over_devices(device_map: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("A b B a ? A\n")
    lens = ["lens", "toy:hop", "--prompt", "A b B a ? A"]
    assert main(lens) == 0
    alone = capsys.readouterr().out
    assert main([*lens, "--device-map", device_map]) == 0 and capsys.readouterr().out == alone
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--analysis", "stages", "--out", str(tmp_path / "run")]
    assert main(["analyze", "toy:hop", *asked, "--device-map", device_map]) == 0


def test_a_map_of_devices_reaches_the_model_in_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("A b B a ? A\n")
    prompts, out = ["--prompts", str(tmp_path / "p.txt")], ["--out", str(tmp_path / "out")]
    for command, more in {
        "lens": prompts,
        "report": [*prompts, *out],
        "compare": [*prompts, "--n-loops", "2,3"],
        "analyze": [*prompts, "--analysis", "stages", *out],
        "collect": [*prompts, "--sites", "resid_post", *out],
        "paper": [*prompts, "--out", str(tmp_path / "paper")],
        "explore": [],
    }.items():
        asked = [command, "toy:hop", *more, "--device-map"]
        assert main([*asked, '{"": "cpu", "coree": 0}']) == 1
        assert "device_map has 'coree', which is no part of this model" in capsys.readouterr().err
        for wrong, says in (("even", "neither auto nor balanced"), ('{"": true}', "use --device")):
            with pytest.raises(SystemExit):
                main([*asked, wrong])
            assert says in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main([*asked, "auto", "--device", "cpu"])
        assert "--device: not allowed with argument --device-map" in capsys.readouterr().err


def test_a_map_of_parts_is_one_for_the_looped_model_alone() -> None:
    for device_map, beside in (('{"core": 0}', {"device": "cpu"}), ("auto", {"device_map": "auto"})):
        args = parser().parse_args(["paper", "MODEL", "--prompts", "P", "--out", "DIR", "--device-map", device_map])
        assert devices_beside(args, "cpu") == beside


def test_collect_writes_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"ids": [3, 4, 5]}\n{"ids": [6, 7, 8, 9]}\n')
    out = tmp_path / "store"
    asked = ["collect", str(GOLDEN / "huginn"), "--prompts", str(prompts), "--sites", "mlp_out,loops.*.hook_out"]
    assert main([*asked, "--n-loops", "3", "--loops", "0:2", "--dtype", "bf16", "--positions=-1", "--out", str(out)]) == 0
    store = load_activations(out)
    assert {where.split(".")[1] for where in store.names} == {"0", "1"} and store.dtype == torch.bfloat16
    assert store.to_dataframe()["position"].tolist() == [2, 3] and "2 prompts, 2 tokens" in capsys.readouterr().out
    assert main([*asked, "--loops", "0:x", "--out", str(out)]) == 1
    assert "write indices such as 3, 0,2 or 1:4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([str(GOLDEN / "ouro"), "--prompts", "/no/such/file"], "--prompts '/no/such/file' cannot be read"),
        ([str(GOLDEN / "ouro"), "--tokens", "5", "--csv", "/no/such/place/x.csv"], "no directory '/no/such/place'"),
        ([str(GOLDEN / "ouro"), "--prompt", "hello"], "has no tokenizer, and 'hello' is no list of token ids"),
        ([str(GOLDEN / "ouro"), "--prompt", ""], "no tokenizer, and '' is no list"),
        ([str(GOLDEN / "ouro"), "--prompt", str(2**63)], f"'{2**63}' is no list of token ids"),
        (["no/such-model", "--tokens", "1"], "no/such-model.*not a directory"),
        ([str(GOLDEN / "ouro"), "--tokens", "500"], "0..100"),
        ([str(GOLDEN / "ouro"), "--tokens", "5", "--n-loops", "0"], "n_loops=0"),
        ([str(GOLDEN / "ouro"), "--tokens", "5", "--top-k", "0"], "top_k=0"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], unchecked: None
) -> None:
    assert main(["lens", *arguments]) == 1
    err = capsys.readouterr().err
    assert re.search(says, err) and "Traceback" not in err


def test_a_place_for_the_table_is_checked_before_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep-init", "--n-layers", "1", "--csv", "/no/such/place/x.csv"]) == 1
    err = capsys.readouterr().err
    assert "no directory '/no/such/place'" in err and len(err.strip().splitlines()) == 1


def test_the_command_is_installed() -> None:
    help_page = subprocess.run(
        [Path(sys.executable).parent / "tl-looped", "lens", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--prompt" in help_page and "--top-k" in help_page and "example" in help_page
    bad = subprocess.run(
        [sys.executable, "-m", "tl_looped.cli", "lens", "x", "--tokens", "5,a"], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2 and "5,17,3" in bad.stderr
