"""What loops in a recorded run: its layers, and the passes over them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from ..errors import LoopedError
from ..schedule import Schedule, check_count
from .calls import Call, Calls, is_same

# Parts of a path that say nothing of which stack it is.
_COMMON = {"model", "transformer", "module", "layers", "layer", "blocks", "block", "h", "net", "core", "stack"}


@dataclass(frozen=True, eq=False)
class Found:
    """The layers of a run, and their order.

    Args:
        calls: of every virtual layer, in the order of the run.
        schedule: of the run.
    """

    calls: list[Call]
    schedule: Schedule

    @property
    def paths(self) -> list[str]:
        """The modules of the layers, in the order in which they run first."""
        return list(dict.fromkeys(call.path for call in self.calls))


def find(run: Calls, layers: Sequence[str] | None, n_prelude: int | None, like: Schedule | None = None) -> Found:
    """Find the layers of a run and the order of their passes.

    Args:
        run: its calls.
        layers: the modules that are layers, where that is known.
        n_prelude: how many layers run before the loop, where that is known.
        like: of the same module at another depth, by which a run of one loop is understood.

    Raises:
        LoopedError: no layers are found; nothing runs twice; layers that the run does not call, or one inside another.
    """
    paths = _layers(run) if layers is None else layers
    calls = [call for call in run.calls if call.path in set(paths)]
    if not calls:
        raise LoopedError(
            "no layers were found: no module takes a residual stream [batch, pos, width] and returns one. Name them: "
            'layers="transformer.h" or layers=["block"].'
        )
    for call in calls:
        outer = call.parent
        while outer is not None:
            if outer.path in set(paths):
                raise LoopedError(f"layers {outer.path!r} and {call.path!r} were named, but the second runs inside the first.")
            outer = outer.parent
    if like is not None and (once := replace(like, n_loops=1)).n_layers == len(calls) and like.order is None:
        return Found(calls, once)
    if len(calls) == len({call.path for call in calls}):
        shown = ", ".join(dict.fromkeys(call.path for call in calls[:3]))
        raise LoopedError(
            f"no layer runs twice ({shown}{', ...' * (len(calls) > 3)}: {len(calls)} calls), so this is no looped model. If "
            "other modules are its layers, name them by layers=. To loop layers of an ordinary Llama-shaped model, use "
            "LoopedBridge.loop_layers(model, start, stop, n_loops=); to look at it as it is, TransformerLens."
        )
    return Found(calls, schedule_of([call.path for call in calls], n_prelude))


def schedule_of(order: Sequence[str], n_prelude: int | None = None) -> Schedule:
    """The passes in a sequence of layers of which some run several times.

    A stack is a chain of layers that always follow each other. What runs once before the first repetition is the prelude,
    what runs once after the last is the coda.

    Args:
        order: the layers in the order of the run, by name.
        n_prelude: how many layers run before the loop, where that is known.

    Example:
        >>> schedule_of(["in", "a", "b", "a", "b", "a", "b", "out"])
        Schedule(n_core=2, n_loops=3, n_prelude=1, n_coda=1, l_cycles=None)
        >>> schedule_of(["l", "l", "h", "l", "l", "h"]).describe()
        '2 loops over stacks A (4 x 1 layer) and B (2 x 1 layer), 0 prelude and 0 coda layers: 6 virtual layers'
    """
    if n_prelude is not None and check_count("prelude", n_prelude, 0) >= len(order):
        raise LoopedError(f"prelude={n_prelude} was given, but the run has {len(order)} layers.")
    times = Counter(order)
    once = [times[path] == 1 for path in order]
    first = once.index(False) if n_prelude is None else n_prelude
    stop = len(order) - once[::-1].index(False)
    core = order[first:stop]
    chains = _chains(core)
    chain_of = {path: chain for chain in chains for path in chain}
    starts = [chain_of[path] for path in core if chain_of[path][0] == path]
    names = _names([chain for chain in dict.fromkeys(starts)])
    return Schedule.from_passes([(names[chain], len(chain)) for chain in starts], first, len(order) - stop)


def _chains(order: Sequence[str]) -> list[tuple[str, ...]]:
    """The longest chains of layers that only ever follow each other."""
    after: dict[str | None, set[str | None]] = {}
    before: dict[str | None, set[str | None]] = {}
    for one, next_one in pairwise([None, *order, None]):
        after.setdefault(one, set()).add(next_one)
        before.setdefault(next_one, set()).add(one)
    chains: list[list[str]] = []
    for path in dict.fromkeys(order):
        goes_on = chains and before[path] == {chains[-1][-1]} and after[chains[-1][-1]] == {path}
        if goes_on:
            chains[-1].append(path)
        else:
            chains.append([path])
    return [tuple(chain) for chain in chains]


def _names(chains: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A word for every stack: "core" for one, else the word of its path that tells it from the others, or a letter."""
    if len(chains) == 1:
        return {chains[0]: "core"}
    words = [_word(chain[0]) for chain in chains]
    if len(set(words)) < len(words) or not all(word.isidentifier() for word in words):
        words = [chr(ord("A") + k) if k < 26 else f"S{k}" for k in range(len(chains))]
    return dict(zip(chains, words, strict=True))


def _word(path: str) -> str:
    """The last word of a path that is no common one, without what only says that it is a stack."""
    words = [re.sub(r"_(module|level|stack|layers?|blocks?|net)$", "", word) for word in path.split(".")]
    telling = [word for word in words if not word.isdigit() and word not in _COMMON]
    return telling[-1] if telling and telling[-1] not in ("prelude", "coda", "loops") else ""


def named(module: nn.Module, layers: object) -> list[str]:
    """The paths of the layers that a user names.

    Args:
        module: whose.
        layers: a path, paths, or modules; a list of modules stands for those in it.

    Raises:
        LoopedError: there is no such submodule.
    """
    asked = [layers] if isinstance(layers, (str, nn.Module)) or not isinstance(layers, Iterable) else list(layers)
    paths = {id(submodule): path for path, submodule in module.named_modules()}
    found: list[str] = []
    for one in asked:
        submodule = one
        if isinstance(one, str):
            try:
                submodule = module.get_submodule(one)
            except AttributeError as error:
                near = [path for path in paths.values() if path.endswith(one.rpartition(".")[2])][:3]
                hint = f" Like it: {', '.join(near)}." if near else ""
                raise LoopedError(f"layers={one!r} was given, but the module has no such submodule.{hint}") from error
        if not isinstance(submodule, nn.Module) or id(submodule) not in paths:
            raise LoopedError(f"layers holds {one!r}, which is no submodule of this module; pass paths or submodules.")
        several = isinstance(submodule, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        found += [paths[id(inner)] for inner in (submodule.children() if several else [submodule])]
    return list(dict.fromkeys(found))


def _layers(run: Calls) -> list[str]:
    """The modules that are most likely the layers: each turns a residual stream into one, and they follow each other."""
    streams = [call for call in run.calls if _is_stream(call)]
    times, side_by_side = Counter(call.path for call in streams), _side_by_side(streams)
    in_turn = [c for c in streams if c.path.rpartition(".")[2].isdigit() and c.path not in side_by_side]
    numbered = _outermost(in_turn)
    if all(times[call.path] == 1 for call in numbered):  # they are before or after what loops, or there are none
        numbered = _outermost([call for call in streams if call in in_turn or times[call.path] > 1])
    paths = list(dict.fromkeys(call.path for call in numbered))
    while deeper := _deeper(run, paths):
        paths = deeper
    return paths


def _is_stream(call: Call) -> bool:
    """Whether a call of a module with modules inside turned [batch, pos, width] into the same shape."""
    took, gave = call.takes, call.gives
    return bool(call.inner) and took is not None and gave is not None and took.ndim == 3 and took.shape == gave.shape


def _side_by_side(calls: Sequence[Call]) -> set[str]:
    """The modules that are given what others of their list are given in the same call: experts, and no layers."""
    together: dict[object, set[str]] = {}

    def key(call: Call) -> object:
        return id(call.parent), call.path.rpartition(".")[0], call.takes.data_ptr() if call.takes is not None else 0

    for call in calls:
        together.setdefault(key(call), set()).add(call.path)
    alone = {call.path for call in calls if len(together[key(call)]) == 1}
    return {call.path for call in calls} - alone


def _outermost(calls: Sequence[Call]) -> list[Call]:
    """The calls that lie inside none of the others."""
    chosen = set(map(id, calls))

    def is_inside(call: Call) -> bool:
        outer = call.parent
        while outer is not None and id(outer) not in chosen:
            outer = outer.parent
        return outer is not None

    return [call for call in calls if not is_inside(call)]


def _deeper(run: Calls, paths: list[str]) -> list[str]:
    """The layers inside what were taken for layers, where these do nothing but run them one after the other."""
    found: list[str] = []
    for path in paths:
        for call in run.of(path):
            inner = _outermost([c for c in _within(call) if _is_stream(c)])
            ends = [call.takes, *(c.gives for c in inner)]
            is_chain = len(inner) > 0 and all(is_same(c.takes, end) for c, end in zip(inner, ends, strict=False))
            kinds = {re.sub(r"\d+", "*", c.path) for c in inner}
            if not (is_chain and is_same(inner[-1].gives, call.gives) and len(kinds) == 1 and len({c.path for c in inner}) > 1):
                return []
            found += [c.path for c in inner]
    return list(dict.fromkeys(found))


def _within(call: Call) -> list[Call]:
    """All calls inside one."""
    return [found for inner in call.inner for found in (inner, *_within(inner))]
