"""Rotary angles."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .config import LoopedConfig


def inverse_frequencies(cfg: LoopedConfig, base: float) -> tuple[Float[Tensor, " half"], float]:
    """Frequencies [d_head / 2] and the factor on cos and sin, by transformers' own rules for scaled ones."""
    scaling = {k: v for k, v in (cfg.rope_scaling or {}).items() if v is not None}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        exponent = torch.arange(0, cfg.d_head, 2, dtype=torch.float32, device="cpu") / cfg.d_head
        return 1.0 / base**exponent, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama = LlamaConfig(
        hidden_size=cfg.d_head * cfg.n_heads,
        num_attention_heads=cfg.n_heads,
        head_dim=cfg.d_head,
        max_position_embeddings=cfg.n_ctx,
        rope_parameters={**scaling, "rope_type": kind, "rope_theta": base},
    )
    with torch.device("cpu"):  # these functions also create tensors on the default device, "meta" while loading
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](llama, torch.device("cpu"))
    return frequencies.to(torch.float32), float(factor)


Angles = tuple[Float[Tensor, "batch pos half"], Float[Tensor, "batch pos half"]]


class Rotary:
    """cos and sin for positions, by the base of the frequencies; no parameters, hence no module."""

    def __init__(self, cfg: LoopedConfig):
        bases = {cfg.rope_base(i) for i in range(cfg.n_physical)} if cfg.rope_layout != "none" else set[float]()
        self.frequencies: dict[float, Float[Tensor, " half"]] = {}
        self.factor: float = 1.0
        self.precision: torch.dtype = getattr(torch, cfg.rope_precision)
        for base in sorted(bases):
            self.frequencies[base], self.factor = inverse_frequencies(cfg, base)

    def __call__(self, position_ids: Int[Tensor, "batch pos"]) -> dict[float, Angles]:
        """Cosines and sines by base, each [batch, pos, d_head / 2], fp32."""
        found: dict[float, Angles] = {}
        for base, frequencies in self.frequencies.items():
            self.frequencies[base] = frequencies = frequencies.to(position_ids.device)
            angles = position_ids.unsqueeze(-1).float() * frequencies
            cos, sin = ((f(angles) * self.factor).to(self.precision).float() for f in (torch.cos, torch.sin))
            found[base] = (cos, sin)
        return found
