"""Parts that several sections have."""

from __future__ import annotations

from ..._words import counted
from ..question import Question
from ..section import Numbers, Part, Reading

SHOWN_POSITIONS = 32  # columns of a heat map over positions


def left_out(least: int, *, first_too: bool = False) -> Part:
    """Say how many prompts were too short.

    Args:
        least: the tokens that a prompt needs.
        first_too: it needs one more where the first is left out.
    """

    def needed(asked: Question) -> int:
        return least + (first_too and asked.skip_first)

    def measure(asked: Question) -> tuple[Numbers, None] | None:
        n = sum(len(batch) for batch in asked.prompts if batch.shape[1] < needed(asked))
        return ({"left_out": n}, None) if 0 < n < asked.n_examples else None

    def read(asked: Question, numbers: Numbers, result: None) -> Reading:
        return Reading([f"Left out: {counted(numbers['left_out'], 'prompt')} of fewer than {needed(asked)} tokens."])

    return Part(measure, read)


def first_token(where: str = "") -> Part:
    """Say that the first token decides the numbers alone, or that it was left out.

    Args:
        where: which of the numbers, if not all.
    """

    def measure(asked: Question) -> tuple[Numbers, None] | None:
        return ({"first_token_times_as_long": asked.first_token}, None) if asked.first_token_said else None

    def read(asked: Question, numbers: Numbers, result: None) -> Reading:
        said = asked.first_token_said.replace(" here;", f" here{where};").replace("left out.", f"left out{where}.")
        return Reading(notes=[said])

    return Part(measure, read)
