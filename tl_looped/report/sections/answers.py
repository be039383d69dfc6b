"""What the model would answer after each loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..._words import counted
from ...analysis._streaming import check_finite
from ...explorer.session import frozen_grid
from ...results import Grid
from .. import pointer_chasing
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, share
from ..tables import Bar, table
from ._common import SHOWN_POSITIONS

COVER_ROWS = 10
EVERY = "What it would say at every position after each loop: point at a cell, or click it, for its most probable tokens."
MOST_ENTRIES = 20_000  # of the most probable tokens in the grid of all positions


class Answers(NamedTuple):
    """The answers after every loop.

    Args:
        right: the right tokens at every position that is shown, -1 where there is none; None where nobody knows.
        wrong: the loops and positions of the answers that are none of them.
        ends: the probabilities after the last position of every prompt.
        grid: what is said in every loop at every position of the first prompt, as the explorer's grid in HTML.
    """

    right: Int[Tensor, "loop pos"] | None
    wrong: list[list[int]]
    ends: Float[Tensor, "loop row d_vocab"]
    grid: str


def measure(asked: Question) -> tuple[Numbers, Answers]:
    """The most probable tokens after every loop, and what becomes of the answer that was told."""
    own, n_loops = asked.model.n_loops, asked.n_loops
    rows = asked.shown if asked.pair is None else torch.cat(asked.pair)
    tokens, first = rows[0], max(0, rows.shape[1] - SHOWN_POSITIONS)
    k = min(4, asked.deep.cfg.d_vocab)

    def read_out(loop: int, logits: Tensor) -> tuple[Any, ...]:
        check_finite(logits, f"the readout after loop {loop}")
        found = logits.float().softmax(-1)
        p, token = found[0, first:].max(-1)
        return token.cpu(), p.cpu(), found[:, -1].cpu(), found[0, -1].topk(k)

    with torch.no_grad():
        *found, top = zip(*asked.deep.readouts(rows, read_out), strict=True)
    answers, probability, ends = map(torch.stack, found)  # [loop, pos] twice, [loop, row, d_vocab]
    labels = {"loop": list(range(n_loops)), "pos": [*map(str, range(first, len(tokens)))]}
    said = ends[:own, 0].argmax(-1)
    numbers: Numbers = {
        "prompt": asked.words(tokens),
        "answers": [asked.words(row) for row in answers],
        "probabilities": Grid(probability, ("loop", "pos"), labels, "probability"),
        "top_answers": [asked.words(one.indices) for one in top],
        "top_probabilities": [one.values for one in top],
        "changed_positions": int((answers[0] != answers[own - 1]).sum()),
        "shown_positions": answers.shape[1],
        "settled_after_loop": next(t for t in range(own) if bool((said[t:] == said[-1]).all())),
        "last_position": ends.max(-1).values,
    }
    if asked.answer is not None:
        chance = ends[:, 0, asked.answer]
        rank = (ends[:, 0] > chance[:, None]).sum(-1)
        numbers |= {"answer": asked.word(asked.answer), "answer_probability": chance, "answer_rank": rank}
    right = None if asked.hops is None else pointer_chasing.right_answers(tokens, n_loops)
    right = None if right is None else right[:, first:]
    if right is not None:
        numbers |= pointer_chasing.count_right(answers, right)
    numbers["cover"] = [[bar.share for bar in row] for _, row in _cover_rows(asked, ends)]
    wrong: list[list[int]] = []
    if right is not None:
        wrong = [[t, first + p] for t, p in ((right >= 0) & (right != answers)).nonzero().tolist()]
    state = {"tokens": tokens.tolist(), "lens": "readout", "loops": n_loops}
    grid = frozen_grid(asked.deep, state, made_for=asked.made_for, most_entries=MOST_ENTRIES, wrong=wrong)
    return numbers, Answers(right, wrong, ends, grid)


def read(asked: Question, numbers: Numbers, found: Answers) -> Reading:
    """What is answered after the first, the own and the last loop, and what the told answer's probability is."""
    own, n_loops, ends, settled = asked.model.n_loops, asked.n_loops, found.ends, numbers["settled_after_loop"]

    def at(loop: int, row: int = 0) -> str:
        p, token = ends[loop, row].max(-1)
        return f"{asked.quoted(int(token))} ({share(p)})"

    prompt = "the prompt" if asked.pair is None else "the clean prompt"
    if own > 1:
        said = [
            f"If it stopped after loop 0, the model would continue {prompt} with {at(0)}; after loop {own - 1} with "
            f"{at(own - 1)}. " + ("It says so from" if settled == 0 else "That answer is there from") + f" loop {settled} on.",
            f"Between these two loops the most probable token changes at {numbers['changed_positions']} of "
            f"{counted(numbers['shown_positions'], 'position')} shown.",
        ]
    else:
        said = [f"After one loop the model continues {prompt} with {at(0)}."]
    if n_loops > own:
        more = ", more often than it was made for," if asked.made_for and n_loops > asked.made_for else ""
        said.append(f"Looped {n_loops} times{more} it says {at(n_loops - 1)}.")
    if asked.answer is not None:
        chance, above = numbers["answer_probability"], int(numbers["answer_rank"][own - 1])
        place, best = "first" if above == 0 else f"below {counted(above, 'token')}", int(chance.argmax())
        said.append(
            f"The answer {asked.quoted(asked.answer)} has a probability of {share(chance[0])} after loop 0 and "
            f"{share(chance[own - 1])} after loop {own - 1}, where it comes {place}; it is highest after loop {best} "
            f"({share(chance[best])})."
        )
    if asked.pair is None:
        headline = f"After loop {own - 1} it would go on with {at(own - 1)}" + (
            "." if own == 1 else ", as from loop 0 on." if settled == 0 else f"; after loop 0, with {at(0)}."
        )
    elif int(ends[own - 1, 0].argmax()) == (token := int(ends[own - 1, 1].argmax())):
        both = " and ".join(share(ends[own - 1, row].max()) for row in (0, 1))
        headline = f"After loop {own - 1} both prompts are answered alike, with {asked.quoted(token)} ({both})."
    else:
        headline = (
            f"After loop {own - 1} it answers {at(own - 1)} to the clean prompt and {at(own - 1, 1)} to the corrupted one"
            + ("." if own == 1 else f"; the clean answer is there from loop {settled} on.")
        )
    if found.right is not None:
        sentence, headline = pointer_chasing.say_right(numbers, own, asked.made_for)
        said.append(sentence)
    elif asked.hops is not None:
        said.append(pointer_chasing.NO_RIGHT_ANSWERS)
    return Reading(said, headline)


def panels(asked: Question, numbers: Numbers, found: Answers) -> list[Figure]:
    """The grid of what is said, loop by position; the answers to the whole prompts for the cover."""
    caption = EVERY
    if asked.n_loops > asked.own and not asked.made_for:  # else the rows are marked
        caption += f" From loop {asked.own} on it loops more often than {asked.own_words}."
    if found.wrong:
        caption += " ✗ marks answers to queries that are not the next hop."
    return [Figure(caption, found.grid, is_wide=True), _cover(asked, found.ends)]


def _told(asked: Question) -> list[int]:
    return [token for token in (asked.answer, asked.wrong) if token is not None]


def _cover_rows(asked: Question, ends: Float[Tensor, "loop row d_vocab"]) -> list[tuple[str, list[Bar]]]:
    own, n_loops = asked.own, asked.n_loops
    loops = list(range(min(own, n_loops)))
    if len(loops) > COVER_ROWS:
        loops = sorted({round(k * (own - 1) / (COVER_ROWS - 1)) for k in range(COVER_ROWS)})
    beyond = COVER_ROWS - len(loops)
    loops += [t for t in range(own, n_loops) if t < own + beyond - 1 or t == n_loops - 1]
    return [
        (
            f"{t}{' +' if t >= own else ''}",
            [Bar(asked.word(int(row.argmax())), float(row.max())) for row in ends[t]]
            + [Bar("", float(ends[t, 0, token])) for token in _told(asked)],
        )
        for t in loops
    ]


def _cover(asked: Question, ends: Float[Tensor, "loop row d_vocab"]) -> Figure:
    """The figure of the first screen: the answer to the whole prompt, or to both, after each loop."""
    told, rows = list(map(asked.quoted, _told(asked))), _cover_rows(asked, ends)
    heads = (["most probable"] if asked.pair is None else ["clean", "corrupted"]) + told
    caption = "What it would answer if it stopped after each loop (loop 0 is the first), and how probable that is."
    if told:
        prompt = "prompt" if asked.pair is None else "clean prompt"
        caption += f" Beside it, how probable {' and '.join(told)} would be after the {prompt}."
    if rows[-1][0].endswith("+"):
        caption += f" Rows with + are beyond {asked.own_words}."
    width = 320 if len(heads) < 3 else 60 + 95 * len(heads)
    return Figure(caption, table(("loop", *heads), [(loop, *cells) for loop, cells in rows]), width, is_cover=True)


PARTS = (Part(measure, read, panels),)
