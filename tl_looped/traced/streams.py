"""Which of the tensors that a module takes and returns is the stream, among masks, tables and memories."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import Call, Held, is_same

Rank = tuple[int, int, bool, float]
RESIDUAL = 0.5  # what a layer returns is as like as this to its stream, by their cosine, if it adds to it


def settle(calls: Sequence[Call], shape: Sequence[int]) -> None:
    """Choose the tensors that hooks of every call see, and let go of the others.

    A stream is another one in every call of a module, where a mask, a table and a memory are the same. It is over all
    positions; the module beside gives it; and what is returned is like it, as layers add to it. It stands at one place in all
    calls of modules whose paths differ by numbers.

    Args:
        calls: of a run, in the order in which they began.
        shape: of the tokens, [batch, pos].
    """
    alike: dict[str, list[Call]] = {}
    for call in calls:
        alike.setdefault(re.sub(r"\d+", "*", call.path), []).append(call)
    beside = _Beside(calls)
    for group in alike.values():
        took = _ranks(group, lambda c: c.took, lambda c: c.gave, beside.gave_before, shape)
        for call in group:
            call.taken = max(call.took, key=lambda held: took[held.at], default=None)
        gave = _ranks(group, lambda c: c.gave, lambda c: [c.taken] if c.taken else [], beside.takes_later, shape)
        for call in group:
            call.given = max(call.gave, key=lambda held: gave[held.at], default=None)
    for call in calls:
        call.took, call.gave = [], []


def _ranks(
    calls: Sequence[Call],
    mine: Callable[[Call], list[Held]],
    theirs: Callable[[Call], list[Held]],
    is_passed: Callable[[Call, Held], bool],
    shape: Sequence[int],
) -> dict[Any, Rank]:
    """How much what stands at each place is like a stream; that of one place alone is not asked."""
    places: dict[Any, list[tuple[Call, Held]]] = {}
    for call in calls:
        for held in mine(call):
            places.setdefault(held.at, []).append((call, held))
    if all(len(mine(call)) < 2 for call in calls):
        return dict.fromkeys(places, (0, 0, False, 0.0))
    return {at: _rank(found, theirs, is_passed, shape) for at, found in places.items()}


def _rank(
    found: Sequence[tuple[Call, Held]],
    theirs: Callable[[Call], list[Held]],
    is_passed: Callable[[Call, Held], bool],
    shape: Sequence[int],
) -> Rank:
    n_fits = sum(any(held.tensor.shape == other.tensor.shape for other in theirs(call)) for call, held in found)
    n_over = sum(held.tensor.ndim == 3 and tuple(held.tensor.shape[:2]) == tuple(shape) for _, held in found)
    n_passed = sum(is_passed(call, held) for call, held in found)
    like = sum(max((_cosine(held.tensor, other.tensor) for other in theirs(call)), default=0.0) for call, held in found)
    like = like / len(found)
    return (n_fits if _changes(found) else 0, n_over, 2 * n_passed >= len(found), like if like > RESIDUAL else 0.0)


def _changes(found: Sequence[tuple[Call, Held]]) -> bool:
    """Whether what stands at a place is another thing in several calls of a module; of modules, where each was called once."""
    by_path: dict[str, list[Held]] = {}
    for call, held in found:
        by_path.setdefault(call.path, []).append(held)
    several = [helds for helds in by_path.values() if len(helds) > 1] or [[held for _, held in found]]
    return len(found) == 1 or any(_differ(helds) for helds in several)


def _differ(helds: Sequence[Held]) -> bool:
    first = helds[0].tensor
    return any(held.changed or not (is_same(held.tensor, first) or _equal(held.tensor, first)) for held in helds)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


def _cosine(x: Tensor, y: Tensor) -> float:
    """The cosine of two tensors of one shape; 0 if it is none."""
    if x.shape != y.shape:
        return 0.0
    found = float(F.cosine_similarity(x.flatten().float(), y.flatten().to(x.device).float(), dim=0))
    return found if found > 0 else 0.0  # nan where a mask is infinite


class _Beside:
    """What modules give to those beside them, which one module holds."""

    def __init__(self, calls: Iterable[Call]):
        self.given: dict[Any, int] = {}
        self.taken: dict[Any, int] = {}
        for call in calls:
            for held in call.gave:
                self.given.setdefault(_key(call, held), call.index)
            self.taken |= {_key(call, held): call.index for held in call.took}

    def gave_before(self, call: Call, held: Held) -> bool:
        """Whether a call before gave what a call takes."""
        return self.given.get(_key(call, held), call.index) < call.index

    def takes_later(self, call: Call, held: Held) -> bool:
        """Whether a call afterwards takes what a call gives."""
        return self.taken.get(_key(call, held), call.index) > call.index


def _key(call: Call, held: Held) -> Any:
    x = held.tensor
    return call.path.rpartition(".")[0], x.data_ptr(), x.shape, x.stride()
