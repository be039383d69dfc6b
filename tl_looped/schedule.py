"""Which layer runs when: passes, virtual layers, and the names that carry the loop.

A looped model runs stacks of layers several times. Unrolled, every execution of a layer is one *virtual layer*;
TransformerLens names it `blocks.{i}`. This module is the only place that converts between that index, the site (stack, loop,
layer) and the names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from ._words import counted
from .errors import LoopedError, OutOfRangeError, UnknownNameError
from .kinds import count, plain

__all__ = ["Indices", "LoopSelector", "Pass", "Schedule", "Site"]

_MAX_INT64 = 2**63 - 1
_INDEX = r"(\*|-?\d+|(?:-?\d+)?:(?:-?\d+)?)"
_BLOCK = re.compile(rf"blocks\.{_INDEX}\.(.+)")
_EDGE = re.compile(rf"(prelude|coda)\.blocks\.{_INDEX}\.(.+)")
_LOOP = re.compile(rf"(?:(\w+)\.)?loops\.{_INDEX}(?:\.blocks\.{_INDEX})?\.(.+)")

# Which loops: one, a slice, several, every one, the last one. Everywhere the same; negative indices count from the end.
LoopSelector = int | slice | Sequence[int] | Literal["all", "last"]
# Which layers, positions or heads; None for all.
Indices = int | slice | Sequence[int] | None


class Site(NamedTuple):
    """Where a virtual layer sits: its stack, the loop (None in prelude and coda) and the layer inside the stack."""

    stack: str
    loop: int | None
    layer: int


@dataclass(frozen=True)
class Pass:
    """One execution of a stack: its place in the run, its loop index, its virtual layers `first .. first + n_layers - 1`."""

    index: int
    stack: str
    loop: int
    first: int
    n_layers: int

    @property
    def layers(self) -> range:
        """The virtual indices of this pass."""
        return range(self.first, self.first + self.n_layers)


_UNITS = {"head": "H", "neuron": "N"}  # parts of a layer, in labels


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` if it is an int of at least `minimum`; raise a `LoopedError` that names it otherwise.

    Args:
        name: what the message calls it.
        value: what was given.
        minimum: the least that is accepted.

    Raises:
        LoopedError: it is no int, or too small.
    """
    return count(minimum, _MAX_INT64)(name, plain(value))


@dataclass(frozen=True)
class Schedule:
    """The order in which the layers of a looped model run.

    Args:
        n_core: layers in the looped stack (in each of the two stacks when `l_cycles` is given).
        n_loops: how often the looped stack runs; counts H cycles when `l_cycles` is given.
        n_prelude: layers before the loop.
        n_coda: layers after the loop.
        l_cycles: runs of the L stack before each run of the H stack (HRM-Text), or None for one looped stack.

    Example:
        >>> schedule = Schedule(n_core=3, n_loops=4, n_prelude=2, n_coda=1)
        >>> schedule.n_layers
        15
        >>> schedule.site(7)
        Site(stack='core', loop=1, layer=2)
        >>> schedule.name(7, "attn.hook_z")
        'loops.1.blocks.2.attn.hook_z'
        >>> schedule.expand("loops.2:.blocks.0.hook_resid_pre")
        ['blocks.8.hook_resid_pre', 'blocks.11.hook_resid_pre']
    """

    n_core: int
    n_loops: int
    n_prelude: int = 0
    n_coda: int = 0
    l_cycles: int | None = None

    def __post_init__(self) -> None:
        check_count("n_core", self.n_core)
        check_count("n_loops", self.n_loops)
        check_count("n_prelude", self.n_prelude, 0)
        check_count("n_coda", self.n_coda, 0)
        if self.l_cycles is not None:
            check_count("l_cycles", self.l_cycles)

    @property
    def core_stacks(self) -> tuple[str, ...]:
        """The looped stacks."""
        return ("core",) if self.l_cycles is None else ("L", "H")

    @cached_property
    def stacks(self) -> dict[str, int]:
        """Number of physical layers of every stack, in the order of their physical indices."""
        return {"prelude": self.n_prelude, **dict.fromkeys(self.core_stacks, self.n_core), "coda": self.n_coda}

    @property
    def n_passes(self) -> int:
        """How often a looped stack runs, all stacks together."""
        return self.n_loops * (1 if self.l_cycles is None else self.l_cycles + 1)

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """Every execution of a looped stack, in the order of the run."""
        return tuple(map(self._pass, range(self.n_passes)))

    def _pass(self, index: int) -> Pass:
        """The pass at a place in the run, always the same object."""
        if index not in self._made:
            stack, loop = "core", index
            if self.l_cycles is not None:
                loop, step = divmod(index, self.l_cycles + 1)
                stack, loop = ("H", loop) if step == self.l_cycles else ("L", loop * self.l_cycles + step)
            self._made[index] = Pass(index, stack, loop, self.n_prelude + index * self.n_core, self.n_core)
        return self._made[index]

    @cached_property
    def _made(self) -> dict[int, Pass]:
        return {}

    def _pass_of(self, stack: str, loop: int) -> Pass:
        """The pass that is the execution number `loop` of a stack."""
        if self.l_cycles is None:
            return self._pass(loop)
        h, step = (loop, self.l_cycles) if stack == "H" else divmod(loop, self.l_cycles)
        return self._pass(h * (self.l_cycles + 1) + step)

    @property
    def n_layers(self) -> int:
        """Number of virtual layers."""
        return self.n_prelude + self.n_passes * self.n_core + self.n_coda

    @property
    def first_coda_layer(self) -> int:
        """Virtual index of the first coda layer (`n_layers` where there is no coda)."""
        return self.n_layers - self.n_coda

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The site of every virtual layer."""
        core = [Site(p.stack, p.loop, j) for p in self.passes for j in range(p.n_layers)]
        edge = {s: [Site(s, None, j) for j in range(n)] for s, n in (("prelude", self.n_prelude), ("coda", self.n_coda))}
        return tuple(edge["prelude"] + core + edge["coda"])

    @cached_property
    def physical(self) -> tuple[int, ...]:
        """For every virtual layer, the index of its physical layer (prelude, looped stacks, coda)."""
        offset, base = {}, 0
        for stack, n in self.stacks.items():
            offset[stack], base = base, base + n
        return tuple(offset[site.stack] + site.layer for site in self.sites)

    def n_loops_of(self, stack: str) -> int:
        """How often a looped stack runs.

        Args:
            stack: "core", or "L" or "H" for HRM-Text.
        """
        if stack not in self.core_stacks:
            return 0
        return self.n_loops * self.l_cycles if stack == "L" and self.l_cycles is not None else self.n_loops

    def looped_stack(self, stack: str | None = None) -> str:
        """Check the name of a looped stack; None for the only one.

        Args:
            stack: "L" or "H" for HRM-Text; None or "core" elsewhere.

        Raises:
            LoopedError: there is no such stack, or None was given and there are two.
        """
        stacks = list(self.core_stacks)
        if stack is None and len(stacks) > 1:
            raise LoopedError("this model loops the stacks L and H; pass stack='L' or stack='H'.")
        if stack is not None and stack not in stacks:
            raise LoopedError(f"stack={stack!r} was asked, but this model loops {' and '.join(map(repr, stacks))}.")
        return stacks[0] if stack is None else stack

    def select_loops(self, loops: LoopSelector = "all", stack: str | None = None) -> list[int]:
        """The loops of a stack that a selector names, in the order asked.

        Args:
            loops: an int, a slice, several ints, "all" or "last".
            stack: "L" or "H" for HRM-Text; None elsewhere.

        Raises:
            OutOfRangeError: a loop that this run does not have, or no loop at all.

        Example:
            >>> schedule = Schedule(n_core=3, n_loops=4)
            >>> schedule.select_loops(slice(2, None)), schedule.select_loops([0, -1]), schedule.select_loops("last")
            ([2, 3], [0, 3], [3])
        """
        stack, loops = self.looped_stack(stack), plain(loops)
        n = self.n_loops_of(stack)
        if isinstance(loops, str):
            if loops not in ("all", "last"):
                raise LoopedError(f'loops={loops!r} was asked; pass an int, a slice, a list of ints, "all" or "last".')
            return list(range(n)) if loops == "all" else [n - 1]
        if isinstance(loops, slice):
            chosen = list(range(n)[loops])
        else:
            asked = [loops] if isinstance(loops, int) else loops
            if not isinstance(asked, Sequence):
                raise LoopedError(f'loops={loops!r} was asked; pass an int, a slice, a list of ints, "all" or "last".')
            chosen = [_pick_one(t, n, "loop", "loops", more_loops=stack == "core") for t in asked]
        if not chosen:
            raise OutOfRangeError(f"loops={loops!r} selects nothing: there are {n} loops{_span(n)}.")
        return chosen

    def passes_of(self, loops: LoopSelector = "all", stack: str | None = None) -> list[Pass]:
        """The passes of a looped stack that a loop selector names, in the order asked.

        Args:
            loops: as in `select_loops`.
            stack: "L" or "H" for HRM-Text; None elsewhere.

        Raises:
            OutOfRangeError: a loop that this run does not have, or no loop at all.
        """
        stack = self.looped_stack(stack)
        return [self._pass_of(stack, t) for t in self.select_loops(loops, stack)]

    def layer(self, index: int) -> int:
        """Check a virtual index and make it non-negative.

        Args:
            index: a virtual layer; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such layer.
        """
        return _pick_one(index, self.n_layers, "layer", "virtual layers")

    def loop(self, index: int) -> int:
        """Check a loop index (of the H stack for HRM-Text) and make it non-negative.

        Args:
            index: a loop; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such loop.
        """
        return _pick_one(index, self.n_loops, "loop", "loops", more_loops=True)

    def pass_of_loop(self, loop: int) -> Pass:
        """The pass that ends a loop (the H pass for HRM-Text).

        Args:
            loop: which loop; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such loop.
        """
        return self._pass_of(self.core_stacks[-1], self.loop(loop))

    def pass_of_layer(self, index: int) -> Pass | None:
        """The pass that a virtual layer belongs to, or None in prelude and coda.

        Args:
            index: a virtual layer; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such layer.
        """
        layer = self.layer(index) - self.n_prelude
        return self._pass(layer // self.n_core) if 0 <= layer < self.n_passes * self.n_core else None

    def site(self, index: int) -> Site:
        """The site of a virtual layer.

        Args:
            index: a virtual layer; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such layer.
        """
        layer = self.layer(index)
        if layer < self.n_prelude:
            return Site("prelude", None, layer)
        which, j = divmod(layer - self.n_prelude, self.n_core)
        if which >= self.n_passes:
            return Site("coda", None, layer - self.first_coda_layer)
        p = self._pass(which)
        return Site(p.stack, p.loop, j)

    def virtual(self, site: Site) -> int:
        """The virtual index of a site.

        Args:
            site: stack, loop and layer; negative indices count from the end.

        Raises:
            OutOfRangeError: this run has no such site.
        """
        stack, loop, layer = site
        is_looped = stack in self.core_stacks
        if loop is not None and is_looped:
            loop = _pick_one(loop, self.n_loops_of(stack), "loop", "loops", more_loops=stack == "core")
        layer = _pick_one(layer, self.stacks.get(stack, 0), "layer", f"layers in stack {stack!r}")
        if (loop is not None) != is_looped:
            raise OutOfRangeError(f"{site} was asked, but this run has {self.describe()}.")
        if loop is not None:
            return self._pass_of(stack, loop).first + layer
        return layer if stack == "prelude" else self.first_coda_layer + layer

    def is_last(self, p: Pass) -> bool:
        """Whether a pass is the last one of the run.

        Args:
            p: one of `passes`, or a copy of one.
        """
        return p.index == self.n_passes - 1

    def pass_prefix(self, p: Pass) -> str:
        """The loop-indexed name of a pass, without a hook, such as "loops.2".

        Args:
            p: one of `passes`.
        """
        return f"{self._stack_prefix(p.stack)}loops.{p.loop}"

    def _stack_prefix(self, stack: str) -> str:
        return "" if stack == "core" else f"{stack}."

    def name(self, index: int, hook: str) -> str:
        """The loop-indexed name of hook point `hook` of virtual layer `index`.

        Args:
            index: a virtual layer; negative ones count from the end.
            hook: such as "attn.hook_z".

        Raises:
            OutOfRangeError: there is no such layer.
        """
        return f"{self.layer_name(index)}.{hook}"

    def layer_name(self, index: int) -> str:
        """The loop-indexed name of a virtual layer, such as "loops.2.blocks.5".

        Args:
            index: a virtual layer; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such layer.
        """
        site = self.site(index)
        loop = "" if site.loop is None else f"loops.{site.loop}."
        return f"{self._stack_prefix(site.stack)}{loop}blocks.{site.layer}"

    def loop_name(self, name: str) -> str:
        """The loop-indexed spelling of a TransformerLens hook name; other names come back as they are.

        Args:
            name: such as "blocks.3.hook_mlp_out".

        Raises:
            OutOfRangeError: there is no such layer.
        """
        match = _BLOCK.fullmatch(name)
        return self.name(int(match[1]), match[2]) if match and match[1].lstrip("-").isdigit() else name

    def tl_label(self, label: str) -> str:
        """TransformerLens's label of a component or stream, from the loop-indexed one; others come back unchanged.

        Args:
            label: such as "loops.2.blocks.1.mlp_out".

        Example:
            >>> schedule = Schedule(n_core=3, n_loops=4)
            >>> [schedule.tl_label(f"loops.1.blocks.0.{part}") for part in ("attn_out", "head.2", "neuron.7", "resid_mid")]
            ['3_attn_out', 'L3H2', 'L3N7', '3_mid']
        """
        name = self.expand(label)[0]
        layer = virtual_layer(name)
        if layer is None:
            return "final_post" if label == "final" else label
        part, _, unit = name.split(".", 2)[2].partition(".")
        return f"L{layer}{_UNITS[part]}{unit}" if unit else f"{layer}_{part.removeprefix('resid_')}"

    def loop_label(self, label: str) -> str:
        """The loop-indexed label of a component or stream, from TransformerLens's; the inverse of `tl_label`.

        Args:
            label: such as "5_mlp_out", "L5H3", "L5N17", "5_pre" or "final_post".

        Example:
            >>> [Schedule(n_core=3, n_loops=4).loop_label(label) for label in ("3_attn_out", "L3H2", "embed")]
            ['loops.1.blocks.0.attn_out', 'loops.1.blocks.0.head.2', 'embed']
        """
        if match := re.fullmatch(r"L(\d+)([HN])(\d+)", label):
            kind = next(kind for kind, letter in _UNITS.items() if letter == match[2])
            return self.name(int(match[1]), f"{kind}.{match[3]}")
        if match := re.fullmatch(r"(\d+)_(attn_out|mlp_out|pre|mid)", label):
            return self.name(int(match[1]), match[2] if "out" in match[2] else f"resid_{match[2]}")
        return "final" if label == "final_post" else label

    def expand(self, name: str) -> list[str]:
        """All TransformerLens names that a name or pattern in either spelling stands for.

        Indices may be negative (from the end), `*` (all) or `a:b` (a half-open range). Names without an index come back
        unchanged; whether the hook itself exists is for the bridge to say.

        Raises:
            OutOfRangeError: an index outside the run.
            UnknownNameError: a stack that this model does not have.
        """
        if match := _BLOCK.fullmatch(name):
            index, hook = match.groups()
            return [f"blocks.{i}.{hook}" for i in _pick(index, self.n_layers, name, "virtual layers")]
        if match := _EDGE.fullmatch(name):
            stack, index, hook = match.groups()
            layers = _pick(index, self.stacks[stack], name, f"{stack} layers")
            return [f"blocks.{self.virtual(Site(stack, None, j))}.{hook}" for j in layers]
        if match := _LOOP.fullmatch(name):
            stack, loop, layer, hook = match.groups()
            stack = stack or "core"
            if stack not in self.core_stacks:
                exist = " and ".join(f"'{self._stack_prefix(s)}loops.'" for s in self.core_stacks)
                raise UnknownNameError(f"{name!r} was asked, but the looped names of this model begin with {exist}.")
            loops = _pick(loop, self.n_loops_of(stack), name, "loops", more_loops=stack == "core")
            if layer is None:
                return [f"{self._stack_prefix(stack)}loops.{t}.{hook}" for t in loops]
            layers = _pick(layer, self.stacks[stack], name, "layers in a loop")
            return [f"blocks.{self.virtual(Site(stack, t, j))}.{hook}" for t in loops for j in layers]
        return [name]

    def describe(self) -> str:
        """One line: what runs in this model."""
        core = "one stack" if self.l_cycles is None else f"stacks L ({self.l_cycles} x per loop) and H"
        edges = f"{self.n_prelude} prelude and {counted(self.n_coda, 'coda layer')}"
        loops, layers = counted(self.n_loops, "loop"), counted(self.n_core, "layer")
        return f"{loops} over {core} of {layers}, {edges}: {counted(self.n_layers, 'virtual layer')}"


def virtual_layer(name: str) -> int | None:
    """The virtual index in a TransformerLens name, `blocks.{i}` or `blocks.{i}.{hook}`; None for names outside the layers."""
    match = re.match(r"blocks\.(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def select_indices(asked: Indices, n: int, what: str) -> list[int]:
    """The indices below `n` that were asked for, without repeats, in ascending order; negative ones count from the end.

    Raises:
        OutOfRangeError: an index that does not exist, or none at all.
    """
    asked = plain(asked)
    if asked is None or isinstance(asked, slice):
        chosen = list(range(n)[asked if isinstance(asked, slice) else slice(None)])
    elif isinstance(asked, int) or (isinstance(asked, Sequence) and not isinstance(asked, str)):
        indices = [asked] if isinstance(asked, int) else asked
        chosen = sorted({_pick_one(i, n, what, what) for i in indices})
    else:
        raise LoopedError(f"{what}={asked!r} was asked; pass an int, a slice, a list of ints, or None for all.")
    if not chosen:
        raise OutOfRangeError(f"{asked!r} selects nothing: there are {n} {what}{_span(n)}.")
    return chosen


def check_index(index: int, n: int, what: str) -> int:
    """Check an index and make it non-negative.

    Args:
        index: the index; negative ones count from the end.
        n: how many there are.
        what: what they are, in the singular, for the error.

    Raises:
        OutOfRangeError: there is no such entry.
    """
    return _pick_one(index, n, what, f"{what}s")


def is_pattern(name: str) -> bool:
    """Whether a name may stand for several hook points."""
    return "*" in name or ":" in name


def _pick(token: str, n: int, asked: str, what: str, more_loops: bool = False) -> list[int]:
    if token == "*":
        chosen = list(range(n))
    elif ":" in token:
        start, stop = (int(end) if end else None for end in token.split(":"))
        chosen = list(range(n)[start:stop])
    else:
        return [_pick_one(int(token), n, asked, what, more_loops)]
    if not chosen:
        raise OutOfRangeError(f"{asked!r} selects nothing: there are {n} {what}{_span(n)}.")
    return chosen


def _pick_one(index: int, n: int, asked: str, what: str, more_loops: bool = False) -> int:
    index = plain(index)
    if isinstance(index, bool) or not isinstance(index, int):
        raise LoopedError(f"{asked} {index!r} was asked, but an index is an int.")
    if not -n <= index < n:
        advice = f"; for more, load with n_loops= or use model.unroll({index + 1})" if more_loops and index >= n else ""
        where = f"index {index} in {asked!r}" if "." in asked else f"{asked} {index}"
        raise OutOfRangeError(f"{where} is out of range: there are {n} {what}{_span(n)}{advice}.")
    return index % n


def _span(n: int) -> str:
    return f" (0..{n - 1})" if n else ""
