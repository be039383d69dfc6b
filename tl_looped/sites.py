"""Which activations a sweep or an intervention means: a site in chosen layers of chosen loops, or in chosen passes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import LoopedError
from .looped import Looped, require
from .schedule import Indices, LoopSelector, Pass, Schedule, Site, select_indices


class Kind(NamedTuple):
    """A kind of activation.

    Args:
        hook: its hook point, after the name of what it belongs to.
        of: what has one, a "layer", a "pass" or the "run".
        axes: after the batch axis. The "pos" of a pattern are its queries, "src_pos" its keys.
        about: what it is.
        is_swept: whether sweeps and interventions take it as a site.
        is_grouped: whether grouped keys and values share one head.
    """

    hook: str
    of: Literal["layer", "pass", "run"]
    axes: tuple[str, ...]
    about: str
    is_swept: bool = True
    is_grouped: bool = False


_STREAM, _HEAD, _PAIR, _MLP = ("pos", "d_model"), ("pos", "head", "d_head"), ("head", "pos", "src_pos"), ("pos", "d_mlp")

# Every kind of activation by its name as a site, in the order in which `tl-looped info` shows them.
KINDS: dict[str, Kind] = {
    "embed": Kind("hook_embed", "run", _STREAM, "the scaled embedding", False),
    "resid_pre": Kind("hook_resid_pre", "layer", _STREAM, "the residual stream entering a layer"),
    "attn_out": Kind("hook_attn_out", "layer", _STREAM, "what attention adds to the stream"),
    "resid_mid": Kind("hook_resid_mid", "layer", _STREAM, "the residual stream between attention and MLP"),
    "mlp_out": Kind("hook_mlp_out", "layer", _STREAM, "what the MLP adds to the stream"),
    "resid_post": Kind("hook_resid_post", "layer", _STREAM, "the residual stream leaving a layer"),
    "state": Kind("hook_state", "pass", _STREAM, "the state entering a pass"),
    "injection": Kind("hook_injection", "pass", _STREAM, "what is injected in a pass"),
    "in": Kind("hook_in", "pass", _STREAM, "what the first layer of a pass reads", False),
    "out": Kind("hook_out", "pass", _STREAM, "the state leaving a pass"),
    "q": Kind("attn.hook_q", "layer", _HEAD, "queries"),
    "rot_q": Kind("attn.hook_rot_q", "layer", _HEAD, "queries after rotation", False),
    "z": Kind("attn.hook_z", "layer", _HEAD, "what every head read"),
    "k": Kind("attn.hook_k", "layer", _HEAD, "keys", is_grouped=True),
    "rot_k": Kind("attn.hook_rot_k", "layer", _HEAD, "keys after rotation", False, True),
    "v": Kind("attn.hook_v", "layer", _HEAD, "values", is_grouped=True),
    "attn_scores": Kind("attn.hook_attn_scores", "layer", _PAIR, "attention before the softmax", False),
    "pattern": Kind("attn.hook_pattern", "layer", _PAIR, "attention"),
    "pre": Kind("mlp.hook_pre", "layer", _MLP, "neurons before the nonlinearity", False),
    "pre_linear": Kind("mlp.hook_pre_linear", "layer", _MLP, "what gated neurons are multiplied by", False),
    "post": Kind("mlp.hook_post", "layer", _MLP, "neurons", False),
    "exit_logit": Kind("hook_exit_logit", "pass", ("pos",), "what the exit gate of a pass says", False),
}


def _swept(of: str, is_head: bool = False) -> tuple[str, ...]:
    return tuple(n for n, kind in KINDS.items() if kind.is_swept and kind.of == of and ("head" in kind.axes) == is_head)


STREAMS, HEADS, PASSES = _swept("layer"), _swept("layer", is_head=True), _swept("pass")


def axes_of(hook: str) -> tuple[str, ...]:
    """The axes of a swept activation after its batch axis, by a name of its hook point."""
    return next(kind.axes for kind in KINDS.values() if kind.is_swept and hook.endswith(f".{kind.hook}"))


def outer_axes(site: str) -> tuple[str, ...]:
    """The axes over the places of a site, before those of the activation."""
    return ("loop",) if KINDS[site].of == "pass" else ("loop", "layer")


class Place(NamedTuple):
    """An activation: where it is (layer 0 for a pass), its hook, and the last layer whose input it cannot change (-1: none)."""

    site: Site
    hook: str
    entry: int

    @property
    def loop(self) -> str | int:
        """What its loop is called; prelude and coda have one loop, called so."""
        return self.site.stack if self.site.loop is None else self.site.loop


def select_layers(schedule: Schedule, loops: LoopSelector, layers: Indices, stack: str | None) -> list[int]:
    """The virtual layers that loops and layers of a stack name, loop by loop in the order asked.

    Raises:
        LoopedError: loops of prelude or coda; loops or layers that do not exist.
    """
    if stack in ("prelude", "coda"):
        if not isinstance(loops, str) or loops != "all":
            raise LoopedError(f"loops={loops!r} was asked of the {stack}, which runs once; leave loops out.")
        chosen: list[int | None] = [None]
    else:
        stack = schedule.looped_stack(stack)
        chosen = list(dict.fromkeys(schedule.select_loops(loops, stack)))
    numbers = select_indices(layers, schedule.stacks[stack], "layers")
    return [schedule.virtual(Site(stack, loop, j)) for loop in chosen for j in numbers]


def select_places(
    model: Looped, site: str, loops: LoopSelector = "all", layers: Indices = None, stack: str | None = None
) -> list[Place]:
    """Every place of a site, loop by loop in the order asked.

    Args:
        model: the model.
        site: one of `STREAMS`, `HEADS`, `PASSES`.
        loops: which loops.
        layers: which layers inside the loop, or inside prelude or coda; None for all.
        stack: "L" or "H" for HRM-Text; "prelude" or "coda" for sites of layers.

    Raises:
        LoopedError: a site, loops or layers that do not exist.
    """
    schedule = model.schedule
    if site not in PASSES:
        return [layer_place(model, site, i) for i in select_layers(schedule, loops, layers, stack)]
    if layers is not None or stack in ("prelude", "coda"):
        raise LoopedError(f"site={site!r} belongs to a pass; leave layers out, or choose one of {', '.join(STREAMS)}.")
    if site == "injection":
        require(model, "injection", "site='injection'")
    return [_pass_place(schedule, site, p) for p in dict.fromkeys(schedule.passes_of(loops, stack))]


def swept_places(
    model: Looped, site: str, axes: Sequence[str], loops: LoopSelector, layers: Indices, stack: str | None
) -> list[tuple[tuple[str | int, ...], Place]]:
    """The places of a sweep, each with its labels on those of the axes "loop" and "layer" that are swept.

    Where no part of the model is asked for and "loop" is an axis, prelude and coda are entries of it, in the order of the run.
    """
    schedule, places = model.schedule, select_places(model, site, loops, layers, stack)
    nothing_asked = stack is None and layers is None and isinstance(loops, str) and loops == "all"
    if site not in PASSES and nothing_asked and "loop" in axes:
        edges = [layer_place(model, site, i) for i in range(schedule.n_layers) if schedule.site(i).loop is None]
        places = sorted([*places, *edges], key=lambda place: place.entry)
    labels = [{"loop": place.loop, "layer": place.site.layer} for place in places]
    return [(tuple(label[axis] for axis in label if axis in axes), place) for label, place in zip(labels, places, strict=True)]


def laid_out(
    values: Float[Tensor, "cell ..."], keys: Sequence[tuple[str | int, ...]], axes: Sequence[str]
) -> tuple[Float[Tensor, ...], dict[str, list[str | int]]]:
    """One value per cell as a grid, and the labels of its axes; NaN where stacks have fewer layers than others.

    Args:
        values: the cells lead.
        keys: the labels of every cell, one per axis.
        axes: the axes.
    """
    labels = {axis: list(dict.fromkeys(key[k] for key in keys)) for k, axis in enumerate(axes)}
    sizes = [len(labels[axis]) for axis in axes]
    if len(keys) == prod(sizes):
        return values.unflatten(0, sizes) if sizes else values[0], labels
    grid = torch.full((*sizes, *values.shape[1:]), torch.nan, dtype=values.dtype, device=values.device)
    for value, key in zip(values, keys, strict=True):
        grid[tuple(labels[axis].index(label) for axis, label in zip(axes, key, strict=True))] = value
    return grid, labels


def _pass_place(schedule: Schedule, site: str, p: Pass) -> Place:
    entry = p.layers[-1] if site == "out" else p.first - 1
    return Place(Site(p.stack, p.loop, 0), f"{schedule.pass_prefix(p)}.{KINDS[site].hook}", entry)


def layer_place(model: Looped, site: str, layer: int) -> Place:
    """The place of a site in one virtual layer."""
    return Place(model.schedule.site(layer), model.schedule.name(layer, KINDS[site].hook), layer)


def check_site(site: str, known: tuple[str, ...] = (*STREAMS, *HEADS, *PASSES)) -> None:
    """Refuse a site that does not exist, with a list of those that do.

    Args:
        site: the site.
        known: those that exist.

    Raises:
        LoopedError: it is none of them.
    """
    if site not in known:
        raise LoopedError(f"site={site!r} was asked; choose one of {', '.join(map(repr, known))}.")
