"""How work is cut: prompts into batches, batches into units. It depends on the prompts alone, not on who does the work."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoopedError
from ..looped import Hooked
from .prompts import token_batches
from .shares import Share

MOST_UNITS = 256  # of an analysis: so many files, and so many processes that have work


@dataclass(frozen=True)
class Batch:
    """Prompts that are measured together.

    Args:
        prompts: which ones.
        value: the one, or the tokens of all as rows.
        weight: how much work they are, about.
    """

    prompts: tuple[int, ...]
    value: Any
    weight: int


@dataclass(frozen=True)
class Unit:
    """Batches whose sum is one file.

    Args:
        index: which unit.
        batches: its batches.
    """

    index: int
    batches: tuple[Batch, ...]

    @property
    def weight(self) -> int:
        """How much work it is, about."""
        return sum(batch.weight for batch in self.batches)

    @property
    def prompts(self) -> tuple[int, ...]:
        """Which prompts it has."""
        return tuple(prompt for batch in self.batches for prompt in batch.prompts)


def cut(model: Hooked, prompts: Sequence[Any], batch_size: int) -> list[Unit]:
    """Cut prompts into units.

    Args:
        model: whose tokenizer counts.
        prompts: all of them.
        batch_size: at most so many prompts of one length are measured together.
    """
    batches: list[Batch] = []
    waiting: dict[int, list[tuple[int, Tensor]]] = {}  # by length
    places: dict[int, int] = {}

    def close(length: int) -> None:
        group = waiting.pop(length)
        indices, rows = zip(*group, strict=True)
        value = prompts[indices[0]] if len(group) == 1 else torch.cat(rows)
        batches[places[length]] = Batch(indices, value, length * len(group))

    for index, prompt in enumerate(prompts):
        tokens = _tokens(model, prompt)
        if tokens is None or len(tokens) > 1:
            # What is no prompt may say how much work it is.
            batches.append(Batch((index,), prompt, getattr(prompt, "weight", 1) if tokens is None else tokens.numel()))
            continue
        length = tokens.shape[1]
        if length > model.cfg.n_ctx:  # it fails at once, and would outweigh all others
            batches.append(Batch((index,), prompt, 1))
            continue
        if length not in waiting:
            places[length] = len(batches)
            batches.append(Batch((), None, 0))  # a batch stands where its first prompt does
        waiting.setdefault(length, []).append((index, tokens))
        if len(waiting[length]) == batch_size:
            close(length)
    for length in list(waiting):
        close(length)
    size = -(-len(batches) // MOST_UNITS)
    parts = [tuple(batches[k : k + size]) for k in range(0, len(batches), size)]
    return [Unit(index, part) for index, part in enumerate(parts)]


def _tokens(model: Hooked, prompt: Any) -> Tensor | None:
    """The tokens of a prompt; None of what is none, or a bad one, which its analysis will refuse."""
    if not isinstance(prompt, (str, Tensor)):
        return None
    try:
        return next(token_batches(model, prompt, what="analyze"))
    except LoopedError:
        return None


def share_of(units: Sequence[Unit], share: Share) -> list[Unit]:
    """The units of one share, of about equal weight, in an order in which the first few are like all.

    Args:
        units: all of them.
        share: whose.
    """
    # Another number of shares deals them out quite differently, so what one share left behind is spread over all.
    order = random.Random(share.of).sample(units, len(units))
    loads, mine = [0] * min(share.of, len(units)), list[Unit]()  # of more shares the last ones get nothing
    for unit in order:
        least = min(range(len(loads)), key=loads.__getitem__)
        loads[least] += unit.weight
        if least == share.index:
            mine.append(unit)
    mine.sort(key=lambda unit: unit.weight)
    return [mine[k] for k in _spread(len(mine))]


def _spread(n: int) -> list[int]:
    """The numbers below n in an order in which those of any beginning are spread evenly over all (by the golden ratio)."""
    found: dict[int, None] = {}
    step = 0
    while len(found) < n:
        found.setdefault(int((0.5 + step * 0.6180339887498949) % 1 * n))
        step += 1
    return [*found]
