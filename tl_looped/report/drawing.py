"""What the panels of several sections share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..explorer._packing import packed
from ..explorer._page import frozen_part
from ..figures.tokens_shown import cut
from ..panels import Axis, Panel, heat_map
from ..results import Grid
from ..schedule import Site

LONGEST = 16  # characters of a token in a figure


def with_axes(panel: Panel, **roles: Axis) -> Panel:
    """A panel with other axes.

    Args:
        panel: the panel.
        **roles: the axes that are others.
    """
    return replace(panel, roles=panel.roles | roles)


def by_loops(grid: Grid, other: str) -> list[Panel]:
    """A heat map of loops by loops.

    Args:
        grid: over two axes of loops.
        other: what the one across is called.
    """
    panel = heat_map(grid)
    return [with_axes(panel, x=replace(panel.roles["x"], title=other))]


def over_positions(grid: Grid, words: Sequence[str], positions: Sequence[int], down: str) -> Panel:
    """A heat map with the tokens above the positions.

    Args:
        grid: the last axis is the position.
        words: the tokens of its entries.
        positions: where they stand in the prompt.
        down: what the rows are.
    """
    panel, tokens = heat_map(grid), [cut(word, LONGEST) for word in words]
    said = [f"position {p}, {word}" for p, word in zip(positions, tokens, strict=True)]
    return with_axes(panel, x=Axis("", tokens, said, form="tokens"), y=replace(panel.roles["y"], title=down))


def cells(grid: Grid, rows: Sequence[tuple[str, Site]], columns: Sequence[dict[str, str | None]]) -> str:
    """The grid of the explorer with numbers that were computed before, as HTML.

    Args:
        grid: the numbers, [row, column].
        rows: the name of every row and where it is; a line parts loops.
        columns: {"name": a token, "sub": its position, "other": the token of a second prompt where that is another one}.
    """
    described = [{"name": name, "group": site.where, "edge": site.loop is None} for name, site in rows]
    return frozen_part({"title": grid.name, "rows": described, "columns": list(columns), "values": packed(grid.values)})


def linear_if_narrow(panel: Panel) -> Panel:
    """A logarithmic axis over less than a factor of four would have a label or two."""
    drawn = [v for line in panel.numbers for v in line if v > 0]
    is_narrow = bool(drawn) and max(drawn) < 4 * min(drawn)
    return with_axes(panel, y=replace(panel.roles["y"], scale="linear")) if is_narrow else panel
