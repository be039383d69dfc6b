"""Directories of `analyze` and `paper`: what lies in them is measured once, is what it says, and is of one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedConfig, LoopedError, analyze, collect
from tl_looped.analysis import limiting_behaviour
from tl_looped.paper import Paper, paper
from tl_looped.results import Estimate
from tl_looped.results.saving import SEAL

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.usefixtures("by_hand")
CFG: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_vocab": 31, "n_core": 2, "n_loops": 3, "n_ctx": 16}
PROMPTS = [random_tokens(1, n, seed=k)[0] for k, n in enumerate((5, 4, 6, 4))]
QUIET: dict[str, Any] = {"verbose": False}


@pytest.fixture(scope="module")
def model() -> LoopedBridge:
    return LoopedBridge.from_config(LoopedConfig(**CFG), seed=0)


class Sums:
    """An analysis that notes which prompts it was asked of, by their lengths, and may lack memory for some."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.too_long: int = 99
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self, model: Any, prompt: torch.Tensor) -> Estimate:
        self.asked.append(prompt.numel())
        if prompt.numel() >= self.too_long:
            raise self.error
        return Estimate.of(prompt.view(1, -1).double().sum(1), (), {}, "sum")


def done(model: LoopedBridge, sums: Sums, out: Path, **settings: Any) -> Any:
    sums.asked.clear()
    found = analyze({"sums": sums}, model, PROMPTS, out=out, **QUIET, **settings)
    assert found is not None
    return found["sums"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_prompt_without_memory_is_tried_again_and_another_is_not(
    error: Exception, model: LoopedBridge, tmp_path: Path
) -> None:
    sums = Sums()
    sums.too_long, sums.error = 6, error
    assert [index for index, _ in done(model, sums, tmp_path).failed] == [2]
    assert done(model, sums, tmp_path).failed and sums.asked == [6]  # still too little
    sums.too_long = 99
    found = done(model, sums, tmp_path)
    assert found.failed == () and sums.asked == [6] and found.result.count == 4
    sums.too_long, sums.error = 6, ValueError("no such prompt")
    shutil.rmtree(tmp_path)
    for asked in ([5, 4, 6, 4], []):
        assert done(model, sums, tmp_path).failed and sorted(sums.asked) == sorted(asked)


def test_a_file_of_another_prompt_or_without_its_seal_is_measured_again(model: LoopedBridge, tmp_path: Path) -> None:
    sums = Sums()
    first = done(model, sums, tmp_path)
    files = sorted((tmp_path / "sums").glob("*.safetensors"))
    shutil.copy(files[2], files[0])
    assert same(done(model, sums, tmp_path), first) and sums.asked == [5]
    whole = files[1].read_bytes()
    at = whole.index(SEAL[2:8].encode())
    files[1].write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert same(done(model, sums, tmp_path), first) and sums.asked == [4]


def measured(model: LoopedBridge, out: Path, **settings: Any) -> Paper | None:
    return paper(model, PROMPTS, out=out, n_loops=4, **QUIET, **settings)


def test_a_directory_is_of_one_command(model: LoopedBridge, tmp_path: Path) -> None:
    collect(model, PROMPTS, "resid_post", out=tmp_path / "collect", **QUIET)
    done(model, Sums(), tmp_path / "analyze")
    measured(model, tmp_path / "paper")
    (tmp_path / "paper" / "paper.asked.json").rename(tmp_path / "asked")
    for place in ("collect", "paper"):
        with pytest.raises(LoopedError, match=f"of tl-looped {place}, whose results this would replace"):
            done(model, Sums(), tmp_path / place)
    for place in ("analyze", "paper"):
        with pytest.raises(LoopedError, match=f"of tl-looped {place}, whose results this would replace"):
            collect(model, PROMPTS, "resid_post", out=tmp_path / place, **QUIET)
    for place in ("collect", "analyze"):
        with pytest.raises(LoopedError, match=f"of tl-looped {place}, whose results this would replace"):
            measured(model, tmp_path / place)
    (tmp_path / "asked").rename(tmp_path / "paper" / "paper.asked.json")
    with pytest.raises(LoopedError, match="is a part of tl-looped paper"):
        done(model, Sums(), tmp_path / "paper" / "parts" / "prompts")
    with pytest.raises(LoopedError, match="File name too long"):
        done(model, Sums(), tmp_path / ("a" * 300))


def test_what_is_not_several_prompts_is_refused_or_named(model: LoopedBridge, tmp_path: Path, unchecked: None) -> None:
    for one, kind in (("Return it", "one str"), (PROMPTS[0], "one Tensor"), ({"text": "a"}, "a dict with 'text'")):
        with pytest.raises(LoopedError, match=f"paper was asked of {kind}"):
            paper(model, one, out=tmp_path / "one", **QUIET)
    with pytest.raises(LoopedError, match=r"none of 1 prompt could be measured; .* is a int; pass texts or tensors"):
        paper(model, [[3, 5, 7]], out=tmp_path / "list", n_loops=4, **QUIET)


def test_examples_of_batches_are_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    bridge = random_bridge("ouro", torch.float64, n_core=1)
    found = paper(bridge, PROMPTS, out=tmp_path, n_loops=24, batch_size=2, **QUIET)
    assert found is not None
    alone = limiting_behaviour(bridge, PROMPTS, n_loops=24, **QUIET)
    lengths = [example.labels.shape[1] for example in found.findings.parts["behaviour"].examples]
    assert lengths == [5, 4, 6, 4] == [example.labels.shape[1] for example in alone.examples]
    for a, b in zip(found.findings.parts["behaviour"].examples, alone.examples, strict=True):
        torch.testing.assert_close(a.rotation_power, b.rotation_power, equal_nan=True)
    said = json.loads((tmp_path / "paper.json").read_text())
    assert said["examples"] == [0, 1, 2, 3]
    assert found.findings.refused["bound"] and all(n == 4 for n in found.findings.refused["bound"].values())  # of prompts


def test_a_feed_forward_model_once_asked_for_stays(
    model: LoopedBridge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = LoopedBridge.from_config(LoopedConfig(**CFG).replace(n_loops=1), seed=1)
    assert measured(model, tmp_path) is not None
    with_it = measured(model, tmp_path, feed_forward=beside)
    again = measured(model, tmp_path)
    assert with_it is not None and again is not None
    assert "stages_feed_forward" in again.findings.parts and again.page.read_text() == with_it.page.read_text()
    shutil.rmtree(tmp_path / "parts" / "feed_forward")
    assert paper(model, PROMPTS, out=tmp_path, n_loops=4) is None
    assert "feed_forward" in capsys.readouterr().err
