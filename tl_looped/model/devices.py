"""Where the parts of a model lie, and how what a run carries gets to whoever reads it.

A part of a model, such as a layer, lies whole on one device, and all its passes run there. What happens between the layers of
a loop happens where its first layer lies, the home of the loop. Nothing of this is configured: it follows from where the
parameters are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .config import LoopedConfig

T = TypeVar("T")
_TABLES = "value_embeds"


class Carried(dict[str, Tensor]):
    """What is carried beside the stream; reading a tensor brings it to the device of whoever reads, `device`.

    Layers may leave tensors where they lie; as items, they are seen as they were left.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None, device: torch.device | None = None):
        super().__init__(values or {})
        self.device: torch.device | None = device

    def __getitem__(self, name: str) -> Tensor:
        return self._here(super().__getitem__(name))

    def get(self, name: str, default: T = None) -> Tensor | T:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As of a dict."""
        return self._here(super().get(name, default))

    def pop(self, name: str, *default: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As of a dict."""
        return self._here(super().pop(name, *default))

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) and self.device is not None else value


def device_of(module: nn.Module) -> torch.device | None:
    """Where the first parameter of a module lies; None if it has none.

    Args:
        module: a module whose parameters all lie on one device.
    """
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter.device
    return next((at for child in module._modules.values() if child is not None and (at := device_of(child))), None)


def part_of(cfg: LoopedConfig, name: str) -> str:
    """The part of a model that a parameter belongs to: a layer, or what has one name outside the layers.

    Args:
        cfg: the structure.
        name: the canonical name of the parameter.

    Example:
        >>> from tl_looped import LoopedConfig
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3)
        >>> part_of(cfg, "core.1.attn.q.weight"), part_of(cfg, "ln_final.weight")
        ('core.1', 'ln_final')
    """
    parts = name.split(".")
    if parts[0] not in (*cfg.schedule.stacks, _TABLES):
        return parts[0]
    return ".".join(parts[: 4 if parts[2] == "loops" and not cfg.own_parts else 2])


def layer_parts(cfg: LoopedConfig, stack: str, layer: int) -> list[str]:
    """The parts of a model that a physical layer is: one, or one for every loop if they share nothing of it.

    Args:
        cfg: the structure.
        stack: its stack.
        layer: its index in the stack.
    """
    return [f"{stack}.{layer}"] if cfg.own_parts else cfg.layer_names(stack, layer)
