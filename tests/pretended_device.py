"""Devices that are none: tensors "on" them lie in the CPU's memory, and raise where a tensor of another device meets them.

That is what accelerators do, so a run on them finds tensors made in the wrong place without one. They are as strict as CUDA: a
CPU tensor may meet one of a device if it is a single number, an index, or copied; tensors of two such devices may not meet at
all but in a copy. After `switch_on()` they are known everywhere: `model.to("pretended")`, `torch.arange(3, device="lazy")`. The
second has the name of a backend that torch knows, since torch lets gradients flow on one device of a backend in Python only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME, SECOND = "pretended", "lazy"
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # which take indices of the CPU too


class Pretended(Tensor):
    """A tensor of the pretended device; `numbers` holds them."""

    numbers: Tensor
    on: str
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, on: str) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=f"{on}:0"
        )
        made.numbers, made.on = inner, on
        return made

    def __repr__(self) -> str:
        return f"{self.on} {self.numbers!r}"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Pretended):
            raise RuntimeError(f"set_data: a tensor of {NAME} was given one of the CPU")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.numbers, self.on = value.numbers, value.on

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _pretended(device: Any) -> str | None:
    """Which pretended device this is; None for another one."""
    device = torch.device(device)
    if device.type not in (NAME, SECOND):
        return None
    if device.index:
        raise RuntimeError(f"invalid device ordinal: {device}")
    return device.type


def _check(func: Any, args: Any, kwargs: Any) -> str | None:
    """Raise if tensors of several devices meet; the pretended one of those that are given, if any."""
    packet = func.overloadpacket
    if packet in COPIES:
        return args[0].on if isinstance(args[0], Pretended) else None
    given = pytree.tree_leaves((args[0] if packet in INDEXED else args, kwargs))
    tensors = [x for x in given if isinstance(x, Tensor)]
    if packet in INDEXED:  # a tensor of the CPU is not indexed by a device's, nor one of a device by another one's
        tensors += [x for x in args[1] if x is not None and (isinstance(x, Pretended) or not isinstance(args[0], Pretended))]
        tensors += [args[2]] if len(args) > 2 else []
    there = {x.on for x in tensors if isinstance(x, Pretended)}
    wrong = [tuple(x.shape) for x in tensors if not isinstance(x, Pretended) and x.ndim > 0]
    if len(there) > 1 or (there and wrong):
        on = sorted(there) + [f"the CPU {wrong}"] * bool(wrong)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got some of {', '.join(on)}.")
    return next(iter(there), None)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten._fused_sdp_choice.default:
        return 0  # the attention that is written out
    if func is aten._efficientzerotensor.default:
        func = aten.zeros.default
    on = _check(func, args, kwargs)
    if (device := kwargs.get("device")) is not None:
        on = _pretended(device)
        kwargs = kwargs | {"device": "cpu"} if on is not None else kwargs
    made: dict[int, Tensor] = {}

    def bare(x: Any) -> Any:
        if isinstance(x, Pretended):
            made[id(x.numbers)] = x
            return x.numbers
        return x

    if isinstance(kwargs.get("generator"), torch.Generator) and kwargs["generator"].device.type != "cpu":
        raise RuntimeError("a generator of the pretended device cannot be had")
    found = func(*pytree.tree_map(bare, args), **pytree.tree_map(bare, kwargs))

    def dressed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        before = made.get(id(x))
        if before is not None and on == before.on:
            return before
        return x if on is None else Pretended(x, on)

    # What was resized or transposed in place changes the tensor outside too.
    return pytree.tree_map(dressed, found)


@functools.cache
def switch_on() -> None:
    """Make the devices known to torch; they stay known for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")

    def fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(func, args, kwargs)

    def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        (target.numbers if isinstance(target, Pretended) else target).copy_(
            source.numbers if isinstance(source, Pretended) else source
        )
        return target

    aten_library = torch.library.Library("aten", "IMPL")
    for name in ("empty.memory_format", "empty_strided", "triu_indices", "_efficientzerotensor"):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")
        for key in ("PrivateUse1", "Lazy"):
            aten_library.impl(name, functools.partial(fallback, op), key)
    for key in ("PrivateUse1", "Lazy"):
        aten_library.impl("_copy_from", copy, key)
    switch_on.libraries = (library, aten_library)
