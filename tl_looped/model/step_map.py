"""One loop as a function of the state: what dynamics can be studied on, at any state and with gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..record import InitialState
from .inputs import masks_of, positions_of
from .jvp import jvp
from .layers import Inputs
from .looped_model import LoopedModel
from .loops import Stream


class StepMap:
    """The map from the states entering a loop to those leaving it, for one batch of prompts.

    A state has one part per looped stack, HRM-Text's [L, H] two and all others one. Applied again and again to `start` it gives
    the states that the model has after every loop (`hook_out` of its passes).

    Args:
        model: the model; its hooks do not act.
        tokens: what it runs on.
        initial_state: as in `LoopedBridge.forward`.
    """

    def __init__(self, model: LoopedModel, tokens: Int[Tensor, "batch pos"], initial_state: InitialState = None):
        # A second loop, so that the first one is not the last, which may end otherwise.
        self.twin: LoopedModel = (twin := model.unrolled(2))
        schedule = twin.cfg.schedule
        self.stacks: tuple[str, ...] = tuple(schedule.core_stacks)
        self.stop: int = schedule.pass_of_loop(0).layers.stop
        self.layers: range = range(schedule.n_prelude, self.stop + 1)
        with torch.no_grad():
            x = twin._embed(tokens, None, None, None, None, 0)
            positions = positions_of(twin.cfg, x, None, None, 0)
            self.inputs: Inputs = Inputs(
                rope=twin.rotary(positions),
                masks=masks_of(twin.cfg, x, None, None, 0),
                value_embeds=twin._value_embeds(tokens),
                positions=positions,
            )
            for i in range(schedule.n_prelude):
                x = twin.layer(i, x, self.inputs)
            self.begun: dict[str, Tensor] = twin.begin(x, initial_state, positions)
            self.start: Float[Tensor, "stack batch pos d_model"] = torch.stack([self.begun[stack] for stack in self.stacks])

    def __call__(self, states: Float[Tensor, "stack batch pos d_model"]) -> Float[Tensor, "stack batch pos d_model"]:
        stream = Stream(states[0])
        begun = self.begun | dict(zip(self.stacks, states, strict=True))
        for i in self.twin.steps(stream, self.layers, self.inputs, False, lambda _: begun):
            if i == self.stop:
                break
        return torch.stack([stream.carried[stack] for stack in self.stacks])

    @torch.no_grad()
    def jvp(
        self, states: Float[Tensor, "stack batch pos d_model"], tangents: Float[Tensor, "direction stack batch pos d_model"]
    ) -> Float[Tensor, "direction stack batch pos d_model"]:
        """The Jacobian at a state times each of several directions; exact, in forward mode."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            return torch.stack([jvp(self, (states,), (v,)) for v in tangents])
