"""How many shards a store has in the end: known when all prompts have been read, so that a lost last one is missed."""

from __future__ import annotations

import json
from pathlib import Path

from .._writing import write_text

EXTENT = "extent.json"


def keep_extent(out: Path, n_shards: int) -> None:
    """Note how many shards there are to be.

    Args:
        out: the directory.
        n_shards: of all processes together.
    """
    if extent_of(out) != n_shards:
        write_text(out / EXTENT, json.dumps({"shards": n_shards}))


def extent_of(out: Path) -> int:
    """How many shards there are to be; 0 where that is not known.

    Args:
        out: the directory.
    """
    try:
        return int(json.loads((out / EXTENT).read_text(encoding="utf-8"))["shards"])
    except (OSError, ValueError, KeyError, TypeError):  # of before, or damaged: the next collect writes it
        return 0
