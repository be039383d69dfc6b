"""What every result has in a notebook: one line as `repr`, a small table as HTML."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..panels import Panel, draw

if TYPE_CHECKING:
    from ..looped import Looped
    from .grid import Grid

MOST_ROWS, MOST_COLUMNS = 12, 12  # of a table in a notebook
MOST_LETTERS = 160  # of a repr
CELL = "padding: 2px 8px; text-align: right; font-variant-numeric: tabular-nums"
HEAD = "padding: 2px 8px; text-align: right; font-weight: 600"


class Shown:
    """Base of grids and results: how they look, and how they are kept."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = cls.__repr__  # its own, or `dataclass` would write one that prints every number
        if "panels" in vars(cls):
            cls.plot = _drawing(cls.panels)

    def __repr__(self) -> str:
        line = f"{type(self).__name__}({', '.join(self._described())})"
        return line if len(line) <= MOST_LETTERS else f"{line[: MOST_LETTERS - 2]}…)"

    def _described(self) -> list[str]:
        """The parts of the one line."""
        parts: Any = self
        return [f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(parts)]

    def to_dataframe(self) -> Any:
        """A pandas DataFrame of the numbers."""
        raise NotImplementedError

    def panels(self) -> list[Panel]:
        """What `plot` draws, as plain data; its arguments are those of `plot`."""
        raise NotImplementedError

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """A plotly figure of `panels`; in every class with the arguments of its `panels`, which notebooks complete.

        Args:
            *args: as for `panels`.
            **kwargs: as for `panels`.

        Raises:
            LoopedError: plotly is not installed, or what `panels` raises.
        """
        return draw(self.panels(*args, **kwargs))

    def save(self, path: str | Path, model: Looped | None = None) -> Path:
        """Write the result into one file, without pickle; `tl_looped.load_result` reads it.

        Args:
            path: the file, `.safetensors` by custom.
            model: the model it is of, whose fingerprint is kept: `load_result(path, model)` refuses another one.

        Raises:
            LoopedError: the file cannot be written.
        """
        from .saving import save_result

        return save_result(self, path, model)

    def _repr_html_(self) -> str:
        frame = self.to_dataframe()
        few = self._few(frame).head(MOST_ROWS)
        rows = [[_cell(value) for value in row] for row in few.itertuples(index=False)]
        more = f"{len(frame)} rows; to_dataframe() has them all" if len(frame) > len(few) else ""
        return html_table(repr(self), [str(name) for name in few.columns], rows, more)

    def _few(self, frame: Any) -> Any:
        """What a notebook shows of a DataFrame, of which the first rows fit."""
        return frame


def _drawing(panels: Callable[..., list[Panel]]) -> Callable[..., Any]:
    """The method that draws what `panels` returns, with its arguments and its words."""

    @wraps(panels)
    def plot(self: Shown, *args: Any, **kwargs: Any) -> Any:
        return draw(panels(self, *args, **kwargs))

    plot.__name__, plot.__qualname__ = "plot", panels.__qualname__.replace("panels", "plot")
    return plot


def _brief(value: Any) -> str:
    """A field in a few letters."""
    if isinstance(value, Shown):
        return " ".join(value._described())
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    if isinstance(value, (tuple, list)) and (len(value) > 3 or any(is_dataclass(v) for v in value)):
        return f"{len(value)} entries"
    if isinstance(value, dict):
        return "{" + ", ".join(map(str, value)) + "}"
    return type(value).__name__ if is_dataclass(value) else repr(value)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def matrix(grid: Grid) -> str:
    """A grid as a table: the last axis across, the others down, cells shaded by their value.

    Args:
        grid: the grid.
    """
    *down, across = grid.axes
    values = grid.values.double().cpu().reshape(-1, len(grid.labels[across]))
    names = [[]] if not down else _rows(grid, down)
    finite = values[values.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else 0.0
    rows = []
    for name, row in list(zip(names, values.tolist(), strict=True))[:MOST_ROWS]:
        cells = [_shaded(v, largest) for v in row[:MOST_COLUMNS]]
        rows.append([*(f"<b>{escape(str(label))}</b>" for label in name), *cells])
    heads = [
        *down,
        *(f"{across} {label}" if k == 0 else str(label) for k, label in enumerate(grid.labels[across][:MOST_COLUMNS])),
    ]
    whole = values.shape[0] <= MOST_ROWS and values.shape[1] <= MOST_COLUMNS
    more = "" if whole else f"{values.shape[0]} x {values.shape[1]} numbers; to_dataframe() has them all"
    return html_table(repr(grid), heads, rows, more)


def _rows(grid: Grid, down: list[str]) -> list[list[Any]]:
    from itertools import islice, product

    return [list(row) for row in islice(product(*(grid.labels[axis] for axis in down)), grid.values.numel())]


def _shaded(value: float, largest: float) -> str:
    if not math.isfinite(value) or not largest:
        return f"{value:.4g}"
    colour = "33,102,172" if value >= 0 else "178,24,43"
    return f'<span style="display:block;background:rgba({colour},{0.45 * abs(value) / largest:.2f})">{value:.4g}</span>'


def html_table(caption: str, heads: list[str], rows: list[list[str]], more: str) -> str:
    """A small table that takes its colours from the page.

    Args:
        caption: above it.
        heads: of the columns.
        rows: cells, as HTML.
        more: below it.
    """
    head = "".join(f'<th style="{HEAD}">{escape(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    below = f'<div style="opacity: 0.7">{escape(more)}</div>' if more else ""
    return (
        f'<div style="overflow-x: auto; max-width: 100%"><div><code>{escape(caption)}</code></div>'
        f'<table style="border-collapse: collapse"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}</div>'
    )
