"""What several sections say alike."""

from __future__ import annotations

from ..._words import counted
from ..question import Question
from ..section import Section

SHOWN_POSITIONS = 32  # columns of a heat map over positions


def left_out(asked: Question, section: Section, least: int) -> None:
    """Say how many prompts were too short.

    Args:
        asked: whose prompts.
        section: what is written to.
        least: the tokens that a prompt needs.
    """
    n = sum(len(batch) for batch in asked.prompts if batch.shape[1] < least)
    if n and section.reading:
        section.numbers["left_out"] = n
        section.reading[-1] += f" Left out: {counted(n, 'prompt')} of fewer than {least} tokens."


def say_first_token(asked: Question, section: Section, where: str = "") -> None:
    """Say that the first token decides the numbers alone, or that it was left out.

    Args:
        asked: the prompts.
        section: what is written to.
        where: which of the numbers, if not all.
    """
    if said := asked.first_token_said:
        section.numbers["first_token_times_as_long"] = asked.first_token
        section.notes.append(said.replace(" here;", f" here{where};").replace("left out.", f"left out{where}."))
