"""Modules of `looped_modules`, traced, and what they answer by themselves."""

from __future__ import annotations

from typing import Any

import looped_modules
import torch
from looped_modules import VOCAB
from torch import Tensor, nn

from tl_looped import LoopedBridge

CLEAN, CORRUPTED = torch.tensor([[2, 7, 1, 8, 4, 6]]), torch.tensor([[2, 3, 1, 8, 4, 6]])
KEYWORDS = {"Universal"}
SEEDED = {"Noisy": {"seed": 5}}
ALL = ["NanoLoop", "Universal", "Halting", "InPlace", "Hierarchical", "Noisy", "Capped", "Between", "Shuffled", "Parallel"]


def module_of(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(looped_modules, name)(**kwargs).eval()


def traced(name: str, **kwargs: Any) -> Any:
    example: Any = {"tokens": CLEAN} if name in KEYWORDS else CLEAN
    settings: Any = {**SEEDED.get(name, {}), **kwargs}
    return LoopedBridge.trace(module_of(name), example, verbose=False, **settings)


def own_logits(model: Any, tokens: Tensor) -> Tensor:
    """What the module returns when it is called by itself."""
    if model.asked.seed is not None:
        torch.manual_seed(model.asked.seed)
    found = model.module(tokens=tokens) if type(model.module).__name__ in KEYWORDS else model.module(tokens)
    if isinstance(found, tuple):
        return next(x for x in found if x.shape[-1] == VOCAB)
    return found["logits"] if isinstance(found, dict) else found


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 3] - logits[0, -1, 11]
