"""Numbers in sentences, and tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def counted(n: int, noun: str) -> str:
    """As in "1 loop" and "3 loops"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table.

    Args:
        rows: its cells; a row may be shorter than others.

    Example:
        >>> aligned([["loop", "answer"], ["0", "b"]])
        ['loop  answer', '0     b']
    """
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(max(map(len, rows)))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
