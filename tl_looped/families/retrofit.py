"""Retrofitted recurrence: Huginn's loop around the blocks of a Llama, TinyLlama or OLMo-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kinds import count, number, table
from ..model.config import LoopedConfig
from ._common import Shapes, Source, rope
from ._read import get, need, only
from .huginn import raven_fields, raven_sources, raven_tied

TIED = ("transformer.wte.weight", "lm_head.weight")
IGNORED = ("*.inv_freq",)

_LLAMA = {"ln1": "norm_1", "ln2": "norm_2"}
_OLMO = {"ln1_post": "norm_1", "ln2_post": "norm_2", "attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm"}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a retrofit: Huginn's model_type without Huginn's four norms per block."""
    return config.get("model_type") == "huginn_raven" and not any(name.endswith(".norm_3.weight") for name in shapes)


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes. Only the tensors tell an OLMo block from a Llama block."""
    only(config, qk_bias=False)
    olmo = any(name.endswith(".attn.q_norm.weight") for name in shapes)
    # Inherited from Huginn and not recomputed for the smaller width, so the stored numbers count.
    init = need(config, "init_values", table)
    get(config, "rope_base", None, number(1.0, above=True))  # the published code reads rope_theta
    return LoopedConfig(
        family="retrofit",
        n_ctx=get(config, "max_position_embeddings", get(config, "block_size", 4096, count()), count()),
        norm="branch" if olmo else "pre",
        norm_eps=get(config, "norm_eps", 1e-5, number()),
        qk_norm="flat" if olmo else "none",
        **rope(config, None),
        noise_std=need(init, "std", number(above=True)),
        noise_scale=need(init, "embed_scale", number()),
        embed_scale=need(init, "embed_scale", number()),
        tied=raven_tied(config, False),
        **raven_fields(config),
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    return raven_sources(cfg, shapes, _OLMO if cfg.norm == "branch" else _LLAMA)
