"""What hooks can know of the run that they are part of."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor, nn


@runtime_checkable
class KeyValueCache(Protocol):
    """What the model needs of a key-value cache; transformers' `DynamicCache` is one."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new positions, and return those that the layer reads."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions are kept."""
        ...


@dataclass(eq=False, kw_only=True)
class Running:
    """A run, or a step of a generation, while it goes on.

    Args:
        cache: the keys and values that it keeps; None for none.
        past: positions of the text before the first one that is run.
        real: which positions of the text are no padding; None for all.
    """

    cache: KeyValueCache | None = None
    past: int = 0
    real: Bool[Tensor, "batch key"] | None = None

    def enter(self) -> None:
        """What runs from now on is part of this."""
        _running.set(weakref.ref(self))


_running: ContextVar[weakref.ref[Running] | None] = ContextVar("running", default=None)


def running() -> Running | None:
    """The run that goes on; an object of its own in every run, and in every step of a generation."""
    reference = _running.get()
    return None if reference is None else reference()


def is_observed(slot: nn.Module) -> bool:
    """Whether a hook is attached to a slot."""
    return bool(slot._forward_hooks or slot._forward_pre_hooks or slot._backward_hooks or slot._backward_pre_hooks)


def first_hooked(model: Any) -> str | None:
    """The name of a hook point of a model that has a hook; None if none has.

    Args:
        model: a model with a `hook_dict`.
    """
    return next((name for name, point in model.hook_dict.items() if is_observed(point)), None)
