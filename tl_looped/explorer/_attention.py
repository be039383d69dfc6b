"""Where one head looks, in every loop."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..looped import Looped
from ..schedule import select_indices
from ..sites import select_layers
from ._edits import Hooks
from ._packing import packed
from ._progress import Progress

MOST_WEIGHTS = 1_500_000


@torch.no_grad()
def head_in_all_loops(
    model: Looped,
    tokens: Int[Tensor, "1 pos"],
    stack: str,
    layer: int,
    head: int,
    at: int,
    hooks: Hooks,
    progress: Progress,
) -> dict[str, Any]:
    """The patterns of one head in all loops, of the last queries that fit, and all that one position looks at.

    Args:
        model: the model that runs.
        tokens: the prompt.
        stack: a looped stack, or "prelude" or "coda", which run once.
        layer: inside the stack.
        head: which head.
        at: the position whose queries are sent whatever does not fit.
        hooks: what acts in the run.
        progress: is told how far it is, and may end it.

    Raises:
        OutOfRangeError: no such layer or head.
    """
    select_indices(head, model.cfg.n_heads, "heads")
    layers = select_layers(model.schedule, "all", layer, stack)
    n_pos = tokens.shape[1]
    kept = min(n_pos, max(1, MOST_WEIGHTS // (len(layers) * n_pos)))
    patterns: list[Tensor] = []

    def keep(pattern: Tensor, hook: object) -> None:
        progress(len(patterns) / len(layers), "attention")
        patterns.append(pattern[0, head].float().cpu())

    names = [(f"blocks.{i}.attn.hook_pattern", keep) for i in layers]
    model.run_with_hooks(tokens, fwd_hooks=[*hooks, *names], return_type=None)
    found = torch.stack(patterns)
    return {
        "stack": stack,
        "layer": layer,
        "head": head,
        "labels": [model.schedule.site(i).where for i in layers],
        "first": n_pos - kept,
        "patterns": packed(found[:, n_pos - kept :]),
        "at": at,
        "looks_at": packed(found[:, at]),
    }
