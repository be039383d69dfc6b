"""Where the answer is made: patches from a clean into a corrupted run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._words import counted
from ...metrics import logit_diff
from ...names import stack_prefix
from ...patching.sweep import patch_sweep
from ...results import Grid
from ...schedule import Schedule, Site
from .. import pointer_chasing
from ..drawing import over_positions
from ..question import Question
from ..section import Section, Unmeasured, listed, share
from ._common import SHOWN_POSITIONS

DECIDES = 0.5  # of the difference, restored by one state
COLUMN = 20  # pixels across, in which a tilted token can be read
FAINT = 0.05  # of the difference; columns that stay below are not drawn
SHOWN_PASSES = 8  # named in a sentence


class Tokens(NamedTuple):
    """Two answers that are compared, and how they were chosen."""

    right: int
    wrong: int
    why: str


def the_patches(asked: Question, section: Section) -> None:
    """Where the answer is made: patches from a clean into a corrupted run."""
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
    positions = _positions(clean.shape[1], differs, everything=model.looped_cfg.prefix_lm)
    words = zip(asked.words(clean[0]), asked.words(corrupted[0]), strict=True)
    every = [a.strip() or a if a == b else f"{a.strip() or a} | {b.strip() or b}" for a, b in words]
    pairs = [every[p] for p in positions]
    section.numbers |= {
        "clean": asked.words(clean[0]),
        "corrupted": asked.words(corrupted[0]),
        "right": asked.word(chosen.right),
        "wrong": asked.word(chosen.wrong),
        "positions": positions,
    }
    section.reading.append(
        f"{chosen.why} Each cell puts one state of the clean run into the corrupted one and reads how far the difference of "
        f"the logits of {asked.quoted(chosen.right)} and {asked.quoted(chosen.wrong)} goes from the corrupted run (0) to the "
        "clean one (1)."
    )
    sweep = patch_sweep(
        model, corrupted, cache, metric, axes=("virtual_layer", "pos"), positions=positions, verbose=False
    ).normalised()
    section.numbers["entering_layers"] = sweep
    between = f"{asked.quoted(chosen.right)} and {asked.quoted(chosen.wrong)}"
    _hand_over(schedule, section, sweep.values, pairs, positions, between)
    kept = [k for k, p in enumerate(positions) if p in differs or float(sweep.values[:, k].abs().max()) >= FAINT]
    kept = sorted({*kept, len(positions) - 1})
    figure = _columns(sweep, kept, pairs, positions, "layer")
    _mark_stacks(figure, schedule)
    n_left = len(positions) - len(kept)
    cut = f" Left out: {counted(n_left, 'position')} where no patch moves it by {FAINT:.0%}." if n_left else ""
    if len(positions) < clean.shape[1]:
        cut += f" Patched: {len(positions)} of {clean.shape[1]} positions."
    part = "prelude, loops and coda" if schedule.n_prelude or schedule.n_coda else "all loops"
    caption = f"Patching the state entering each layer, {part}; clean | corrupted where the tokens differ.{cut}"
    section.draw(caption, figure, 120 + COLUMN * len(kept))
    if section.figures:
        section.cover = section.figures[0]
    for stack in schedule.core_stacks:
        if schedule.n_loops_of(stack) < 3:
            continue
        a_pass, name = schedule.names.pass_word, stack_prefix(stack, ": ")
        after = patch_sweep(
            model, corrupted, cache, metric, site="out", stack=stack, positions=positions, verbose=False
        ).normalised()
        section.numbers[f"leaving_loops_{stack}"] = after
        most = after.values.amax(-1)
        section.numbers[f"restores_most_{stack}"] = best = [positions[k] for k in after.values.argmax(-1).tolist()]
        places = [f"{t} at position {at}, “{every[at]}” ({share(most[t])})" for t, at in enumerate(best)]
        section.reading.append(
            f"{name}Where the state leaving a {a_pass} restores most: after {listed(places[:SHOWN_PASSES])}"
            f"{', ...' if len(places) > SHOWN_PASSES else '.'}"
        )
        figure = _columns(after, kept, pairs, positions, a_pass)
        section.draw(f"{name}Patching the state leaving each {a_pass}.", figure, 60 + COLUMN * len(kept))
    if asked.hops is not None:
        pointer_chasing.transplants(asked, section)


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
    if asked.answer is not None and asked.wrong is not None:
        return Tokens(right, wrong, said)
    if right != wrong:
        return Tokens(right, wrong, said)
    told = {first, second} if asked.answer is None else {asked.answer}
    change[list(told)] = 0
    if asked.answer is None:
        right, wrong = int(change.argmax()), int(change.argmin())
        compared = f"{asked.quoted(right)} (more probable after the clean prompt) and {asked.quoted(wrong)} (less)"
        said = f"Both prompts are answered with {asked.quoted(first)}, so the tokens are compared that change most: {compared}."
    else:
        wrong = int(change.argmin())
    return Tokens(right, wrong, said)


def _positions(n: int, differs: list[int], *, everything: bool) -> list[int]:
    """The positions that are patched: all of a short prompt; else from the first difference on, its middle left out."""
    if n <= SHOWN_POSITIONS:
        return list(range(n))
    after = list(range(n)) if everything else list(range(differs[0], n))
    near = {*differs[: SHOWN_POSITIONS // 2], *after[-SHOWN_POSITIONS // 2 :]}
    return sorted(near | {*after[: SHOWN_POSITIONS - len(near)]})


def place(site: Site) -> str:
    """A layer in words, such as "loop 1, layer 0" and "coda layer 4"."""
    stack, loop, layer = site
    return f"{stack} layer {layer}" if loop is None else f"{'' if stack == 'core' else f'{stack} '}loop {loop}, layer {layer}"


def _hand_over(
    schedule: Schedule, section: Section, values: Tensor, pairs: list[str], positions: list[int], between: str
) -> None:
    """Say from which layer on the last token holds the answer, and where it was before."""
    best, most = values.argmax(-1).tolist(), values.amax(-1)
    last = len(positions) - 1
    holds = [b == last and float(m) >= DECIDES for b, m in zip(best, most, strict=True)]
    at = next((i for i in range(len(best)) if all(holds[i:])), None)
    section.numbers["hand_over_layer"] = at
    section.numbers["restored_by_layer"] = most
    if at is None:
        k = best[-1]
        found = (
            f"Up to the last layer, {place(schedule.site(len(best) - 1))}, the last token does not decide between {between}: "
            f"the clean state there, put into the corrupted run, restores {share(values[-1, last])} of the difference; at "
            f"“{pairs[k]}” (position {positions[k]}) it restores most, {share(most[-1])}."
        )
    else:
        found = (
            f"From {place(schedule.site(at))} on, the last token decides between {between}: the clean state there, put into "
            f"the corrupted run, restores {share(most[at])} of the difference."
        )
        if at > 0:
            k = best[at - 1]
            where = "it restores" if k == last else f"“{pairs[k]}” (position {positions[k]}) does most,"
            found += f" One layer before, {where} {share(most[at - 1])}."
    section.headline = found
    section.reading.append(found)


def _columns(grid: Grid, kept: list[int], pairs: list[str], positions: list[int], down: str) -> Any:
    """A heat map of some columns of a sweep, the last axis."""
    labels = {**grid.labels, grid.axes[-1]: [grid.labels[grid.axes[-1]][k] for k in kept]}
    part = Grid(grid.values[..., kept], grid.axes, labels, "share restored")
    figure = over_positions(part, [pairs[k] for k in kept], [positions[k] for k in kept], down)
    if float(part.values.min()) > -FAINT:  # what is below zero is nothing, and needs no colour of its own
        most = max(1.0, float(part.values.max()))
        figure.update_traces(colorscale="Blues", zmin=0, zmax=most, zmid=None)
    return figure


def _mark_stacks(figure: Any, schedule: Schedule) -> None:
    """Lines between stacks and loops."""
    sites = schedule.sites
    for i in range(1, len(sites)):
        if sites[i][:2] != sites[i - 1][:2]:
            figure.add_hline(y=i - 0.5, line={"width": 1.5 if sites[i].stack == sites[i - 1].stack else 3, "color": "#777"})
