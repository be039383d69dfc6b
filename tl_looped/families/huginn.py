"""Huginn-0125: a latent state from noise, norms on the stream, the prelude's output concatenated at every pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..kinds import count, flag, number, table
from ..model.config import LoopedConfig
from ._common import Shapes, Source, activation, attention_rows, fused, layers, mlp_rows, modules, readout
from ._read import get, need, only, unused

TIED = ("transformer.wte.weight", "lm_head.weight")
IGNORED = ("freqs_cis",)

_BLOCK = {"ln1": "norm_1", "ln1_stream": "norm_2", "ln2": "norm_3", "ln2_stream": "norm_4"}
# Keys of the published class that only training or initialisation reads.
_UNUSED = (
    "activation_checkpoint_impl architecture_class_name effective_expected_depth init_orthogonal init_strategy "
    "mean_backprop_depth hidden_size n_layers num_hidden_layers padding_multiple sampling_scheme test_time_noise_type"
)
_STACKS = {"prelude": "prelude", "core": "core_block", "coda": "coda"}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is Huginn; retrofits share its class name and model_type, but have two norms per block."""
    return config.get("model_type") == "huginn_raven" and any(name.endswith(".norm_3.weight") for name in shapes)


def raven_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that Huginn and the retrofits have in common."""
    only(config, bias=False, test_time_noise=0, state_init="like-init", injection_type="linear", mlp_class_name="GatedMLP")
    only(config, block_class_name="SandwichBlock", norm_class_name="RMSNorm_llama")
    unused(config, _UNUSED)
    size, heads = get(config, "vocab_size", None, count()), get(config, "num_attention_heads", None, count())
    return {
        "d_model": need(config, "n_embd", count()),
        "n_heads": get(config, "n_heads", heads, count()) or need(config, "n_heads"),
        "n_kv_heads": get(config, "num_key_value_heads", 0, count()),
        "d_head": get(config, "head_dim", 0, count()),
        "d_mlp": need(config, "intermediate_size", count()),
        "d_vocab": get(config, "padded_vocab_size", size, count()) or need(config, "padded_vocab_size"),
        "n_prelude": need(config, "n_layers_in_prelude", count(0)),
        "n_core": need(config, "n_layers_in_recurrent_block", count()),
        "n_coda": need(config, "n_layers_in_coda", count(0)),
        "n_loops": need(config, "mean_recurrence", count()),
        "act_fn": activation(config, "nonlin_name"),
        "injection": "concat",
        "initial_state": "noise",
    }


def raven_tied(config: Mapping[str, Any], default: bool) -> bool:
    """Whether the embeddings are tied; transformers writes its own key beside the one that the published class reads."""
    tied = get(config, "tie_embeddings", get(config, "tie_word_embeddings", default, flag), flag)
    only(config, tie_word_embeddings=tied)
    return tied


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    fields = raven_fields(config)
    width, biased = fields["d_model"], get(config, "qk_bias", True, flag)
    noise_std, scale = (2 / (5 * width)) ** 0.5, width**0.5
    unused(config, "rope_theta max_position_embeddings")  # the published code reads rope_base and block_size
    # The published class writes these numbers next to the width that they follow from.
    init = get(config, "init_values", {}, table)
    for key, follows in (("std", noise_std), ("embed_scale", scale)):
        if not math.isclose(found := get(init, key, follows, number()), follows, rel_tol=1e-3):
            raise CheckpointError(
                f"this huginn_raven checkpoint has init_values[{key!r}]={found:g}, but {follows:g} follows from n_embd="
                f"{width}; only the number that follows is implemented. Restore the published config.json."
            )
    if biased and fields["n_kv_heads"] not in (0, fields["n_heads"]):
        raise CheckpointError(
            f"this huginn_raven checkpoint has qk_bias with num_key_value_heads={fields['n_kv_heads']} for "
            f"n_heads={fields['n_heads']}, which the published model cannot run; only equal numbers are implemented."
        )
    return LoopedConfig(
        family="huginn",
        n_ctx=get(config, "block_size", 4096, count()),
        norm="stream",
        norm_eps=get(config, "norm_eps", 1e-6, number()),
        biases=("q", "k") if biased else (),
        rope_layout="pairs",
        rope_theta=get(config, "rope_base", 50000.0, number(1.0, above=True)),
        noise_std=noise_std,
        noise_scale=scale,
        embed_scale=scale,
        after_loop="final_norm",
        tied=raven_tied(config, True),
        **fields,
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    found = raven_sources(cfg, shapes, _BLOCK)
    for at, stack, j, _ in layers(cfg) if cfg.biases else ():
        stored, shape = f"transformer.{_STACKS[stack]}.{j}.attn.qk_bias", (2, 1, cfg.n_heads, cfg.d_head)
        found[f"{at}.attn.q.bias"] = Source(stored, 0, shape)
        found[f"{at}.attn.k.bias"] = Source(stored, cfg.n_heads * cfg.d_head, shape)
    return found


def raven_sources(cfg: LoopedConfig, shapes: Shapes, block: Mapping[str, str]) -> dict[str, Source]:
    """Sources of everything but biases; `block` names the norms of a block, which differ between Huginn and the retrofits."""
    table = {"inject": "transformer.adapter", "ln_final": "transformer.ln_f"}
    table |= readout(cfg, shapes, "transformer.wte", "lm_head")
    found: dict[str, Source] = {}
    for at, stack, j, _ in layers(cfg):
        stored = f"transformer.{_STACKS[stack]}.{j}"
        table |= {f"{at}.attn.o": f"{stored}.attn.proj", f"{at}.mlp.down": f"{stored}.mlp.proj"}
        table |= {f"{at}.{ours}": f"{stored}.{theirs}" for ours, theirs in block.items()}
        found |= fused(f"{stored}.attn.Wqkv", cfg.d_model, attention_rows(cfg, at, "q k v"))
        found |= fused(f"{stored}.mlp.fc", cfg.d_model, mlp_rows(cfg, at))
    return found | modules(cfg.replace(biases=()), table)
