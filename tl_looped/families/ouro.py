"""Ouro: a sandwich-normed stack run `total_ut_steps` times, the final norm and an exit gate after every pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import LoopedConfig
from ._common import LLAMA_BLOCK, Shapes, Source, decoder_fields, get, llama_sources, modules, need, only

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)

# The published names mislead: `input_layernorm_2` follows the attention, `post_attention_layernorm` precedes the MLP.
_BLOCK = {**LLAMA_BLOCK, "ln1_post": "input_layernorm_2", "ln2_post": "post_attention_layernorm_2"}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is an Ouro checkpoint."""
    return config.get("model_type") == "ouro"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    only(config, use_sliding_window=False)
    return LoopedConfig(
        family="ouro",
        n_core=need(config, "num_hidden_layers"),
        n_loops=get(config, "total_ut_steps", 4),
        norm="sandwich",
        pass_norm=True,
        final_norm=False,
        exit_gate=True,
        **decoder_fields(config, default_theta=10000.0),
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    gate = modules(cfg, {"exit_gate": "model.early_exit_gate"})
    return {**llama_sources(cfg, shapes, _BLOCK), **gate, "exit_gate.bias": Source("model.early_exit_gate.bias")}
