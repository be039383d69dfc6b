"""`tl-looped paper`: the same numbers as the analyses alone, however often it was stopped, and a reason for what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same, with_words
from zoo import GOLDEN, SMALL, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedConfig, LoopedError, analysis, analyze
from tl_looped.cli import main
from tl_looped.paper import Paper, paper
from tl_looped.paper.drawn import DRAWN, About
from tl_looped.paper.findings import Findings
from tl_looped.paper.measures import Initial, OfInitial, OfPrompt
from tl_looped.paper.published import PUBLISHED, SECTIONS
from tl_looped.results import load_result
from tl_looped.runs.units import cut

pytestmark = pytest.mark.usefixtures("by_hand")
pytest.importorskip("pyarrow")
PROMPTS = [random_tokens(1, n, seed=n)[0] for n in (5, 4, 6)]
QUIET: dict[str, Any] = {"verbose": False}


def made(bridge: LoopedBridge, prompts: list[Any], **settings: Any) -> Paper:
    found = paper(bridge, prompts, **settings)
    assert found is not None
    return found


def here(found: Paper) -> dict[str, str]:
    return {row.figure: row.here for row in found.rows}


def why(found: Paper, figure: str) -> str:
    return next(row.not_done for row in found.rows if row.figure == figure)


def test_the_numbers_are_those_of_the_analyses(tmp_path: Path) -> None:
    bridge = random_bridge("huginn", torch.float64, n_core=1)
    found = made(bridge, PROMPTS, out=tmp_path, n_loops=24, **QUIET)
    parts = found.findings.parts
    assert found.findings.n_prompts == 3 and found.failed == ()
    alone = {
        "fixed_points": analysis.fixed_points(bridge, PROMPTS, n_loops=24, patterns=True, **QUIET),
        "behaviour": analysis.limiting_behaviour(bridge, PROMPTS, n_loops=24, **QUIET),
        "stages": analysis.inference_stages(bridge, PROMPTS, **QUIET),
        "stages_deep": analysis.inference_stages(bridge, PROMPTS, n_loops=24, **QUIET),
        "patterns_8": analysis.attention_distances(bridge, PROMPTS, n_loops=8, **QUIET),
        "states_24": analysis.state_similarity(bridge, PROMPTS, n_loops=24, **QUIET),
        "path_0": analysis.trajectories(bridge, PROMPTS[0], n_loops=24, n_components=2, **QUIET),
    }
    for name, result in alone.items():
        assert same(parts[name], result), name
        assert same(load_result(tmp_path / f"{name}.safetensors", bridge), result), name
    with bridge.hooks(fwd_hooks=[("prelude.blocks.1.hook_mlp_out", lambda x, hook: 0 * x)]):
        assert same(parts["stages_without_mlp"], analysis.inference_stages(bridge, PROMPTS, **QUIET))
    import pandas as pd

    frame = pd.read_parquet(tmp_path / "fixed_points.parquet")
    assert torch.equal(torch.tensor(frame["norm"]), alone["fixed_points"].norm.values.flatten())


@pytest.mark.parametrize("name", ["ouro", "retrofit_llama", "hrm_text", "loopus"])
def test_every_row_has_a_finding_or_a_reason(name: str, tmp_path: Path) -> None:
    found = made(random_bridge(name), PROMPTS, out=tmp_path, n_loops=4, **QUIET)
    assert all(bool(row.here) != bool(row.not_done) for row in found.rows), found.rows
    done = {figure for figure, text in here(found).items() if text}
    assert {"Figure 2", "Figure 3", "Figure 4", "Figure 7", "Figure 19", "Figure 41"} <= done
    assert "rotary" in why(found, "Proposition 4.2") and "24 loops" in why(found, "Figure 14")
    assert "64 loops" in why(found, "Figures 6, 29, 30, 31") and "32" in why(found, "Figure 21")
    page, written = found.page.read_text(), json.loads((tmp_path / "paper.json").read_text())
    assert page.count("<section") == len(SECTIONS) and "http" not in page.replace("http://www.w3.org", "")
    assert [row["figure"] for row in written["figures"]] == [row.figure for row in found.rows]
    import pandas as pd

    assert len(pd.read_parquet(tmp_path / "figures.parquet")) == len(found.rows)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, call = random_bridge("ouro"), OfPrompt.__call__
    whole = made(bridge, PROMPTS, out=tmp_path / "whole", n_loops=4, **QUIET)
    seen = list[int]()

    def stops(self: OfPrompt, model: Any, prompt: torch.Tensor) -> Findings:
        seen.append(len(prompt))
        if len(seen) in (2, 4):
            raise KeyboardInterrupt
        return call(self, model, prompt)

    monkeypatch.setattr(OfPrompt, "__call__", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            paper(bridge, PROMPTS, out=tmp_path / "stopped", n_loops=4, **QUIET)
    stopped = made(bridge, PROMPTS, out=tmp_path / "stopped", n_loops=4, **QUIET)
    assert len(seen) == 5 and {*seen} == {4, 5, 6}  # two were begun twice
    assert same(stopped.findings, whole.findings) and stopped.page.read_text() == whole.page.read_text()
    monkeypatch.setattr(Path, "exists", lambda file: False)  # as for a process that began at the same time
    with pytest.raises(LoopedError, match="n_loops=4, not 5"):
        paper(bridge, PROMPTS, out=tmp_path / "stopped", n_loops=5, **QUIET)
    assert json.loads((tmp_path / "stopped" / "paper.asked.json").read_text())["n_loops"] == 4


@pytest.mark.parametrize("removed", [".", "parts/prompts"])
def test_what_is_removed_meanwhile_is_measured_again(removed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, call, out = random_bridge("ouro"), OfPrompt.__call__, tmp_path / "out"
    seen = list[int]()

    def removes(self: OfPrompt, model: Any, prompt: torch.Tensor) -> Findings:
        seen.append(len(prompt))
        if len(seen) == 2:
            shutil.rmtree(out / removed)
        return call(self, model, prompt)

    monkeypatch.setattr(OfPrompt, "__call__", removes)
    found = made(bridge, PROMPTS, out=out, n_loops=2, **QUIET)
    assert found.findings.n_prompts == 3 and len(seen) == 4 and found.page.is_file()
    assert load_result(out / "stages.safetensors", bridge).colsum.count == 3


def test_a_model_that_cannot_loop_farther_is_looped_as_far_as_it_can(tmp_path: Path) -> None:
    bridge = LoopedBridge.from_pretrained(GOLDEN / "llama_rrt", device="cpu")
    found = made(bridge, [prompt % bridge.cfg.d_vocab for prompt in PROMPTS], out=tmp_path, n_loops=9, **QUIET)
    assert found.findings.parts["fixed_points"].reference == bridge.n_loops - 1
    assert f"Looped {bridge.n_loops} times and not 9: " in found.page.read_text()


def test_two_processes_make_the_page_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, out = random_bridge("retrofit_llama"), tmp_path / "two"
    whole = made(bridge, PROMPTS, out=tmp_path / "one", n_loops=4, **QUIET)
    assert paper(bridge, PROMPTS, out=out, n_loops=4, shard="1/2", **QUIET) is None
    assert main(["merge", str(out)]) == 1 and "not done" in capsys.readouterr().err
    both = made(bridge, PROMPTS, out=out, n_loops=4, shard="2/2", **QUIET)
    assert same(both.findings, whole.findings) and both.page.read_text() == whole.page.read_text()
    with monkeypatch.context() as patched:
        patched.setattr("tl_looped.paper.writing.find_spec", lambda name: None)
        assert main(["merge", str(out)]) == 1 and "needs pyarrow; pip install" in capsys.readouterr().err
    both.page.unlink()
    assert main(["merge", str(out)]) == 0 and both.page.read_text() == whole.page.read_text()


def test_a_directory_is_of_paper_or_of_analyze(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bridge, ask = random_bridge("ouro"), {"fixed_points": {"n_loops": 2}}
    paper(bridge, PROMPTS[:1], out=tmp_path / "paper", n_loops=2, **QUIET)
    analyze(ask, bridge, PROMPTS[:1], out=tmp_path / "analyze", **QUIET)
    with pytest.raises(LoopedError, match="is of tl-looped paper, whose results this would replace"):
        analyze(ask, bridge, PROMPTS[:1], out=tmp_path / "paper", **QUIET)
    with pytest.raises(LoopedError, match="is of tl-looped analyze, whose results this would replace"):
        paper(bridge, PROMPTS[:1], out=tmp_path / "analyze", n_loops=2, **QUIET)
    assert main(["merge", str(tmp_path / "paper" / "parts" / "prompts")]) == 1
    assert f"merge {str(tmp_path / 'paper')!r}" in capsys.readouterr().err


def test_prompts_that_cannot_be_measured_are_named(tmp_path: Path) -> None:
    bridge = random_bridge("ouro")
    prompts = [torch.tensor([3]), torch.zeros(SMALL["n_ctx"] + 1, dtype=torch.long), *PROMPTS]
    found = made(bridge, prompts, out=tmp_path, n_loops=4, **QUIET)
    assert [index for index, _ in found.failed] == [1] and found.findings.parts["stages"].colsum.count == 3
    assert found.findings.parts["fixed_points"].norm.count == 4  # one token has states
    assert "one token" in next(iter(found.findings.refused["stages"]))
    assert "1 prompt left out" in found.page.read_text()
    with pytest.raises(LoopedError, match="no prompts"):
        paper(bridge, [], out=tmp_path / "none", **QUIET)


def test_a_feed_forward_model_that_cannot_read_the_prompts_is_told(tmp_path: Path) -> None:
    twin = LoopedBridge.from_config(LoopedConfig(**{**SMALL, "d_vocab": 2}, n_core=2, n_loops=1), seed=0)
    found = made(random_bridge("ouro"), PROMPTS[:1], out=tmp_path, n_loops=2, feed_forward=twin, **QUIET)
    assert "the feed-forward model: prompt 0: LoopedError" in here(found)["Figure 8"]


def test_proposition_4_2_holds_without_positions(tmp_path: Path) -> None:
    cfg = LoopedConfig(**SMALL, n_core=2, n_loops=3, rope_layout="none", n_kv_heads=1)
    bridge = LoopedBridge.from_config(cfg, seed=0).to(torch.float64)
    found = made(bridge, PROMPTS, out=tmp_path, n_loops=4, **QUIET).findings.parts["bound"]
    assert found.labels["loop"] == [1, 2, 3] and 0 < float(found.values.max()) <= 1
    with torch.no_grad():
        _, cache = bridge.unroll(4).run_with_cache(PROMPTS[0][None])
    x, a = (cache.stack_loops(name, layer=1)[:, 0] for name in ("attn.hook_in", "pattern"))
    attn = bridge.blocks[1].attn
    kappa = torch.linalg.matrix_norm(attn.W_Q[2].detach() @ attn.W_K[-1].detach().T, ord=2)
    bound = max(torch.linalg.matrix_norm(x[t], ord=2) for t in (1, 2)) * kappa / SMALL["d_head"] ** 0.5 * (x[2] - x[1]).norm()
    one = OfPrompt(4)(bridge, PROMPTS[0]).parts["bound"]
    assert float(one.values[1, 1, 2]) == pytest.approx(float((a[2, 2] - a[1, 2]).norm() / bound), rel=1e-9)


def test_layouts_are_drawn_from_their_sweep() -> None:
    sweep = analysis.random_init_sweep(n_layers=2, d_model=8, n_loops=4, seeds=1, verbose=False)
    parts = {f"init_{n}": sweep for n in (12, 4, 16)}
    said, figures = DRAWN["6"](About(Findings(parts, {}, 0), 64, ("core",), {}))
    assert "pre-norm, injection" in said and len(figures) == 6
    assert DRAWN.keys() == PUBLISHED.keys() == {key for _, keys in SECTIONS.values() for key in keys}


def test_layouts_are_cut_by_size_and_seed_and_add_up() -> None:
    initials = [Initial(n_layers, seed) for seed in (0, 1) for n_layers in (1, 2)]
    units = cut(random_bridge("ouro"), initials, 4)
    assert [unit.weight for unit in units] == [1, 2, 1, 2]
    found = [OfInitial(4)(random_bridge("ouro"), unit.batches[0].value) for unit in units[::2]]  # of one layer
    both = analysis.random_init_sweep(n_layers=1, n_loops=4, seeds=2, verbose=False)
    assert same((found[0] + found[1]).parts["init_1"], both) and both.distance.count == 2


def test_the_command_writes_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("The default value is None.\nThe square root of 16 is\n")
    twin = ["--feed-forward", "toy:text-feedforward"]
    asked = ["paper", "toy:text", "--prompts", str(tmp_path / "prompts.txt"), "--loops", "4", "--out", str(tmp_path / "out")]
    assert main([*asked, *twin]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("paper: 1 of 3 measures begun\npaper: 2 of 3")
    assert "paper: 100 % done, 0.00 minutes left" in printed.err
    assert printed.out.strip() == str((tmp_path / "out" / "index.html").resolve()) and "Figure 10" in printed.err
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Correlation of a pass with the feed-forward model" in page and "over 2 prompts" in page
    assert main([*asked[:-1], str(tmp_path / "prompts.txt")]) == 1 and "directory" in capsys.readouterr().err


def test_texts_of_the_paper_are_followed_where_there_are_words(tmp_path: Path) -> None:
    found = made(with_words("huginn"), ["a b c"], out=tmp_path, n_loops=4, **QUIET)
    assert {"path_0", "path_1", "path_2"} <= {*found.findings.parts, *found.findings.refused}
