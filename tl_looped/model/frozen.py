"""The modules on the way of the residual stream, with what they compute from it held: linear maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .loops import Apply


def apply_module(module: Any, *inputs: Tensor) -> Tensor:
    """A module, in the dtype and on the device of its inputs, over any leading axes.

    Args:
        module: the module, or a component around it.
        *inputs: what it reads, [..., d_model].
    """
    plain: nn.Module = getattr(module, "_original_component", module)
    weights = {name: p.detach().to(inputs[0].device, inputs[0].dtype) for name, p in plain.named_parameters()}
    flat = tuple(x.reshape(1, -1, x.shape[-1]) for x in torch.broadcast_tensors(*inputs))
    return torch.func.functional_call(plain, weights, flat).reshape(inputs[0].shape)


def frozen(read: Callable[[str], Tensor]) -> Apply:
    """The modules around the layers with norms and gates held at their values in a run, which are linear maps.

    Args:
        read: what a hook saw in the run, by its name.
    """

    def apply(module: Any, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
        if name.rpartition(".")[2].startswith("hook_"):
            return read(name)
        plain: Any = getattr(module, "_original_component", module)
        if not hasattr(plain, "frozen"):
            return apply_module(plain, *inputs)
        return plain.frozen(*inputs, *(read(f"{name}.{hook}") for hook in plain.HELD))

    return apply
