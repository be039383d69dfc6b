"""`Run`: which run a cache came from, so that it can be run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .running import first_hooked

InitialState = Float[Tensor, "batch pos d_model"] | int | torch.Generator | Literal["zero"] | None

# These arguments make a partial run, which cannot be repeated.
PARTIAL = ("start_at_layer", "stop_at_layer", "start", "stop", "injection", "past_key_values", "use_cache", "loop")
INPUTS = ("attention_mask", "position_ids", "token_type_ids", "prepend_bos", "padding_side")


@dataclass(frozen=True)
class Run:
    """The arguments of one whole run of a model.

    Args:
        input: tokens, or scaled embeddings.
        initial_state: as in `LoopedBridge.forward`; a generator is kept as a copy in the state that it was given in.
        inputs: what else the run was given, such as `attention_mask`.
        hooked: whether hooks were attached that may have changed what the run computed.
    """

    input: Any
    initial_state: Any
    inputs: dict[str, Any]
    hooked: bool

    @classmethod
    def of(cls, model: Any, input: Any, kwargs: dict[str, Any]) -> Run | None:
        """The record of a run that is about to begin; None if it is only a part of one."""
        if any(kwargs.get(name) is not None for name in PARTIAL):
            return None
        return cls(
            _kept(input),
            _kept(kwargs.get("initial_state")),
            {name: _kept(kwargs[name]) for name in INPUTS if kwargs.get(name) is not None},
            first_hooked(model) is not None,
        )

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that repeat the run."""
        return {**self.inputs, "initial_state": rehearsal(self.initial_state)}

    def starts_like(self, other: Any) -> bool:
        """Whether another `initial_state` argument means the same state."""
        mine = self.initial_state
        if isinstance(mine, torch.Generator) and isinstance(other, torch.Generator):
            return torch.equal(mine.get_state(), other.get_state())
        if isinstance(mine, Tensor) and isinstance(other, Tensor):
            return mine.shape == other.shape and torch.equal(mine.to(other.device, other.dtype), other)
        return type(mine) is type(other) and mine == other


def rehearsal(initial_state: Any) -> Any:
    """The same initial state for another run: a generator is not advanced."""
    return initial_state.clone_state() if isinstance(initial_state, torch.Generator) else initial_state


def _kept(value: Any) -> Any:
    """A copy that later edits in place do not reach."""
    return value.detach().clone() if isinstance(value, Tensor) else rehearsal(value)
