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
    """Return `value` as an int if it is one of at least `minimum`; raise a `LoopedError` that says so of `name` otherwise."""
    return count(minimum, _MAX_INT64)(name, plain(value))


def pick_loops(loops: LoopSelector, n: int, more_loops: bool) -> list[int]:
    """The loops of `n` that a selector names, in the order asked; `more_loops` as in `pick_one`."""
    if isinstance(loops, str) and loops in ("all", "last"):
        loops = slice(None) if loops == "all" else -1
    return _several(loops, n, "loop", "loops", '"all" or "last"', more_loops)


def select_indices(asked: Indices, n: int, what: str) -> list[int]:
    """The indices below `n` that were asked for, without repeats, in ascending order; negative ones count from the end.

    Raises:
        OutOfRangeError: an index that does not exist, or none at all.
    """
    return sorted({*_several(slice(None) if asked is None else asked, n, what, what, "or None for all")})


def _several(asked: object, n: int, one: str, what: str, others: str, more_loops: bool = False) -> list[int]:
    """The indices below `n` that were asked for, in the order asked."""
    asked = plain(asked)
    if isinstance(asked, slice):
        chosen = list(range(n)[asked])
    elif isinstance(asked, int) or (isinstance(asked, Sequence) and not isinstance(asked, str)):
        chosen = [pick_one(i, n, one, what, more_loops) for i in ([asked] if isinstance(asked, int) else asked)]
    else:
        raise LoopedError(f"{what}={asked!r} was asked; pass an int, a slice, a list of ints, {others}.")
    if not chosen:
        raise OutOfRangeError(f"{what}={asked!r} selects nothing: there are {n} {what}{span(n)}.")
    return chosen


def check_index(index: int, n: int, what: str) -> int:
    """Check an index of `n` of what is meant, said in the singular, and make it non-negative."""
    return pick_one(index, n, what, f"{what}s")


def pick_one(index: object, n: int, asked: str, what: str, more_loops: bool = False) -> int:
    """Check an index of `n` and make it non-negative.

    An error names what was asked, or the name that holds the index, what there are, in the plural, and maybe how to get more.
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
