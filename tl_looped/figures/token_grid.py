"""A heat map with a token in every cell: rows by columns, coloured by a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import LoopedError
from ..panels import Axis, Mark, Panel
from .tokens_shown import cut, visible

LONGEST = 8  # characters of a token in a cell
SHADES = {
    "prob": Axis("probability of the top token", range=(0.0, 1.0), palette="Blues"),
    "entropy": Axis("entropy (nats)", palette="Purples"),
    "rank": Axis("rank of the target (0 is the top)", scale="rank", palette="Blues_r"),
    "kl": Axis("KL to the last row (nats)", palette="Oranges"),
}


def token_grid(
    tokens: Sequence[Sequence[str]],
    z: Sequence[Sequence[float]],
    hover: Sequence[Sequence[str]],
    colour: str,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    titles: tuple[str, str],
    title: str = "",
    marks: Sequence[Mark] = (),
    top: bool = False,
) -> Panel:
    """A heat map with the text of a token in every cell.

    Args:
        tokens: the text of every cell.
        z: its number.
        hover: what is said of it on hover, as lines of plain text.
        colour: which of `SHADES` the numbers are.
        rows: what the rows are called.
        columns: what the columns are called.
        titles: of the axis across and of the one down.
        title: the caption.
        marks: lines between rows.
        top: put the names of the columns on top.
    """
    shade = SHADES[colour]
    high = max((v for row in z for v in row if math.isfinite(v)), default=0.0)
    roles = {
        "x": Axis(titles[0], [cut(name, 12) for name in columns], form="tokens" if top else ""),
        "y": Axis(titles[1], list(rows)),
        "colour": replace(shade, range=shade.range or (0.0, high if high > 0 else 1.0)),
    }
    text = [[cut(visible(token), LONGEST) for token in row] for row in tokens]
    grid = {"colour": list(map(list, z)), "text": text, "said": list(map(list, hover))}
    return Panel("heat map", [grid], roles, list(marks), title)


def lines(tokens: Sequence[str], probs: Sequence[float]) -> list[str]:
    """The most probable tokens, one in a line.

    Args:
        tokens: their texts.
        probs: their probabilities.
    """
    return [f"{visible(token)}  {p:.3f}" for token, p in zip(tokens, probs, strict=True)]


def check_colour(colour: str, allowed: Mapping[str, Any]) -> None:
    """Refuse another colour.

    Args:
        colour: what was asked.
        allowed: what there is.

    Raises:
        LoopedError: another one.
    """
    if colour not in allowed:
        raise LoopedError(f"colour={colour!r} was asked; choose {', '.join(map(repr, allowed))}.")
