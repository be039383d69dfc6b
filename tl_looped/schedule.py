"""Which layer runs when: passes and virtual layers.

A looped model runs stacks of layers several times. Unrolled, every execution of a layer is one *virtual layer*. This module is
the only place that converts between its index and its site (stack, loop, layer); `names` says what it is called.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from ._indices import Indices as Indices
from ._indices import LoopSelector, check_count, pick_loops, pick_one
from ._indices import check_index as check_index
from ._indices import select_indices as select_indices
from .errors import LoopedError, OutOfRangeError
from .names import HookNames, stack_prefix
from .names import is_pattern as is_pattern
from .names import virtual_layer as virtual_layer


class Site(NamedTuple):
    """Where a virtual layer sits: its stack, the loop (None in prelude and coda) and the layer inside the stack."""

    stack: str
    loop: int | None
    layer: int

    @property
    def where(self) -> str:
        """Stack and loop in words, as in "loop 2", "L loop 2" or "coda"."""
        return self.stack if self.loop is None else f"{stack_prefix(self.stack, ' ')}loop {self.loop}"


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


class _Run(NamedTuple):
    """A stack that runs `times` times in a row, and what precedes it in its cycle: passes, layers, runs of the same stack."""

    stack: str
    n_layers: int
    times: int
    at: int
    first: int
    loop: int


def _find(runs: Sequence[_Run], counted_as: str, index: int, per_cycle: int) -> tuple[int, _Run, int]:
    """The cycle and the run in which something lies that is counted through, and how far it is into the run."""
    cycle, at = divmod(index, per_cycle)
    run = runs[bisect_right(runs, at, key=attrgetter(counted_as)) - 1]
    return cycle, run, at - getattr(run, counted_as)


@dataclass(frozen=True, repr=False)
class Schedule:
    """The order in which the layers of a looped model run.

    Args:
        n_core: layers in the looped stack (in each of the two stacks when `l_cycles` is given).
        n_loops: how often the looped stack runs; counts H cycles when `l_cycles` is given.
        n_prelude: layers before the loop.
        n_coda: layers after the loop.
        l_cycles: runs of the L stack before each run of the H stack (HRM-Text), or None for one looped stack.
        order: stack and number of layers of every pass where no formula gives them; use `from_passes`.

    Example:
        >>> schedule = Schedule(n_core=3, n_loops=4, n_prelude=2, n_coda=1)
        >>> schedule.n_layers
        15
        >>> schedule.site(7)
        Site(stack='core', loop=1, layer=2)
    """

    n_core: int
    n_loops: int
    n_prelude: int = 0
    n_coda: int = 0
    l_cycles: int | None = None
    order: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        check_count("n_core", self.n_core)
        check_count("n_loops", self.n_loops)
        check_count("n_prelude", self.n_prelude, 0)
        check_count("n_coda", self.n_coda, 0)
        if self.l_cycles is not None:
            check_count("l_cycles", self.l_cycles)

    def __repr__(self) -> str:
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        return f"Schedule({', '.join(f'{k}={v!r}' for k, v in known.items() if k != 'order' or v is not None)})"

    @classmethod
    def from_passes(cls, passes: Iterable[tuple[str, int]], n_prelude: int = 0, n_coda: int = 0) -> Schedule:
        """The schedule of passes in any order. A loop ends whenever the stack that runs last has run.

        Args:
            passes: stack and number of layers of every pass, in the order of the run.
            n_prelude: layers before the first pass.
            n_coda: layers after the last one.

        Raises:
            LoopedError: no pass; a stack whose name is no word, or "prelude" or "coda"; a stack of two lengths.

        Example:
            >>> schedule = Schedule.from_passes([("A", 2), ("B", 3), ("A", 2), ("A", 2), ("B", 3)])
            >>> schedule.name(7, "hook_mlp_out"), schedule.n_loops
            ('A.loops.2.blocks.0.hook_mlp_out', 2)
            >>> Schedule.from_passes([("core", 3)] * 4) == Schedule(n_core=3, n_loops=4)
            True
        """
        order = tuple((stack, check_count(f"layers of {stack!r}", n)) for stack, n in passes)
        if not order:
            raise LoopedError("a schedule of no passes was asked; name at least one, as in [('core', 3)].")
        for stack in {stack for stack, _ in order}:
            if not stack.isidentifier() or stack in ("prelude", "coda", "loops", "blocks"):
                raise LoopedError(
                    f"a stack {stack!r} was asked; its name must be a word other than prelude, coda, loops, blocks."
                )
            if len(lengths := sorted({n for other, n in order if other == stack})) > 1:
                raise LoopedError(f"the stack {stack!r} runs with {lengths} layers; one stack has one length.")
        last, n_core = order[-1]
        n_loops = order.count(order[-1])
        l_cycles = None if last == "core" else len(order) // n_loops - 1
        if last in ("core", "H") and l_cycles != 0:
            formula = cls(n_core, n_loops, n_prelude, n_coda, l_cycles)
            if order == tuple((p.stack, p.n_layers) for p in formula.passes):
                return formula
        return cls(n_core, n_loops, n_prelude, n_coda, order=order)

    @cached_property
    def names(self) -> HookNames:
        """What the layers and passes are called."""
        return HookNames(self)

    @cached_property
    def _cycle(self) -> tuple[_Run, ...]:
        """The passes of a cycle; the run is `_n_cycles` of them. Never unrolled, for a config may say 10^9 loops."""
        if self.order is not None:
            found = [(*key, len(list(run))) for key, run in groupby(self.order)]
        elif self.l_cycles is None:
            found = [("core", self.n_core, 1)]
        else:
            found = [("L", self.n_core, self.l_cycles), ("H", self.n_core, 1)]
        runs: list[_Run] = []
        index, first, loops = 0, 0, dict.fromkeys([stack for stack, _, _ in found], 0)
        for stack, n_layers, times in found:
            runs.append(_Run(stack, n_layers, times, index, first, loops[stack]))
            index, first, loops[stack] = index + times, first + times * n_layers, loops[stack] + times
        return tuple(runs)

    @property
    def _n_cycles(self) -> int:
        return self.n_loops if self.order is None else 1

    @cached_property
    def _runs_of(self) -> dict[str, list[_Run]]:
        """The part of a cycle that is each looped stack's; the stack that ends the loops stands last."""
        stacks = [stack for stack in dict.fromkeys(run.stack for run in self._cycle) if stack != self._cycle[-1].stack]
        return {s: [run for run in self._cycle if run.stack == s] for s in (*stacks, self._cycle[-1].stack)}

    @cached_property
    def core_stacks(self) -> tuple[str, ...]:
        """The looped stacks, last the one whose passes end the loops."""
        return tuple(self._runs_of)

    @cached_property
    def stacks(self) -> dict[str, int]:
        """Number of physical layers of every stack, in the order of their physical indices."""
        core = {stack: runs[0].n_layers for stack, runs in self._runs_of.items()}
        return {"prelude": self.n_prelude, **core, "coda": self.n_coda}

    @cached_property
    def _per_cycle(self) -> tuple[int, int]:
        """Passes and layers of a cycle."""
        return sum(run.times for run in self._cycle), sum(run.times * run.n_layers for run in self._cycle)

    @property
    def n_passes(self) -> int:
        """How often a looped stack runs, all stacks together."""
        return self._n_cycles * self._per_cycle[0]

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """Every execution of a looped stack, in the order of the run."""
        return tuple(map(self._pass, range(self.n_passes)))

    def _pass(self, index: int) -> Pass:
        """The pass at a place in the run, always the same object."""
        if index not in self._made:
            cycle, run, at = _find(self._cycle, "at", index, self._per_cycle[0])
            loop = cycle * self._loops_of(run.stack) + run.loop + at
            first = self.n_prelude + cycle * self._per_cycle[1] + run.first + at * run.n_layers
            self._made[index] = Pass(index, run.stack, loop, first, run.n_layers)
        return self._made[index]

    @cached_property
    def _made(self) -> dict[int, Pass]:
        return {}

    def _loops_of(self, stack: str) -> int:
        """How often a stack runs in a cycle."""
        return self._runs_of[stack][-1].loop + self._runs_of[stack][-1].times

    def _pass_of(self, stack: str, loop: int) -> Pass:
        """The pass that is the execution number `loop` of a stack."""
        cycle, run, at = _find(self._runs_of[stack], "loop", loop, self._loops_of(stack))
        return self._pass(cycle * self._per_cycle[0] + run.at + at)

    @property
    def n_layers(self) -> int:
        """Number of virtual layers."""
        return self.first_coda_layer + self.n_coda

    @cached_property
    def first_coda_layer(self) -> int:
        """Virtual index of the first coda layer (`n_layers` where there is no coda)."""
        return self.n_prelude + self._n_cycles * self._per_cycle[1]

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
        """How often a looped stack runs; 0 for what is none."""
        if stack not in self.core_stacks:
            return 0
        return self._n_cycles * self._loops_of(stack)

    def looped_stack(self, stack: str | None = None) -> str:
        """Check the name of a looped stack; None for the only one.

        Args:
            stack: "L" or "H" for HRM-Text; None or "core" elsewhere.

        Raises:
            LoopedError: there is no such stack, or None was given and there are two.
        """
        stacks = list(self.core_stacks)
        if stack is None and len(stacks) > 1:
            asked = " or ".join(f"stack={name!r}" for name in stacks)
            raise LoopedError(f"this model loops the stacks {' and '.join(stacks)}; pass {asked}.")
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
        stack = self.looped_stack(stack)
        return pick_loops(loops, self.n_loops_of(stack), self.is_unrolled(stack))

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
        return pick_one(index, self.n_layers, "layer", "virtual layers")

    def loop(self, index: int) -> int:
        """Check a loop index (of the H stack for HRM-Text) and make it non-negative.

        Args:
            index: a loop; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such loop.
        """
        return pick_one(index, self.n_loops, "loop", "loops", self.order is None)

    def pass_of_loop(self, loop: int) -> Pass:
        """The pass that ends a loop (the H pass for HRM-Text).

        Args:
            loop: which loop; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such loop.
        """
        return self._pass_of(self.core_stacks[-1], self.loop(loop))

    def passes_in(self, loop: int) -> tuple[Pass, ...]:
        """The passes of a loop, of all looped stacks, in the order of the run.

        Args:
            loop: which loop; negative ones count from the end.
        """
        loop = self.loop(loop)
        first = self.pass_of_loop(loop - 1).index + 1 if loop else 0
        return tuple(map(self._pass, range(first, self.pass_of_loop(loop).index + 1)))

    def in_loop(self, p: Pass) -> tuple[int, int]:
        """The loop of the run that a pass is in, and which run of its stack it is there.

        Args:
            p: one of `passes`.
        """
        loop = bisect_left(range(self.n_loops), p.index, key=lambda t: self.pass_of_loop(t).index)
        return loop, [q for q in self.passes_in(loop) if q.stack == p.stack].index(p)

    def pass_of_layer(self, index: int) -> Pass | None:
        """The pass that a virtual layer belongs to, or None in prelude and coda.

        Args:
            index: a virtual layer; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such layer.
        """
        layer = self.layer(index)
        if not self.n_prelude <= layer < self.first_coda_layer:
            return None
        cycle, run, at = _find(self._cycle, "first", layer - self.n_prelude, self._per_cycle[1])
        return self._pass(cycle * self._per_cycle[0] + run.at + at // run.n_layers)

    def site(self, index: int) -> Site:
        """The site of a virtual layer.

        Args:
            index: a virtual layer; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such layer.
        """
        layer, p = self.layer(index), self.pass_of_layer(index)
        if p is not None:
            return Site(p.stack, p.loop, layer - p.first)
        if layer < self.n_prelude:
            return Site("prelude", None, layer)
        return Site("coda", None, layer - self.first_coda_layer)

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
            loop = pick_one(loop, self.n_loops_of(stack), "loop", "loops", self.is_unrolled(stack))
        layer = pick_one(layer, self.stacks.get(stack, 0), "layer", f"layers in stack {stack!r}")
        if (loop is not None) != is_looped:
            raise OutOfRangeError(f"{site} was asked, but this run has {self.describe()}.")
        return self.first_layer(stack, loop) + layer

    def first_layer(self, stack: str, loop: int | None) -> int:
        """The virtual index of the first layer of a stack in one of its loops; the loop is None in prelude and coda."""
        if loop is not None:
            return self._pass_of(stack, loop).first
        return 0 if stack == "prelude" else self.first_coda_layer

    def is_unrolled(self, stack: str) -> bool:
        """Whether `unroll` gives this stack any number of loops."""
        return self.order is None and stack == "core"

    def is_last(self, p: Pass) -> bool:
        """Whether a pass, or a copy of one, is the last one of the run."""
        return p.index == self.n_passes - 1

    def pass_prefix(self, p: Pass) -> str:
        """See `HookNames.pass_prefix`."""
        return self.names.pass_prefix(p)

    def name(self, index: int, hook: str) -> str:
        """See `HookNames.name`."""
        return self.names.name(index, hook)

    def layer_name(self, index: int) -> str:
        """See `HookNames.layer_name`."""
        return self.names.layer_name(index)

    def loop_name(self, name: str) -> str:
        """See `HookNames.loop_name`."""
        return self.names.loop_name(name)

    def loop_label(self, label: str) -> str:
        """See `HookNames.loop_label`."""
        return self.names.loop_label(label)

    def describe(self) -> str:
        """See `HookNames.describe`."""
        return self.names.describe()
