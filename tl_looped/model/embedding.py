"""The embedding of tokens and positions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import LoopedConfig


class Embedding(nn.Embedding):
    """Token embedding times the family's scale, plus that of the position where the family has one."""

    def __init__(self, cfg: LoopedConfig):
        super().__init__(cfg.d_vocab, cfg.d_model)
        self.scale: float = cfg.embed_scale
        self.positions: nn.Parameter | None = None
        if cfg.learned_positions:
            self.positions = nn.Parameter(torch.zeros(cfg.n_ctx, cfg.d_model))

    def forward(
        self, input: Int[Tensor, "batch pos"], position_ids: Int[Tensor, "*rows pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        embed = super().forward(input)
        embed = embed if self.scale == 1.0 else embed * self.scale
        if self.positions is None:
            return embed
        return embed + self.positions[position_ids]
