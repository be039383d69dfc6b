"""One run of a module, call by call: which submodule was called when, inside which, on what, and what it returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

UNKNOWN = -2
# Names under which modules take and return their stream, which may stand behind masks and tables of angles.
STREAMS = ("hidden_states", "last_hidden_state", "hidden", "x", "inputs", "input")


@dataclass(eq=False)
class Call:
    """One call of a submodule.

    Args:
        path: of the submodule, as `named_modules` has it.
        number: which of its calls in the run.
        index: which call of the run, in the order in which they began.
        parent: the call inside which it was made; None for one of the module itself.
        takes: the first tensor of real numbers that it was given; None for none.
        gives: the first one that it returned.
        inner: the calls made inside it.
        versions: how often the two tensors had been changed in place.
    """

    path: str
    number: int
    index: int
    parent: Call | None
    takes: Tensor | None = None
    gives: Tensor | None = None
    inner: list[Call] = field(default_factory=list["Call"])
    versions: list[int] = field(default_factory=list[int])

    def inside(self, path: str) -> str:
        """The path of this call relative to one that it lies in; the path itself outside."""
        return self.path.removeprefix(f"{path}.") if path else self.path

    @property
    def changed(self) -> tuple[bool, bool]:
        """Whether what was taken, and what was given, was changed in place later."""
        took, gave = (_version(x) for x in (self.takes, self.gives))
        return took != self.versions[0] or took == UNKNOWN, gave != self.versions[1] or gave == UNKNOWN


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


def _version(x: Tensor | None) -> int:
    """How often a tensor was changed in place; those of inference mode do not say."""
    return -1 if x is None else UNKNOWN if x.is_inference() else x._version


def tensor_in(value: Any) -> Tensor | None:
    """The first tensor of real numbers in what a module takes or returns; None for none.

    Args:
        value: a tensor, or a sequence or a mapping that may hold some.
    """
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = [value[key] for key in (*(k for k in STREAMS if k in value), *(k for k in value if k not in STREAMS))]
    if isinstance(value, (tuple, list)):
        return next((found for found in map(tensor_in, value) if found is not None), None)
    return None


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same numbers at the same place; a slice of everything is.

    Args:
        one: a tensor.
        other: a tensor.
    """
    if one is None or other is None:
        return False
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride())


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """What a module takes or returns, with another tensor in the place of one.

    Containers without it are the ones that were given: a module may keep keys in a list that it hands on.

    Args:
        value: as for `tensor_in`.
        old: the tensor that is there now.
        new: the other one.
    """
    if value is old:
        return new
    if isinstance(value, Mapping):
        items = {key: replaced(part, old, new) for key, part in value.items()}
        if all(items[key] is part for key, part in value.items()):
            return value
        kind: Any = type(value)
        return kind(**items) if hasattr(value, "to_tuple") else kind(items)  # transformers' outputs take fields
    if isinstance(value, (tuple, list)):
        parts = [replaced(part, old, new) for part in value]
        if all(one is other for one, other in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


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
            took = tensor_in((args, kwargs))
            call = Call(path, numbers[path], len(calls), pending[-1] if pending else None, took)
            call.versions.append(_version(took))
            if call.parent is not None:
                call.parent.inner.append(call)
            calls.append(call)
            pending.append(call)

        return hook

    def ended(_: nn.Module, args: Any, output: Any) -> None:
        call = pending.pop()
        call.gives = tensor_in(output)
        call.versions.append(_version(call.gives))

    handles: list[Any] = []
    try:
        for path, submodule in module.named_modules():
            if path:
                handles.append(submodule.register_forward_pre_hook(began(path), with_kwargs=True))
                handles.append(submodule.register_forward_hook(ended))
        with torch.inference_mode(False), torch.no_grad():
            return Calls(calls, run())
    finally:
        for handle in handles:
            handle.remove()
