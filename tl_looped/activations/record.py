"""What a store was made of: its directory says it, and takes no other collection."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch

from .._writing import link_first
from ..errors import LoopedError
from ..looped import Looped
from ..panels import Panel
from ..results import Result, load_result
from ..results.saving import save_result
from ..runs.asked import described, digest, weights_of
from ..runs.folder import Weights, refuse_others
from ..schedule import Schedule
from .places import where
from .shards import DamagedError, Shard

RECORD = "collection.safetensors"


@dataclass(frozen=True, eq=False)
class Collection(Result):
    """What was collected, of which run.

    Args:
        names: of the activations, loop-indexed.
        shapes: of a row of each.
        dtype: in which they are kept.
        schedule: of the model.
        rows_per_shard: how many positions a shard has at most, unless one prompt has more.
        stop: how many virtual layers were run; None for the whole model.
        asked: the other settings, as text.
    """

    names: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    schedule: Schedule
    rows_per_shard: int
    stop: int | None
    asked: dict[str, str]

    @property
    def mark(self) -> str:
        """What a shard says of the collection that it is of."""
        settings = [f"{name}={value}" for name, value in sorted(self.asked.items())]
        shapes = [f"{name} {self.shapes[name]}" for name in self.names]
        return digest([*shapes, str(self.dtype), str(self.rows_per_shard), *settings])

    def to_dataframe(self) -> Any:
        """One row for each activation: where it is, and the shape of what a token has of it."""
        import pandas as pd

        rows = [(name, *where(self.schedule, name)[:4], str(self.shapes[name])) for name in self.names]
        return pd.DataFrame(rows, columns=["name", "site", "stack", "loop", "layer", "shape"])

    def panels(self) -> list[Panel]:
        """Nothing: a record has no numbers to draw."""
        return []


def weights_mark(wanted: Collection, model: Weights) -> str:
    """What a shard says of the weights that it is of.

    Args:
        wanted: the collection.
        model: has the fingerprint of the weights.
    """
    return digest([described(wanted.schedule), weights_of(model)])


def whole_record(out: Path, model: Weights | Looped | None = None) -> Collection | None:
    """The record of a directory; None where it has none, or a damaged one.

    Args:
        out: the directory.
        model: refuse what is of another one.

    Raises:
        LoopedError: it is of another model, of a later version, or no collection.
    """
    file, asked = out / RECORD, cast(Any, model)
    try:
        found = load_result(file)
    except LoopedError as error:
        if "a later version" in str(error):
            raise
        return None
    if not isinstance(found, Collection):
        raise LoopedError(f"{str(file)!r} is a {type(found).__name__} and no collection; choose another directory.")
    return found if asked is None else load_result(file, asked)


def check_same(out: Path, wanted: Collection, model: Weights) -> Collection | None:
    """The record of a directory, if it has a whole one and it is of this collection.

    Args:
        out: the directory.
        wanted: what is asked now; where it has no shapes, those of the record are not compared.
        model: has the fingerprint of the weights; what is of others is refused.

    Raises:
        LoopedError: it is of another collection; the message has the difference.
    """
    refuse_others(out, "collect")
    found = whole_record(out, model)
    if found is None:
        return None
    before: dict[str, Any] = {**found.asked, **{f.name: getattr(found, f.name) for f in fields(found) if f.name != "asked"}}
    now: dict[str, Any] = {**wanted.asked, **{f.name: getattr(wanted, f.name) for f in fields(wanted) if f.name != "asked"}}
    for name in (*found.asked, *wanted.asked, "names", "dtype", "schedule"):
        if before.get(name) != now.get(name):
            was, is_now = (_without(before[name], now[name])) if name == "names" else (before.get(name), now.get(name))
            raise LoopedError(
                f"{str(out)!r} is a collection with {name}={was}, not {is_now}; choose another directory, or remove this one."
            )
    return found


def record_first(out: Path, wanted: Collection, model: Weights) -> Collection:
    """Write the record of a directory, or read that of a process that was faster.

    A record that was lost or damaged is written again where the shards are of this collection and of these weights.

    Args:
        out: the directory.
        wanted: what is asked now.
        model: has the fingerprint of the weights; what is of others is refused.

    Raises:
        LoopedError: it is of another collection; the message has the difference.
    """
    file = out / RECORD
    was_there = file.exists()  # what comes later is of another process, and whole
    if found := check_same(out, wanted, model):
        return found
    marks = wanted.mark, weights_mark(wanted, model)
    for path in sorted(out.glob("shard-*.safetensors")):
        with suppress(DamagedError):  # it is written again
            said = Shard(path).metadata
            if (said.get("collection"), said.get("weights")) != marks:
                raise LoopedError(
                    f"{str(out)!r} has no whole {RECORD}, and {path.name} does not say that it is of this collection and of "
                    "these weights; choose another directory, or remove this one."
                )
    if was_there:
        file.unlink(missing_ok=True)
    save_result(wanted, file, cast(Any, model), put=link_first)
    return check_same(out, wanted, model) or wanted


def _without(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, str]:
    """What the names of two collections have that the other has not, in a few letters."""

    def few(names: list[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "no others"

    return few([name for name in a if name not in set(b)]), few([name for name in b if name not in set(a)])
