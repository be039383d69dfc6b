"""Which activations are collected: names of this package, and where each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import LoopedError, UnknownNameError
from ..looped import Looped, require
from ..names import stack_prefix, virtual_layer
from ..schedule import Indices, LoopSelector, Schedule, pick_loops
from ..sites import KINDS, check_site, select_layers

Sites = str | Sequence[str]


class Where(NamedTuple):
    """Where an activation is.

    Args:
        site: the kind of activation, such as "resid_post", or the name of its hook where no kind has that.
        stack: the stack it is of, "" for none.
        loop: the loop of its stack, None outside the loops.
        layer: the layer in its stack, None for what belongs to a pass or to the run.
        stop: how many virtual layers have to run for it; None if only the whole run has it.
    """

    site: str
    stack: str
    loop: int | None
    layer: int | None
    stop: int | None


def where(schedule: Schedule, name: str) -> Where:
    """Where an activation is, by its loop-indexed name."""
    (full,) = schedule.names.expand(name)
    if (index := virtual_layer(full)) is not None:
        site = schedule.site(index)
        return Where(_site(full.split(".", 2)[2], "layer"), site.stack, site.loop, site.layer, index + 1)
    if (found := schedule.names.of_pass(full)) is not None:
        stack, loop, hook = found
        p = schedule.passes_of(loop, stack)[0]
        return Where(_site(hook, "pass"), p.stack, p.loop, None, p.layers.stop)
    site = _site(full, "run")
    return Where(site, "", None, None, 0 if site == "embed" else None)


def _site(hook: str, of: str) -> str:
    return next((site for site, kind in KINDS.items() if kind.hook == hook and kind.of == of), hook)


def chosen_names(model: Looped, sites: Sites, loops: LoopSelector, layers: Indices, stack: str | None) -> list[str]:
    """The loop-indexed names of every activation that is asked for, each once, in the order of the run.

    Raises:
        LoopedError: a site, a name, loops or layers that do not exist; a site that has no row for every token.
    """
    schedule, found = model.schedule, list[str]()
    asked = [sites] if isinstance(sites, str) else list(sites)
    if not asked or not all(isinstance(site, str) for site in asked):
        raise LoopedError(f'sites={sites!r} was asked; pass a site such as "resid_post", a name or a pattern, or several.')
    for site in asked:
        if site == "injection":
            require(model, "injection", "site='injection'")
        names = names_of(schedule, site, loops, layers, stack, model)
        for name in names:
            kind = KINDS.get(where(schedule, name).site)
            if kind is not None and kind.axes[0] != "pos":
                raise LoopedError(
                    f"{name} was asked, which has a row for every head and as many numbers as the prompt has tokens; a store "
                    "keeps rows of one width. Read attention with run_with_cache."
                )
        found += names
    order = {name: at for at, name in enumerate(dict.fromkeys(found))}
    return sorted(order, key=lambda name: (_end(where(schedule, name)), order[name]))


def _end(at: Where) -> int | float:
    return float("inf") if at.stop is None else at.stop


def names_of(
    schedule: Schedule, site: str, loops: LoopSelector, layers: Indices, stack: str | None, model: Looped | None = None
) -> list[str]:
    """The loop-indexed names that a site, or a name or pattern, stands for.

    Args:
        schedule: the run.
        site: a kind of activation, to which loops, layers and stack belong, or a name, of which loops are chosen.
        loops: which loops.
        layers: which layers of the stack.
        stack: as in sweeps.
        model: whose names they are; None where any name will do.
    """
    if site in KINDS:
        kind = KINDS[site]
        if kind.of != "layer" and (layers is not None or stack in ("prelude", "coda")):
            raise LoopedError(f"site={site!r} belongs to a {kind.of}; leave layers out, or choose a site of layers.")
        if kind.of == "layer":
            return [schedule.name(i, kind.hook) for i in select_layers(schedule, loops, layers, stack)]
        if kind.of == "pass":
            return [f"{schedule.pass_prefix(p)}.{kind.hook}" for p in dict.fromkeys(schedule.passes_of(loops, stack))]
        return [kind.hook]
    if "." not in site and "hook_" not in site:
        check_site(site, tuple(kind for kind, about in KINDS.items() if about.axes[0] == "pos"))
    if layers is not None or stack is not None:
        raise LoopedError(
            f"layers= or stack= was asked beside the name {site!r}, which says its own; choose a site such as 'z'."
        )
    full = schedule.names.expand(site) if model is None else model.expand_name(site)
    names = [schedule.loop_name(name) for name in full]
    if isinstance(loops, str) and loops == "all":
        return names
    kept = [
        name for name in names if (loop := (at := where(schedule, name)).loop) is None or loop in _loops(schedule, loops, at)
    ]
    if not kept:
        raise UnknownNameError(f"{site!r} was asked with loops={loops!r}, but it names other loops.")
    return kept


def _loops(schedule: Schedule, loops: LoopSelector, at: Where) -> list[int]:
    return pick_loops(loops, schedule.n_loops_of(at.stack), False)


def group_of(schedule: Schedule, name: str) -> str:
    """What an activation has its rows in common with: the pass that it is of, or the layers of that pass; "" outside the loops.

    Example:
        >>> [group_of(Schedule(n_core=2, n_loops=3), f"loops.1.{name}") for name in ("hook_out", "blocks.0.hook_mlp_out")]
        ['loops.1', 'loops.1.blocks']
    """
    at = where(schedule, name)
    return "" if at.loop is None else f"{stack_prefix(at.stack)}loops.{at.loop}{'' if at.layer is None else '.blocks'}"
