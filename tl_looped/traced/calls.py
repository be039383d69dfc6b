"""One run of a module, call by call: which submodule was called when, inside which, on what, and what it returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

UNKNOWN = -2
# Names under which modules take and return their stream, which may stand behind masks and tables of angles.
STREAMS = ("hidden_states", "last_hidden_state", "hidden", "x", "inputs", "input")


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor of real numbers in what a module takes or returns.

    Args:
        at: the keys that lead to it.
        tensor: the tensor.
        version: how often it had been changed in place.
    """

    at: tuple[Any, ...]
    tensor: Tensor
    version: int

    @property
    def changed(self) -> bool:
        """Whether it was changed in place later."""
        return self.version == UNKNOWN or _version(self.tensor) != self.version


@dataclass(eq=False)
class Call:
    """One call of a submodule.

    Args:
        path: of the submodule, as `named_modules` has it.
        number: which of its calls in the run.
        index: which call of the run, in the order in which they began.
        parent: the call inside which it was made; None for one of the module itself.
        took: the tensors that it was given which may be its stream, until it is settled which is.
        gave: likewise those that it returned.
        inner: the calls made inside it.
        is_open: it has not returned.
        taken: which of the tensors that it was given its hooks see; None where there is none.
        given: which of those that it returned.
        is_one_of_several: others like it go from call to call too.
    """

    path: str
    number: int
    index: int
    parent: Call | None
    took: list[Held] = field(default_factory=list["Held"])
    gave: list[Held] = field(default_factory=list["Held"])
    inner: list[Call] = field(default_factory=list["Call"])
    is_open: bool = True
    taken: Held | None = None
    given: Held | None = None
    is_one_of_several: bool = False

    @property
    def takes(self) -> Tensor | None:
        """The tensor that it was given."""
        return None if self.taken is None else self.taken.tensor

    @property
    def gives(self) -> Tensor | None:
        """The tensor that it returned."""
        return None if self.given is None else self.given.tensor

    def inside(self, path: str) -> str:
        """The path of this call relative to one that it lies in; the path itself outside."""
        return self.path.removeprefix(f"{path}.") if path else self.path

    @property
    def changed(self) -> tuple[bool, bool]:
        """Whether what was taken, and what was given, was changed in place later."""
        return self.taken is not None and self.taken.changed, self.given is not None and self.given.changed


@dataclass(eq=False)
class Calls:
    """A run.

    Args:
        calls: every call of a submodule, in the order in which they began.
        output: what the module returned.
    """

    calls: list[Call]
    output: Any

    def of(self, path: str) -> list[Call]:
        """The calls of one submodule."""
        return [call for call in self.calls if call.path == path]


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; those of inference mode do not say."""
    return UNKNOWN if x.is_inference() else x._version


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by key."""
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in (*(k for k in STREAMS if k in value), *(k for k in value if k not in STREAMS))]
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name, None)) for each in fields(value)]
    return []


def tensors_in(value: Any, at: tuple[Any, ...] = ()) -> list[Held]:
    """The tensors of real numbers in what a module takes or returns.

    Args:
        value: a tensor, or a sequence, a mapping or a dataclass that may hold some.
        at: the keys that lead to it.
    """
    if isinstance(value, Tensor):
        return [Held(at, value, _version(value))] if value.is_floating_point() else []
    return [held for key, part in _parts(value) for held in tensors_in(part, (*at, key))]


def tensor_at(value: Any, at: Sequence[Any]) -> Tensor | None:
    """The tensor of real numbers at a place in what a module takes or returns; None for none.

    Args:
        value: as for `tensors_in`.
        at: the keys that lead to it.
    """
    for key in at:
        value = dict(_parts(value)).get(key)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def likeliest(found: Sequence[Held]) -> Held | None:
    """The first of some tensors that may be a stream, before masks and tables; None for none.

    Args:
        found: the tensors.
    """
    return next((held for held in found if held.tensor.ndim == 3), found[0] if found else None)


def _fitting(found: list[Held], others: Sequence[Held]) -> list[Held]:
    """Those of some tensors that have the shape of others; else the likeliest. What is not held here can be freed."""
    shapes = {held.tensor.shape for held in others if held.tensor.ndim == 3}
    first = likeliest(found)
    return [held for held in found if held.tensor.shape in shapes] or ([] if first is None else [first])


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same numbers at the same place; a slice of everything is.

    Args:
        one: a tensor.
        other: a tensor.
    """
    if one is None or other is None:
        return False
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride())


def replaced(value: Any, at: Sequence[Any], new: Tensor) -> Any:
    """What a module takes or returns, with another tensor at a place.

    Containers beside it are the ones that were given: a module may keep keys in a list that it hands on.

    Args:
        value: as for `tensors_in`.
        at: the keys that lead to the place.
        new: the other tensor.
    """
    if not at:
        return new
    key = at[0]
    part = replaced(dict(_parts(value))[key], at[1:], new)
    kind: Any = type(value)
    if isinstance(value, MutableMapping):  # transformers' outputs are dataclasses too, and set their fields by key
        changed: Any = copy(value)
        changed[key] = part
        return changed
    if isinstance(value, Mapping):
        return kind({name: part if name == key else one for name, one in value.items()})
    if is_dataclass(value):
        changed = copy(value)  # without running its __init__ again
        object.__setattr__(changed, key, part)
        return changed
    parts = [part if i == key else one for i, one in enumerate(value)]
    return kind(*parts) if hasattr(value, "_fields") else kind(parts)


def record(module: nn.Module, run: Callable[[], Any], into: list[Call]) -> Calls:
    """Run a module and write down every call of a submodule.

    Args:
        module: what is run.
        run: runs it.
        into: where calls are written down while the run goes on.
    """
    calls = into
    pending: list[Call] = []
    numbers: dict[str, int] = {}

    def began(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            numbers[path] = numbers.get(path, -1) + 1
            call = Call(path, numbers[path], len(calls), pending[-1] if pending else None, tensors_in((args, kwargs)))
            if call.parent is not None:
                call.parent.inner.append(call)
            calls.append(call)
            pending.append(call)

        return hook

    def ended(_: nn.Module, args: Any, output: Any) -> None:
        call, found = pending.pop(), tensors_in(output)
        call.is_open, call.took, call.gave = False, _fitting(call.took, found), _fitting(found, call.took)

    handles: list[Any] = []
    try:
        for path, submodule in module.named_modules():
            if path:
                handles.append(submodule.register_forward_pre_hook(began(path), with_kwargs=True))
                handles.append(submodule.register_forward_hook(ended, always_call=True))
        with torch.inference_mode(False), torch.no_grad():
            return Calls(calls, run())
    finally:
        for handle in handles:
            handle.remove()
