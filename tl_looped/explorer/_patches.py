"""A second prompt, whose activations go into the run of the first: chosen cells, or every one by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import LoopedError
from ..figures.tokens_shown import token_texts
from ..kinds import shown
from ..looped import Looped
from ..metrics import logit_diff
from ..patching import patch_sweep
from ..schedule import select_indices
from ..sites import KINDS, PASSES
from ._asked import Patch
from ._edits import Hooks
from ._packing import packed
from ._progress import Progress

PARTS = 16  # of a sweep, after each of which it says how far it is


def same_length(model: Looped, tokens: Int[Tensor, "1 pos"], others: Int[Tensor, "1 other_pos"]) -> None:
    """Refuse prompts of different lengths, and say where they part.

    Args:
        model: the model.
        tokens: the first prompt.
        others: the second.

    Raises:
        LoopedError: they have different numbers of tokens.
    """
    if tokens.shape == others.shape:
        return
    ours, theirs = (token_texts(model.tokenizer, ids[0]) for ids in (tokens, others))
    differ: list[str] = []
    for tag, a, b, c, d in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if tag != "equal":
            first, second = ("".join(part) for part in (ours[a:b], theirs[c:d]))
            differ.append(f"{shown(second) if second else 'nothing'} for {shown(first) if first else 'nothing'} (position {a})")
    raise LoopedError(
        f"The second prompt has {len(theirs)} tokens and the first {len(ours)}: {'; '.join(differ[:4])}. "
        "A patch goes from a position to the same position, so both need equally many tokens."
    )


def patch_hooks(model: Looped, others: Int[Tensor, "1 pos"], patch: Patch) -> Hooks:
    """Hooks that put activations of a run of the second prompt into that of the first.

    Args:
        model: the model, unedited.
        others: the second prompt.
        patch: which activations.

    Raises:
        LoopedError: a place that the run does not have.
    """
    places = patched_places(model, patch, others.shape[1])
    with torch.no_grad():
        _, cache = model.run_with_cache(others, names_filter=list(places))

    def put(source: Tensor, positions: list[int]) -> Callable[[Tensor, Any], Tensor]:
        def hook_function(x: Tensor, hook: Any) -> Tensor:
            new = x.clone()
            at: Any = (slice(None), positions, patch.head) if patch.site == "z" else (slice(None), positions)
            new[at] = source[at]
            return new

        return hook_function

    return [(name, put(cache[name], positions)) for name, positions in places.items()]


def patched_places(model: Looped, patch: Patch, n_pos: int) -> dict[str, list[int]]:
    """The hooks of a patch, each with its positions.

    Args:
        model: the model.
        patch: the patch.
        n_pos: how many positions there are.

    Raises:
        LoopedError: a place or a head that the run does not have.
    """
    if patch.site == "z":
        select_indices(patch.head, model.cfg.n_heads, "heads")
    layers = {model.schedule.layer_name(i): i for i in range(model.schedule.n_layers)}
    passes = {model.schedule.pass_prefix(p) for p in model.schedule.passes}
    found: dict[str, list[int]] = {}
    for name, pos in patch.cells:
        if name not in (passes if patch.site in PASSES else layers):
            raise LoopedError(
                f"{name!r} was to be patched; this run has {model.schedule.describe()}. Patches of prelude and coda have no "
                "state; loops that are beyond the chosen number do not run."
            )
        (pos,) = select_indices(pos, n_pos, "positions")
        found.setdefault(f"{name}.{KINDS[patch.site].hook}", []).append(pos)
    return {name: sorted(set(positions)) for name, positions in found.items()}


def sweep(
    model: Looped,
    tokens: Int[Tensor, "1 pos"],
    others: Int[Tensor, "1 pos"],
    site: str,
    head: int,
    answers: tuple[int, int],
    progress: Progress,
) -> dict[str, Any]:
    """Patch every cell by itself, with what `patch_sweep` gives: 0 is the run of the first prompt, 1 that of the second.

    Args:
        model: the model, unedited.
        tokens: the first prompt, into whose run the patches go.
        others: the second prompt.
        site: what is patched.
        head: for "z", which head.
        answers: the metric is the logit of the first of these tokens minus that of the second, at the last position.
        progress: is told how far it is, and may end it.

    Raises:
        LoopedError: prompts of different lengths; a metric that is the same for both.
    """
    same_length(model, tokens, others)
    metric = logit_diff(*answers)
    with torch.no_grad():
        _, cache = model.run_with_cache(others, names_filter=_names(model, site))
    asked: list[dict[str, Any]] = []
    rows: list[str] = []
    if site in PASSES:
        for stack in model.schedule.core_stacks:
            every = range(model.schedule.n_loops_of(stack))
            asked += [{"axes": ("loop", "pos"), "loops": part, "stack": stack} for part in _parts(every)]
            rows += [model.schedule.pass_prefix(p) for p in model.schedule.passes_of("all", stack)]
    else:
        every = range(model.schedule.n_layers)
        heads = {"heads": head, "axes": ("virtual_layer", "pos")} if site == "z" else {"axes": ("virtual_layer", "pos")}
        asked += [{"layers": part, **heads} for part in _parts(every)]
        rows += [model.schedule.layer_name(i) for i in every]
    values: list[Tensor] = []
    found: Any = None
    for k, arguments in enumerate(asked):
        progress(k / len(asked), f"patching {site}")
        found = patch_sweep(model, tokens, cache, metric, site=site, verbose=False, **arguments)
        values.append(found.normalised().values)
    progress(1, "done")
    return {
        "site": site,
        "head": head if site == "z" else None,
        "rows": rows,
        "values": packed(torch.cat(values)),
        "first": float(found.baseline_corrupted),
        "second": float(found.baseline_clean),
        "answers": list(answers),
        "words": dict(zip(map(str, answers), token_texts(model.tokenizer, list(answers)), strict=True)),
    }


def _names(model: Looped, site: str) -> list[str]:
    """The hooks of a site everywhere."""
    schedule, hook = model.schedule, KINDS[site].hook
    if site in PASSES:
        return [f"{schedule.pass_prefix(p)}.{hook}" for p in schedule.passes]
    return [schedule.name(i, hook) for i in range(schedule.n_layers)]


def _parts(every: Sequence[int]) -> list[list[int]]:
    size = -(-len(every) // PARTS)
    return [list(every[i : i + size]) for i in range(0, len(every), size)]
