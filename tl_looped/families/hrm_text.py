"""HRM-Text: a fast stack L and a slow stack H that add their states to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..kinds import count, flag, number
from ..model.config import LoopedConfig
from ._common import (
    LLAMA_BLOCK,
    Shapes,
    Source,
    attention_rows,
    decoder_fields,
    fused,
    layers,
    mlp_rows,
    modules,
    readout,
    stored_layers,
)
from ._read import get, unused

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq", "model.z_H_init")

_BLOCK = {ours: theirs for ours, theirs in LLAMA_BLOCK.items() if not ours.startswith("ln")}
_BLOCK["attn.gate"] = "self_attn.gate_proj"


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is an HRM-Text checkpoint."""
    return config.get("model_type") == "hrm_text"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    fields = decoder_fields(config, default_theta=10000.0)
    fields["n_kv_heads"] = 0  # transformers' HRM-Text has as many key heads as query heads, whatever num_key_value_heads says
    if "o" in fields["biases"]:
        fields["biases"] += ("attn_gate",)
    unused(config, "L_bp_cycles")
    n_loops, l_cycles = get(config, "H_cycles", 2, count()), get(config, "L_cycles", 3, count())
    return LoopedConfig(
        family="hrm_text",
        n_core=_layers_per_stack(config, shapes, n_loops * (l_cycles + 1)),
        n_loops=n_loops,
        l_cycles=l_cycles,
        norm_weight=False,
        attn_gate=True,
        pass_norm=True,
        final_norm=False,
        injection="add",
        initial_state="learned",
        embed_scale=get(config, "embedding_scale", 1 / get(config, "initializer_range", 0.02, number(above=True)), number()),
        prefix_lm=get(config, "prefix_lm", True, flag),
        **fields,
    )


def _layers_per_stack(config: Mapping[str, Any], shapes: Shapes, n_passes: int) -> int:
    """Layers of each stack, counted in the tensors where `num_layers_per_stack` does not say it.

    `num_hidden_layers` counts them, those of both stacks (the official converter) or attention invocations.
    """
    total = get(config, "num_hidden_layers", None, count())
    if (n := get(config, "num_layers_per_stack", None, count())) is not None:
        return n
    stored = stored_layers(shapes, "model.L_module.layers.")
    if not stored or total not in (None, stored, 2 * stored, n_passes * stored):
        raise CheckpointError(
            f"config.json has num_hidden_layers={total} and no num_layers_per_stack, but the tensors are those of {stored} "
            "layers in model.L_module. Write the number of layers of one stack as num_layers_per_stack into config.json."
        )
    return stored


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
