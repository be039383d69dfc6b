"""HRM-Text: a fast stack L and a slow stack H that add their states to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import LoopedConfig
from ._common import (
    LLAMA_BLOCK,
    Shapes,
    Source,
    attention_rows,
    decoder_fields,
    fused,
    get,
    layers,
    mlp_rows,
    modules,
    need,
    readout,
)

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq", "model.z_H_init")

_BLOCK = {ours: theirs for ours, theirs in LLAMA_BLOCK.items() if not ours.startswith("ln")}
_BLOCK["attn.gate"] = "self_attn.gate_proj"


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is an HRM-Text checkpoint."""
    return config.get("model_type") == "hrm_text"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes. `num_hidden_layers` counts layers only where `num_layers_per_stack` is missing."""
    fields = decoder_fields(config, default_theta=10000.0)
    fields["n_kv_heads"] = 0  # transformers' HRM-Text has as many key heads as query heads, whatever num_key_value_heads says
    if "o" in fields["biases"]:
        fields["biases"] += ("attn_gate",)
    return LoopedConfig(
        family="hrm_text",
        n_core=get(config, "num_layers_per_stack", config.get("num_hidden_layers")) or need(config, "num_layers_per_stack"),
        n_loops=get(config, "H_cycles", 2),
        l_cycles=get(config, "L_cycles", 3),
        norm_weight=False,
        attn_gate=True,
        pass_norm=True,
        final_norm=False,
        injection="add",
        initial_state="learned",
        embed_scale=get(config, "embedding_scale", 1 / get(config, "initializer_range", 0.02)),
        prefix_lm=get(config, "prefix_lm", True),
        **fields,
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored: in the Hub's fused matrices or, after `state_dict()`, one by one."""
    is_fused = any(name.endswith(".gqkv_proj.weight") for name in shapes)
    table = readout(cfg, shapes, "model.embed_tokens", "lm_head")
    found = {"learned_state": Source("model.z_L_init")}
    for at, stack, j, _ in layers(cfg):
        stored = f"model.{stack}_module.layers.{j}"
        table |= {f"{at}.{ours}": f"{stored}.{theirs}" for ours, theirs in _BLOCK.items()}
        if is_fused:
            table |= {f"{at}.attn.o": f"{stored}.attn.o_proj"}
            found |= fused(f"{stored}.attn.gqkv_proj", cfg.d_model, attention_rows(cfg, at, "gate q k v"))
            found |= fused(f"{stored}.mlp.gate_up_proj", cfg.d_model, mlp_rows(cfg, at))
    return modules(cfg, table) | found
