"""What the model would answer after each loop."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..._words import counted
from ...analysis._prompts import check_finite
from ...results import Grid
from .. import pointer_chasing
from ..drawing import mark, over_positions, short
from ..question import Question
from ..section import Figure, Section, share
from ..tables import Bar, bars, top_answers
from ._common import SHOWN_POSITIONS

COVER_ROWS = 10


def the_answers(asked: Question, section: Section) -> None:
    """What it would answer after each loop."""
    deep = asked.deep
    own, n_loops = asked.model.n_loops, asked.n_loops
    rows = asked.shown if asked.pair is None else torch.cat(asked.pair)
    tokens = rows[0]
    first = max(0, len(tokens) - SHOWN_POSITIONS)
    positions = list(range(first, len(tokens)))
    k = min(4, deep.cfg.d_vocab)

    def read(loop: int, logits: Tensor) -> tuple[Any, ...]:
        check_finite(logits, f"the readout after loop {loop}")
        found = logits.float().softmax(-1)
        p, token = found[0, first:].max(-1)
        return token.cpu(), p.cpu(), found[:, -1].cpu(), found[0, -1].topk(k)

    with torch.no_grad():
        *read_out, top = zip(*deep.readouts(rows, read), strict=True)
    answers, probability, ends = map(torch.stack, read_out)  # [loop, pos] twice, [loop, row, d_vocab]
    loops = list(range(n_loops))
    section.numbers |= {
        "prompt": asked.words(tokens),
        "answers": [asked.words(row) for row in answers],
        "probabilities": Grid(probability, ("loop", "pos"), {"loop": loops, "pos": [*map(str, positions)]}, "probability"),
        "top_answers": [asked.words(found.indices) for found in top],
        "top_probabilities": [found.values for found in top],
        "changed_positions": int((answers[0] != answers[own - 1]).sum()),
        "shown_positions": len(positions),
    }
    right = None if asked.hops is None else pointer_chasing.right_answers(tokens, n_loops)
    _read(asked, section, answers, ends)
    if right is not None:
        pointer_chasing.read_answers(section, answers, right, own, first, asked.made_for)
    elif asked.hops is not None:
        section.reading.append(
            "This prompt has no right answers to compare with: those have a mapping that leads from each of its queries for as "
            "many hops as there are loops, such as “A b B c C a ? A”."
        )
    _draw(asked, section, answers, right, positions)
    section.draw("The most probable next tokens at the last position.", top_answers(asked, top, asked.own), 460)
    _cover(asked, section, ends)


def _read(asked: Question, section: Section, answers: Int[Tensor, "loop pos"], ends: Float[Tensor, "loop row d_vocab"]) -> None:
    """Say what is answered after the first, the own and the last loop, and what the told answer's probability is."""
    own, n_loops, loops = asked.model.n_loops, asked.n_loops, ends[:, 0].argmax(-1)
    said = loops[:own].tolist()
    settled = next(t for t in range(own) if all(token == said[-1] for token in said[t:]))

    def at(loop: int, row: int = 0) -> str:
        p, token = ends[loop, row].max(-1)
        return f"{asked.quoted(int(token))} ({share(p)})"

    numbers = section.numbers
    numbers["settled_after_loop"] = settled
    numbers["last_position"] = ends.max(-1).values
    is_there = "It says so from loop 0 on." if settled == 0 else f"That answer is there from loop {settled} on."
    clean = " the clean prompt" if asked.pair is not None else " the prompt"
    section.reading.append(
        f"If it stopped after loop 0, the model would continue{clean} with {at(0)}; after loop {own - 1} with {at(own - 1)}. "
        + is_there
        if own > 1
        else f"After one loop the model continues{clean} with {at(0)}."
    )
    if own > 1:
        section.reading.append(
            f"Between these two loops the most probable token changes at {numbers['changed_positions']} of "
            f"{counted(answers.shape[1], 'position')} shown."
        )
    if n_loops > own:
        more = ", more often than it was made for," if asked.made_for and n_loops > asked.made_for else ""
        section.reading.append(f"Looped {n_loops} times{more} it says {at(n_loops - 1)}.")
    if asked.pair is None:
        section.headline = f"After loop {own - 1} it would go on with {at(own - 1)}" + (
            "." if own == 1 else ", as from loop 0 on." if settled == 0 else f"; after loop 0, with {at(0)}."
        )
    else:
        other = ends[own - 1, 1].argmax()
        if int(other) == said[-1]:
            section.headline = (
                f"After loop {own - 1} both prompts are answered alike, with {asked.quoted(said[-1])} "
                f"({share(ends[own - 1, 0].max())} and {share(ends[own - 1, 1].max())})."
            )
        else:
            section.headline = (
                f"After loop {own - 1} it answers {at(own - 1)} to the clean prompt and {at(own - 1, 1)} to the corrupted one"
                + ("." if own == 1 else f"; the clean answer is there from loop {settled} on.")
            )
    if asked.answer is not None:
        chance = ends[:, 0, asked.answer]
        rank = (ends[:, 0] > chance[:, None]).sum(-1)
        numbers |= {"answer": asked.word(asked.answer), "answer_probability": chance, "answer_rank": rank}
        best = int(chance.argmax())
        above = int(rank[own - 1])
        place = "first" if above == 0 else f"below {counted(above, 'token')}"
        section.reading.append(
            f"The answer {asked.quoted(asked.answer)} has a probability of {share(chance[0])} after loop 0 and "
            f"{share(chance[own - 1])} after loop {own - 1}, where it comes {place}; it is highest after loop {best} "
            f"({share(chance[best])})."
        )


def _draw(
    asked: Question,
    section: Section,
    answers: Int[Tensor, "loop pos"],
    right: Int[Tensor, "loop pos"] | None,
    positions: list[int],
) -> None:
    """The grid of answers, loop by position."""
    words = section.numbers["prompt"][positions[0] :]
    figure = over_positions(section.numbers["probabilities"], words, positions, "loop")
    longest = max(len(asked.word(token)) for token in {*answers.flatten().tolist()})
    right = None if right is None else right[:, positions[0] :]
    wrong = torch.zeros_like(answers, dtype=torch.bool) if right is None else (right >= 0) & (right != answers)
    text = [
        [short(asked.word(t)) + (" ✗" if w else "") for t, w in zip(*rows, strict=True)]
        for rows in zip(answers.tolist(), wrong.tolist(), strict=True)
    ]
    hover = "loop %{y}, %{customdata}<br>%{text} %{z:.1%}<extra></extra>"
    figure.update_traces(
        text=text, texttemplate="%{text}", hovertemplate=hover, zmin=0, zmax=1, showscale=False, textfont={"size": 12}
    )
    caption = "The most probable next token at every position, if the model stopped after each loop; darker is more probable."
    if asked.n_loops > asked.own:
        mark(figure, asked.own - 0.5, across=True)
        caption += f" Below the dotted line it loops more often than {asked.own_words}."
    if bool(wrong.any()):
        caption += " ✗ marks answers to queries that are not the next hop."
    section.draw(caption, figure, 50 + max(30, min(110, 12 + 8 * longest)) * len(positions))


def _cover(asked: Question, section: Section, ends: Float[Tensor, "loop row d_vocab"]) -> None:
    """The figure of the first screen: the answer to the whole prompt, or to both, after each loop."""
    own, n_loops = asked.own, asked.n_loops
    loops = list(range(min(own, n_loops)))
    if len(loops) > COVER_ROWS:
        loops = sorted({round(k * (own - 1) / (COVER_ROWS - 1)) for k in range(COVER_ROWS)})
    beyond = COVER_ROWS - len(loops)
    loops += [t for t in range(own, n_loops) if t < own + beyond - 1 or t == n_loops - 1]
    heads = ["most probable"] if asked.pair is None else ["clean", "corrupted"]
    told = [token for token in (asked.answer, asked.wrong) if token is not None]
    heads += [f"{asked.quoted(token)}" for token in told]

    def cells(loop: int) -> list[Bar]:
        found = [Bar(asked.word(int(row.argmax())), float(row.max())) for row in ends[loop]]
        return found + [Bar("", float(ends[loop, 0, token])) for token in told]

    caption = "What it would answer if it stopped after each loop (loop 0 is the first), and how probable that is."
    if told:
        said = " and ".join(asked.quoted(token) for token in told)
        caption += f" Beside it, how probable {said} would be after the {'prompt' if asked.pair is None else 'clean prompt'}."
    if loops[-1] >= own:
        caption += f" Rows with + are beyond {asked.own_words}."
    rows = [(f"{t}{' +' if t >= own else ''}", cells(t)) for t in loops]
    section.cover = Figure(caption, bars(("loop", *heads), rows), 320 if len(heads) < 3 else 60 + 95 * len(heads))
    section.numbers["cover"] = [[bar.share for bar in row] for _, row in rows]
