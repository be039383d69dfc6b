"""What the figures of several sections share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from ..figures import plots
from ..results import Grid

LONGEST = 16  # characters of a token in a figure


def short(word: str) -> str:
    """A token as plotly may show it in a cell: not too long, and no markup."""
    return escape(word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…", quote=False)


def over_positions(grid: Grid, words: Sequence[str], positions: Sequence[int], down: str) -> Any:
    """A heat map with the tokens above the positions.

    Args:
        grid: the last axis is the position.
        words: the tokens of its entries.
        positions: where they stand in the prompt.
        down: what the rows are.
    """
    figure = plots.heat_map(grid, title=" ")
    # Words repeat, and plotly would merge columns of one name: columns have numbers and the words are ticks.
    is_run = list(positions) == list(range(positions[0], positions[-1] + 1))
    columns = list(positions) if is_run else list(range(len(positions)))
    hover = [[f"position {p}, {short(word)}" for p, word in zip(positions, words, strict=True)]] * len(figure.data[0].z)
    figure.update_traces(x=columns, customdata=hover)
    angle = 0 if max(map(len, words)) < 4 else -60
    figure.update_xaxes(tickvals=columns, ticktext=[*map(short, words)], title=None, side="top", tickangle=angle)
    return figure.update_yaxes(title=down)


def thinned(figure: Any, most: int = 8, title: str = "other loop") -> Any:
    """A heat map of loops by loops with no more labels across than a narrow page has room for."""
    labels = list(figure.layout.xaxis.ticktext)
    every = -(-len(labels) // most)
    ticks = {"tickvals": list(figure.layout.xaxis.tickvals)[::every], "ticktext": labels[::every]}
    return figure.update_xaxes(**ticks, tickangle=0, title=title)


def linear_if_narrow(figure: Any) -> Any:
    """A logarithmic axis over less than a factor of four would have a label or two."""
    drawn = [v for trace in figure.data for v in trace.y if v is not None and math.isfinite(v)]
    if drawn and 0 < max(drawn) < 4 * min(drawn):
        figure.update_yaxes(type="linear", dtick=None, exponentformat=None, tickformat=None)
    return figure


def mark(figure: Any, at: float, *, across: bool = False) -> None:
    """Draw the dotted line beyond which a model loops more often than its own number.

    Args:
        figure: what it is drawn on.
        at: where.
        across: a horizontal line rather than a vertical one.
    """
    line = {"width": 1.5, "dash": "dot", "color": "#d95f0e"}
    figure.add_hline(y=at, line=line) if across else figure.add_vline(x=at, line=line)
