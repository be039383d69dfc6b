"""Modules of which a model has a hundred thousand: they have no containers for hooks before they have hooks.

PyTorch gives every module eleven dictionaries for hooks and a set, 1.6 kB together. In the virtual layers of many loops nearly
all stay empty, and would take more memory than the parameters that the loops share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

from torch import nn

from ..errors import LoopedError


class _NoHooks(OrderedDict[int, Any]):
    """The hooks of all modules that have none."""

    def __setitem__(self, key: int, value: Any) -> NoReturn:
        raise LoopedError(
            f"{value!r} was written into a private dictionary of hooks, which all modules without hooks share; use "
            "register_forward_hook, or another method of the module that registers hooks."
        )


# By what PyTorch says of itself, which differs between its versions.
_HOOKS = [name for name, held in vars(nn.Module()).items() if isinstance(held, dict) and "hooks" in name]
_REGISTERS = [name for name in vars(nn.Module) if "register_" in name and name.endswith(("_hook", "_buffer"))]
_LEFT_OUT = frozenset((*_HOOKS, "_non_persistent_buffers_set", "_is_full_backward_hook"))


class Lean(nn.Module):
    """A module that has containers for hooks only when it has hooks; the last one among the bases of a class."""

    _is_full_backward_hook: bool | None = None
    _non_persistent_buffers_set: Any = frozenset[str]()

    def __init__(self) -> None:
        self.__dict__.update({name: held for name, held in vars(nn.Module()).items() if name not in _LEFT_OUT})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # PyTorch's own would make what is left out


def _register(name: str) -> Callable[..., Any]:
    """One of PyTorch's methods that register a hook or a buffer, for which a module gets containers as any other has."""
    register: Callable[..., Any] = getattr(nn.Module, name)

    @wraps(register)
    def registered(self: Lean, *args: Any, **kwargs: Any) -> Any:
        held = self.__dict__
        if not held.keys() >= _LEFT_OUT:
            held.update({**vars(nn.Module()), **held})
        return register(self, *args, **kwargs)

    return registered


for _name in _HOOKS:
    setattr(Lean, _name, _NoHooks())
for _name in _REGISTERS:
    setattr(Lean, _name, _register(_name))


class Linear(nn.Linear, Lean):
    """An affine map."""
