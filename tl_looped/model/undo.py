"""Changes that an interruption cannot leave half done.

Ctrl-C may come at any moment: between a change and the `try` that would undo it, in a `finally`, on the way into or out of a
`with` block. So what is undone is known before anything is changed, and undone once more if that was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def undone(action: Callable[[], T], undo: Callable[[], object]) -> T:
    """Return what an action returns, and undo it, however it ends.

    Args:
        action: what changes something for a while.
        undo: puts it back; called twice, so the second call must find nothing to do.
    """
    try:
        try:
            return action()
        finally:
            undo()
    finally:
        undo()


def whole(action: Callable[[], T], undo: Callable[[], object]) -> T:
    """Return what an action returns; undo it if it does not come to its end.

    Args:
        action: what changes something.
        undo: puts it back; called twice, so the second call must find nothing to do.
    """
    try:
        try:
            return action()
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise


class Snapshot:
    """What the modules of some trees hold (parameters, buffers, hooks, attributes); tensors are kept, not copied.

    Args:
        *roots: the trees.
        tensors_only: only parameters and buffers, which takes a tenth of the time.
    """

    def __init__(self, *roots: nn.Module, tensors_only: bool = False):
        dicts = [module.__dict__ for module in {id(m): m for root in roots for m in root.modules()}.values()]
        if tensors_only:
            holders = [held[name] for held in dicts for name in ("_parameters", "_buffers") if held[name]]
        else:
            holders = [*dicts, *(value for held in dicts for value in held.values() if isinstance(value, (dict, list)))]
        # Restored in place, for handles of hooks know the containers that hold these.
        self._held: list[tuple[Any, Any]] = [(holder, holder.copy()) for holder in holders]
        parameters = {id(p): p for held in dicts for p in held["_parameters"].values()}.values()
        tensors = [t for p in parameters if p is not None for t in (p, p.grad) if t is not None]
        self._data: list[tuple[Tensor, Tensor]] = [(t, t.data) for t in tensors]

    def restore(self) -> None:
        """Put everything back."""
        for holder, content in self._held:
            if isinstance(holder, dict):
                holder.clear()
                holder.update(content)
            else:
                holder[:] = content
        for tensor, data in self._data:
            if tensor.dtype != data.dtype or tensor.device != data.device:
                tensor.data = data
