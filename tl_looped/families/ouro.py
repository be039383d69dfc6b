"""Ouro: a sandwich-normed stack run `total_ut_steps` times, the final norm and an exit gate after every pass.

The published forward reads every token after the first loop at which the sum of its exit probabilities reaches
`early_exit_threshold`; the last loop is read if none does. Here the last loop is always read, and another threshold than the
released 1.0 is refused. At 1.0 the two differ where the sum rounds to 1.0 before the last loop: in fp32 from `1 - 2^-25` on,
which takes a gate that is nearly sure, in bf16 from `1 - 2^-9` = 0.998 on, which a trained gate reaches. The loop that the
published forward reads is then that of the policy `Gate(1.0)`, whose sums are in the model's dtype as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..kinds import MAX_COUNT, count, number
from ..model.config import LoopedConfig
from ._common import LLAMA_BLOCK, Shapes, Source, decoder_fields, llama_sources, modules
from ._read import get, need, only, unused

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)

# The published names mislead: `input_layernorm_2` follows the attention, `post_attention_layernorm` precedes the MLP.
_BLOCK = {**LLAMA_BLOCK, "ln1_post": "input_layernorm_2", "ln2_post": "post_attention_layernorm_2"}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is an Ouro checkpoint."""
    return config.get("model_type") == "ouro"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    only(config, use_sliding_window=False, use_weighted_exit=False)
    unused(config, "sliding_window max_window_layers chunk_size")  # layer_types, all "full_attention", have the say
    if (threshold := get(config, "early_exit_threshold", 1.0, number(-math.inf))) < 1:
        raise CheckpointError(
            f"this ouro checkpoint has early_exit_threshold={threshold:g}, with which the published forward reads each token "
            "after a loop of its own; only the released 1.0 and null, which read the last loop, are implemented. Set 1.0 in "
            f"config.json; exit_steps and generate take the threshold as a policy, Gate({max(threshold, 0):g})."
        )
    if (step := get(config, "early_exit_step", -1, count(-MAX_COUNT))) >= 0:
        raise CheckpointError(
            f"this ouro checkpoint has early_exit_step={step}, with which the published forward reads loop {step}; this is not "
            f"implemented as an option. Remove it from config.json and load with n_loops={step + 1}."
        )
    return LoopedConfig(
        family="ouro",
        n_core=need(config, "num_hidden_layers", count()),
        n_loops=get(config, "total_ut_steps", 4, count()),
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
