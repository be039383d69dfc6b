"""Which loops, layers, positions or heads: what may be asked for, and the indices that it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .errors import LoopedError, OutOfRangeError
from .kinds import count, plain

_MAX_INT64 = 2**63 - 1

# Which loops: one, a slice, several, every one, the last one. Everywhere the same; negative indices count from the end.
LoopSelector = int | slice | Sequence[int] | Literal["all", "last"]
# Which layers, positions or heads; None for all.
Indices = int | slice | Sequence[int] | None


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` if it is an int of at least `minimum`; raise a `LoopedError` that names it otherwise.

    Args:
        name: what the message calls it.
        value: what was given.
        minimum: the least that is accepted.

    Raises:
        LoopedError: it is no int, or too small.
    """
    return count(minimum, _MAX_INT64)(name, plain(value))


def pick_loops(loops: LoopSelector, n: int, more_loops: bool) -> list[int]:
    """The loops of `n` that a selector names, in the order asked.

    Args:
        loops: the selector.
        n: how many there are.
        more_loops: as in `pick_one`.

    Raises:
        OutOfRangeError: a loop that does not exist, or no loop at all.
    """
    loops = plain(loops)
    if isinstance(loops, str) and loops in ("all", "last"):
        return list(range(n)) if loops == "all" else [n - 1]
    if isinstance(loops, slice):
        chosen = list(range(n)[loops])
    elif isinstance(loops, int) or (isinstance(loops, Sequence) and not isinstance(loops, str)):
        chosen = [pick_one(t, n, "loop", "loops", more_loops) for t in ([loops] if isinstance(loops, int) else loops)]
    else:
        raise LoopedError(f'loops={loops!r} was asked; pass an int, a slice, a list of ints, "all" or "last".')
    if not chosen:
        raise OutOfRangeError(f"loops={loops!r} selects nothing: there are {n} loops{span(n)}.")
    return chosen


def select_indices(asked: Indices, n: int, what: str) -> list[int]:
    """The indices below `n` that were asked for, without repeats, in ascending order; negative ones count from the end.

    Raises:
        OutOfRangeError: an index that does not exist, or none at all.
    """
    asked = plain(asked)
    if asked is None or isinstance(asked, slice):
        chosen = list(range(n)[asked if isinstance(asked, slice) else slice(None)])
    elif isinstance(asked, int) or (isinstance(asked, Sequence) and not isinstance(asked, str)):
        indices = [asked] if isinstance(asked, int) else asked
        chosen = sorted({pick_one(i, n, what, what) for i in indices})
    else:
        raise LoopedError(f"{what}={asked!r} was asked; pass an int, a slice, a list of ints, or None for all.")
    if not chosen:
        raise OutOfRangeError(f"{asked!r} selects nothing: there are {n} {what}{span(n)}.")
    return chosen


def check_index(index: int, n: int, what: str) -> int:
    """Check an index and make it non-negative.

    Args:
        index: the index; negative ones count from the end.
        n: how many there are.
        what: what they are, in the singular, for the error.

    Raises:
        OutOfRangeError: there is no such entry.
    """
    return pick_one(index, n, what, f"{what}s")


def pick_one(index: object, n: int, asked: str, what: str, more_loops: bool = False) -> int:
    """Check an index and make it non-negative.

    Args:
        index: the index; negative ones count from the end.
        n: how many there are.
        asked: what the index is of, or the name that holds it.
        what: what there are, in the plural.
        more_loops: whether the error says how to get more.

    Raises:
        OutOfRangeError: there is no such entry.
    """
    at = plain(index)
    if isinstance(at, bool) or not isinstance(at, int):
        raise LoopedError(f"{asked} {at!r} was asked, but an index is an int.")
    if not -n <= at < n:
        advice = f"; for more, load with n_loops= or use model.unroll({at + 1})" if more_loops and at >= n else ""
        where = f"index {at} in {asked!r}" if "." in asked else f"{asked} {at}"
        raise OutOfRangeError(f"{where} is out of range: there are {n} {what}{span(n)}{advice}.")
    return at % n


def span(n: int) -> str:
    """The indices below `n`, as an error adds them."""
    return f" (0..{n - 1})" if n else ""
