"""Numbers in sentences."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """As in "1 loop" and "3 loops"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
