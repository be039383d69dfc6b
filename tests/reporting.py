"""A tiny model and prompts for reports, and what is read from their pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tl_looped import LoopedConfig
from tl_looped.report import sections

TINY = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=2, rope_theta=100.0)
TOKENS = [torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[9, 8, 7]])]


def held(text: str) -> list[dict[str, Any]]:
    """What every grid of a page holds."""
    return [json.loads(one) for one in re.findall(r'<script class="tlx-data"[^>]*>(.*?)</script>', text, re.DOTALL)]


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Leave all other sections out."""
    monkeypatch.setattr("tl_looped.report.SECTIONS", {name: sections.SECTIONS[name] for name in names})
