"""How far the attention patterns of any two executed layers are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..looped import Looped, at_depth
from ..record import InitialState, rehearsal
from ..results import Estimate
from ..running import is_observed
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ._streaming import Look, Plan, carry_out

NAME = "pattern_distance"


def attention_distances(
    model: Looped,
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
    measure = AttentionDistancesMeasure(per_head, initial_state)
    return over_prompts(measure, at_depth(model, n_loops), prompts, what="attention_distances", verbose=verbose)


@dataclass(frozen=True)
class AttentionDistancesMeasure:
    """What `attention_distances` measures of a batch, between all virtual layers or between some."""

    per_head: bool
    initial_state: InitialState
    layers: tuple[int, ...] | None = None

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> Estimate:
        """Measure one batch."""
        return carry_out(model, tokens, self.plan(model, tokens))

    def plan(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> Plan[Estimate]:
        """The runs of one batch that it takes."""
        schedule, cfg = model.schedule, model.cfg
        names = [schedule.layer_name(i) for i in (range(schedule.n_layers) if self.layers is None else self.layers)]
        hooks = {f"{name}.attn.hook_pattern": i for i, name in enumerate(names)}
        causal = not any(is_observed(hook) for hook in model.hook_dict.values())  # hooks may let a query look ahead
        batch, pos = tokens.shape
        square = torch.ones(pos, pos, dtype=torch.bool, device=tokens.device)
        cells = (square.tril() if causal else square).flatten().nonzero()[:, 0]  # of a head's pattern
        n_cells, n_heads = cfg.n_heads * len(cells), cfg.n_heads if self.per_head else 1
        per_loop = sum(schedule.stacks.values()) * (8 * pos * cfg.d_model + 2 * cfg.n_heads * pos**2)  # numbers of an example
        chunk = min(n_cells, max(1, per_loop // len(names)))
        gram = torch.zeros(batch, n_heads, len(names), len(names), dtype=torch.float64, device="cpu")
        held = torch.empty(batch, len(names), chunk, dtype=model.cfg.dtype, device=tokens.device)
        for first in range(0, n_cells, chunk):
            parts = _parts(first, min(first + chunk, n_cells), len(cells))

            def keep(i: int, pattern: Tensor, parts: list[tuple[int, slice, slice]] = parts) -> None:
                for head, there, here in parts:
                    held[:, i, here] = pattern[:, head].flatten(1).to(held.device)[:, cells[there]]

            state = self.initial_state if first + chunk >= n_cells else rehearsal(self.initial_state)
            yield Look(hooks, keep, schedule.n_layers, state)
            for head, _, here in parts:
                for rows in held[..., here].split(max(1, chunk // 8), dim=-1):  # so much is widened at a time
                    gram[:, head if self.per_head else 0] += (rows.double() @ rows.double().mT).cpu()
        norms = gram.diagonal(dim1=-2, dim2=-1).clone()
        distances = gram.mul_(-2).add_(norms[..., None, :]).add_(norms[..., None]).clamp_(min=0)
        distances = distances.div_(pos if self.per_head else cfg.n_heads * pos).sqrt_().movedim(1, -1)
        labels: dict[str, list[Any]] = {"layer": names, "other": names}
        if self.per_head:
            return Estimate.of(distances, ("layer", "other", "head"), labels | {"head": list(range(n_heads))}, NAME)
        return Estimate.of(distances[..., 0], ("layer", "other"), labels, NAME)


def _parts(first: int, stop: int, n_cells: int) -> list[tuple[int, slice, slice]]:
    """Cells `first .. stop - 1`, counted head after head: for every head its own cells, and where they are among these."""
    found = []
    for head in range(first // n_cells, -(-stop // n_cells)):
        start, end = max(first, head * n_cells), min(stop, (head + 1) * n_cells)
        found.append((head, slice(start - head * n_cells, end - head * n_cells), slice(start - first, end - first)))
    return found
