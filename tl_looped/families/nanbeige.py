"""Nanbeige4.2: a Llama whose whole stack runs `num_loops` times, with the final norm after every pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..kinds import count, flag, number, several
from ..model.config import LoopedConfig
from ._common import Shapes, Source, decoder_fields, llama_sources
from ._read import get, need, only, unused

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)

# Options of the published class that the released checkpoints leave off.
_OFF = (
    "loop_middle_layers loop_share_kv enable_hyper_connection enable_mhc enable_h_res_identity "
    "enable_depth_attention qk_layernorm insert_ngram_layer_idx ngram_insert_all_layers emb_neighbor_num"
)


# Sizes of these options, without effect where they are off.
_SIZES = "hc_* mhc_* ngram_* emb_* hyper_connection_* depth_attention_*"


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a Nanbeige checkpoint."""
    return config.get("model_type") == "nanbeige"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    only(config, **dict.fromkeys(_OFF.split(), False))
    unused(config, _SIZES)
    weights = get(config, "loop_loss_weights", (), several(number(-math.inf)))
    n_loops = get(config, "num_loops", 1, count())
    inner_norm = not get(config, "skip_loop_final_norm", False, flag)
    return LoopedConfig(
        family="nanbeige",
        n_core=need(config, "num_hidden_layers", count()),
        n_loops=1 if get(config, "enable_double_loop_split", False, flag) else len(weights) + 1 if weights else n_loops,
        pass_norm=inner_norm,
        final_norm=not inner_norm,
        **decoder_fields(config, default_theta=10000.0),
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    return llama_sources(cfg, shapes)
