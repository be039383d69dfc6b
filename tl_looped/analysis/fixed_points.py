"""Cyclic fixed points: whether every layer of a loop settles, where, and whether the layers settle in different places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._old_calls import accepts_old
from .._precision import wide
from .._together import stacked
from ..errors import LoopedError
from ..looped import Looped, at_depth, check_model
from ..panels import GroupBy, Panel, grouped
from ..record import InitialState
from ..results import Estimate, Result, table
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ..schedule import Indices, Pass, Schedule, Site, check_count
from ._directions import cosine, relative_distance
from ._streaming import At, Plan, at_positions, by_layer, carry_out, need_loops, run_twice

__all__ = ["FixedPoints", "fixed_points"]

Metric = Literal["l2", "relative", "cosine"]
Reduction = Literal["token", "matrix"]
Quantity = Literal["successive", "distance", "norm"]
Cells = dict[str, dict[At, Tensor]]  # for every quantity, [batch, ...] by (loop, layer)
TITLES: dict[Quantity, str] = {
    "distance": "From every loop to X*",
    "successive": "From every loop to the loop before",
    "norm": "Norm of the residual stream",
}
NAMES: dict[Metric, str] = {"l2": "L2 distance", "relative": "relative distance", "cosine": "cosine similarity"}
RESID, PATTERN = "hook_resid_post", "attn.hook_pattern"


@dataclass(frozen=True, eq=False)
class FixedPoints(Result):
    """What `fixed_points` found: estimates over the examples, axes (loop, layer) unless stated otherwise. `a + b` merges.

    Args:
        norm: L2 norm of the residual stream. An RMS norm before the readout hides growth, so look at it beside every distance.
        successive: from each loop but the first to the loop before, under "l2", "relative" (l2 over the norm of the later
            state) and "cosine" (the similarity, 1 for no change of direction). A state that is zero has no direction, and no
            distance is relative to it: such tokens are left out of these two, and if all of an example are, the mean is NaN.
        distance: from each loop to the reference X*, under the same names; "relative" is over the norm of X*. If the reference
            is the last loop, the last entry is 0 (cosine 1) by construction and says nothing.
        layer_cosine: cosine between the references of two layers, axes (layer, other); NaN likewise.
        degeneracy: lowest cosine between the references of two layers of an example, axis (pairs): "with layer 0" is the
            paper's, "all" is over all pairs. Near 1 the layers share one fixed point. NaN likewise, and in a loop of one layer.
        pattern_successive: from each loop but the first to the loop before, of the attention pattern; None if not asked for.
        pattern_distance: from each loop to the reference, of the attention pattern.
        reduction: "token" or "matrix".
        stack: the looped stack.
        reference: the loop that X* was taken from.
        schedule: what ran.
    """

    norm: Estimate
    successive: dict[Metric, Estimate]
    distance: dict[Metric, Estimate]
    layer_cosine: Estimate
    degeneracy: Estimate
    pattern_successive: Estimate | None
    pattern_distance: Estimate | None
    reduction: Reduction
    stack: str
    reference: int
    schedule: Schedule

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row per (loop, layer): the norm and every distance, with standard errors and the count."""
        patterns = [e for e in (self.pattern_successive, self.pattern_distance) if e is not None]
        return table(self.norm, *self.successive.values(), *self.distance.values(), *patterns)

    @accepts_old("group_by")
    def panels(
        self, quantity: Quantity = "distance", metric: Metric = "relative", *, group_by: GroupBy = "layer"
    ) -> list[Panel]:
        """One quantity, as in figures 3 and 4 of arXiv 2604.11791; `.plot()` of a field is its heat map.

        Args:
            quantity: "distance", "successive" or "norm".
            metric: "l2", "relative" or "cosine"; without meaning for the norm.
            group_by: one line per layer ("layer"), per loop ("recurrence"), or one over all layers in their order ("depth").

        Raises:
            LoopedError: an unknown quantity, metric or grouping.
        """
        if quantity not in get_args(Quantity) or metric not in get_args(Metric):
            known = f"{', '.join(get_args(Quantity))} in {', '.join(get_args(Metric))}"
            raise LoopedError(f"{quantity!r} in {metric!r} was asked; there are {known}.")
        grid = self.norm if quantity == "norm" else getattr(self, quantity)[metric]
        at = [Site(self.stack, t, j) for t in grid.labels["loop"] for j in grid.labels["layer"]]
        layers = [self.schedule.virtual(site) for site in at]
        log_y = quantity != "norm" and metric != "cosine"
        values = grid.values.clone()
        if quantity == "distance" and grid.labels["loop"][-1] == self.reference:
            values[-1] = torch.nan  # by construction
        title = f"{TITLES[quantity]}, {'mean over tokens' if self.reduction == 'token' else 'of the whole prompt'}"
        name = "L2 norm" if quantity == "norm" else NAMES[metric]
        drawn = values.flatten().tolist()
        return [grouped(drawn, self.schedule, layers=layers, group_by=group_by, name=name, title=title, log_y=log_y)]


def fixed_points(
    model: Looped,
    prompts: Prompts,
    *,
    n_loops: int | None = 128,
    n_reference: int | None = None,
    reduction: Reduction = "token",
    patterns: bool = False,
    positions: Indices = None,
    stack: str | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> FixedPoints:
    """How far every layer of every loop is from the loop before and from an approximate fixed point X* (arXiv 2604.11791).

    `X[t, l]` is the residual stream leaving layer `l` in loop `t` (`hook_resid_post`, before any norm between passes), X* that
    of the last loop. The paper's figure 3 is `|X[t, l] - X[t-1, l]|`, figure 4 `|X[t, l] - X*[l]|`. It does not say how the
    norm of a [pos, d_model] matrix is taken: "token", our choice, is the mean over tokens of the L2 norm, of the relative
    distance and of the cosine of each token; "matrix" takes the norm and the cosine of the whole matrix. Then follows the mean
    over examples. Distances of attention patterns are Frobenius norms over all heads, divided by `sqrt(head * query)`, so
    that they do not grow with either (our choice).

    Each batch is run twice: against the loop before, which ends with X*, and against X*. One loop of the streams (and patterns)
    is held. If all loops of them take 64 MB or less, they are held instead, and the batch is run once.

    Args:
        model: the model. Hooks on it act on the runs, if it has `n_loops` loops itself.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        n_loops: how many loops to look at (H cycles for HRM-Text); the paper's 128 unless told, None for the model's own.
        n_reference: take X* from the last of so many loops instead, at least `n_loops`.
        reduction: "token" or "matrix".
        patterns: look at attention patterns too.
        positions: whose states are looked at; None for all. `slice(1, None)` leaves out a first token that dwarfs the others.
        stack: "L" or "H" for HRM-Text; not needed elsewhere.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; fewer than two loops; an activation that is not finite (the first one is named).

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.analysis import fixed_points
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = fixed_points(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), n_loops=8, verbose=False)
        >>> found.distance["l2"].values.shape, found.distance["l2"].count
        (torch.Size([8, 2]), 2)
        >>> bool(found.successive["relative"].values[-1].max() < found.successive["relative"].values[0].min())
        True
    """
    if reduction not in get_args(Reduction):
        raise LoopedError(f'reduction={reduction!r} was asked; choose "token" or "matrix".')
    check_model(model)
    n_loops = model.n_loops if n_loops is None else check_count("n_loops", n_loops)
    if n_reference is not None and check_count("n_reference", n_reference) < n_loops:
        raise LoopedError(f"n_reference={n_reference} was asked, but X* comes from no earlier loop than n_loops={n_loops}.")
    deep = at_depth(model, n_reference or n_loops)
    looped = deep.schedule.looped_stack(stack)
    n_passes = sum(p.stack == looped for t in range(n_loops) for p in deep.schedule.passes_in(t))
    need_loops(n_passes, 2, "fixed_points", "a successive difference")
    measure = FixedPointsMeasure(n_passes, reduction, patterns, positions, looped, initial_state)
    return over_prompts(measure, deep, prompts, what="fixed_points", verbose=verbose)


@dataclass(frozen=True)
class FixedPointsMeasure:
    """What `fixed_points` measures of a batch in the first `n_passes` passes of a stack; the last pass that there is has X*."""

    n_passes: int
    reduction: Reduction
    patterns: bool
    positions: Indices
    stack: str
    initial_state: InitialState

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> FixedPoints:
        """Measure one batch."""
        return carry_out(model, tokens, self.plan(model))

    def plan(self, model: Looped) -> Plan[FixedPoints]:
        """The runs of one batch that it takes."""
        passes = model.schedule.passes_of("all", self.stack)
        # The first loops of a longer run are those of a shorter one.
        shown, compare = passes[: self.n_passes], {RESID: self._compare}
        if self.patterns:
            compare[PATTERN] = _frobenius
        found = yield from compare_loops(model, passes[-1], shown, self.initial_state, compare)
        resid, pattern = found[RESID], found.get(PATTERN)
        layers, states = list(range(shown[0].n_layers)), resid.reference.values()
        between = stacked((self._compare(a, b.to(a.device))["cosine"] for a in states for b in states), 1)
        between = between.unflatten(1, (len(layers), len(layers))).cpu()
        others = between.masked_fill(torch.eye(len(layers), dtype=torch.bool, device="cpu"), torch.inf)
        lowest = torch.stack([others[:, 0].amin(-1), others.amin((-2, -1))], 1)
        lowest = lowest.masked_fill(lowest.isinf(), torch.nan)
        names: tuple[Metric, ...] = get_args(Metric)
        return FixedPoints(
            norm=by_layer(resid.distance["norm"], "norm"),
            successive={m: by_layer(resid.successive[m], f"successive_{m}") for m in names},
            distance={m: by_layer(resid.distance[m], f"distance_{m}") for m in names},
            layer_cosine=Estimate.of(between, ("layer", "other"), {"layer": layers, "other": layers}, "cosine"),
            degeneracy=Estimate.of(lowest, ("pairs",), {"pairs": ["with layer 0", "all"]}, "lowest_cosine"),
            pattern_successive=pattern and by_layer(pattern.successive["frobenius"], "pattern_successive"),
            pattern_distance=pattern and by_layer(pattern.distance["frobenius"], "pattern_distance"),
            reduction=self.reduction,
            stack=self.stack,
            reference=passes[-1].loop,
            schedule=model.schedule,
        )

    def _compare(self, x: Float[Tensor, "batch pos d_model"], base: Float[Tensor, "batch pos d_model"]) -> dict[str, Tensor]:
        """The distances of states from others, relative to the others, and their own norm; [batch]."""
        x, base = at_positions(x, self.positions), at_positions(base, self.positions)
        if self.reduction == "matrix":
            x, base = x.flatten(1)[:, None], base.flatten(1)[:, None]
        x, base = wide(x), wide(base)
        l2 = (x - base).norm(dim=-1)
        parts = {"l2": l2, "relative": relative_distance(x, base), "cosine": cosine(x, base), "norm": x.norm(dim=-1)}
        return {name: part.nanmean(1) for name, part in parts.items()}


@dataclass
class Compared:
    """What `compare_loops` measured, and the reference of every layer."""

    successive: Cells
    distance: Cells
    reference: dict[int, Tensor]


def compare_loops(
    model: Looped,
    last: Pass,
    shown: list[Pass],
    initial_state: InitialState,
    compare: Mapping[str, Callable[[Tensor, Tensor], dict[str, Tensor]]],
) -> Plan[dict[str, Compared]]:
    """Compare activations of every layer in every loop with those of the loop before and with those of the last."""
    successive, distance = ({hook: Cells() for hook in compare} for _ in range(2))

    def into(found: dict[str, Cells]) -> Callable[[str, At, Tensor, Tensor], None]:
        def put(hook: str, at: At, x: Tensor, base: Tensor) -> None:
            for name, part in compare[hook](x, base).items():
                found[hook].setdefault(name, {})[at] = part

        return put

    held = yield from run_twice(model, [*compare], shown, last, initial_state, into(successive), into(distance))
    ends = {hook: {layer: value for (of, layer), value in held.items() if of == hook} for hook in compare}
    return {hook: Compared(successive[hook], distance[hook], ends[hook]) for hook in compare}


def _frobenius(x: Float[Tensor, "batch head query key"], base: Float[Tensor, "batch head query key"]) -> dict[str, Tensor]:
    return {"frobenius": (frobenius_per_head(x, base).square().sum(1) / (x.shape[1] * x.shape[2])).sqrt()}


def frobenius_per_head(
    x: Float[Tensor, "batch head query key"], base: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head"]:
    """The Frobenius distance of every head's pattern from another; one head is widened and subtracted at a time."""
    pairs = zip(x.unbind(1), base.unbind(1), strict=True)
    return torch.stack([(wide(a) - wide(b)).flatten(1).norm(dim=1) for a, b in pairs], 1)
