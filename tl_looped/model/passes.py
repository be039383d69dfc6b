"""The ends of a pass: its slots, its modules, and the maps by which something is injected."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import LoopedConfig
from .lean import Lean


class ConcatInjection(Lean):
    """A linear map of the state and the injected embedding side by side (Huginn, retrofits)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.empty(width, 2 * width))

    def forward(
        self, state: Float[Tensor, "batch pos d_model"], injection: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return nn.functional.linear(torch.cat((state, injection), dim=-1), self.weight)


class DecayInjection(Lean):
    """Parcae's discretised linear system: `exp(-dt A) state + dt B injection`; `A = exp(A_log)`, `dt = softplus(dt_bias)`."""

    def __init__(self, width: int):
        super().__init__()
        self.A_log: nn.Parameter = nn.Parameter(torch.zeros(width))
        self.dt_bias: nn.Parameter = nn.Parameter(torch.zeros(width))
        self.B: nn.Parameter = nn.Parameter(torch.empty(width, width))

    def forward(
        self, state: Float[Tensor, "batch pos d_model"], injection: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        dt = nn.functional.softplus(self.dt_bias)
        return torch.exp(-dt * self.A_log.exp()) * state + dt * nn.functional.linear(injection, self.B)


class AddInjection(Lean):
    """State plus injection (HRM-Text)."""

    def forward(
        self, state: Float[Tensor, "batch pos d_model"], injection: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return state + injection


PASS_NAMES = {"norm": "pass_norm"}  # canonical names of the parts of a pass, where they are not those of their modules
INJECTIONS: dict[str, Callable[[int], nn.Module]] = {
    "add": lambda width: AddInjection(),
    "concat": ConcatInjection,
    "decay": DecayInjection,
}


class PassEnds(Lean):
    """The slots and modules at the entrance and the exit of one pass; the loop kind calls them.

    Args:
        cfg: the structure.
        parts: the modules that the loop kind has there.
    """

    def __init__(self, cfg: LoopedConfig, parts: dict[str, nn.Module]):
        super().__init__()
        if cfg.injection != "none":
            self.hook_injection: nn.Module = nn.Identity()
        self.hook_state: nn.Module = nn.Identity()
        self.hook_in: nn.Module = nn.Identity()
        self.hook_out: nn.Module = nn.Identity()
        if cfg.exit_gate:
            self.hook_exit_logit: nn.Module = nn.Identity()
        for name, part in parts.items():
            setattr(self, name, part)
