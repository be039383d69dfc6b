"""The attention patterns of one run, layer by layer."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..looped import Looped, at_depth
from ..record import InitialState
from ..results import Grid
from ..runs.prompts import token_batches
from ..schedule import Indices, select_indices
from ._streaming import visit


@accepts_old(head="heads")
def looped_floorplan(
    model: Looped,
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
    batches = list(token_batches(deep, tokens, what="looped_floorplan"))
    if (n_prompts := sum(map(len, batches))) > 1:
        raise LoopedError(f"looped_floorplan of {n_prompts} prompts was asked; pass one.")
    chosen = select_indices(heads, deep.cfg.n_heads, "heads")
    schedule, patterns = deep.schedule, []
    names = [schedule.layer_name(i) for i in range(schedule.n_layers)]

    def keep(key: int, pattern: Tensor) -> None:
        patterns.append(pattern[0, chosen].mean(0).cpu())

    hooks = {f"{name}.attn.hook_pattern": i for i, name in enumerate(names)}
    visit(deep, batches[0], hooks, keep, stop=schedule.n_layers, initial_state=initial_state)
    positions = list(range(batches[0].shape[1]))
    labels = {"layer": names, "query": positions, "key": positions}
    return Grid(torch.stack(patterns), ("layer", "query", "key"), labels, "attention")
