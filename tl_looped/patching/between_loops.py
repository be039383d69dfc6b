"""The state or an activation of one loop, written into another loop."""

from __future__ import annotations

from typing import Any

import torch

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..looped import Looped, require, stopping
from ..record import InitialState
from ..schedule import Indices, LoopSelector
from ..sites import PASSES, check_site, select_places
from .batches import Cell, Edit, Patcher
from .clean_run import CleanRun, Metric
from .sweep import PatchSweep, Tokens, inner_axes, result, where_of

__all__ = ["patch_between_loops"]


@accepts_old("site", "layer")
def patch_between_loops(
    model: Looped,
    tokens: Tokens,
    metric: Metric,
    *,
    site: str = "out",
    layer: int | None = None,
    source_tokens: Tokens | None = None,
    onwards: bool = False,
    loops: LoopSelector = "all",
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
        onwards: write into the destination loop and every later one of the run, rather than into it alone.
        loops: which loops, as sources and as destinations.
        positions: which positions are written; None for all.
        heads: which heads are written; None for all.
        stack: "L" or "H" for HRM-Text.
        at_loop: measure the answer after this loop, as `model.unroll(at_loop + 1)` gives it; None for the last.
        n_loops: of runs of this many loops; None for the model's own number.
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
        >>> def metric(logits):
        ...     return logits[0, -1, 3]
        >>> moved = patch_between_loops(model, torch.tensor([[1, 2]]), metric, site="z", layer=1, verbose=False)
        >>> moved.axes, bool((moved.values.diag() == moved.baseline_corrupted).all())
        (('source_loop', 'destination_loop'), True)
    """
    in_passes = site in PASSES
    if in_passes != (layer is None):
        raise LoopedError(
            f"layer={layer} was asked of site={site!r}; "
            + ("a pass has it once: leave layer out." if in_passes else "say which layer of the loop, layer=0 for the first.")
        )
    check_site(site)
    model = stopping(model, at_loop, n_loops)
    places = select_places(model, site, loops, layer, stack)
    if site == "out":
        require(model, "equal passes", "a patch of states leaving one pass into another")
    if layer is not None:
        require(model, "every position", "a patch of what a layer computes in one loop into another")
    hooks = [place.hook for place in places]
    targets = select_places(model, site, "all", layer, stack) if onwards else places
    patcher = Patcher(model, tokens, metric, [place.hook for place in targets], initial_state, inputs, max_batch)
    baseline, values = None, {hook: patcher.base[hook] for hook in hooks}
    if source_tokens is not None:
        with torch.no_grad():
            start = patcher.run_arguments()["initial_state"]
            logits, cache = model.run_with_cache(source_tokens, names_filter=hooks, initial_state=start, **inputs)
        clean = CleanRun(model, cache)
        clean.check_padding(patcher.base.attention_mask)
        baseline, values = patcher.score(logits), {hook: clean.read(hook, patcher.base[hook]) for hook in hooks}
    inner = inner_axes(patcher, places[0].hook, positions, heads)
    where = where_of(patcher.base[places[0].hook], inner)
    cells = []
    for source in places:
        for destination in places:
            written = [place for place in targets if place.entry >= destination.entry] if onwards else [destination]
            edits = [Edit(place.hook, values[source.hook], where) for place in written]
            cells.append(Cell(edits, destination.entry, min(inner["pos"])))
    found = patcher.run(cells, verbose, f"patching {site} between loops").unflatten(0, (len(places), len(places)))
    labels = [place.loop for place in places]
    axes = ("source_loop", "destination_loop")
    return result(patcher, found, axes, dict.fromkeys(axes, labels), baseline)
