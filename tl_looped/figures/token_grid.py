"""A figure with a token in every cell: rows by columns, coloured by a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .plotly import graph_objects
from .tokens_shown import cut, in_figure, visible

ROW = 22
LONGEST = 8  # characters of a token in a cell
NARROW = 360  # pixels across that a figure may have: a telephone's
TEXT = "#808690"  # readable on white and on black, as nobody knows which a notebook has
# Below the grid, so that it has room beside a grid of one row too.
BAR = {"orientation": "h", "thickness": 10, "len": 180, "lenmode": "pixels", "x": 0, "xanchor": "left", "yanchor": "top"}
MARGIN = {"t": 70, "b": 120, "r": 12}
MOST_ROWS = 160  # of more, texts are in the hover only


@dataclass(frozen=True)
class Colours:
    """How numbers become colours.

    Args:
        name: what the numbers are, with their unit.
        scale: plotly's name of the scale.
        low: the number of its first colour.
        high: the number of its last one; None for the greatest.
        log: colours follow the logarithm of the number plus one, as ranks need it.
    """

    name: str
    scale: str = "Blues"
    low: float = 0.0
    high: float | None = None
    log: bool = False

    def arguments(self, z: Sequence[Sequence[float]]) -> dict[str, Any]:
        """What a heat map of plotly takes.

        Args:
            z: the numbers.
        """
        known = [v for row in z for v in row if math.isfinite(v)]
        high = self.high if self.high is not None else max(known, default=0.0)
        bar: dict[str, Any] = {"title": {"text": self.name, "side": "top", "font": {"size": 12}}, **BAR}
        if not self.log:
            return {"z": z, "zmin": self.low, "zmax": high if high > self.low else self.low + 1, "colorbar": bar}
        ends = [0, *(n * 10**k for k in range(8) for n in (1, 3) if n * 10**k <= high)]
        bar |= {"tickvals": [math.log10(e + 1) for e in ends], "ticktext": [str(e) for e in ends]}
        return {
            "z": [[math.log10(v + 1) for v in row] for row in z],
            "zmin": 0,
            "zmax": max(math.log10(high + 1), math.log10(2)),
            "colorbar": bar,
        }


COLOURS = {
    "prob": Colours("probability of the top token", high=1.0),
    "entropy": Colours("entropy (nats)", "Purples"),
    "rank": Colours("rank of the target (0 is the top)", "Blues_r", log=True),
    "kl": Colours("KL to the last row (nats)", "Oranges"),
}


@dataclass(frozen=True)
class Band:
    """Rows that belong together.

    Args:
        first: the first of them.
        stop: the row after the last.
        edge: whether they stand outside the loop, and are marked.
    """

    first: int
    stop: int
    edge: bool = False


def token_grid(
    tokens: Sequence[Sequence[str]],
    z: Sequence[Sequence[float]],
    hover: Sequence[Sequence[str]],
    colours: Colours,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    titles: tuple[str, str],
    title: str = "",
    bands: Sequence[Band] = (),
    top: bool = False,
) -> Any:
    """A plotly figure with the text of a token in every cell.

    Args:
        tokens: the text of every cell.
        z: its number.
        hover: what is said of it on hover, as lines of plain text.
        colours: how the numbers become colours.
        rows: what the rows are called.
        columns: what the columns are called.
        titles: of the axis across and of the one down.
        title: above the figure.
        bands: which rows belong together; a line is drawn between two bands.
        top: put the names of the columns on top.

    Raises:
        LoopedError: plotly is not installed.
    """
    go = graph_objects()
    at = {
        "x": 0,
        "xref": "container",
        "xanchor": "left",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"l": 12, "t": 12},
    }
    figure = go.Figure(layout={"title": {"text": title, "font": {"size": 15}, **at}})
    cells = [[cut(visible(token), LONGEST) for token in row] for row in tokens]
    longest = max((len(text) for row in cells for text in row), default=0)
    left = 24 + 7 * max(map(len, rows), default=0)
    fits = 7 * longest * len(columns) <= NARROW - left - MARGIN["r"]
    few = len(rows) <= MOST_ROWS
    figure.add_heatmap(
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        text=[list(map(in_figure, row)) for row in cells],
        texttemplate="%{text}" if few else None,
        textfont={"size": 11} if fits else None,  # otherwise as large as the cells of this width allow
        hovertext=[["<br>".join(map(in_figure, said.split("\n"))) for said in row] for row in hover],
        hovertemplate="%{hovertext}<extra></extra>",
        colorscale=colours.scale,
        xgap=1,
        ygap=1 if few else 0,
        **colours.arguments(z),
    )
    plain = {"showgrid": False, "zeroline": False, "ticks": ""}
    every_row = -(-len(rows) // MOST_ROWS)
    figure.update_xaxes(
        title=titles[0],
        tickvals=list(range(len(columns))),
        ticktext=[in_figure(cut(name, 12)) for name in columns],
        side="top" if top else "bottom",
        **plain,
    )
    figure.update_yaxes(
        title=titles[1],
        tickvals=list(range(0, len(rows), every_row)),
        ticktext=[in_figure(name) for name in rows[::every_row]],
        autorange="reversed",
        **plain,
    )
    for before, after in pairwise(bands):
        wide = 3 if before.edge or after.edge else 1.5
        figure.add_hline(y=after.first - 0.5, line={"width": wide, "color": "#c44" if wide == 3 else "#888"})
    margin = {**MARGIN, "t": MARGIN["t"] + (60 if top else 0), "b": MARGIN["b"] - (40 if top else 0)}
    margin["l"] = left
    height = ROW * len(rows) if few else max(ROW * MOST_ROWS, 4 * len(rows))
    figure.update_traces(colorbar={"y": (-20 if top else -54) / height})
    clear = dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "rgba(0,0,0,0)")
    tall = margin["t"] + margin["b"] + height
    return figure.update_layout(template="none", font_color=TEXT, margin=margin, height=tall, autosize=True, **clear)


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
    from ..errors import LoopedError

    if colour not in allowed:
        raise LoopedError(f"colour={colour!r} was asked; choose {', '.join(map(repr, allowed))}.")
