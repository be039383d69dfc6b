"""Rotary angles."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..config import LoopedConfig


def inverse_frequencies(cfg: LoopedConfig) -> tuple[Float[Tensor, " half"], float]:
    """Frequencies [d_head / 2] and the factor on cos and sin, by transformers' own rules for scaled ones."""
    scaling = {k: v for k, v in (cfg.rope_scaling or {}).items() if v is not None}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        exponent = torch.arange(0, cfg.d_head, 2, dtype=torch.float32, device="cpu") / cfg.d_head
        return 1.0 / cfg.rope_theta**exponent, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama = LlamaConfig(
        hidden_size=cfg.d_head * cfg.n_heads,
        num_attention_heads=cfg.n_heads,
        head_dim=cfg.d_head,
        max_position_embeddings=cfg.n_ctx,
        rope_parameters={**scaling, "rope_type": kind, "rope_theta": cfg.rope_theta},
    )
    with torch.device("cpu"):  # these functions also create tensors on the default device, "meta" while loading
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](llama, torch.device("cpu"))
    return frequencies.to(torch.float32), float(factor)


class Rotary:
    """cos and sin for positions; no parameters, hence no module."""

    def __init__(self, cfg: LoopedConfig):
        frequencies, factor = inverse_frequencies(cfg)
        self.frequencies: Float[Tensor, " half"] = frequencies
        self.factor: float = factor

    def __call__(self, position_ids: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [batch, pos, d_head / 2], fp32."""
        self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids.unsqueeze(-1).float() * self.frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor
