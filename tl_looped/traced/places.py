"""The places in a run that get names: inputs and outputs of every submodule, under TransformerLens's names where these fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LoopedError
from .attention import Attention, K, Q
from .calls import Call, Calls, is_same
from .streams import is_near, stream_through
from .structure import Found

ATTENTION = re.compile(r"(^|[._])(self_?)?(attn|attention|mixer)(\.|$)", re.IGNORECASE)
MLP = re.compile(r"(^|[._])(mlp|ffn?|feed_?forward|moe|experts?)(\.|$)", re.IGNORECASE)
PROJECTIONS = {
    f"attn.hook_{word[0]}": re.compile(rf"(^|[._])(to_)?(w_?)?{word}(_?proj|_?lin)?$")
    for word in ("q(uery)?", "k(ey)?", "v(alue)?")
}

STREAM, PLAIN = ("hook_resid_pre", "hook_resid_post"), ("hook_in", "hook_out")

Side = Literal["in", "out"]
Parts = dict[str, tuple[str, Side, int | None]]  # by hook: a path in the layer, which side of it, how many heads


@dataclass(frozen=True)
class Place:
    """Where a hook point acts.

    Args:
        name: of the hook point.
        path: of the submodule.
        number: which of its calls in the run.
        side: what it takes or gives; or what its attention computes.
        heads: into how many heads the last axis is split; None for none.
        copies: what goes on is a copy, because the run changes it in place later.
        at: the keys that lead to its tensor, in what is taken or given.
    """

    name: str
    path: str
    number: int
    side: str
    heads: int | None = None
    copies: bool = False
    at: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Places:
    """Every place of a run.

    Args:
        places: those with a hook point.
        also: other names of these hook points.
        entrance: the hook of a pass that holds the state entering it.
        parts: what was told of the inside of layers, for the table.
        unnamed: why layers lack names of the stream; "" if none does.
    """

    places: list[Place]
    also: dict[str, str]
    entrance: str
    parts: dict[str, str]
    unnamed: str = ""


def places_of(
    module: nn.Module,
    run: Calls,
    found: Found,
    attention: dict[int, list[Attention]],
    shape: torch.Size,
    parts: Mapping[str, str],
) -> Places:
    """Name the places of a run.

    Args:
        module: what was run.
        run: its calls.
        found: its layers.
        attention: by the index of a layer's call, what its attention computed.
        shape: of the tokens, [batch, pos].
        parts: which submodules of a layer its parts are, where that is known: by hook, the path in the layer.
    """
    places: list[Place] = []
    also: dict[str, str] = {}
    stream = stream_through(run, found.calls)
    layer_of = {id(call): i for i, call in enumerate(found.calls)}
    inside: dict[int, int] = {}  # the layer of every call inside one
    for i, layer in enumerate(found.calls):
        inside |= {id(call): i for call in _within(layer)}
    maps = {path for path, m in module.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2}
    told: dict[str, Parts] = {}
    for path in found.paths:
        of_path = [(c, attention.get(c.index, [])) for c in found.calls if c.path == path]
        told[path] = _parts(of_path, maps) | {hook: _named(hook, part, *of_path[0]) for hook, part in parts.items()}
    for i, layer in enumerate(found.calls):
        is_stream = is_over(layer.takes, shape) and is_over(layer.gives, shape)
        names = [
            of_stream if is_stream and layer.path in paths else plain
            for of_stream, plain, paths in zip(STREAM, PLAIN, (stream.enters, stream.leaves), strict=True)
        ]
        places += _both(f"blocks.{i}", layer, names)
        also |= {f"blocks.{i}.{plain}": f"blocks.{i}.{name}" for plain, name in zip(PLAIN, names, strict=True) if name != plain}
        seen: dict[str, int] = {}
        part = told[layer.path] if is_stream else {}
        for call in _within(layer):
            short = call.inside(layer.path)
            seen[short] = seen.get(short, -1) + 1
            prefix = f"blocks.{i}.{short}" + (f".call{seen[short]}" if seen[short] else "")
            mine = {(side, heads): hook for hook, (path, side, heads) in part.items() if path == short and not seen[short]}
            for place in _both(prefix, call, PLAIN):
                if (
                    hook := mine.pop(("in" if place.side == "in" else "out", None), None)
                ) is not None:  # TransformerLens's name, and its path as another
                    also[place.name] = f"blocks.{i}.{hook}"
                    place = replace(place, name=f"blocks.{i}.{hook}")
                places.append(place)
            for (side, heads), hook in mine.items():
                held = call.given if side == "out" else call.taken
                if held is not None:
                    places.append(Place(f"blocks.{i}.{hook}", call.path, call.number, side, heads, held.changed, held.at))
        for computed in attention.get(layer.index, []) if is_stream else []:
            if len(attention[layer.index]) == 1:
                known = {place.name for place in places}
                names = {hook: f"blocks.{i}.{_unrotated(hook, computed, layer)}" for hook in computed.hooks}
                places += [Place(n, layer.path, layer.number, hook) for hook, n in names.items() if n not in known]
    places += _outside(run, found, layer_of, inside)
    ends, entrance = _ends(run, found, places)
    also |= ends
    embed = next(
        (c for c in run.calls if is_over(c.gives, shape) and isinstance(module.get_submodule(c.path), nn.Embedding)), None
    )
    if embed is not None:
        also["hook_embed"] = f"{embed.path}.hook_out"
    known = {place.name for place in places}
    return Places(places, {name: to for name, to in also.items() if to in known}, entrance, _said(told), stream.why_not)


def _both(prefix: str, call: Call, names: Sequence[str]) -> Iterator[Place]:
    """The places before and after a call."""
    for held, name, side in ((call.taken, names[0], "in"), (call.given, names[1], "out")):
        if held is not None:
            yield Place(f"{prefix}.{name}", call.path, call.number, side, copies=held.changed, at=held.at)


def is_over(x: Tensor | None, shape: Sequence[int]) -> bool:
    """Whether a tensor has the axes [batch, pos, width] of a run.

    Args:
        x: a tensor.
        shape: of the tokens.
    """
    return x is not None and x.ndim == 3 and tuple(x.shape[:2]) == tuple(shape)


def _within(call: Call) -> list[Call]:
    return [found for inner in call.inner for found in (inner, *_within(inner))]


def _outside(run: Calls, found: Found, layer_of: dict[int, int], inside: dict[int, int]) -> Iterator[Place]:
    """The places outside the layers; what is called in every loop is named by it."""
    calls: dict[str, list[Call]] = {}
    for call in run.calls:
        if id(call) not in layer_of and id(call) not in inside:
            calls.setdefault(call.path, []).append(call)
    prefixes = {id(c): prefix for of_path in calls.values() for c, prefix in zip(of_path, _wheres(of_path, found), strict=True)}
    seen: dict[str, int] = {}
    for call in run.calls:
        if id(call) not in prefixes:
            continue
        prefix = f"{prefixes[id(call)]}{call.path}"
        seen[prefix] = seen.get(prefix, -1) + 1
        yield from _both(prefix + (f".call{seen[prefix]}" if seen[prefix] else ""), call, PLAIN)


def _wheres(calls: list[Call], found: Found) -> list[str]:
    """The prefixes of the calls of a module outside the layers: those of their passes, for what is called several times.

    What is called before every pass, or after every one, is of that pass; so for the loops. Others are of the pass that has
    begun.
    """
    if len(calls) == 1:
        return [""]
    schedule, at = found.schedule, [call.index for call in calls]
    for passes in (schedule.passes, schedule.passes_of("all", schedule.core_stacks[-1])):
        if len(passes) == len(calls):
            starts, ends = ([found.calls[p.layers[k]].index for p in passes] for k in (0, -1))
            is_before = all(end < i < start for end, i, start in zip([-1, *ends], at, starts, strict=False))
            is_after = all(start < i < then for start, i, then in zip(starts, at, [*starts[1:], math.inf], strict=True))
            if is_before or is_after:
                return [f"{schedule.pass_prefix(p)}." for p in passes]
    last = found.calls[schedule.first_coda_layer - 1].index
    prefixes: list[str] = []
    for call in calls:
        begun = [p for p in schedule.passes if found.calls[p.first].index < call.index or found.calls[p.first] in _within(call)]
        prefixes.append("" if not begun or call.index > last else f"{schedule.pass_prefix(begun[-1])}.")
    return prefixes


def _ends(run: Calls, found: Found, places: list[Place]) -> tuple[dict[str, str], str]:
    """Other names for what enters and leaves a pass, and the hook that holds what enters one."""
    given = {(place.path, place.number): place.name for place in places if place.side == "out" and place.heads is None}
    schedule, also = found.schedule, dict[str, str]()
    left: Tensor | None = None
    is_passed_on = True
    for p in schedule.passes:
        prefix, last = schedule.pass_prefix(p), found.calls[p.layers[-1]]
        also[f"{prefix}.hook_in"] = f"blocks.{p.first}.hook_resid_pre"
        also[f"{prefix}.hook_out"] = f"blocks.{p.layers[-1]}.hook_resid_post"
        entered = found.calls[p.first].takes
        if left is not None and entered is not None:
            is_passed_on = is_passed_on and left.shape == entered.shape and torch.equal(left, entered)
        left = last.gives
        norm = _norm_after(run, last)
        times = schedule.n_loops_of(p.stack)
        if norm is not None and len(run.of(norm.path)) == times:  # the norm that ends every pass of the stack
            left = norm.gives
            also[f"{prefix}.hook_out"] = given[norm.path, norm.number]
    if is_passed_on:
        also |= {f"{schedule.pass_prefix(p)}.hook_state": f"blocks.{p.first}.hook_resid_pre" for p in schedule.passes}
    return also, "hook_state" if is_passed_on else "hook_in"


def _norm_after(run: Calls, layer: Call) -> Call | None:
    """The call, right after a layer, that takes what it gave and returns a stream."""
    after = [c for c in run.calls[layer.index + 1 :] if c.parent is layer.parent or c.parent is None]
    found = next((c for c in after if is_same(c.takes, layer.gives)), None)
    is_norm = found is not None and found.gives is not None and found.takes is not None and not found.inner
    return found if is_norm and found is not None and found.gives.shape == found.takes.shape else None  # pyright: ignore


def _named(hook: str, path: str, layer: Call, computed: list[Attention]) -> tuple[str, Side, int | None]:
    """A part of a layer that a user names."""
    call = next((c for c in _within(layer) if c.inside(layer.path) == path), None)
    side: Side = "in" if hook in ("attn.hook_z", "mlp.hook_post") else "out"
    x = None if call is None else call.takes if side == "in" else call.gives
    if x is None:
        raise LoopedError(
            f"parts={{{hook!r}: {path!r}}} was given, but {layer.path} runs no {path!r}; pass a path in the layer."
        )
    if hook.removeprefix("attn.hook_") not in ("q", "k", "v", "z"):
        return path, side, None
    width = computed[0].d_head or (x.shape[-1] // computed[0].n_heads) if len(computed) == 1 else 0
    if not width or x.shape[-1] % width:
        raise LoopedError(
            f"parts={{{hook!r}: {path!r}}} was given, but {layer.path} computes no attention whose heads are known."
        )
    return path, side, x.shape[-1] // width


def _parts(layers: list[tuple[Call, list[Attention]]], maps: set[str]) -> Parts:
    """What the submodules of a layer are; equal in all calls."""
    found = [_parts_of(layer, computed, maps) for layer, computed in layers]
    return {hook: part for hook, part in found[0].items() if all(other.get(hook) == part for other in found)}


def _parts_of(layer: Call, computed: list[Attention], maps: set[str]) -> Parts:
    parts: Parts = {}
    calls = _within(layer)
    short = {id(call): call.inside(layer.path) for call in calls}
    first = {path: call for call in reversed(calls) for path in [short[id(call)]]}
    if (pair := _branches(layer, calls, computed)) is not None:
        parts |= {
            hook: (short[id(call)], "out", None) for hook, call in zip(("hook_attn_out", "hook_mlp_out"), pair, strict=True)
        }
    if len(computed) != 1:
        return parts
    one = computed[0]
    around = _around(one)
    inside = [c for c in calls if c in first.values() and id(c.parent) in around]  # maps of the MLP may be called keys too
    projected = [(hook, c) for hook, word in PROJECTIONS.items() for c in inside if word.search(short[id(c)])]
    queries = [c.gives.shape[-1] for hook, c in projected if hook == "attn.hook_q" and c.gives is not None]
    d_head = one.d_head or (queries[0] // one.n_heads if queries else 0)
    for hook, call in reversed(projected):  # the first of several stays
        heads = _heads(call.gives, d_head, one.n_heads)
        if heads is not None:
            parts[hook] = (short[id(call)], "out", heads)
    if (out := _last_map(calls, one, maps)) is not None:
        parts["attn.hook_z"] = (short[id(out)], "in", one.n_heads)
    if (post := _neurons(calls, parts.get("hook_mlp_out"), short, maps)) is not None:
        parts["mlp.hook_post"] = (post, "in", None)
    return parts


def _branches(layer: Call, calls: list[Call], computed: list[Attention]) -> tuple[Call, Call] | None:
    """The two calls inside a layer whose outputs it adds to the stream: attention and MLP; None where it does otherwise."""
    x, y = layer.takes, layer.gives
    if x is None or y is None or x.shape != y.shape or layer.changed[0]:
        return None
    streams = [c for c in calls if c.gives is not None and c.gives.shape == x.shape and not c.changed[1]]
    attends = {id(a.call) for a in computed}

    def is_attention(call: Call) -> bool:
        return any(id(c) in attends for c in (call, *_within(call))) or (not attends and bool(ATTENTION.search(call.path)))

    for a in streams:
        for m in streams:
            if a is m or m in _within(a) or a in _within(m) or a.gives is None or m.gives is None:
                continue
            if is_attention(a) and not is_attention(m) and is_near(x + a.gives + m.gives, y):
                return a, m
    return None


def _unrotated(hook: str, computed: Attention, layer: Call) -> str:
    """The name of queries and keys in attention: where a map of the layer gave them as they are, they were not rotated."""
    x = {Q: computed.q, K: computed.k}.get(hook)
    if x is None:
        return hook
    flat = x.transpose(1, 2).flatten(2)
    for call in _within(layer):
        given = call.gives
        if given is not None and given.ndim == 3 and given.shape[:2] == flat.shape[:2] and not given.shape[-1] % flat.shape[-1]:
            if any(torch.equal(part, flat) for part in given.split(flat.shape[-1], -1)):
                return hook.replace("rot_", "")
    return hook


def _heads(flat: Tensor | None, d_head: int, n_heads: int) -> int | None:
    """How many heads of a width a projection has; None if it is none of this attention."""
    if flat is None or flat.ndim != 3 or not d_head or flat.shape[-1] % d_head:
        return None
    heads = flat.shape[-1] // d_head
    return heads if heads <= n_heads and n_heads % heads == 0 else None


def _around(one: Attention) -> set[int]:
    """The calls inside which attention was computed."""
    found: set[int] = set()
    call = one.call
    while call is not None:
        found.add(id(call))
        call = call.parent
    return found


def _last_map(calls: list[Call], one: Attention, maps: set[str]) -> Call | None:
    """The linear map after the heads: it ends the module that attends."""
    holders = [c for c in calls if one.call is c]
    if not holders:
        return None
    ends = [c for c in _within(holders[0]) if is_same(c.gives, holders[0].gives) and c.takes is not None and c.path in maps]
    wide = [c for c in ends if c.takes is not None and c.takes.ndim == 3 and c.takes.shape[-1] % one.n_heads == 0]
    return wide[0] if wide else None


def _neurons(calls: list[Call], mlp: tuple[str, str, int | None] | None, short: dict[int, str], maps: set[str]) -> str | None:
    """The path of the last map of an MLP, which is given its neurons."""
    if mlp is None:
        return None
    holder = next(c for c in calls if short[id(c)] == mlp[0])
    ends = [c for c in _within(holder) if is_same(c.gives, holder.gives) and c.takes is not None and c.path in maps]
    return short[id(ends[0])] if ends and MLP.search(short[id(holder)]) else None


def _said(told: dict[str, Parts]) -> dict[str, str]:
    """The parts of the layers, in words."""
    said: dict[str, str] = {}
    for parts in told.values():
        for hook, (path, side, _) in parts.items():
            said.setdefault(hook, f"{path} ({'input' if side == 'in' else 'output'})")
    return said
