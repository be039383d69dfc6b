"""Inkling-2-Mini's text model: layers that read mixtures of block sums, in a loop that starts again from the prelude each time.

The residual stream is the sum of a block of layers and starts anew with every block. What a branch reads is a mixture over
depth: of the embedding, the sums of the finished blocks, and the stream (`attn_mix`, `mlp_mix`); so is what the last norm reads
(`final_mix`). A pass does not continue the one before. It begins with what the prelude left, and in every later loop each
branch mixes what it reads with a message (`message.hook_out`, one each for queries, keys, values and MLP), read from the block
sums of the pass before (`loops.{t}.hook_sources`) and let through by gates (`q_message`, `k_message`, `v_message`,
`mlp_message`).

So the output depends on all passes but the last through messages alone, and their direct effect on a logit is 0.

The embedding has its norm folded in, and ends with the unpadded vocabulary. Images are not read: of the multimodal checkpoints
the text model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..kinds import Kind, choice, count, number, several, shown, table
from ..model.config import LoopedConfig
from ..model.depth_mix import wide
from ..model.from_prelude import READERS, FromPrelude
from ..model.norms import RMSNorm
from ._common import Computed, Shapes, Source, layers
from ._read import Recorded, get, need, only, unused

TIED = ("model.llm.embed.weight", "model.llm.unembed.weight")
IGNORED = ("model.visual.*", "model.vision_tower.*", "model.multi_modal_projector.*")
# What the loop kind is told beside the fields of the config, of a tiny model.
SMALL: dict[str, Any] = {
    "block": 1, "gate_rank": 2, "windowed_heads": [2, 1, 4], "d_bias": 2, "extent": 3, "taps": 2, "clip": 3.0, "bias_clip": 2.0,
    "floor": 2, "growth": 0.1, "n_experts": 3, "n_chosen": 2, "route_scale": 1.0, "mlp_caps": [1.0, 2.0],
}  # fmt: skip


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is an Inkling-2 loop model, of text alone or with images."""
    return config.get("model_type") in ("inkling2_loop", "inkling2_loop_text")


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    if config["model_type"] == "inkling2_loop":
        unused(config, "vision_config image_token_id tie_word_embeddings")
        text = Recorded(need(config, "text_config", table))
        cfg = _text_config(text)
        text.check_unread(cfg.family)
        return cfg
    return _text_config(config)


def _text_config(config: Mapping[str, Any]) -> LoopedConfig:
    unused(config, "hidden_act number_of_conv_states vocab_size tie_word_embeddings")
    only(config, scoring_func="sigmoid")
    loop = get(config, "loop_config", {}, table)

    def of_loop(key: str, nested: str, default: int) -> int:
        outside, inside = (get(given, name, None, count()) for given, name in ((config, key), (loop, nested)))
        if None not in (outside, inside) and outside != inside:
            raise CheckpointError(
                f"config.json has {key}={outside} and loop_config[{nested!r}]={inside}, of which transformers reads the second "
                "whatever the first is. Remove the one that is not meant."
            )
        return next(value for value in (inside, outside, default) if value is not None)

    start, stop = of_loop("loop_layer_index_start", "core_start", 6), of_loop("loop_layer_index_end", "core_end", 18)
    n_loops, rank = of_loop("loop_num_passes", "num_passes", 3), of_loop("loop_gate_rank", "gate_rank", 64)
    n_layers, block = _get(config, "num_hidden_layers", 24, count()), _get(config, "n_layers_per_attn_res_block", 6, count())
    if start % block or stop % block or not start < stop <= n_layers:
        raise CheckpointError(
            f"config.json loops the layers {start} to {stop - 1} of {n_layers}, in blocks of {block}; the first one and "
            "the one after the last must begin a block."
        )
    window = _get(config, "sliding_window_size", 1024, count(), "sliding_window")
    usual = ["hybrid" if (i + 1) % 6 == 0 else "hybrid_sliding" for i in range(n_layers)]
    kinds = get(config, "layer_types", usual, several(choice("hybrid", "hybrid_sliding")))
    if len(kinds) != n_layers:
        raise CheckpointError(f"config.json has {len(kinds)} layer_types for num_hidden_layers={n_layers}; give one for each.")
    cfg = LoopedConfig(
        family="inkling2_loop",
        d_model=_get(config, "hidden_size", 2304, count()),
        n_heads=_get(config, "num_attention_heads", 24, count()),
        n_kv_heads=_get(config, "num_key_value_heads", 8, count()),
        d_head=_get(config, "head_dim", 128, count()),
        d_mlp=_get(config, "moe_intermediate_size", 1152, count(), "intermediate_size"),
        d_vocab=_get(config, "unpadded_vocab_size", 200058, count()),
        n_ctx=_get(config, "max_position_embeddings", 1048576, count(), "model_max_length"),
        n_prelude=start,
        n_core=stop - start,
        n_coda=n_layers - stop,
        n_loops=n_loops,
        norm_eps=_get(config, "rms_norm_eps", 1e-6, number()),
        attn_gate=True,
        windows=tuple(window if kind == "hybrid_sliding" else None for kind in kinds),
        rope_layout="none",
        logit_softcap=_get(config, "final_logit_softcapping", 30.0, number()),
        loop="from_prelude",
        options={
            "block": block,
            "gate_rank": rank,
            "windowed_heads": [
                _get(config, "swa_num_attention_heads", 24, count()),
                _get(config, "swa_num_key_value_heads", 8, count()),
                _get(config, "swa_head_dim", 128, count()),
            ],
            "d_bias": _get(config, "d_rel", 16, count()),
            "extent": _get(config, "rel_extent", 1024, count()),
            "taps": _get(config, "conv_kernel_size", 4, count(), "sconv_kernel_size"),
            "clip": _get(config, "qk_l2_clip_threshold", 22.627416997969522, number()),
            "bias_clip": _get(config, "rel_l2_clip_threshold", 8.0, number()),
            "floor": _get(config, "log_scaling_n_floor", 8192, count()),
            "growth": _get(config, "log_scaling_alpha", 0.1, number()),
            "n_experts": _get(config, "n_routed_experts", 128, count(), "num_local_experts"),
            "n_chosen": _get(config, "num_experts_per_tok", 8, count()),
            "route_scale": _get(config, "route_scale", 8.0, number(), "routed_scaling_factor"),
            "mlp_caps": [_get(config, "mlp_gate_softcap", 4.0, number()), _get(config, "mlp_up_softcap", 25.0, number())],
        },
    )
    FromPrelude(cfg)  # which checks its options
    return cfg


def _get(config: Mapping[str, Any], key: str, default: Any, kind: Kind[Any], alias: str = "") -> Any:
    """A value under its own name, or the other that transformers takes for it."""
    other = get(config, alias, None, kind) if alias else None
    found = get(config, key, other, kind)
    if None not in (found, other) and found != other:
        raise CheckpointError(f"config.json has {key}={shown(found)} and {alias}={shown(other)}, which are one. Remove one.")
    return default if found is None else found


# Modules and parameters of a layer: ours, the released name, that of transformers' state_dict.
_LAYER = """
attn.q.weight             attn.wq_du.weight              self_attn.q_proj.linear.weight
attn.k.weight             attn.wk_dv.weight              self_attn.k_proj.linear.weight
attn.v.weight             attn.wv_dv.weight              self_attn.v_proj.linear.weight
attn.o.weight             attn.wo_ud.weight              self_attn.o_proj.linear.weight
attn.gate.weight          attn.gate_attn.weight          self_attn.o_proj.gate_proj.weight
attn.rel.weight           attn.wr_du.weight              self_attn.relative_position_bias.linear.weight
attn.sink.weight          attn.attn_sink_proj.weight     self_attn.sink_proj.weight
attn.by_distance          attn.rel_logits_proj.proj      self_attn.relative_position_bias.proj
attn.q_clip.weight        attn.q_l2_clip.scale           self_attn.q_proj.norm.scale
attn.rel_clip.weight      attn.rel_l2_clip.scale         self_attn.relative_position_bias.norm.scale
attn_conv.weight          attn_sconv.weight              post_attention_convolution.conv1d.weight
mlp_conv.weight           mlp_sconv.weight               post_mlp_convolution.conv1d.weight
ln2.weight                mlp_norm.weight                post_attention_layernorm.weight
mlp.router.weight         mlp.gate.weight                mlp.gate.weight
mlp.router.bias           mlp.gate.bias                  mlp.gate.e_score_correction_bias
mlp.down                  mlp.experts.w2_weight          mlp.experts.down_proj
"""
_WINDOWED = """
attn.k_conv.weight        attn.k_sconv.weight            self_attn.k_proj.sconv.conv1d.weight
attn.v_conv.weight        attn.v_sconv.weight            self_attn.v_proj.sconv.conv1d.weight
ln1.weight                attn_norm.weight               input_layernorm.weight
"""
_FULL = """
attn.k_conv.weight        attn.k_sconv.static_w          self_attn.k_proj.sconv.static_weight
attn.v_conv.weight        attn.v_sconv.static_w          self_attn.v_proj.sconv.static_weight
attn.k_conv.tap.weight    attn.k_sconv.weight_proj       self_attn.k_proj.sconv.weight_proj.weight
attn.v_conv.tap.weight    attn.v_sconv.weight_proj       self_attn.v_proj.sconv.weight_proj.weight
"""
_GATES = "".join(
    f"{ours}_message.down.weight    controllers.{theirs}.down_weight    {ours}_message_gate.down_proj.weight\n"
    f"{ours}_message.forget.weight  controllers.{theirs}.forget_weight  {ours}_message_gate.forget_gate_proj.weight\n"
    f"{ours}_message.gain.weight    controllers.{theirs}.gain_weight    {ours}_message_gate.message_gate_proj.weight\n"
    for ours, theirs in zip(READERS, ("attn", "k", "v", "mlp"), strict=True)
)


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source | Computed]:
    """Where every parameter is stored: under the released names, or those of transformers' state_dict."""
    released = "model.llm.embed.weight" in shapes or "model.norm.weight" not in {
        n.replace("language_model.", "") for n in shapes
    }
    inside = any(name.startswith("model.language_model.") for name in shapes)
    root = "model.llm." if released else "model.language_model." if inside else "model."
    width, found = cfg.d_model, dict[str, Source | Computed]()

    def padded(name: str) -> tuple[int, ...]:
        """The shape of a matrix with a row for every token, and maybe for some that do not exist."""
        return (max(cfg.d_vocab, *shapes.get(name, ())[:1], 0), width)

    embed, norm = (f"{root}{n}" for n in (("embed.weight", "embed_norm.weight") if released else
                   ("embed_tokens.weight", "embed_tokens.embed_norm.weight")))  # fmt: skip
    found["embed.weight"] = Computed(
        lambda rows, weight: _normed(rows[: cfg.d_vocab], weight, cfg.norm_eps),
        {embed: padded(embed), norm: (width,)},
    )
    unembed = f"{root}unembed.weight" if released else "lm_head.weight"
    found["unembed.weight"] = Source(unembed, shape=padded(unembed))
    found["ln_final.weight"] = Source(f"{root}norm.weight")
    found["final_mix.query"] = Source(f"{root}{'attn_res.output_query' if released else 'final_input.query'}")
    for at, stack, j, i in layers(cfg):
        is_full = cfg.windows[i] is None
        layer = f"{root}layers.{i}."
        n_heads, _, d_head = (cfg.n_heads, 0, cfg.d_head) if is_full else cfg.options["windowed_heads"]
        flat = {"attn.q_clip.weight": (n_heads, d_head), "attn.rel_clip.weight": (n_heads, cfg.options["d_bias"])}
        for line in (_LAYER + (_FULL if is_full else _WINDOWED) + (_GATES if stack == "core" else "")).split("\n"):
            if line:
                ours, *theirs = line.split()
                found[f"{at}.{ours}"] = Source(layer + theirs[0 if released else 1], shape=flat.get(ours))
        if i:
            query = f"{root}attn_res.attn_queries.{i - 1}" if released else f"{layer}attention_input.query"
            found[f"{at}.attn_mix.query"] = Source(query, shape=None if is_full else (width,))
        found[f"{at}.mlp_mix.query"] = Source(f"{root}attn_res.mlp_queries.{i}" if released else f"{layer}mlp_input.query")
        if is_full:
            norms = [f"{layer}{part}_input_{'norm' if released else 'layernorm'}.weight" for part in "qkv"]
            found[f"{at}.ln1.weight"] = Computed(lambda *rows: torch.stack(rows), dict.fromkeys(norms, (width,)))
        both = f"{layer}mlp.experts.{'w13_weight' if released else 'gate_up_proj'}"
        shape = (cfg.options["n_experts"], 2 * cfg.d_mlp, width)
        for first, part in enumerate(("gate", "up")):
            rows = slice(first, None, 2) if released else slice(first * cfg.d_mlp, (first + 1) * cfg.d_mlp)
            found[f"{at}.mlp.{part}"] = Computed(lambda w, rows=rows: w[:, rows], {both: shape})
        if stack == "core":
            found[f"{at}.message.query"] = _messages(cfg, root, j, released)
    return found


def _normed(rows: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """The rows of an embedding after its norm."""
    norm = RMSNorm(rows.shape[1], eps)
    norm.weight = nn.Parameter(wide(weight))
    return norm.unhooked(wide(rows)).to(rows.dtype)


def _messages(cfg: LoopedConfig, root: str, j: int, released: bool) -> Computed:
    """The queries by which a layer reads its messages: those of queries, keys, values and MLP."""
    if not released:
        return Computed(lambda of: of[j], {f"{root}message_input.query": (cfg.n_core, len(READERS), cfg.d_model)})
    names = [f"{root}middle_cycle_cross_pass_{kind}queries" for kind in ("", "kv_")]
    shape = (2 * cfg.n_core, cfg.d_model)
    return Computed(
        lambda of, kv: torch.stack((of[2 * j], kv[2 * j], kv[2 * j + 1], of[2 * j + 1])), dict.fromkeys(names, shape)
    )
