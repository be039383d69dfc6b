"""Nanbeige4.2: a Llama whose whole stack runs `num_loops` times, with the final norm after every pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import LoopedConfig
from ._common import Shapes, Source, decoder_fields, get, llama_sources, need, only

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)

# Options of the published class that the released checkpoints leave off.
_OFF = (
    "loop_middle_layers loop_share_kv enable_hyper_connection enable_mhc enable_h_res_identity "
    "enable_depth_attention qk_layernorm insert_ngram_layer_idx ngram_insert_all_layers emb_neighbor_num"
)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a Nanbeige checkpoint."""
    return config.get("model_type") == "nanbeige"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    only(config, **dict.fromkeys(_OFF.split(), False))
    weights = config.get("loop_loss_weights")
    n_loops = len(weights) + 1 if weights else get(config, "num_loops", 1)
    inner_norm = not get(config, "skip_loop_final_norm", False)
    return LoopedConfig(
        family="nanbeige",
        n_core=need(config, "num_hidden_layers"),
        n_loops=1 if config.get("enable_double_loop_split") else n_loops,
        pass_norm=inner_norm,
        final_norm=not inner_norm,
        **decoder_fields(config, default_theta=10000.0),
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    return llama_sources(cfg, shapes)
