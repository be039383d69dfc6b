"""A device that is none: tensors "on" it lie in the CPU's memory, and raise where a tensor of the CPU meets them.

That is what an accelerator does, so a run on this device finds tensors made in the wrong place without one. It is as strict as
CUDA: a CPU tensor may meet one of the device if it is a single number, an index, or copied. After `switch_on()` the device is
called "pretended" everywhere: `model.to("pretended")`, `torch.arange(3, device="pretended")`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # which take indices of the CPU too


class Pretended(Tensor):
    """A tensor of the pretended device; `numbers` holds them."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=f"{NAME}:0"
        )
        made.numbers = inner
        return made

    def __repr__(self) -> str:
        return f"{NAME} {self.numbers!r}"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Pretended):
            raise RuntimeError(f"set_data: a tensor of {NAME} was given one of the CPU")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.numbers = value.numbers

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


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Raise if tensors of both devices meet."""
    packet = func.overloadpacket
    if packet in COPIES:
        return
    given = pytree.tree_leaves((args[0] if packet in INDEXED else args, kwargs))
    tensors = [x for x in given if isinstance(x, Tensor)]
    if packet in INDEXED and not isinstance(args[0], Pretended):
        tensors += [x for x in args[1] if x is not None]  # a tensor of the CPU is not indexed by the device's
    if packet in INDEXED and len(args) > 2:
        tensors.append(args[2])
    wrong = [tuple(x.shape) for x in tensors if not isinstance(x, Pretended) and x.ndim > 0]
    if wrong and any(isinstance(x, Pretended) for x in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} got {wrong} of the CPU and others of {NAME}."
        )


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten._fused_sdp_choice.default:
        return 0  # the attention that is written out
    _check(func, args, kwargs)
    device = kwargs.get("device")
    there = device is None or torch.device(device).type == NAME
    made: dict[int, Tensor] = {}

    def bare(x: Any) -> Any:
        if isinstance(x, Pretended):
            made[id(x.numbers)] = x
            return x.numbers
        return x

    if device is not None and there:
        kwargs = kwargs | {"device": "cpu"}
    if isinstance(kwargs.get("generator"), torch.Generator) and kwargs["generator"].device.type != "cpu":
        raise RuntimeError("a generator of the pretended device cannot be had")
    found = func(*pytree.tree_map(bare, args), **pytree.tree_map(bare, kwargs))

    def dressed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return made.get(id(x)) if id(x) in made else Pretended(x) if there else x

    # What was resized or transposed in place changes the tensor outside too.
    return pytree.tree_map(dressed, found)


@functools.cache
def switch_on() -> None:
    """Make the device known to torch; it stays known for the rest of the process."""
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
    for name in ("empty.memory_format", "empty_strided"):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")
        aten_library.impl(name, functools.partial(fallback, op), "PrivateUse1")
    aten_library.impl("_copy_from", copy, "PrivateUse1")
    switch_on.libraries = (library, aten_library)
