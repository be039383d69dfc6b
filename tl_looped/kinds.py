"""What a field of a config may be: its kind and its range.

A kind takes a name and a value, and returns the value as plain Python, or raises a `LoopedError` that says what was expected.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar, cast

import numpy as np

from .errors import LoopedError

Value = TypeVar("Value")
Kind = Callable[[str, object], Value]

MAX_COUNT = 2**31 - 1
_MAX_NUMBER = 3e38  # beyond it fp32 has no numbers
_MAX_ENTRIES = 100_000
_SHOWN = 80  # characters of a value in an error


def shown(value: object) -> str:
    """A value as an error shows it: of a long one, the beginning.

    Args:
        value: anything.
    """
    try:
        text = repr(value[:_SHOWN] if isinstance(value, (list, tuple, str)) else value)
    except (ValueError, RecursionError):  # ints of thousands of digits, lists nested a thousand times
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def refusal(name: str, value: object, must_be: str) -> LoopedError:
    """The error for a value of the wrong kind.

    Args:
        name: what it was given for.
        value: what was given.
        must_be: what was expected.
    """
    return LoopedError(f"{name}={shown(value)} was asked, but {name} must be {must_be}.")


def plain(value: Any) -> Any:
    """Ints, or a list of them, in Python's own type from numpy's and torch's; anything else as it is.

    Args:
        value: an index, or several.

    Example:
        >>> plain(np.int64(3)), plain(np.arange(2)), plain(slice(2))
        (3, [0, 1], slice(None, 2, None))
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(plain(one) for one in cast("Iterable[Any]", value))  # a tuple of TransformerLens's is a slice
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return value
    return operator.index(value)


def count(least: int = 1, most: int = MAX_COUNT) -> Kind[int]:
    """An int, also numpy's; a bool is none.

    Args:
        least: the smallest that is accepted.
        most: the greatest.

    Example:
        >>> count()("n_loops", 3)
        3
    """

    def check(name: str, value: object) -> int:
        try:
            index = None if isinstance(value, (bool, np.bool_)) else operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            index = None
        if index is None or not least <= index <= most:
            raise refusal(name, value, f"an int >= {least}" + (f" and <= {most}" if index and index > most else ""))
        return index

    return check


def number(low: float = 0.0, high: float | None = None, above: bool = False) -> Kind[float]:
    """A finite real number, which an int is too.

    Args:
        low: the smallest that is accepted.
        high: the greatest; None for what fp32 can hold.
        above: `low` itself is not accepted.
    """

    def check(name: str, value: object) -> float:
        try:
            real = float(value) if isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) else None
        except OverflowError:
            real = None
        if real is None or not low <= real <= (_MAX_NUMBER if high is None else high) or (above and real == low):
            bound = f"{'>' if above else '>='} {low:g}"
            raise refusal(name, value, f"a finite number {bound}" if high is None else f"a number between {low:g} and {high:g}")
        return real

    return check


def flag(name: str, value: object) -> bool:
    """True or False, and nothing that is merely true or false in an `if`.

    Args:
        name: what it was given for.
        value: what was given.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise refusal(name, value, "True or False")
    return bool(value)


def text(name: str, value: object) -> str:
    """Any str.

    Args:
        name: what it was given for.
        value: what was given.
    """
    if not isinstance(value, str):
        raise refusal(name, value, "a str")
    return value


def choice(*options: str) -> Kind[Any]:
    """One of some words.

    Args:
        *options: the words.
    """

    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in options:
            raise LoopedError(f"{name}={shown(value)} was asked; choose one of {', '.join(map(repr, options))}.")
        return value

    return check


def optional(kind: Kind[Value]) -> Kind[Value | None]:
    """None, or another kind.

    Args:
        kind: the other kind.
    """
    return lambda name, value: None if value is None else kind(name, value)


def several(kind: Kind[Value]) -> Kind[tuple[Value, ...]]:
    """A tuple or list of one kind.

    Args:
        kind: the kind of its entries.
    """

    def check(name: str, value: object) -> tuple[Value, ...]:
        if not isinstance(value, (tuple, list)) or len(value) > _MAX_ENTRIES:
            raise refusal(name, value, f"a tuple or a list of at most {_MAX_ENTRIES} entries")
        return tuple(kind(f"{name}[{i}]", entry) for i, entry in enumerate(value))

    return check


def table(name: str, value: object) -> dict[str, Any]:
    """A dictionary whose keys are words.

    Args:
        name: what it was given for.
        value: what was given.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refusal(name, value, "a dictionary")
    return dict(value)


def json_table(name: str, value: object) -> dict[str, Any]:
    """A dictionary that a JSON file keeps as it is.

    Args:
        name: what it was given for.
        value: what was given.
    """
    found = table(name, value)
    try:
        kept = json.loads(json.dumps(found)) == found
    except (TypeError, ValueError):
        kept = False
    if not kept:
        raise refusal(name, value, "a dictionary of what JSON has: texts, numbers, true and false, null, lists of these")
    return found
