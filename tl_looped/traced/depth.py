"""How often a module loops, set for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import LoopedError

_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def looping(module: nn.Module, where: str | Callable[[nn.Module, int], object] | None, n: int | None) -> Generator[None]:
    """Let a module loop so often for a while; one run at a time where there is something to set.

    Args:
        module: the module.
        where: as in `set_loops`; None where nothing is set.
        n: how often; None for as often as it does.
    """
    if n is None or where is None:
        yield
        return
    with _locks.setdefault(module, threading.RLock()):
        before = set_loops(module, where, n)
        try:
            yield
        finally:
            if before is not None:
                set_loops(module, where, before)


def set_loops(module: nn.Module, where: str | Callable[[nn.Module, int], object], n: int) -> int | None:
    """Set how often a module loops.

    Args:
        module: the module.
        where: the path of a number in it, such as "config.n_loops", or a function of the module and the number.
        n: how often.

    Returns:
        What it was before; None where a function sets it.

    Raises:
        LoopedError: there is no such number.
    """
    if not isinstance(where, str):
        where(module, n)
        return None
    *path, last = where.split(".")
    holder: Any = module
    try:
        for word in path:
            holder = holder[word] if isinstance(holder, dict) else getattr(holder, word)
        before = holder[last] if isinstance(holder, dict) else getattr(holder, last)
    except (AttributeError, KeyError) as error:
        raise LoopedError(f"set_loops={where!r} was given, but the module has no such attribute.") from error
    if isinstance(before, bool) or not isinstance(before, int):
        raise LoopedError(f"set_loops={where!r} was given, which is {before!r} and no number of loops.")
    if isinstance(holder, dict):
        holder[last] = n
    else:
        setattr(holder, last, n)
    return before
