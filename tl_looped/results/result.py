"""`Result`: what holds several grids, and the settings they were measured with."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from ..errors import LoopedError
from .grid import Estimate
from .showing import Shown

AnyResult = TypeVar("AnyResult", bound="Result")


class Result(Shown):
    """Base of the frozen dataclasses that analyses return: estimates, examples in tuples, and settings.

    `a + b` is the result over the prompts of both: estimates merge, examples follow each other, settings must be the same.
    `sum(results)` adds many.
    """

    def __add__(self: AnyResult, other: AnyResult) -> AnyResult:
        if type(self) is not type(other):
            return NotImplemented
        parts: Any = self
        merged = {f.name: _merge(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(parts)}
        return replace(parts, **merged)

    def __radd__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # where `sum` begins


def _merge(name: str, a: Any, b: Any) -> Any:
    if isinstance(a, Estimate) and isinstance(b, Estimate):
        return a + b
    if isinstance(a, tuple) and isinstance(b, tuple) and not hasattr(a, "_fields"):
        return a + b
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {key: _merge(f"{name}[{key!r}]", a[key], b[key]) for key in a}
    if a != b:
        raise LoopedError(
            f"a result with {name}={_short(a)} was added to one with {name}={_short(b)}; they answer different questions. "
            "Add results of the same settings only."
        )
    return a


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
