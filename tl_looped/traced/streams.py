"""Which of the tensors that a module takes and returns is the stream, among masks, tables and memories."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import Call, Calls, Held, is_same

Rank = tuple[int, int, bool, bool, int, float]
RESIDUAL = 0.5  # what a layer returns is as like as this to its stream, by their cosine, if it adds to it
MARGIN = 0.1  # what is less like than another by less than this may be the stream: a gate mixes old states in


def settle(calls: Sequence[Call], shape: Sequence[int]) -> None:
    """Choose the tensors that hooks of every call see, and let go of the others.

    A stream is another one in every call of a module, where a mask, a table and a memory are the same. It is over all
    positions; the module beside gives it; and what is returned is like it, as layers add to it: of several the one given last.
    It stands at one place in all calls of modules whose paths differ by numbers.

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
        n_streams = sum(rank[0] > 0 and rank[2] for rank in gave.values())
        for call in group:
            call.given = max(call.gave, key=lambda held: gave[held.at], default=None)
            call.is_one_of_several = n_streams > 1
    for call in calls:
        call.took, call.gave = [], []


@dataclass(frozen=True)
class Stream:
    """How a stream goes through the layers.

    Args:
        enters: the modules that take it.
        leaves: those that return it.
        why_not: what is so of the others; "" if there are none.
    """

    enters: set[str]
    leaves: set[str]
    why_not: str


def stream_through(run: Calls, layers: Sequence[Call]) -> Stream:
    """Find out which layers take and return the stream, and not what is added to it, a part of it or one of several.

    Args:
        run: its calls, settled.
        layers: those of the layers.
    """
    enters, leaves, why = set[str](), set[str](), dict[str, str]()
    pairs: dict[tuple[str, str], list[tuple[Call, Call]]] = {}
    for one, then in pairwise(layers):
        pairs.setdefault((one.path, then.path), []).append((one, then))
    before = [call.gives for call in run.calls[: layers[0].index] if call.gives is not None]
    injected = {paths for paths, found in pairs.items() if _is_injected(found, before)}
    linked = [(a.path, b.path) in injected or _is_linked(run, a, b) for a, b in pairwise(layers)]
    for path in dict.fromkeys(call.path for call in layers):
        mine = [i for i, call in enumerate(layers) if call.path == path]
        followed = [(layers[i], layers[i + 1]) for i in mine if i + 1 < len(layers)]
        if layers[mine[0]].is_one_of_several:
            why[path] = "several tensors of one shape go from layer to layer; hook_in and hook_out hold one of them"
        elif followed and all(_is_added(one, then) for one, then in followed):
            enters.add(path)
            why[path] = "what is returned is added to the stream; it is at hook_out"
        elif any(linked[j] for i in mine for j in (i - 1, i) if 0 <= j < len(linked)) or all(_is_like(layers[i]) for i in mine):
            enters.add(path)
            leaves.add(path)
        else:
            why[path] = "what is taken and returned is not the stream; make a module of every layer to have names for it"
    said = {text: [path for path in why if why[path] == text] for text in dict.fromkeys(why.values())}
    return Stream(enters, leaves, "; ".join(f"{_some(paths)}: {text}" for text, paths in said.items()))


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + ", ..." * (len(paths) > 3)


def _is_linked(run: Calls, one: Call, then: Call) -> bool:
    """Whether a layer is given what the one before returned, or what a module, such as a norm, makes of it."""
    x, y = one.gives, then.takes
    if x is None or y is None:
        return False
    between = run.calls[one.index + 1 : then.index]
    return _is(x, y) or any(is_same(c.takes, x) and is_same(c.gives, y) for c in between)


def _is_injected(pairs: Sequence[tuple[Call, Call]], before: Sequence[Tensor]) -> bool:
    """Whether a layer is given what the one before returned, and the same in each loop or at all positions, or an embedding."""
    sums = [(a.gives, b.takes) for a, b in pairs if a.gives is not None and b.takes is not None]
    sums = [(x, y.to(x.device)) for x, y in sums[:2] if x.shape == y.shape and x.ndim == 3 and x.dtype == y.dtype]
    if not sums:
        return False
    x, y = sums[0]
    added = y - x
    return (
        any(other.shape == x.shape and is_near(other + added, then) for other, then in sums[1:])
        or (x.shape[1] > 1 and is_near(x + added[:, :1], y))
        or any(e.shape == x.shape and is_near(x + e.to(x), y) for e in before)
    )


def _is_added(one: Call, then: Call) -> bool:
    """Whether the next layer is given the sum of what this one was given and returned."""
    x, y, z = one.takes, one.gives, then.takes
    return x is not None and y is not None and z is not None and x.shape == y.shape and is_near(x + y, z.to(x.device))


def _is_like(call: Call) -> bool:
    """Whether a layer adds to what it is given."""
    return call.takes is not None and call.gives is not None and _cosine(call.takes, call.gives) > RESIDUAL


def is_near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of a few additions.

    Args:
        one: a tensor.
        other: a tensor.
    """
    if one.shape != other.shape:
        return False
    size = float(torch.maximum(one.abs().max(), other.abs().max())) if one.numel() else 0.0
    return bool((one - other).abs().max() <= 8 * torch.finfo(one.dtype).eps * size) if size else True


def _ranks(
    calls: Sequence[Call],
    mine: Callable[[Call], list[Held]],
    theirs: Callable[[Call], list[Held]],
    passed: Callable[[Call, Held], int],
    shape: Sequence[int],
) -> dict[Any, Rank]:
    """How much what stands at each place is like a stream; that of one place alone is not asked."""
    places: dict[Any, list[tuple[Call, Held]]] = {}
    for call in calls:
        for held in mine(call):
            places.setdefault(held.at, []).append((call, held))
    if all(len(mine(call)) < 2 for call in calls):
        return dict.fromkeys(places, (0, 0, False, False, 0, 0.0))
    ranks = {at: _rank(found, theirs, passed, shape) for at, found in places.items()}
    best = max((rank[:3], rank[-1]) for rank in ranks.values())
    return {at: (*rank[:3], rank[-1] >= best[1] - MARGIN, *rank[4:]) for at, rank in ranks.items()}


def _rank(
    found: Sequence[tuple[Call, Held]],
    theirs: Callable[[Call], list[Held]],
    passed: Callable[[Call, Held], int],
    shape: Sequence[int],
) -> Rank:
    n_fits = sum(any(held.tensor.shape == other.tensor.shape for other in theirs(call)) for call, held in found)
    n_over = sum(held.tensor.ndim == 3 and tuple(held.tensor.shape[:2]) == tuple(shape) for _, held in found)
    when = [passed(call, held) for call, held in found]
    is_passed = 2 * sum(at > 0 for at in when) >= len(found)
    like = sum(max((_cosine(held.tensor, other.tensor) for other in theirs(call)), default=0.0) for call, held in found)
    like = like / len(found)
    # whether it is among the likest is told when all are known
    return (n_fits if _changes(found) else 0, n_over, is_passed, True, sum(when), like if like > RESIDUAL else 0.0)


def _changes(found: Sequence[tuple[Call, Held]]) -> bool:
    """Whether what stands at a place is another thing in several calls of a module; of modules, where each was called once."""
    by_path: dict[str, list[Held]] = {}
    for call, held in found:
        by_path.setdefault(call.path, []).append(held)
    several = [helds for helds in by_path.values() if len(helds) > 1] or [[held for _, held in found]]
    return len(found) == 1 or any(_differ(helds) for helds in several)


def _differ(helds: Sequence[Held]) -> bool:
    first = helds[0].tensor
    return any(held.changed or not _is(held.tensor, first) for held in helds)


def _is(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same numbers."""
    return is_same(x, y) or (x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y))


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

    def gave_before(self, call: Call, held: Held) -> int:
        """When what a call takes was given by a call before; 0 if it was not."""
        at = self.given.get(_key(call, held), call.index)
        return at + 1 if at < call.index else 0

    def takes_later(self, call: Call, held: Held) -> int:
        """Whether a call afterwards takes what a call gives."""
        return int(self.taken.get(_key(call, held), call.index) > call.index)


def _key(call: Call, held: Held) -> Any:
    x = held.tensor
    return call.path.rpartition(".")[0], x.data_ptr(), x.shape, x.stride()
