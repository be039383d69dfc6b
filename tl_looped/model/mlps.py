"""The MLPs of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .config import LoopedConfig
from .lean import Lean, Linear
from .norms import RMSNorm, norm_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def _half_square(x: Tensor) -> Tensor:
    return 0.5 * F.relu(x).square()


class MLP(Lean):
    """`down(post)`; `post` is `act(gate(x)) * up(x)`, `act(up(x))` or Parcae's `relu(up(x))^2 / 2`, normed if `inner_norm`."""

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        gated = cfg.mlp == "gated"
        self.act: Callable[[Tensor], Tensor] = _half_square if cfg.mlp == "relu_squared" else ACTIVATIONS[cfg.act_fn]
        self.gate: nn.Linear | None = Linear(cfg.d_model, cfg.d_mlp, bias="gate" in cfg.biases) if gated else None
        self.up: nn.Linear = Linear(cfg.d_model, cfg.d_mlp, bias="in" in cfg.biases)
        self.inner_norm: RMSNorm | None = norm_of(cfg, cfg.d_mlp) if cfg.inner_norm else None
        self.down: nn.Linear = Linear(cfg.d_mlp, cfg.d_model, bias="out" in cfg.biases)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        post = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(post if self.inner_norm is None else self.inner_norm(post))
