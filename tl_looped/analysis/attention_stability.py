"""Whether attention settles: how far every head's pattern is from the loop before and from the last loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from .._old_names import moved
from ..looped import Looped, at_depth, require
from ..panels import GroupBy, Panel, grouped
from ..record import InitialState
from ..results import Estimate, Result, table
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ..schedule import Schedule, Site
from ._streaming import by_layer, carry_out, need_loops
from .fixed_points import PATTERN, compare_loops, frobenius_per_head


@dataclass(frozen=True, eq=False)
class AttentionStability(Result):
    """What `attention_stability` measured; estimates over the examples, axes (loop, layer, head). `a + b` merges.

    Args:
        successive: Frobenius distance of a head's pattern from that in the loop before, over `sqrt(pos)`; from loop 1 on.
        distance: the same from the pattern in the last loop, where it is 0 by construction.
        stack: the looped stack.
        schedule: what ran.
    """

    successive: Estimate
    distance: Estimate
    stack: str
    schedule: Schedule

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per (loop, layer, head)."""
        return table(self.distance, self.successive)

    def panels(self, group_by: GroupBy = "layer") -> list[Panel]:
        """The successive distances, mean over heads; `.plot()` of a field is its heat map, head by head.

        Args:
            group_by: one line per layer ("layer"), per loop ("recurrence"), or one over all layers in their order ("depth").

        Raises:
            LoopedError: an unknown grouping.
        """
        grid = self.successive
        at = [Site(self.stack, t, j) for t in grid.labels["loop"] for j in grid.labels["layer"]]
        layers = [self.schedule.virtual(site) for site in at]
        values, title = grid.values.mean(-1).flatten().tolist(), "Attention patterns against the loop before, mean over heads"
        name = "Frobenius distance / sqrt(pos)"
        return [grouped(values, self.schedule, layers=layers, group_by=group_by, name=name, title=title)]


def attention_stability(
    model: Looped,
    prompts: Prompts,
    *,
    n_loops: int | None = None,
    stack: str | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> AttentionStability:
    """How far every head's attention pattern is from the loop before and from the last loop (arXiv 2604.11791, figures 23, 25).

    `|A - A'|_F / sqrt(pos)` per head: the root mean square over queries, which does not grow with the prompt (our choice; the
    paper does not say how lengths and heads are averaged). `fixed_points(patterns=True)` has all heads in one number. Each
    batch is run twice, first against the loop before, while the patterns of one loop are held; or once, if those of all loops
    take 64 MB or less.

    Args:
        model: the model.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        n_loops: how many loops to look at (H cycles for HRM-Text); None for the model's own.
        stack: "L" or "H" for HRM-Text; not needed elsewhere.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; fewer than two loops; a pattern that is not finite.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = attention_stability(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), n_loops=5, verbose=False)
        >>> tuple(found.successive.values.shape), found.successive.labels["loop"]
        ((4, 2, 2), [1, 2, 3, 4])
    """
    deep = at_depth(model, n_loops)
    need_loops(len(deep.schedule.passes_of("all", stack)), 2, "attention_stability", "a distance between loops")
    require(deep, "equal heads", "attention_stability")
    measure = AttentionStabilityMeasure(deep.schedule.looped_stack(stack), initial_state)
    return over_prompts(measure, deep, prompts, what="attention_stability", verbose=verbose)


@dataclass(frozen=True)
class AttentionStabilityMeasure:
    """What `attention_stability` measures of a batch."""

    stack: str
    initial_state: InitialState

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> AttentionStability:
        """Measure one batch."""
        passes = model.schedule.passes_of("all", self.stack)

        def per_head(a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"distance": frobenius_per_head(a, b) / a.shape[-1] ** 0.5}

        plan = compare_loops(model, passes[-1], passes, self.initial_state, {PATTERN: per_head})
        found = carry_out(model, tokens, plan)[PATTERN]
        return AttentionStability(
            successive=by_layer(found.successive["distance"], "successive_distance", "head"),
            distance=by_layer(found.distance["distance"], "distance_to_last", "head"),
            stack=self.stack,
            schedule=model.schedule,
        )


def __getattr__(name: str) -> object:
    return moved(__name__, name)
