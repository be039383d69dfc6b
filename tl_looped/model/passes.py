"""What happens around the layers of one pass: the injection on the way in, the norm and the exit gate on the way out."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import LoopedConfig
from .layers import RMSNorm, observe


class ConcatInjection(nn.Module):
    """A linear map of the state and the injected embedding side by side (Huginn, retrofits)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.empty(width, 2 * width))

    def forward(
        self, state: Float[Tensor, "batch pos d_model"], injection: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return nn.functional.linear(torch.cat((state, injection), dim=-1), self.weight)


class DecayInjection(nn.Module):
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


class AddInjection(nn.Module):
    """State plus injection (HRM-Text)."""

    def forward(
        self, state: Float[Tensor, "batch pos d_model"], injection: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return state + injection


class PassEnds(nn.Module):
    """The entrance and the exit of one pass; the layers between them belong to the model."""

    def __init__(self, cfg: LoopedConfig, is_last: bool):
        super().__init__()
        kinds = {"concat": ConcatInjection, "decay": DecayInjection}
        self.inject: nn.Module | None = None
        if cfg.injection != "none":
            self.inject = AddInjection() if cfg.injection == "add" else kinds[cfg.injection](cfg.d_model)
            self.hook_injection: nn.Module = nn.Identity()
        self.hook_state: nn.Module = nn.Identity()
        self.hook_in: nn.Module = nn.Identity()
        own_norm = cfg.pass_norm and not (is_last and cfg.pass_norm_is_final)
        self.norm: RMSNorm | None = RMSNorm(cfg.d_model, cfg.norm_eps, cfg.norm_weight) if own_norm else None
        self.step: float | None = 1 / cfg.anchor_steps if cfg.strategy == "anchored" else None
        self.hook_out: nn.Module = nn.Identity()
        self.exit_gate: nn.Linear | None = None
        if cfg.exit_gate:
            self.exit_gate = nn.Linear(cfg.d_model, 1)
            self.hook_exit_logit: nn.Module = nn.Identity()

    def enter(self, state: Tensor, injection: Tensor | None) -> tuple[Tensor, Tensor]:
        """The input of the first layer, and the state after its hooks."""
        state = observe(self.hook_state, state)
        if self.inject is None:
            return observe(self.hook_in, state), state
        return self.hook_in(self.inject(state, observe(self.hook_injection, cast(Tensor, injection)))), state

    def leave(self, x: Tensor, state: Tensor | None, final_norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """The state leaving the pass, and its exit logit. `final_norm` stands in for the pass's own norm in the last pass."""
        norm = self.norm or final_norm
        if norm is not None:
            x = norm(x)
        if self.step is not None and state is not None:
            x = state + (x - state) * self.step
        x = observe(self.hook_out, x)
        return x, None if self.exit_gate is None else self.hook_exit_logit(self.exit_gate(x).squeeze(-1))
