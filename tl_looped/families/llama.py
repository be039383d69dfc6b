"""Ordinary Llama-shaped decoders, of which a range of layers is looped (family "looped_llama")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..errors import CheckpointError, LoopedError
from ..kinds import choice, count, several
from ..model.config import LoopedConfig
from ..schedule import check_count
from ._common import LLAMA_BLOCK, Shapes, Source, decoder_fields, llama_sources, stored_layers
from ._read import get, model_kind

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

_KEYS = (
    "model_type hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size num_hidden_layers "
    "max_position_embeddings rms_norm_eps hidden_act attention_bias mlp_bias tie_word_embeddings rope_theta rope_scaling "
    "rope_parameters partial_rotary_factor use_sliding_window sliding_window max_window_layers layer_types no_rope_layers "
    "no_rope_layer_interval"
).split()
_QK_NORM = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a decoder whose layers can be looped."""
    return config.get("model_type") in MODEL_TYPES


def looped_config(
    config: Mapping[str, Any],
    shapes: Shapes,
    *,
    start: int | None = None,
    stop: int | None = None,
    n_loops: int = 1,
    strategy: Literal["naive", "anchored"] = "naive",
    beta: float = 0.5,
    anchor_steps: int | None = None,
) -> LoopedConfig:
    """What the decoder computes when its layers `start .. stop - 1` run `n_loops` times.

    Args:
        config: the raw config.json.
        shapes: the shapes of the stored tensors.
        start: first looped layer.
        stop: first layer after the loop.
        n_loops: how often the range runs.
        strategy: "naive" repeats the range; "anchored" takes a fraction of each pass (arXiv 2605.23872).
        beta: weight of the first pass in the output of an anchored loop.
        anchor_steps: passes that an anchored loop would need to go all the way; by default `n_loops`.

    Raises:
        CheckpointError: no range was given, or the decoder has an option that is not implemented.
        LoopedError: the range does not fit the decoder.
    """
    if start is None or stop is None:
        raise CheckpointError(
            f"a {model_kind(config)} checkpoint was asked for, but an ordinary decoder has no looped layers; "
            "say which to loop with LoopedBridge.loop_layers(model, start=..., stop=..., n_loops=...)."
        )
    full = _with_defaults(config, shapes)
    n_layers: int = full["num_hidden_layers"]
    if check_count("start", start, 0) >= check_count("stop", stop) or stop > n_layers:
        raise LoopedError(
            f"layers {start} to {stop} (exclusive) were asked, but the model has {n_layers}: 0 <= start < stop <= {n_layers}."
        )
    fields = decoder_fields(full, default_theta=10000.0)
    if full["model_type"] == "qwen2":
        fields["biases"] = ("q", "k", "v")
    return LoopedConfig(
        family="looped_llama",
        n_prelude=start,
        n_core=stop - start,
        n_coda=n_layers - stop,
        n_loops=n_loops,
        qk_norm="head" if full["model_type"] == "qwen3" else "none",
        windows=_windows(full),
        strategy=strategy,
        anchor_steps=anchor_steps or (n_loops if strategy == "anchored" else 1),
        beta=beta,
        **fields,
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    return llama_sources(cfg, shapes, {**LLAMA_BLOCK, **(_QK_NORM if cfg.qk_norm == "head" else {})})


def _with_defaults(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Every key that decides what the decoder computes, by transformers' own defaults for the model type."""
    from transformers import AutoConfig

    given = {key: config[key] for key in _KEYS if key in config}
    n_layers, stored = get(given, "num_hidden_layers", None, count()), stored_layers(shapes, "model.layers.")
    if n_layers is not None and n_layers != stored:  # transformers would fill a list of that length
        raise CheckpointError(
            f"config.json has num_hidden_layers={n_layers}, but the tensors are those of {stored} layers. "
            "Use the config of the model that they belong to."
        )
    try:
        return AutoConfig.for_model(**given).to_dict()
    except Exception as error:  # transformers validates its configs with several kinds of exception
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers does not accept this {model_kind(config)} config.json: {reason}") from error


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The sliding window of every layer; empty where no layer has one."""
    n_layers, window = config["num_hidden_layers"], get(config, "sliding_window", None, count())
    if not all(get(config, "no_rope_layers", (1,), several(count(0)))):
        raise CheckpointError(
            f"this {config['model_type']} checkpoint has layers without rotary positions (no_rope_layers), which are not "
            "implemented; loop the layers of another decoder."
        )
    if window is None or config["model_type"] == "llama":
        return ()
    if config["model_type"] == "mistral":
        return (window,) * n_layers
    kinds = get(config, "layer_types", (), several(choice("full_attention", "sliding_attention")))
    return tuple(window if layer == "sliding_attention" else None for layer in kinds)
