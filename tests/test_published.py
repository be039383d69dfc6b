"""Checkpoints of random weights at published sizes, which docs/cost.md measures, have the published layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import published
import pytest
import torch
from zoo import GOLDEN, golden_tensors

from tl_looped import LoopedBridge
from tl_looped.checkpoints import open_checkpoint

SMALL = {
    "Ouro-2.6B": "ouro",
    "Huginn-3.5B": "huginn",
    "HRM-Text-1B": "hrm_text",
    "Recurrent-Llama-1B": "retrofit_llama",
    "Dory-4B": "dory",
}


@pytest.mark.parametrize("name", SMALL)
def test_names_and_shapes_are_those_that_the_published_code_wrote(name: str) -> None:
    """Of the tiny models that it made, from their config.json."""
    config = json.loads((GOLDEN / SMALL[name] / "config.json").read_text())
    stored = {at: tuple(tensor.shape) for at, tensor in golden_tensors(SMALL[name]).items()}
    assert published.shapes(name, config) == stored


@pytest.mark.parametrize(("name", "count"), [("HRM-Text-1B", 1_182_795_264), ("Dory-4B", 3_975_229_440)])
def test_the_published_configurations_have_as_many_parameters_as_the_published_models(name: str, count: int) -> None:
    assert sum(map(math.prod, published.shapes(name).values())) == count


@pytest.mark.parametrize("name", SMALL)
def test_what_is_written_in_shards_loads_and_says_something(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "SHARD", 60_000)
    config = json.loads((GOLDEN / SMALL[name] / "config.json").read_text())
    n_shards = published.write(name, tmp_path, config)
    assert n_shards == len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert set(open_checkpoint(tmp_path).dtypes.values()) == {torch.bfloat16}
    model = LoopedBridge.from_pretrained(tmp_path, dtype=torch.float32)
    logits = model(torch.tensor([[3, 1, 4, 1, 5]]))
    assert 0.1 < logits.std() < 10
