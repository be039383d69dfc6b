"""Hooks that are on a model for a while, and gone after an interruption too.

TransformerLens takes its hooks off when a run raises an `Exception`. Ctrl-C raises no such thing, and may come between a hook
and the note that it has to be taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from ..model.undo import whole

T = TypeVar("T")


class Added:
    """The hooks that are put on a bridge from now on."""

    def __init__(self, bridge: Any):
        self.bridge: Any = bridge
        self.level: int = bridge.context_level
        self.ids: range = range(_next_id(), 2**63)  # handles are numbered in the order in which they are made

    def close(self) -> None:
        """Do not count hooks that are added later."""
        self.ids = range(self.ids.start, _next_id())

    def take_off(self) -> None:
        """Take them off, and leave the contexts that were entered."""
        points: Iterable[HookPoint] = {id(point): point for point in self.bridge.hook_dict.values()}.values()
        for point in points:
            for name in [name for name in point.__dict__ if name.startswith(("_forward_", "_backward_"))]:
                held = point.__dict__[name]
                for key in [key for key in held if key in self.ids]:
                    del held[key]
            for handles in (point.fwd_hooks, point.bwd_hooks):
                handles[:] = [handle for handle in handles if handle.hook.id not in self.ids]
        self.bridge.context_level = self.level


def without_leftovers(bridge: Any, action: Callable[[], T]) -> T:
    """Return what an action returns; if it does not come to its end, the hooks it put on the bridge are gone."""
    return whole(action, Added(bridge).take_off)


class Hooked(AbstractContextManager[Any]):
    """TransformerLens's context manager with hooks: none are left when the way into it or out of it is interrupted."""

    def __init__(self, bridge: Any, context: AbstractContextManager[Any]):
        self.bridge: Any = bridge
        self.context: AbstractContextManager[Any] = context

    def __enter__(self) -> Any:
        self.added: Added = Added(self.bridge)
        return whole(self._enter, self.added.take_off)

    def _enter(self) -> Any:
        entered = self.context.__enter__()
        self.added.close()
        return entered

    def __exit__(self, *error: Any) -> Any:
        return whole(partial(self.context.__exit__, *error), self.added.take_off)


def _next_id() -> int:
    return RemovableHandle.next_id
