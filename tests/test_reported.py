"""Faults that were reported: one test a kind, with the number that is right and how it was had."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import ZOO, random_bridge, random_tokens
from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.analysis import injection_effect
from tl_looped.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden"

# --- Machines: rows, kernels and training runs ---


@pytest.mark.parametrize(("name", "stack"), [("huginn", None), ("parcae", None), ("hrm_text", "L"), ("hrm_text", "H")])
def test_rows_that_round_differently_have_no_effect_before_the_edit(name: str, stack: str | None) -> None:
    """0 by definition: before the edit there is one computation. The hook stands for a processor whose rows differ in rounding."""
    bridge, tokens = random_bridge(name, torch.float64, n_loops=4), random_tokens(2, 5)
    first = bridge.schedule.passes[0]
    bridge.add_hook(
        f"{bridge.schedule.pass_prefix(first)}.hook_out", lambda x, hook: x + 1e-6 * torch.arange(len(x)).view(-1, 1, 1)
    )
    n_passes = bridge.schedule.n_loops_of(bridge.schedule.looped_stack(stack))
    found = injection_effect(bridge, tokens, n_passes // 2, stack=stack, verbose=False)
    assert found.state_change.values.tolist()[:2] == found.kl.values.tolist()[:2] == [0.0, 0.0]
    assert found.state_change.values[2:].min() > 1e-3 and found.kl.values[2:].min() > 1e-9


# (end: Machines: rows, kernels and training runs)


# --- Copies, interruptions, frozen parameters, stale caches ---


# (end: Copies, interruptions, frozen parameters, stale caches)


# --- Padding and tokenizers ---


# (end: Padding and tokenizers)


# --- Configs: keys, kinds, counts ---


# (end: Configs: keys, kinds, counts)


# --- Files: saving, reading, writing ---


# (end: Files: saving, reading, writing)


# --- Paths, receivers and attribution ---


# (end: Paths, receivers and attribution)


# --- TransformerLens's names and tools ---


# (end: TransformerLens's names and tools)


# --- Exit policies, noise, figures ---


# (end: Exit policies, noise, figures)
