"""Parcae: a decaying latent state, value embeddings that every pass reads, squared-ReLU MLPs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..kinds import count, flag, number, table
from ..model.config import LoopedConfig
from ._common import Shapes, Source, layers, modules, readout
from ._read import Recorded, get, need, only, unused

TIED = ("transformer.wte.weight", "lm_head.weight")
# A value embedding acts only where a layer has both the table and the gate; published checkpoints hold some without partner.
IGNORED = ("freqs_cis", "value_embeds.*.weight", "*.attn.ve_gate.weight")

_BLOCK = {
    **{"ln1": "norm_1", "ln2": "norm_2", "mlp.up": "mlp.fc", "mlp.down": "mlp.proj"},
    **{"attn.q": "attn.c_q", "attn.k": "attn.c_k", "attn.v": "attn.c_v", "attn.o": "attn.c_proj"},
}
_TABLE = re.compile(r"value_embeds\.(\d{1,9})\.weight")
_GATE = re.compile(r"transformer\.(prelude|core_block|coda)\.(\d{1,9})\.attn\.ve_gate\.weight")
# Keys of the published class that only training reads, or that choose between kernels. recurrent_iteration_method samples a
# depth in a forward that was not given one; generation takes mean_recurrence, as here.
_UNUSED = (
    "activation_checkpoint_impl attn_impl curriculum_target hf_config init_orthogonal lockstep_k lockstep_n "
    "mean_backprop_depth n_layers name padding_multiple recurrent_iteration_method sampling_scheme "
    "skip_initialization strategy use_fused_head"
)
_STACKS = {"prelude": "prelude", "core": "core_block", "coda": "coda"}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a Parcae checkpoint, which has no model_type."""
    return config.get("_class_name") == "ParcaeConfig"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    width, d_mlp = need(config, "n_embd", count()), need(config, "intermediate_size", count())
    n_heads, size = need(config, "num_attention_heads", count()), get(config, "vocab_size", None, count())
    settings = Recorded(get(config, "rope_settings", {}, table))
    unused(config, _UNUSED)
    only(
        config,
        injection_type="diagonal",
        init_strategy="scaled-zero",  # others scale the embedding by rules that no release shows
        state_init="like-init",
        recurrent_embedding_dimension=width,
        recurrent_intermediation_embedding_dimension=d_mlp,
        recurrent_num_attention_heads=n_heads,
        block_class_name="TransformerPreNormBlock",
        mlp_class_name="BaseMLP",
        nonlin_name="ReLU2",
        norm_class_name="RMSNorm",
        mup_model_scaling_factor=1,
        clip_qkv=None,
        logit_scale=1,
        init_values=None,
        randomize_positions_from=None,
        test_time_noise=0,
        model_class_name="Parcae",
        **dict.fromkeys("bias qk_bias center_attention debias_attention use_abacus simple_ops".split(), False),
    )
    only(settings, rope_condense_ratio=1)
    fields: dict[str, Any] = {
        "n_prelude": need(config, "n_layers_in_prelude", count(0)),
        "n_core": need(config, "n_layers_in_recurrent_block", count()),
        "n_coda": need(config, "n_layers_in_coda", count(0)),
        "n_loops": need(config, "mean_recurrence", count()),
    }
    tables = {int(match[1]) for name in shapes if (match := _TABLE.fullmatch(name))}
    first = {"prelude": 0, "core_block": fields["n_prelude"], "coda": fields["n_prelude"] + fields["n_core"]}
    gates = {first[m[1]] + int(m[2]): shape for name, shape in shapes.items() if (m := _GATE.fullmatch(name))}
    gated = tuple(sorted(tables & gates.keys()))
    cfg = LoopedConfig(
        family="parcae",
        d_model=width,
        n_heads=n_heads,
        n_kv_heads=get(config, "num_key_value_heads", 0, count()),
        d_mlp=d_mlp,
        d_vocab=get(config, "padded_vocab_size", size, count()) or need(config, "padded_vocab_size"),
        n_ctx=get(config, "block_size", 2048, count()),
        norm_eps=get(config, "norm_eps", 1e-5, number()),
        qk_norm="after_rope" if get(config, "qk_norm", True, flag) else "none",
        mlp="relu_squared",
        value_embed_layers=gated,
        value_gate_width=max((shape[-1] for i, shape in gates.items() if shape and i in gated), default=0),
        rope_layout="pairs" if get(settings, "use_rope", True, flag) else "none",
        rope_theta=get(settings, "rope_base", 50000.0, number(1.0, above=True)),
        injection="decay",
        prelude_norm=get(config, "prelude_norm", True, flag),
        initial_state="noise",
        noise_std=(2 / (5 * width)) ** 0.5,
        after_loop="linear",
        logit_softcap=get(config, "logit_softcap", None, number(above=True)),
        tied=get(config, "tie_embeddings", True, flag),
        **fields,
    )
    settings.check_unread(cfg.family)
    return cfg


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    table = {"ln_final": "transformer.ln_f", "after_loop": "transformer.C"}
    table |= readout(cfg, shapes, "transformer.wte", "lm_head")
    if cfg.prelude_norm:
        table["prelude_norm"] = "transformer.ln_prelude"
    for at, stack, j, i in layers(cfg):
        stored = f"transformer.{_STACKS[stack]}.{j}"
        table |= {f"{at}.{ours}": f"{stored}.{theirs}" for ours, theirs in _BLOCK.items()}
        if i in cfg.value_embed_layers:
            table |= {f"value_embeds.{i}": f"value_embeds.{i}", f"{at}.attn.value_gate": f"{stored}.attn.ve_gate"}
    return modules(cfg, table) | {f"inject.{part}": Source(f"transformer.adapter.{part}") for part in ("A_log", "dt_bias", "B")}
