"""Whether attention settles: how far the patterns of two executed layers are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .._old_calls import accepts_old
from ..bridge.looped_bridge import LoopedBridge
from ..errors import LoopedError
from ..panels import GroupBy, Panel, grouped
from ..record import InitialState, rehearsal
from ..results import Estimate, Grid, Result, table
from ..running import is_observed
from ..schedule import Indices, Schedule, Site, select_indices
from ._prompts import Prompts, at_depth, over_batches, token_batches
from ._streaming import need_loops, visit
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
    model: LoopedBridge,
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
    batch is run twice, first against the loop before; the patterns of one loop are held.

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
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = attention_stability(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), n_loops=5, verbose=False)
        >>> tuple(found.successive.values.shape), found.successive.labels["loop"]
        ((4, 2, 2), [1, 2, 3, 4])
    """
    deep = at_depth(model, n_loops)
    passes = deep.schedule.passes_of("all", stack)
    need_loops(len(passes), 2, "attention_stability", "a distance between loops")

    def per_head(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"distance": frobenius_per_head(a, b) / a.shape[-1] ** 0.5}

    def examples(tokens: Int[Tensor, "batch pos"]) -> AttentionStability:
        found = compare_loops(deep, tokens, passes[-1], passes, initial_state, {PATTERN: per_head})[PATTERN]

        def estimate(cells: dict[tuple[int, int], dict[str, Tensor]], first: int, name: str) -> Estimate:
            values = torch.stack(
                [torch.stack([cells[p.loop, j]["distance"] for j in range(p.n_layers)], 1) for p in passes[first:]], 1
            )
            axes = ("loop", "layer", "head")
            counts = ([p.loop for p in passes[first:]], range(values.shape[2]), range(values.shape[3]))
            labels = {axis: list(ks) for axis, ks in zip(axes, counts, strict=True)}
            return Estimate.of(values.cpu(), axes, labels, name)

        return AttentionStability(
            successive=estimate(found.successive, 1, "successive_distance"),
            distance=estimate(found.distance, 0, "distance_to_last"),
            stack=deep.schedule.looped_stack(stack),
            schedule=deep.schedule,
        )

    return over_batches(examples, deep, prompts, verbose=verbose, what="attention_stability")


def attention_distances(
    model: LoopedBridge,
    prompts: Prompts,
    *,
    n_loops: int | None = None,
    per_head: bool = False,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> Estimate:
    """Frobenius distances between the attention patterns of all pairs of executed layers (arXiv 2604.11791, figures 2, 21).

    `|A - A'|_F` over all heads, divided by `sqrt(head * pos)`, mean over examples (our choice; the paper does not say).
    Diagonal bands mean that a layer resembles itself in other loops.

    Pairs need all patterns at once, of which only what is not masked is kept. Where that is more than the residual streams and
    patterns of one loop take, each batch is run again for every such share of it: memory stays that of a few loops, and the
    number of runs is `n_loops * pos / (16 * d_head + 4 * pos)`, rounded up: one run where prompts are short, at most a quarter
    of the number of loops where they are long. The distances themselves grow with the square of the number of layers run.

    Args:
        model: the model.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        n_loops: loops to run (H cycles for HRM-Text); None for the model's own. The paper shows 8 and 32.
        per_head: the distances of every head by itself, over `sqrt(pos)`.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Returns:
        An estimate with the axes (layer, other), and head if asked for. Layers are named as in "loops.2.blocks.5"; prelude,
        coda and both stacks of HRM-Text are included.

    Raises:
        LoopedError: no prompts; a pattern that is not finite.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> attention_distances(model, torch.tensor([[1, 2, 3]]), verbose=False).values.shape
        torch.Size([6, 6])
    """
    deep = at_depth(model, n_loops)
    schedule, cfg = deep.schedule, deep.looped_cfg
    names = [schedule.layer_name(i) for i in range(schedule.n_layers)]
    hooks = {f"{name}.attn.hook_pattern": i for i, name in enumerate(names)}
    causal = not any(is_observed(hook) for hook in deep.hook_dict.values())  # hooks may let a query look ahead

    def examples(tokens: Int[Tensor, "batch pos"]) -> Estimate:
        batch, pos = tokens.shape
        square = torch.ones(pos, pos, dtype=torch.bool, device=tokens.device)
        cells = (square.tril() if causal else square).flatten().nonzero()[:, 0]  # of a head's pattern
        n_cells = cfg.n_heads * len(cells)
        per_loop = cfg.n_physical * (8 * pos * cfg.d_model + 2 * cfg.n_heads * pos**2)  # numbers of an example
        chunk = min(n_cells, max(1, per_loop // schedule.n_layers))
        gram = torch.zeros(batch, cfg.n_heads if per_head else 1, len(names), len(names), dtype=torch.float64, device="cpu")
        held = torch.empty(batch, len(names), chunk, dtype=deep.cfg.dtype, device=tokens.device)
        for first in range(0, n_cells, chunk):
            parts = _parts(first, min(first + chunk, n_cells), len(cells))

            def keep(i: int, pattern: Tensor, parts: list[tuple[int, slice, slice]] = parts) -> None:
                for head, there, here in parts:
                    held[:, i, here] = pattern[:, head].flatten(1)[:, cells[there]]

            state = initial_state if first + chunk >= n_cells else rehearsal(initial_state)
            visit(deep, tokens, hooks, keep, stop=schedule.n_layers, initial_state=state)
            for head, _, here in parts:
                for rows in held[..., here].split(max(1, chunk // 8), dim=-1):  # so much is widened at a time
                    gram[:, head if per_head else 0] += (rows.double() @ rows.double().mT).cpu()
        norms = gram.diagonal(dim1=-2, dim2=-1).clone()
        distances = gram.mul_(-2).add_(norms[..., None, :]).add_(norms[..., None]).clamp_(min=0)
        distances = distances.div_(pos if per_head else cfg.n_heads * pos).sqrt_().movedim(1, -1)
        labels = {"layer": names, "other": names, "head": list(range(cfg.n_heads))}
        axes = ("layer", "other", "head") if per_head else ("layer", "other")
        if not per_head:
            distances = distances[..., 0]
        return Estimate.of(distances, axes, {axis: labels[axis] for axis in axes}, "pattern_distance")

    return over_batches(examples, deep, prompts, verbose=verbose, what="attention_distances")


@accepts_old(head="heads")
def looped_floorplan(
    model: LoopedBridge,
    tokens: str | Int[Tensor, "*batch pos"],
    *,
    n_loops: int | None = None,
    heads: Indices = None,
    initial_state: InitialState = None,
) -> Grid:
    """The attention pattern of every executed layer for one prompt (arXiv 2604.11791, figure 63); `plots.floorplan` draws them.

    One pattern for each executed layer is held: the mean over heads.

    Args:
        model: the model.
        tokens: one prompt: a text, or tokens [pos] or [1, pos].
        n_loops: loops to run (H cycles for HRM-Text); None for the model's own.
        heads: the heads whose mean is taken; None for all.
        initial_state: as in `LoopedBridge.forward`.

    Returns:
        Axes (layer, query, key).

    Raises:
        LoopedError: several prompts; a head that the model does not have.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> looped_floorplan(model, torch.tensor([1, 2, 3])).values.shape
        torch.Size([6, 3, 3])
    """
    deep = at_depth(model, n_loops)
    batches = list(token_batches(deep, tokens, verbose=False, what="looped_floorplan"))
    if (n_prompts := sum(map(len, batches))) > 1:
        raise LoopedError(f"looped_floorplan of {n_prompts} prompts was asked; pass one.")
    chosen = select_indices(heads, deep.looped_cfg.n_heads, "heads")
    schedule, patterns = deep.schedule, []
    names = [schedule.layer_name(i) for i in range(schedule.n_layers)]

    def keep(key: int, pattern: Tensor) -> None:
        patterns.append(pattern[0, chosen].mean(0).cpu())

    hooks = {f"{name}.attn.hook_pattern": i for i, name in enumerate(names)}
    visit(deep, batches[0], hooks, keep, stop=schedule.n_layers, initial_state=initial_state)
    positions = list(range(batches[0].shape[1]))
    labels = {"layer": names, "query": positions, "key": positions}
    return Grid(torch.stack(patterns), ("layer", "query", "key"), labels, "attention")


def _parts(first: int, stop: int, n_cells: int) -> list[tuple[int, slice, slice]]:
    """Cells `first .. stop - 1`, counted head after head: for every head its own cells, and where they are among these."""
    found = []
    for head in range(first // n_cells, -(-stop // n_cells)):
        start, end = max(first, head * n_cells), min(stop, (head + 1) * n_cells)
        found.append((head, slice(start - head * n_cells, end - head * n_cells), slice(start - first, end - first)))
    return found
