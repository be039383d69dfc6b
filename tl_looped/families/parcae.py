"""Parcae: a decaying latent state, value embeddings that every pass reads, squared-ReLU MLPs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..config import LoopedConfig
from ._common import Shapes, Source, get, layers, modules, need, only, readout

TIED = ("transformer.wte.weight", "lm_head.weight")
# A value embedding acts only where a layer has both the table and the gate; published checkpoints hold some without partner.
IGNORED = ("freqs_cis", "value_embeds.*.weight", "*.attn.ve_gate.weight")

_BLOCK = {
    **{"ln1": "norm_1", "ln2": "norm_2", "mlp.up": "mlp.fc", "mlp.down": "mlp.proj"},
    **{"attn.q": "attn.c_q", "attn.k": "attn.c_k", "attn.v": "attn.c_v", "attn.o": "attn.c_proj"},
}
_STACKS = {"prelude": "prelude", "core": "core_block", "coda": "coda"}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a Parcae checkpoint, which has no model_type."""
    return config.get("_class_name") == "ParcaeConfig"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    width, d_mlp = need(config, "n_embd"), need(config, "intermediate_size")
    settings = get(config, "rope_settings", {})
    only(
        config,
        injection_type="diagonal",
        init_strategy="scaled-zero",  # others scale the embedding by rules that no release shows
        state_init="like-init",
        recurrent_embedding_dimension=width,
        recurrent_intermediation_embedding_dimension=d_mlp,
        recurrent_num_attention_heads=config.get("num_attention_heads"),
        block_class_name="TransformerPreNormBlock",
        mlp_class_name="BaseMLP",
        nonlin_name="ReLU2",
        norm_class_name="RMSNorm",
        mup_model_scaling_factor=1,
        clip_qkv=None,
        **dict.fromkeys("bias qk_bias center_attention debias_attention use_abacus".split(), False),
    )
    only(settings, rope_condense_ratio=1)
    fields: dict[str, Any] = {
        "n_prelude": need(config, "n_layers_in_prelude"),
        "n_core": need(config, "n_layers_in_recurrent_block"),
        "n_coda": need(config, "n_layers_in_coda"),
        "n_loops": need(config, "mean_recurrence"),
    }
    tables = [int(match[1]) for name in shapes if (match := re.fullmatch(r"value_embeds\.(\d+)\.weight", name))]
    gates = {i: shapes.get(f"{at}.attn.ve_gate.weight") for i, at in enumerate(_stored_layers(fields))}
    gated = tuple(i for i in sorted(tables) if gates.get(i))
    return LoopedConfig(
        family="parcae",
        d_model=width,
        n_heads=need(config, "num_attention_heads"),
        n_kv_heads=get(config, "num_key_value_heads", 0),
        d_mlp=d_mlp,
        d_vocab=get(config, "padded_vocab_size", config.get("vocab_size")) or need(config, "padded_vocab_size"),
        n_ctx=get(config, "block_size", 2048),
        norm_eps=get(config, "norm_eps", 1e-5),
        qk_norm="after_rope" if get(config, "qk_norm", True) else "none",
        mlp="relu_squared",
        value_embed_layers=gated,
        value_gate_width=max((shape[-1] for i, shape in gates.items() if shape and i in gated), default=0),
        rope_layout="pairs" if get(settings, "use_rope", True) else "none",
        rope_theta=float(get(settings, "rope_base", 50000)),
        injection="decay",
        prelude_norm=get(config, "prelude_norm", True),
        initial_state="noise",
        noise_std=(2 / (5 * width)) ** 0.5,
        after_loop="linear",
        logit_softcap=config.get("logit_softcap"),
        tied=get(config, "tie_embeddings", True),
        **fields,
    )


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


def _stored_layers(fields: Mapping[str, Any]) -> list[str]:
    counts = {"prelude": fields["n_prelude"], "core_block": fields["n_core"], "coda": fields["n_coda"]}
    return [f"transformer.{stack}.{j}" for stack, n in counts.items() for j in range(n)]
