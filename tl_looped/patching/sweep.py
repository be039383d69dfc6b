"""Activation patching over (loop, layer, position, head), many patches in one batch.

A sweep makes the corrupted run once, and computes neither the layers nor the positions before a patch again. Every value equals
the one of a run with that patch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..looped import Cache, Looped, require
from ..metrics import metric_name
from ..panels import Panel
from ..record import InitialState, Run
from ..results import Grid
from ..schedule import Indices, LoopSelector, select_indices
from ..sites import KINDS, Place, axes_of, check_site, laid_out, layer_place, outer_axes, swept_places
from ..tokens import counts_from_end
from .batches import Cell, Edit, Patcher
from .clean_run import CleanRun, Metric, clean_at

__all__ = ["PatchSweep", "patch_sweep"]

Tokens = str | list[str] | Int[Tensor, "*batch pos"]


@dataclass(frozen=True, eq=False)
class PatchSweep(Grid):
    """The metric after every patch of a sweep.

    Args:
        values: one dimension per axis; a last axis "example" if the metric gives one number per row of the batch.
        baseline_corrupted: the metric of the run that was patched, without a patch; a scalar or [example].
        baseline_clean: the metric of the run that the patches came from; None if that run cannot be repeated, because its cache
            was not made by `LoopedBridge.run_with_cache` from a whole run without other hooks, or because the model has hooks.
    """

    baseline_corrupted: Tensor | None = None
    baseline_clean: Tensor | None = None

    def _weight(self) -> Tensor:
        return self.values if self.baseline_corrupted is None else self.values - self.baseline_corrupted  # what a patch changes

    @accepts_old("title")
    def panels(self, *, title: str = "") -> list[Panel]:
        """The figure of a `Grid`, of the mean over the examples if there are several.

        Args:
            title: above the figure; the name of the numbers if empty.

        Raises:
            LoopedError: a single number, without axes.
        """
        if self.axes[-1] != "example" or len(self.axes) == 1:
            return super().panels(title=title)
        mean = Grid(self.values.double().mean(-1), self.axes[:-1], self.labels, self.name)
        return mean.panels(title=title or f"{self.name}, mean of {self.values.shape[-1]} examples")

    def normalised(self) -> PatchSweep:
        """The values on a scale where the corrupted run is 0 and the clean run is 1.

        Raises:
            LoopedError: the metric of the clean run is not known, or both runs have the same.
        """
        if self.baseline_clean is None or self.baseline_corrupted is None:
            raise LoopedError(
                "normalised() was called, but the metric of the clean run is not known: its cache was not made by "
                "LoopedBridge.run_with_cache from a whole run without other hooks, or hooks were on the model in the sweep. "
                "Make the cache so and take the hooks off, or scale `values` yourself."
            )
        span = self.baseline_clean - self.baseline_corrupted
        if bool((span == 0).any()):
            raise LoopedError("normalised() was called, but the clean and the corrupted run have the same metric.")
        values, zero = (self.values - self.baseline_corrupted) / span, torch.zeros_like(span)
        return PatchSweep(values, self.axes, self.labels, f"normalised {self.name}", zero, zero + 1)


@accepts_old("site", "axes")
def patch_sweep(
    model: Looped,
    corrupted_tokens: Tokens,
    clean_cache: Cache | Mapping[str, Tensor],
    metric: Metric,
    *,
    site: str = "resid_pre",
    axes: Sequence[str] | None = None,
    loops: LoopSelector = "all",
    layers: Indices = None,
    positions: Indices = None,
    heads: Indices = None,
    stack: str | None = None,
    at_loop: int | None = None,
    n_loops: int | None = None,
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
        loops: which loops. Where the axis "loop" is swept and neither loops, layers nor a stack is asked for, "prelude" and
            "coda" are entries of it beside the loops; layers that a stack lacks are NaN.
        layers: which layers of the loop, or which virtual layers; None for all.
        positions: which positions, the same in every row; None for all.
        heads: which heads (groups of heads for k and v with grouped keys); None for all.
        stack: "core" for the loops alone; "L" or "H" for HRM-Text; "prelude" or "coda" for the layers that run once.
        at_loop: measure the answer after this loop, as `model.unroll(at_loop + 1)` gives it; the clean run is then made again
            at that depth. None for the last.
        n_loops: of runs of this many loops; None for the model's own number.
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
    model, clean_cache = clean_at(model, clean_cache, at_loop, n_loops)
    placed = _places(model, site, names, loops, layers, stack)
    hooks = [place.hook for _, place in placed]
    source = CleanRun(model, clean_cache, initial_state)
    source.require(hooks)
    patcher = Patcher(model, corrupted_tokens, metric, hooks, source.initial_state, inputs, max_batch)
    source.check_start(patcher.recorded.state)
    source.check_padding(patcher.base.attention_mask)
    clean = {hook: source.read(hook, patcher.base[hook]) for hook in hooks}
    groups: dict[tuple[Any, ...], list[Place]] = {}
    for key, place in placed:
        groups.setdefault(key, []).append(place)
    outer = [axis for axis in ("loop", "layer", "virtual_layer") if axis in names]
    swept = [axis for axis in axes_of(hooks[0]) if axis in names]

    cells, keys = list[Cell](), list[tuple[Any, ...]]()
    for key, group in groups.items():
        inner = [inner_axes(patcher, place.hook, positions, heads) for place in group]
        if any(of[axis] != inner[0][axis] for of in inner for axis in swept):
            require(model, "equal heads", f"{swept} of several layers together")
        for point in product(*(inner[0][axis] for axis in swept)):
            one = {axis: [i] for axis, i in zip(swept, point, strict=True)}
            edits = [
                Edit(place.hook, clean[place.hook], where_of(patcher.base[place.hook], of | one))
                for place, of in zip(group, inner, strict=True)
            ]
            cells.append(Cell(edits, min(place.entry for place in group), min((inner[0] | one)["pos"])))
            keys.append((*key, *point))
    values = patcher.run(cells, verbose, f"patching {site}")

    values, labels = laid_out(values, keys, [*outer, *swept])  # NaN for heads that a layer lacks beside others
    labels |= {axis: _inner_labels(patcher, axis, [int(i) for i in labels[axis]]) for axis in swept}
    order = [(*outer, *swept).index(axis) for axis in names]
    values = values.permute(*order, *range(len(names), values.ndim))
    return result(patcher, values, names, labels, _baseline(source, patcher))


def _baseline(source: CleanRun, patcher: Patcher) -> Tensor | None:
    """The metric of the clean run, if it can be repeated."""
    if source.record is None or source.record.hooked or patcher.is_hooked:
        return None
    with torch.no_grad():
        return patcher.score(patcher.model(source.record.input, **source.record.arguments()))


def _check_axes(site: str, axes: Sequence[str] | None) -> tuple[str, ...]:
    check_site(site)
    outer, inner = outer_axes(site), KINDS[site].axes
    if axes is None:
        return (*outer, "head" if "head" in inner else "pos")
    known = outer if outer == ("loop",) else (*outer, "virtual_layer")
    known += tuple(axis for axis in ("pos", "head", "src_pos") if axis in inner)
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if not names or len(set(names)) < len(names) or set(names) - set(known):
        raise LoopedError(f"axes={names} was asked; site={site!r} has the axes {', '.join(known)}, each at most once.")
    if "virtual_layer" in names and {"loop", "layer"} & set(names):
        raise LoopedError(f'axes={names} was asked; "virtual_layer" stands for loop and layer, name it without them.')
    return names


def _places(
    model: Looped, site: str, names: Sequence[str], loops: LoopSelector, layers: Indices, stack: str | None
) -> list[tuple[tuple[Any, ...], Place]]:
    """Every activation that is patched, and the label of each on the axes of layers that are named."""
    if "virtual_layer" in names:
        if loops != "all" or stack is not None:
            raise LoopedError('the axis "virtual_layer" goes without loops= and stack=; choose virtual layers by layers=.')
        chosen = select_indices(layers, model.schedule.n_layers, "virtual layers")
        return [((model.schedule.layer_name(i),), layer_place(model, site, i)) for i in chosen]
    return swept_places(model, site, names, loops, layers, stack)


def inner_axes(patcher: Patcher, hook: str, positions: Indices, heads: Indices) -> dict[str, list[int]]:
    """The chosen indices on the axes of an activation, in the order of these axes after the batch."""
    shape = patcher.base[hook].shape
    pos, mask = select_indices(positions, patcher.n_pos, "positions"), patcher.base.padding()
    if mask is not None and counts_from_end(positions) and not bool(mask[:, pos].all()):
        raise LoopedError(
            f"positions={positions!r} was asked, which is padding in some rows; pad on the left, or count from the beginning."
        )
    axes = axes_of(hook)
    if heads is not None and "head" not in axes:
        raise LoopedError(f"heads={heads!r} was asked of {hook}, which has no head axis; leave heads out.")
    chosen = {"pos": pos, "src_pos": list(range(shape[-1]))}
    if "head" in axes:
        chosen["head"] = select_indices(heads, shape[1 + axes.index("head")], "heads")
    return {axis: chosen[axis] for axis in axes if axis in chosen}


def where_of(activation: Tensor, at: dict[str, list[int]]) -> Tensor:
    """The mask of chosen indices; the last axis of an activation has no name, except for patterns."""
    where = torch.ones((), dtype=torch.bool, device=activation.device)
    for size, chosen in zip(activation.shape[1:], at.values(), strict=False):
        along = torch.zeros(size, dtype=torch.bool, device=activation.device)
        along[chosen] = True
        where = where[..., None] & along
    return where if "src_pos" in at else where[..., None]


def _inner_labels(patcher: Patcher, axis: str, indices: list[int]) -> list[Any]:
    model, run = patcher.model, cast(Run, patcher.base.run)
    if axis == "head" or model.tokenizer is None:
        return list(indices)
    rows = run.input[None] if run.input.ndim == 1 else run.input
    if len(rows) > 1:
        return list(indices)
    words: Any = model.to_str_tokens(rows[0])
    return [f"{words[i]} {i}" for i in indices]


def result(
    patcher: Patcher, values: Tensor, axes: tuple[str, ...], labels: dict[str, list[Any]], clean: Tensor | None
) -> PatchSweep:
    if values.ndim > len(axes):
        axes, labels = (*axes, "example"), labels | {"example": list(range(values.shape[-1]))}
    return PatchSweep(values, axes, labels, metric_name(patcher.metric), patcher.baseline, clean)
