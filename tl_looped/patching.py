"""Activation patching over (loop, layer, position, head), many patches in one batch.

A sweep makes the corrupted run once, and computes neither the layers nor the positions before a patch again. Every value equals
the one of a run with that patch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ._patcher import Cell, Edit, Metric, Patcher, position_axis
from .bridge.cache import LoopedCache
from .bridge.looped_bridge import LoopedBridge
from .bridge.run import copied_generator
from .errors import LoopedError, UnknownNameError
from .model.initial_state import InitialState
from .results import Grid
from .schedule import Indices, LoopSelector, Pass, Site, select_indices

__all__ = ["PatchSweep", "patch_between_loops", "patch_sweep"]

Tokens = str | list[str] | Int[Tensor, "*batch pos"]

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("q", "k", "v", "z", "pattern")
PASSES = ("state", "injection", "out")


@dataclass(frozen=True, eq=False)
class PatchSweep(Grid):
    """The metric after every patch of a sweep.

    Args:
        values: one dimension per axis; a last axis "example" if the metric gives one number per row of the batch.
        baseline_corrupted: the metric of the run that was patched, without a patch; a scalar or [example].
        baseline_clean: the metric of the run that the patches came from; None if that run cannot be repeated, because its cache
            was not made by `LoopedBridge.run_with_cache` from a whole run without other hooks.
    """

    baseline_corrupted: Tensor | None = None
    baseline_clean: Tensor | None = None

    def normalised(self) -> Grid:
        """The values on a scale where the corrupted run is 0 and the clean run is 1.

        Raises:
            LoopedError: the metric of the clean run is not known, or both runs have the same.
        """
        if self.baseline_clean is None or self.baseline_corrupted is None:
            raise LoopedError(
                "normalised() was called, but the metric of the clean run is not known: its cache was not made by "
                "LoopedBridge.run_with_cache from a whole run without other hooks. Make it so, or scale `values` yourself."
            )
        span = self.baseline_clean - self.baseline_corrupted
        if bool((span == 0).any()):
            raise LoopedError("normalised() was called, but the clean and the corrupted run have the same metric.")
        return Grid((self.values - self.baseline_corrupted) / span, self.axes, self.labels, f"normalised {self.name}")


class Place(NamedTuple):
    """An activation that can be patched: where it is on the axes of layers, its hook, the last layer before it."""

    key: dict[str, int | str]
    hook: str
    entry: int


def patch_sweep(
    model: LoopedBridge,
    corrupted_tokens: Tokens,
    clean_cache: LoopedCache | Mapping[str, Tensor],
    metric: Metric,
    site: str = "resid_pre",
    axes: Sequence[str] | None = None,
    *,
    loops: LoopSelector = "all",
    layers: Indices = None,
    positions: Indices = None,
    heads: Indices = None,
    stack: str | None = None,
    initial_state: InitialState = None,
    max_batch: int | None = None,
    verbose: bool = True,
    **inputs: Any,
) -> PatchSweep:
    """Patch clean activations into a corrupted run, cell by cell of a grid, and measure what each patch does.

    Causal tracing (Meng et al. 2022, arXiv 2202.05262), as in `transformer_lens.patching`, with loop and layer as axes. A cell
    is one index on every axis that is named. Along the others everything is patched at once: `axes=("loop",)` patches all
    layers of a loop together, `axes=("layer",)` a layer in all its loops. Every value equals that of a run with this patch
    alone, up to rounding; a cell that changes nothing has the value of the corrupted run, bit for bit.

    Args:
        model: the model. Hooks that are attached act in every run; cells are then run one by one.
        corrupted_tokens: the run that is patched: text or tokens, of the same shape as the clean ones.
        clean_cache: the run the patches come from, with every activation of the site that is patched.
        metric: logits [batch, pos, d_vocab] -> a scalar, or one number per row of the batch.
        site: what is patched. In layers: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", and per head "q", "k",
            "v", "z", "pattern". In passes: "state" (entering the pass), "injection", "out" (leaving it).
        axes: "loop", "layer", "pos", "head", in any order. "virtual_layer" instead of loop and layer covers prelude and coda
            too. Patterns have their query as "pos" and their key as "src_pos". Default: ("loop", "layer", "pos"), for heads
            ("loop", "layer", "head"), for passes ("loop", "pos").
        loops: which loops.
        layers: which layers of the loop, or which virtual layers; None for all.
        positions: which positions; None for all.
        heads: which heads (groups of heads for k and v with grouped keys); None for all.
        stack: "L" or "H" for HRM-Text; "prelude" or "coda" for the layers that run once, whose one loop is called so.
        initial_state: of the corrupted run; default: that of the clean run. Where it is random it must be the same one, or the
            patches would carry the difference between two random states.
        max_batch: how many rows (cells x batch) to run at once; None for what fits into a quarter of the free memory, and no
            more than a CPU gains from.
        verbose: show a progress bar.
        **inputs: what else the corrupted run takes, such as `attention_mask`.

    Raises:
        LoopedError: prompts of different shapes; activations that were not cached; another random initial state; a metric of
            the wrong shape; a site or an axis that does not exist.
        OutOfRangeError: loops, layers, positions or heads that the run does not have.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.patching import patch_sweep
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> _, clean_cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
        >>> def metric(logits):
        ...     return logits[0, -1, 4] - logits[0, -1, 5]
        >>> sweep = patch_sweep(model, torch.tensor([[1, 7, 3]]), clean_cache, metric, verbose=False)
        >>> sweep.axes, tuple(sweep.values.shape)
        (('loop', 'layer', 'pos'), (3, 2, 3))
        >>> bool(sweep.values[0, 0, 0] == sweep.baseline_corrupted)  # both prompts begin with the same token
        True
    """
    names = _check_axes(site, axes)
    places = _places(model, site, names, loops, layers, stack)
    source = _Source(model, clean_cache)
    clean = source.read([place.hook for place in places])
    state = source.initial_state(initial_state)
    patcher = Patcher(model, corrupted_tokens, metric, list(clean), state, inputs, max_batch)
    source.check_start(patcher)
    clean = patcher.fitting(clean.items())
    inner = _inner_axes(patcher, places[0].hook, positions, heads)
    groups: dict[tuple[int | str, ...], list[Place]] = {}
    for place in places:
        groups.setdefault(tuple(i for axis, i in place.key.items() if axis in names), []).append(place)
    outer = [axis for axis in places[0].key if axis in names]
    swept = [axis for axis in inner if axis in names]

    cells = []
    for group in groups.values():
        for point in product(*(inner[axis] for axis in swept)):
            at = inner | {axis: [i] for axis, i in zip(swept, point, strict=True)}
            where = _where(patcher.base[group[0].hook], at)
            edits = [Edit(place.hook, clean[place.hook], where) for place in group]
            cells.append(Cell(edits, min(place.entry for place in group), min(at["pos"])))
    values = patcher.run(cells, verbose, f"patching {site}")

    keys = [list(dict.fromkeys(key[k] for key in groups)) for k in range(len(outer))]
    labels = {axis: _layer_labels(model, axis, key) for axis, key in zip(outer, keys, strict=True)}
    labels |= {axis: _inner_labels(model, corrupted_tokens, axis, inner[axis]) for axis in swept}
    values = values.unflatten(0, [len(labels[axis]) for axis in (*outer, *swept)])
    order = [(*outer, *swept).index(axis) for axis in names]
    values = values.permute(*order, *range(len(names), values.ndim))
    return _result(patcher, values, names, labels, source.baseline(patcher))


def patch_between_loops(
    model: LoopedBridge,
    tokens: Tokens,
    metric: Metric,
    site: str = "out",
    layer: int | None = None,
    *,
    source_tokens: Tokens | None = None,
    onwards: bool = False,
    loops: LoopSelector = "all",
    positions: Indices = None,
    heads: Indices = None,
    stack: str | None = None,
    initial_state: InitialState = None,
    max_batch: int | None = None,
    verbose: bool = True,
    **inputs: Any,
) -> PatchSweep:
    """Write the activation of one pass into another pass of the same run, or of another prompt's, for all pairs of loops.

    With `site="state"` or `"out"` that is a transplant of the whole state. Patching a run with itself, the diagonal changes
    nothing.

    Args:
        model: the model.
        tokens: the run that is patched.
        metric: as in `patch_sweep`.
        site: as in `patch_sweep`.
        layer: which layer of the loop, for sites that layers have.
        source_tokens: the run the activations come from; None for the run itself.
        onwards: write into the destination loop and every later one, rather than into it alone.
        loops: which loops, as sources and as destinations.
        positions: which positions are written; None for all.
        heads: which heads are written; None for all.
        stack: "L" or "H" for HRM-Text.
        initial_state: of both runs.
        max_batch: as in `patch_sweep`.
        verbose: show a progress bar.
        **inputs: what else both runs take, such as `attention_mask`.

    Returns:
        Values [source_loop, destination_loop]. `baseline_corrupted` is the run that is patched, `baseline_clean` the other one.

    Raises:
        LoopedError: as in `patch_sweep`; a site in layers without `layer`.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.patching import patch_between_loops
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> moved = patch_between_loops(model, torch.tensor([[1, 2]]), lambda logits: logits[0, -1, 3], "z", 1, verbose=False)
        >>> moved.axes, bool((moved.values.diag() == moved.baseline_corrupted).all())
        (('source_loop', 'destination_loop'), True)
    """
    in_passes = site in PASSES
    if in_passes != (layer is None):
        raise LoopedError(
            f"layer={layer} was asked of site={site!r}; "
            + ("a pass has it once: leave layer out." if in_passes else "say which layer of the loop, layer=0 for the first.")
        )
    names = ("loop",) if in_passes else ("loop", "layer")
    places = _places(model, site, names, loops, layer, stack)
    if isinstance(initial_state, torch.Generator):
        source_state: InitialState = copied_generator(initial_state)
    else:
        source_state = initial_state
    patcher = Patcher(model, tokens, metric, [place.hook for place in places], initial_state, inputs, max_batch)
    baseline = None
    if source_tokens is None:
        values = {place.hook: patcher.base[place.hook] for place in places}
    else:
        with torch.no_grad():
            hooks = [place.hook for place in places]
            logits, cache = model.run_with_cache(source_tokens, names_filter=hooks, initial_state=source_state, **inputs)
        baseline, values = patcher.score(logits), patcher.fitting((hook, cache[hook]) for hook in hooks)
    inner = _inner_axes(patcher, places[0].hook, positions, heads)
    where = _where(patcher.base[places[0].hook], inner)
    cells = []
    for source in places:
        for destination in places:
            written = [p for p in places if p.entry >= destination.entry] if onwards else [destination]
            edits = [Edit(place.hook, values[source.hook], where) for place in written]
            cells.append(Cell(edits, destination.entry, min(inner["pos"])))
    found = patcher.run(cells, verbose, f"patching {site} between loops").unflatten(0, (len(places), len(places)))
    labels = [str(place.key["loop"]) for place in places]
    axes = ("source_loop", "destination_loop")
    return _result(patcher, found, axes, dict.fromkeys(axes, labels), baseline)


class _Source:
    """The run that patches come from."""

    def __init__(self, model: LoopedBridge, cache: LoopedCache | Mapping[str, Tensor]):
        if isinstance(cache, LoopedCache) and cache.model.schedule != model.schedule:
            raise LoopedError(
                f"clean_cache comes from a run of {cache.model.schedule.describe()}, but the model runs "
                f"{model.schedule.describe()}; cache the clean run with this model."
            )
        if not isinstance(cache, LoopedCache):
            cache = LoopedCache(dict(cache.items()), model, getattr(cache, "has_batch_dim", True))
        self.model, self.cache, self.run = model, cache, cache.run
        first = model.schedule.passes[0]
        self.is_random = model.looped_cfg.initial_state == "noise"
        self.first, self.state = first, f"{model.schedule.pass_prefix(first)}.hook_state"

    def read(self, hooks: list[str]) -> dict[str, Tensor]:
        """The activations of hooks, with a batch axis."""
        missing = [self.model.schedule.loop_name(hook) for hook in hooks if hook not in self.cache]
        if missing:
            shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
            raise UnknownNameError(
                f"clean_cache lacks {shown}; cache the clean run with these in names_filter, or without names_filter."
            )
        return {hook: self.cache[hook] if self.cache.has_batch_dim else self.cache[hook][None] for hook in hooks}

    def initial_state(self, asked: InitialState) -> InitialState:
        """The initial state of the corrupted run: the clean run's, where it matters."""
        if self.run is None:
            if not self.is_random or asked is not None:
                return asked
            if self.state not in self.cache:
                raise LoopedError(
                    "the initial state of this model is random, and clean_cache does not say which one it started from; make "
                    f"it with LoopedBridge.run_with_cache, keep {self.state!r} in it, or pass initial_state=."
                )
            return self.read([self.state])[self.state]
        if asked is None:
            return self.run.arguments()["initial_state"]
        if self.is_random and not self.run.starts_like(asked):
            raise LoopedError(
                f"initial_state={_short(asked)} was asked for the corrupted run, but the clean run started from "
                f"{_short(self.run.initial_state)}; patches would carry the difference of two random states. Leave "
                "initial_state out to start from the clean run's."
            )
        return asked

    def check_start(self, patcher: Patcher) -> None:
        """Both runs must start from the same random state; a hook or another padding may have changed it."""
        if not self.is_random or self.state not in self.cache:
            return
        clean = self.read([self.state])[self.state]
        corrupted = patcher.recording.streams[self.first.first].states[self.first.stack]
        if clean.shape == corrupted.shape and not torch.equal(clean.to(corrupted.device, corrupted.dtype), corrupted):
            raise LoopedError(
                "the clean and the corrupted run start from different random states; pass "
                f"initial_state=clean_cache[{self.state!r}] for the corrupted run."
            )

    def baseline(self, patcher: Patcher) -> Tensor | None:
        """The metric of the clean run, if it can be repeated."""
        if self.run is None or self.run.hooked or patcher.one_by_one:
            return None
        with torch.no_grad():
            return patcher.score(self.model(self.run.input, **self.run.arguments()))


def _check_axes(site: str, axes: Sequence[str] | None) -> tuple[str, ...]:
    if site not in (*STREAMS, *HEADS, *PASSES):
        raise LoopedError(f"site={site!r} was asked; choose one of {', '.join((*STREAMS, *HEADS, *PASSES))}.")
    last = "head" if site in HEADS else "pos"
    if axes is None:
        return ("loop", last) if site in PASSES else ("loop", "layer", last)
    known = ("loop",) if site in PASSES else ("loop", "layer", "virtual_layer")
    known += ("pos", *(("head",) if site in HEADS else ()), *(("src_pos",) if site == "pattern" else ()))
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if not names or len(set(names)) < len(names) or set(names) - set(known):
        raise LoopedError(f"axes={names} was asked; site={site!r} has the axes {', '.join(known)}, each at most once.")
    if "virtual_layer" in names and {"loop", "layer"} & set(names):
        raise LoopedError(f'axes={names} was asked; "virtual_layer" stands for loop and layer, name it without them.')
    return names


def _places(
    model: LoopedBridge, site: str, names: Sequence[str], loops: LoopSelector, layers: Indices, stack: str | None
) -> list[Place]:
    """Every activation of a site that is patched, in the order of the run."""
    schedule = model.schedule
    hook = f"attn.hook_{site}" if site in HEADS else f"hook_{site}"
    if "virtual_layer" in names:
        if loops != "all" or stack is not None:
            raise LoopedError('the axis "virtual_layer" goes without loops= and stack=; choose virtual layers by layers=.')
        chosen = select_indices(layers, schedule.n_layers, "virtual layers")
        return [Place({"virtual_layer": i}, f"blocks.{i}.{hook}", i) for i in chosen]
    if stack in ("prelude", "coda"):
        n = schedule.stacks[stack]
        if site in PASSES or loops != "all" or not n:
            raise LoopedError(f"stack={stack!r} has {n} layers, which run once: choose a site of layers, and leave loops out.")
        chosen = select_indices(layers, n, f"{stack} layers")
        edge = [(j, schedule.virtual(Site(stack, None, j))) for j in chosen]
        return [Place({"loop": stack, "layer": j}, f"blocks.{i}.{hook}", i) for j, i in edge]
    passes: list[Pass] = sorted(set(schedule.passes_of(loops, stack)), key=lambda p: p.index)
    if site in PASSES:
        if layers is not None:
            raise LoopedError(f"layers={layers!r} was asked of site={site!r}, which a pass has once; leave layers out.")
        if site == "injection" and model.looped_cfg.injection == "none":
            raise LoopedError("site='injection' was asked, but nothing is injected in the passes of this model.")
        return [
            Place({"loop": p.loop}, f"{schedule.pass_prefix(p)}.{hook}", p.layers[-1] if site == "out" else p.first - 1)
            for p in passes
        ]
    chosen = select_indices(layers, schedule.n_core, "layers in a loop")
    return [Place({"loop": p.loop, "layer": j}, f"blocks.{p.layers[j]}.{hook}", p.layers[j]) for p in passes for j in chosen]


def _inner_axes(patcher: Patcher, hook: str, positions: Indices, heads: Indices) -> dict[str, list[int]]:
    """The chosen indices on the axes of an activation, in the order of these axes after the batch."""
    shape = patcher.base[hook].shape
    pos = select_indices(positions, patcher.n_pos, "positions")
    if position_axis(hook):
        return {"head": select_indices(heads, shape[1], "heads"), "pos": pos, "src_pos": list(range(shape[-1]))}
    if ".attn." in hook:
        return {"pos": pos, "head": select_indices(heads, shape[2], "heads")}
    if heads is not None:
        raise LoopedError(f"heads={heads!r} was asked of {hook}, which has no head axis; leave heads out.")
    return {"pos": pos}


def _where(activation: Tensor, at: dict[str, list[int]]) -> Tensor:
    """The mask of chosen indices; the last axis of an activation has no name, except for patterns."""
    where = torch.ones((), dtype=torch.bool, device=activation.device)
    for size, chosen in zip(activation.shape[1:], at.values(), strict=False):
        along = torch.zeros(size, dtype=torch.bool, device=activation.device)
        along[chosen] = True
        where = where[..., None] & along
    return where if "src_pos" in at else where[..., None]


def _layer_labels(model: LoopedBridge, axis: str, indices: list[Any]) -> list[str]:
    if axis != "virtual_layer":
        return [str(i) for i in indices]
    return [model.schedule.name(i, "hook").removesuffix(".hook") for i in indices]


def _inner_labels(model: LoopedBridge, tokens: Tokens, axis: str, indices: list[int]) -> list[str]:
    if axis == "head" or model.tokenizer is None:
        return [str(i) for i in indices]
    ids = model.to_tokens(tokens) if not isinstance(tokens, Tensor) else tokens
    rows = ids[None] if ids.ndim == 1 else ids
    if len(rows) > 1:
        return [str(i) for i in indices]
    words: Any = model.to_str_tokens(rows[0])
    return [f"{words[i]} {i}" for i in indices]


def _result(
    patcher: Patcher, values: Tensor, axes: tuple[str, ...], labels: dict[str, list[str]], clean: Tensor | None
) -> PatchSweep:
    if values.ndim > len(axes):
        axes, labels = (*axes, "example"), labels | {"example": [str(i) for i in range(values.shape[-1])]}
    return PatchSweep(values, axes, labels, "metric", patcher.baseline, clean)


def _short(state: object) -> str:
    return f"a tensor {tuple(state.shape)}" if isinstance(state, Tensor) else repr(state)
