"""Dory: a looped nGPT, whose states lie on the unit sphere and move towards what every branch returns (arXiv 2611.03998).

Its scales are stored relative to the spread of the initial weights, and most of them multiply rows of a matrix: they are
folded into it here. Tensors come under three sets of names: of blocks, attention and MLP counted apart, as released; of layers,
as transformers writes them; and those of transformers' state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..kinds import choice, count, number, several, table
from ..model.config import LoopedConfig
from ._common import Computed, Shapes, Source, activation, layers
from ._read import get, need, only

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.*",)
_KINDS = ("sliding_attention", "full_attention")


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a Dory checkpoint."""
    return config.get("model_type") == "dory"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    if "hybrid_layer_pattern" in config or "dory_format_version" in config:
        raise CheckpointError(
            "this dory checkpoint has a config.json of format 1 (hybrid_layer_pattern), which transformers does not read "
            "either; use the config.json that names layer_types."
        )
    only(config, attention_bias=False, mlp_bias=False, tie_word_embeddings=False, recurrent_kv_cache_mode="per_loop")
    n_layers = get(config, "num_hidden_layers", 72, count())
    usual = [("full_attention" if (i + 1) % 4 == 0 else "sliding_attention", "mlp") for i in range(n_layers // 2)]
    kinds = get(config, "layer_types", sum(usual, ()), several(choice(*_KINDS, "mlp")))
    per_layer = 2 if "mlp" in kinds else 1  # config.json may count attention and MLP apart
    kinds = kinds[::per_layer]
    counts = {key: get(config, key, usual, count(0)) for key, usual in (("n_input_layers", 16), ("n_output_layers", 16))}
    core = get(config, "n_recurrent_layers", n_layers - sum(counts.values()), count())
    if sum(counts.values()) + core != n_layers or len(kinds) * per_layer != n_layers or "mlp" in kinds:
        raise CheckpointError(
            f"config.json has num_hidden_layers={n_layers}, of which {counts['n_input_layers']} + {core} + "
            f"{counts['n_output_layers']} are prelude, loop and coda, and layer_types of {len(kinds)} layers; they must agree. "
            "Restore the config.json that the checkpoint was published with."
        )
    window = get(config, "sliding_window", 1024, count())
    width, n_heads = need(config, "hidden_size", count()), need(config, "num_attention_heads", count())
    bases = _rope_bases(config)
    spread = get(config, "initializer_range", 0.0177, number(above=True))
    return LoopedConfig(
        family="dory",
        d_model=width,
        n_heads=n_heads,
        n_kv_heads=get(config, "num_key_value_heads", n_heads, count()),
        d_head=get(config, "head_dim", 0, count()),
        d_mlp=need(config, "intermediate_size", count()),
        d_vocab=need(config, "vocab_size", count()),
        n_ctx=get(config, "max_position_embeddings", 8192, count()),
        n_prelude=counts["n_input_layers"] // per_layer,
        n_core=core // per_layer,
        n_coda=counts["n_output_layers"] // per_layer,
        n_loops=get(config, "n_recurrent_loops", 2, count()),
        norm="sandwich",
        norm_kind="l2",
        norm_eps=1e-6,  # fixed in the published code
        norm_weight=False,
        inner_norm=True,
        residual="interpolate",
        qk_norm="head",
        qk_norm_weight=False,
        query_gain=True,
        attn_gate=True,
        act_fn=activation(config),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        rope_theta=bases["full_attention"],
        rope_theta_windowed=bases["sliding_attention"],
        injection="add",
        prelude_norm=True,
        entry_norm=True,
        options={"spread": spread, "rate": get(config, "ngpt_alpha_init", 0.05, number(above=True)) / spread},
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source | Computed]:
    """Where every parameter is stored."""
    width, q_width, kv_width = cfg.d_model, cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    spread, rate, root = cfg.options["spread"], cfg.options["rate"], width**0.5
    released = any(".mixer." in name for name in shapes)
    stem = "backbone" if any(name.startswith("backbone.") for name in shapes) else "model"
    gate_name = "g_proj" if stem == "backbone" else "gate_proj"
    embed = "backbone.embeddings.weight" if stem == "backbone" else "model.embed_tokens.weight"

    def scaled(weight: str, by: str, rows: int, function: Callable[[Tensor], Tensor]) -> Computed:
        return Computed(lambda w, s: w * function(s)[:, None], {weight: (rows, width), by: (rows,)})

    def vector(stored: str, size: int, function: Callable[[Tensor], Tensor]) -> Computed:
        return Computed(function, {stored: (size,)})

    found: dict[str, Source | Computed] = {
        "embed.weight": Source(embed),
        "unembed.weight": scaled("lm_head.weight", "lm_head.logit_scale", cfg.d_vocab, lambda s: s / spread),
    }
    for at, _, _, i in layers(cfg):
        if released:
            attn, mlp = f"{stem}.layers.{2 * i}.mixer", f"{stem}.layers.{2 * i + 1}.mixer"
            rates = (f"{stem}.layers.{2 * i}.attn_alpha", f"{stem}.layers.{2 * i + 1}.mlp_alpha")
        else:
            attn, mlp = f"{stem}.layers.{i}.self_attn", f"{stem}.layers.{i}.mlp"
            rates = (f"{stem}.layers.{i}.lambda_1", f"{stem}.layers.{i}.lambda_2")
        for letter, rows in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            found[f"{at}.attn.{letter}.weight"] = Source(f"{attn}.{letter}_proj.weight", 0, (rows, width))
        found[f"{at}.attn.o.weight"] = Source(f"{attn}.o_proj.weight")
        found[f"{at}.attn.q_gain"] = vector(f"{attn}.sqk", q_width, lambda s: (s * cfg.d_head**0.5 / spread).square())
        found[f"{at}.attn.gate.weight"] = scaled(
            f"{attn}.{gate_name}.weight", f"{attn}.s_gate", q_width, lambda s: (s * root**0.5 / spread).square()
        )
        for ours in ("gate", "up"):
            found[f"{at}.mlp.{ours}.weight"] = scaled(
                f"{mlp}.{ours}_proj.weight", f"{mlp}.suv_{ours}", cfg.d_mlp, lambda s: s * root
            )
        found[f"{at}.mlp.down.weight"] = Source(f"{mlp}.down_proj.weight")
        for branch, stored in zip(("attn", "mlp"), rates, strict=True):
            found[f"{at}.{branch}_write.rate"] = vector(stored, width, lambda s: (s * rate).abs())
    return found


def _rope_bases(config: Mapping[str, Any]) -> dict[str, float]:
    """The base of the rotary frequencies of both kinds of layer."""
    bases, given = {"sliding_attention": 1e4, "full_attention": 1e7}, get(config, "rope_parameters", {}, table)
    if given.keys() - bases:
        raise CheckpointError(
            f"this dory checkpoint has rope_parameters for {', '.join(sorted(given.keys() - bases))}; implemented is one set "
            "for each of sliding_attention and full_attention."
        )
    for kind, usual in bases.items():
        of_kind = get(given, kind, {}, table)
        only({"model_type": "dory", **of_kind}, rope_type="default", partial_rotary_factor=1.0)
        bases[kind] = get(of_kind, "rope_theta", usual, number(1.0, above=True))
    return bases
