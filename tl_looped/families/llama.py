"""Ordinary Llama-shaped decoders, of which a range of layers is looped (family "looped_llama")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..config import LoopedConfig
from ..errors import CheckpointError, LoopedError
from ..schedule import check_count
from ._common import LLAMA_BLOCK, Shapes, Source, decoder_fields, kind, llama_sources

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

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
            f"a {kind(config)} checkpoint was asked for, but an ordinary decoder has no looped layers; "
            "say which to loop with LoopedBridge.loop_layers(model, start=..., stop=..., n_loops=...)."
        )
    full = _with_defaults(config)
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


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every key present, by transformers' own defaults for the model type."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config).to_dict()
    except Exception as error:  # transformers validates its configs with several kinds of exception
        raise CheckpointError(f"transformers does not accept this {kind(config)} config.json: {error}") from error


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The sliding window of every layer; empty where no layer has one."""
    n_layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if not all(config.get("no_rope_layers") or [True]):
        raise CheckpointError(
            f"this {config['model_type']} checkpoint has layers without rotary positions (no_rope_layers), which are not "
            "implemented; loop the layers of another decoder."
        )
    if window is None or config["model_type"] == "llama":
        return ()
    kinds = ["sliding_attention"] * n_layers if config["model_type"] == "mistral" else config["layer_types"]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"layer_types {sorted(unknown)} are not implemented; full_attention and sliding_attention are. "
            "Loop another decoder."
        )
    return tuple(window if layer == "sliding_attention" else None for layer in kinds)
