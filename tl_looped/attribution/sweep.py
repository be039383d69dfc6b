"""Attribution patching over (loop, layer, ...): a first-order estimate of every patch from one forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from .._old_calls import accepts_old
from .._precision import wide
from .._together import stacked
from ..errors import LoopedError
from ..looped import Cache, Looped, require
from ..patching.clean_run import Comparison, Metric, clean_at
from ..results import Grid
from ..schedule import LoopSelector, check_count
from ..sites import KINDS, check_site, laid_out, outer_axes, swept_places


@accepts_old("site", "axes")
def attribution_sweep(
    model: Looped,
    corrupted_tokens: str | list[str] | Int[Tensor, "*batch pos"],
    clean_cache: Cache,
    metric: Metric,
    *,
    site: str = "z",
    axes: Sequence[str] = ("loop", "layer", "head"),
    loops: LoopSelector = "all",
    stack: str | None = None,
    at_loop: int | None = None,
    n_loops: int | None = None,
    steps: int | None = None,
    **run: Any,
) -> Grid:
    """Estimate, for every cell of a grid at once, what patching it from the corrupted run towards the clean one would do.

    The estimate is `(clean - corrupted) . d metric / d activation` with the gradient of the corrupted run: the first-order term
    of activation patching ("attribution patching", Nanda 2023; Syed et al., arXiv 2310.10348), exact for small differences. A
    cell is one execution of a layer, so every pass has a score of its own; scores of several cells add up to the estimate of
    patching them together.

    Args:
        model: the model.
        corrupted_tokens: the prompt to patch, as long as the clean one.
        clean_cache: from `run_with_cache` of the clean prompt, holding the activations of the site. The corrupted run starts
            from the same initial state.
        metric: from logits [batch, pos, d_vocab] to a number, or to one per row of the batch, [batch].
        site: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z" or "pattern"; or, of a pass,
            "state", "injection" or "out".
        axes: of the result, in this order: "loop", "layer" (not for sites of a pass), "pos", "head" (key-value heads for "k"
            and "v") and "src_pos" (the keys of a pattern, whose "pos" are the queries). Axes not named are summed over.
        loops: which loops. Where the axis "loop" is named and neither loops nor a stack is asked for, "prelude" and "coda" are
            entries of it beside the loops; layers that a stack lacks are NaN.
        stack: "core" for the loops alone; "L" or "H" for HRM-Text; "prelude" or "coda" for the layers that run once.
        at_loop: measure the answer after this loop, as `model.unroll(at_loop + 1)` gives it; the clean run is then made again
            at that depth. None for the last.
        n_loops: of runs of this many loops; None for the model's own number.
        steps: None for the gradient at the corrupted run. `m` averages the gradients of `m` runs on the straight path from the
            corrupted input embedding to the clean one, at the fractions `1/m, ..., m/m` (EAP-IG, arXiv 2403.17806, eq. 3; 5
            is usual). Less wrong where the metric saturates; the differences stay those of the two runs.
        **run: what `model.forward` takes for the corrupted run, such as `attention_mask`.

    Returns:
        A `Grid` in the unit of the metric; a last axis "example" if the metric has one number per row.

    Raises:
        LoopedError: the site lacks an axis; the prompts differ in shape; the runs differ in their initial state; the metric has
            the wrong shape or no gradient; a loop outside the run.
        UnknownNameError: the cache lacks activations; the message says which.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
        >>> _, cache = model.run_with_cache(clean, names_filter="blocks.*.attn.hook_z")
        >>> scores = attribution_sweep(model, corrupted, cache, lambda logits: logits[0, -1, 5] - logits[0, -1, 6])
        >>> scores.axes, tuple(scores.values.shape)
        (('loop', 'layer', 'head'), (3, 2, 2))
    """
    check_site(site)
    model, clean_cache = clean_at(model, clean_cache, at_loop, n_loops)
    dims = ("example", *KINDS[site].axes)
    outer = outer_axes(site)
    _check_axes(site, axes, [*outer, *(axis for axis in dims[1:] if not axis.startswith("d_"))])
    placed = swept_places(model, site, axes, loops, None, stack)
    names = [place.hook for _, place in placed]
    pair = Comparison(model, corrupted_tokens, clean_cache, metric, run)
    pair.require([*names, *(["hook_embed"] if steps is not None else [])])
    if steps is None:
        corrupted, gradients = pair.gradients(names)
    else:
        corrupted, gradients = _integrated(pair, names, check_count("steps", steps))
    if "head" in axes:
        require(pair.model, "equal heads", "a sweep over heads")
    kept = tuple(axis for axis in dims if axis in axes or (axis == "example" and pair.per_example))
    cells: dict[tuple[str | int, ...], Tensor] = {}
    for key, place in placed:
        n = place.hook
        score = _summed((pair.clean(n, corrupted[n]) - wide(corrupted[n])) * gradients[n], dims, kept)
        cells[key] = cells[key] + score if key in cells else score
    swept = tuple(axis for axis in outer if axis in axes)
    values, labels = laid_out(stacked(cells.values()), list(cells), swept)
    wanted = tuple(axes) + (("example",) if pair.per_example else ())
    values = values.permute([(*swept, *kept).index(axis) for axis in wanted])
    sizes = dict(zip(wanted, values.shape, strict=True))
    return Grid(values, wanted, {a: labels.get(a) or list(range(n)) for a, n in sizes.items()}, "attribution")


def _check_axes(site: str, axes: Sequence[str], known: list[str]) -> None:
    if isinstance(axes, str) or not axes or len(set(axes)) < len(axes) or not set(axes) <= set(known):
        raise LoopedError(f"axes={axes!r} were asked; {site!r} has {', '.join(map(repr, known))}: name some, each once.")


def _summed(values: Tensor, dims: Sequence[str], kept: Sequence[str]) -> Tensor:
    gone = [i for i, axis in enumerate(dims) if axis not in kept]
    return values.sum(gone) if gone else values


def _integrated(pair: Comparison, names: list[str], steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The corrupted activations, and the gradients averaged on the way of the input embedding to the clean one."""
    if why := pair.model.lacks("one embedding"):
        raise LoopedError(f"steps={steps} was asked, a path between two input embeddings, but {why} Leave steps out.")
    corrupted = pair.activations([*names, "hook_embed"])
    step = pair.clean("hook_embed", corrupted["hook_embed"]) - wide(corrupted["hook_embed"])
    total: dict[str, Tensor] = {}
    for k in range(1, steps + 1):
        moved = (wide(corrupted["hook_embed"]) + step * (k / steps)).to(corrupted["hook_embed"].dtype)
        _, gradients = pair.gradients(names, [("hook_embed", lambda embed, hook, moved=moved: moved.clone())])
        total = {name: gradient / steps + total.get(name, 0) for name, gradient in gradients.items()}
    return corrupted, total
