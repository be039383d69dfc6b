"""Calls as they were written for the release before: accepted once more, with a warning that has the new spelling."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from .errors import LoopedError

P = ParamSpec("P")
R = TypeVar("R")


def accepts_old(*positional: str, **renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose arguments got other names, or are given by name now.

    Args:
        *positional: arguments that were positional, in their order after those that still are.
        **renamed: the new name for every old one.

    Example:
        >>> @accepts_old("scale", pos="positions")
        ... def read(x, *, scale=1, positions=-1):
        ...     return x * scale, positions
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     read(2, 3, pos=0)
        (6, 0)
        >>> [str(warning.message) for warning in caught]
        ['read(pos=) is now read(positions=).', 'read(scale=) is given by name now.']
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        n_positional = sum(
            kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
        )
        name = function.__name__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            for old in [key for key in kwargs if key in renamed]:
                new = renamed[old]
                if new in kwargs:
                    raise LoopedError(f"{name}({old}=, {new}=) was called; they are one argument, pass {new}= alone.")
                _warn(f"{name}({old}=) is now {name}({new}=).")
                kwargs[new] = kwargs.pop(old)
            for key, value in zip(positional, args[n_positional:], strict=False):
                if key in kwargs:
                    raise LoopedError(f"{name}() got {key} twice, by its place and by its name; pass {key}= alone.")
                _warn(f"{name}({key}=) is given by name now.")
                kwargs[key] = value
            taken = args[:n_positional] + args[n_positional + len(positional) :]  # too many are Python's own error
            return function(*taken, **kwargs)

        return cast(Callable[P, R], call)

    return decorate


def _warn(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=3)
