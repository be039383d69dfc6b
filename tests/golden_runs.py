"""The golden checkpoints at the loop counts of their recorded runs."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from zoo import GOLDEN

from tl_looped.checkpoints import Checkpoint, MemoryCheckpoint, load_model, open_checkpoint
from tl_looped.model import LoopedModel

FAMILIES = ("ouro", "huginn", "retrofit_llama", "retrofit_olmo", "hrm_text", "nanbeige", "parcae")
TOLERANCE = 2e-4


@cache
def golden(family: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / family / "golden.safetensors")


def edited(family: str, **changes: Any) -> MemoryCheckpoint:
    """A golden checkpoint with some keys of its config.json changed; None removes one."""
    config = json.loads((GOLDEN / family / "config.json").read_text()) | changes
    return MemoryCheckpoint(
        {key: value for key, value in config.items() if key not in changes or value is not None},
        load_file(GOLDEN / family / "model.safetensors"),
    )


def load_run(family: str, run: str, checkpoint: Checkpoint | None = None) -> LoopedModel:
    """The model at the loop count of a golden run: "R4", or "H2L3"."""
    counts = [int(n) for n in re.findall(r"\d+", run)]
    return load_model(
        checkpoint or open_checkpoint(GOLDEN / family), n_loops=counts[0], l_cycles=counts[1] if len(counts) > 1 else None
    )


def inputs(family: str, run: str) -> dict[str, Any]:
    values = golden(family)
    start = values.get(f"{run}/initial_state")
    return {"input_ids": values["input_ids"]} | ({} if start is None else {"initial_state": start})


@torch.no_grad()
def logits(model: LoopedModel, **given: Any) -> Tensor:
    return model(**given).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=TOLERANCE)


def runs() -> list[tuple[str, str]]:
    keys = [(family, key.removesuffix("/logits")) for family in FAMILIES for key in golden(family) if key.endswith("/logits")]
    return [(family, run) for family, run in keys if re.fullmatch(r"R[1-9]|H\dL\d", run)]
