"""Where the answer is made: patches from a clean into a corrupted run."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...metrics import logit_diff
from ...names import stack_prefix
from ...patching.sweep import patch_sweep
from ...schedule import Site
from .. import pointer_chasing
from ..drawing import cells
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, Unmeasured, listed, share
from ._common import SHOWN_POSITIONS

DECIDES = 0.5  # of the difference, restored by one state
SHOWN_PASSES = 8  # named in a sentence


class Tokens(NamedTuple):
    """Two answers that are compared, and how they were chosen."""

    right: int
    wrong: int
    why: str


def measure(asked: Question) -> tuple[Numbers, Tokens]:
    """How far every state of the clean run, put into the corrupted one, moves the difference of two logits."""
    if asked.pair is None:
        raise Unmeasured("Two prompts of as many tokens are needed, a clean and a corrupted one.", asked.another_pair())
    model, schedule, (clean, corrupted) = asked.model, asked.model.schedule, asked.pair
    hooks = ["prelude.blocks.*.hook_resid_pre"] if schedule.n_prelude else []
    for stack in schedule.core_stacks:
        hooks += [f"{stack_prefix(stack)}loops.*.{hook}" for hook in ("blocks.*.hook_resid_pre", "hook_out")]
    hooks += ["coda.blocks.*.hook_resid_pre"] if schedule.n_coda else []
    with torch.no_grad():
        clean_logits, cache = model.run_with_cache(clean, names_filter=hooks)
        chosen = _answers(asked, clean_logits[0, -1], model(corrupted)[0, -1])
    metric = logit_diff(chosen.right, chosen.wrong)
    differs = (clean != corrupted)[0].nonzero()[:, 0].tolist()
    positions = _positions(clean.shape[1], differs, everything=model.lacks("causal attention") is not None)
    axes = ("virtual_layer", "pos")
    sweep = patch_sweep(model, corrupted, cache, metric, axes=axes, positions=positions, verbose=False).normalised()
    most, best = sweep.values.amax(-1), sweep.values.argmax(-1).tolist()
    holds = [k == len(positions) - 1 and float(m) >= DECIDES for k, m in zip(best, most, strict=True)]
    numbers: Numbers = {
        "clean": asked.words(clean[0]),
        "corrupted": asked.words(corrupted[0]),
        "right": asked.word(chosen.right),
        "wrong": asked.word(chosen.wrong),
        "positions": positions,
        "entering_layers": sweep,
        "hand_over_layer": next((i for i in range(len(best)) if all(holds[i:])), None),
        "restored_by_layer": most,
    }
    for stack in schedule.core_stacks:
        if schedule.n_loops_of(stack) > 2:
            after = patch_sweep(
                model, corrupted, cache, metric, site="out", stack=stack, positions=positions, verbose=False
            ).normalised()
            numbers[f"leaving_loops_{stack}"] = after
            numbers[f"restores_most_{stack}"] = [positions[k] for k in after.values.argmax(-1).tolist()]
    return numbers, chosen


def _answers(asked: Question, clean: Tensor, corrupted: Tensor) -> Tokens:
    """The two answers whose logits are compared: told, or what the runs answer, or where they differ most.

    Raises:
        Unmeasured: both runs say the same of every token.
    """
    first, second = int(clean.argmax()), int(corrupted.argmax())
    change = clean.float().softmax(-1) - corrupted.float().softmax(-1)
    if float(change.abs().max()) == 0:
        raise Unmeasured("Both prompts are answered the same, so there is nothing for a patch to move.", asked.another_pair())
    said = f"The clean prompt is answered with {asked.quoted(first)}, the corrupted one with {asked.quoted(second)}."
    right, wrong = first if asked.answer is None else asked.answer, second if asked.wrong is None else asked.wrong
    if right != wrong or (asked.answer is not None and asked.wrong is not None):
        return Tokens(right, wrong, said)
    change[[first, second] if asked.answer is None else [asked.answer]] = 0
    wrong = int(change.argmin())
    if asked.answer is None:
        right = int(change.argmax())
        compared = f"{asked.quoted(right)} (more probable after the clean prompt) and {asked.quoted(wrong)} (less)"
        said = f"Both prompts are answered with {asked.quoted(first)}, so the tokens are compared that change most: {compared}."
    return Tokens(right, wrong, said)


def _positions(n: int, differs: list[int], *, everything: bool) -> list[int]:
    """The positions that are patched: all of a short prompt; else from the first difference on, its middle left out."""
    if n <= SHOWN_POSITIONS:
        return list(range(n))
    after = list(range(n)) if everything else list(range(differs[0], n))
    near = {*differs[: SHOWN_POSITIONS // 2], *after[-SHOWN_POSITIONS // 2 :]}
    return sorted(near | {*after[: SHOWN_POSITIONS - len(near)]})


def _columns(numbers: Numbers) -> list[str]:
    """The tokens at every position, of both prompts where they differ."""
    pairs = zip(numbers["clean"], numbers["corrupted"], strict=True)
    return [a.strip() or a if a == b else f"{a.strip() or a} | {b.strip() or b}" for a, b in pairs]


def place(site: Site) -> str:
    """A layer in words, such as "loop 1, layer 0" and "coda layer 4"."""
    return f"{site.where} layer {site.layer}" if site.loop is None else f"{site.where}, layer {site.layer}"


def read(asked: Question, numbers: Numbers, chosen: Tokens) -> Reading:
    """From which layer on the last token holds the answer, and where it was before."""
    schedule, positions, words = asked.model.schedule, numbers["positions"], _columns(numbers)
    between = f"{asked.quoted(chosen.right)} and {asked.quoted(chosen.wrong)}"
    values, most, at = numbers["entering_layers"].values, numbers["restored_by_layer"], numbers["hand_over_layer"]
    best, last = values.argmax(-1).tolist(), len(positions) - 1

    def where(k: int) -> str:
        return f"“{words[positions[k]]}” (position {positions[k]})"

    if at is None:
        found = (
            f"Up to the last layer, {place(schedule.site(len(best) - 1))}, the last token does not decide between {between}: "
            f"the clean state there, put into the corrupted run, restores {share(values[-1, last])} of the difference; at "
            f"{where(best[-1])} it restores most, {share(most[-1])}."
        )
    else:
        found = (
            f"From {place(schedule.site(at))} on, the last token decides between {between}: the clean state there, put into "
            f"the corrupted run, restores {share(most[at])} of the difference."
        )
        if at > 0:
            does = "it restores" if best[at - 1] == last else f"{where(best[at - 1])} does most,"
            found += f" One layer before, {does} {share(most[at - 1])}."
    said = [
        f"{chosen.why} Each cell puts one state of the clean run into the corrupted one and reads how far the difference of "
        f"the logits of {between} goes from the corrupted run (0) to the clean one (1).",
        found,
    ]
    for stack in schedule.core_stacks:
        if after := numbers.get(f"leaving_loops_{stack}"):
            best = numbers[f"restores_most_{stack}"]
            shares = map(share, after.values.amax(-1))
            places = [f"{t} at position {p}, “{words[p]}” ({s})" for t, (p, s) in enumerate(zip(best, shares, strict=True))]
            said.append(
                f"{stack_prefix(stack, ': ')}Where the state leaving a {schedule.names.pass_word} restores most: after "
                f"{listed(places[:SHOWN_PASSES])}{', ...' if len(places) > SHOWN_PASSES else '.'}"
            )
    return Reading(said, found)


def panels(asked: Question, numbers: Numbers, chosen: Tokens) -> list[Figure]:
    """What every state restores, at every position that was patched."""
    schedule, positions, n = asked.model.schedule, numbers["positions"], len(numbers["clean"])
    a_pass, columns = schedule.names.pass_word, []
    for p in positions:
        clean, corrupted = numbers["clean"][p], numbers["corrupted"][p]
        columns.append({"name": clean, "sub": str(p), "other": None if clean == corrupted else corrupted})
    cut = f" Patched: {len(positions)} of {n} positions." if len(positions) < n else ""
    part = "prelude, loops and coda" if schedule.n_prelude or schedule.n_coda else "all loops"
    caption = (
        f"Patching the state entering each layer, {part}: the share of the difference that it restores. Columns that are "
        f"shaded have another token in the corrupted prompt, below that of the clean one.{cut}"
    )
    layers = [(f"{site.where} · {site.layer}", site) for site in schedule.sites]
    sweep = replace(numbers["entering_layers"], name="share restored")
    figures = [Figure(caption, cells(sweep, layers, columns), is_wide=True, is_cover=True)]
    for stack in schedule.core_stacks:
        if after := numbers.get(f"leaving_loops_{stack}"):
            loops = [Site(stack, t, 0) for t in range(len(after.values))]
            caption = f"{stack_prefix(stack, ': ')}Patching the state leaving each {a_pass}."
            after = replace(after, name="share restored")
            figures.append(Figure(caption, cells(after, [(site.where, site) for site in loops], columns), is_wide=True))
    return figures


PARTS = (Part(measure, read, panels), pointer_chasing.TRANSPLANTS)
