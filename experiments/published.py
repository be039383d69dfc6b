"""Published configurations, and checkpoints of random weights in the layout and under the names of the published ones."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tl_looped import LoopedConfig, families
from tl_looped.checkpoints.plan import stored
from tl_looped.families import Family, Source
from tl_looped.model import LoopedModel
from tl_looped.model.parameters import parameter_shapes

SHARD = 1_000_000_000  # bytes, at most
_OURO: dict[str, Any] = {
    "model_type": "ouro", "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6,
    "total_ut_steps": 4, "early_exit_threshold": 1.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
_RAVEN: dict[str, Any] = {
    "model_type": "huginn_raven", "architecture_class_name": "RecurrentGPT", "block_class_name": "SandwichBlock", "bias": False,
    "norm_class_name": "RMSNorm_llama", "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU", "injection_type": "linear",
    "state_init": "like-init", "mean_recurrence": 32, "mean_backprop_depth": 8, "test_time_noise": 0, "block_size": 4096,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Ouro-1.4B": {**_OURO, "num_hidden_layers": 24},
    "Ouro-2.6B": {**_OURO, "num_hidden_layers": 48},
    "Huginn-3.5B": {
        **_RAVEN, "n_embd": 5280, "n_heads": 55, "num_key_value_heads": 55, "head_dim": 96, "intermediate_size": 17920,
        "vocab_size": 65536, "padded_vocab_size": 65536, "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4,
        "n_layers_in_coda": 2, "norm_eps": 1e-6, "rope_base": 50000, "qk_bias": True, "tie_embeddings": True,
        "init_values": {"std": 0.008703882797784892, "embed_scale": 72.6636084983398},
    },
    "HRM-Text-1B": {
        "model_type": "hrm_text", "vocab_size": 65536, "hidden_size": 1536, "intermediate_size": 4096, "head_dim": 128,
        "num_attention_heads": 12, "num_key_value_heads": 12, "num_layers_per_stack": 16, "num_hidden_layers": 128,
        "H_cycles": 2, "L_cycles": 3, "L_bp_cycles": [0, 3], "initializer_range": 0.0255155, "embedding_scale": 39.1918,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "prefix_lm": True, "tie_word_embeddings": False,
    },
    "Recurrent-Llama-1B": {
        **_RAVEN, "n_embd": 2048, "n_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
        "vocab_size": 128256, "padded_vocab_size": 128256, "n_layers_in_prelude": 4, "n_layers_in_recurrent_block": 6,
        "n_layers_in_coda": 4, "norm_eps": 1e-5, "rope_base": 5e5, "rope_theta": 5e5, "qk_bias": False, "tie_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072, "init_values": {"std": 0.008703882797784892, "embed_scale": 1.0},
    },
    "Dory-4B": {
        "model_type": "dory", "vocab_size": 131072, "hidden_size": 2560, "intermediate_size": 7168, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "num_hidden_layers": 72, "n_input_layers": 16, "n_recurrent_layers": 40,
        "n_output_layers": 16, "n_recurrent_loops": 2, "sliding_window": 1024, "max_position_embeddings": 8192,
        "initializer_range": 0.0177, "ngpt_alpha_init": 0.05, "recurrent_kv_cache_mode": "per_loop",
        "tie_word_embeddings": False,
    },
}  # fmt: skip
# With fewer layers, for checkpoints of 1 to 3.3 GB: HRM-Text and the retrofit have all of them.
FEWER: dict[str, dict[str, Any]] = {
    "Ouro-1.4B": {"num_hidden_layers": 12},
    "Ouro-2.6B": {"num_hidden_layers": 24},
    "Huginn-3.5B": {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 1, "n_layers_in_coda": 1},
    "Dory-4B": {"num_hidden_layers": 16, "n_input_layers": 4, "n_recurrent_layers": 8, "n_output_layers": 4},
}
# By which tensors a family tells which of its layouts it has before it.
_HINTS = {
    "Huginn-3.5B": ("transformer.core_block.0.norm_3.weight",),
    "HRM-Text-1B": ("model.L_module.layers.0.attn.gqkv_proj.weight",),
    "Dory-4B": ("backbone.layers.0.mixer.q_proj.weight",),
}


def read(name: str, config: Mapping[str, Any] | None = None) -> tuple[Family, LoopedConfig]:
    """The family of a published model, and what it computes.

    Args:
        name: one of `CONFIGS`.
        config: its config.json; None for the published one.
    """
    config, hint = dict(CONFIGS[name] if config is None else config), dict.fromkeys(_HINTS.get(name, ()), ())
    family = families.detect(config, hint)
    return family, families.read(family, config, hint)


def shapes(name: str, config: Mapping[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a published checkpoint.

    Args:
        name: one of `CONFIGS`.
        config: its config.json; None for the published one.
    """
    family, cfg = read(name, config)
    sources = family.sources(cfg, dict.fromkeys(_HINTS.get(name, ()), ()))
    found: dict[str, tuple[int, ...]] = {}
    for parameter, shape in parameter_shapes(cfg):
        found.update(stored(sources.get(parameter, Source(parameter)), shape))
    if cfg.tied:  # the published checkpoint holds both copies
        found.update(dict.fromkeys(family.TIED, found[family.TIED[0]]))
    if cfg.family == "huginn":
        found["freqs_cis"] = (1, cfg.n_ctx, 1, cfg.d_head // 2, 2)
    return found


def write(name: str, directory: Path, config: Mapping[str, Any] | None = None) -> int:
    """Write config.json and shards of random bf16 tensors with their index; returns how many shards.

    Args:
        name: one of `CONFIGS`.
        directory: an empty directory.
        config: its config.json; None for the published one.
    """
    family, cfg = read(name, config)
    (directory / "config.json").write_text(json.dumps({**(config or CONFIGS[name]), "dtype": "bfloat16"}, indent=2))
    shards = list(_shards(shapes(name, config)))
    index: dict[str, str] = {}
    for i, part in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {at: _values(at, shape, family, cfg) for at, shape in part.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return len(shards)


def twin(model: LoopedModel, dtype: torch.dtype | None = None) -> LoopedModel:
    """The same model, never touched by a bridge; with the same parameters, or with converted ones.

    Args:
        model: the model.
        dtype: what they are converted to.
    """
    with torch.device("meta"):
        other = LoopedModel(model.cfg)
    for name, p in model.canonical_parameters().items():
        other.set_parameter(name, p if dtype is None else nn.Parameter(p.detach().to(dtype), requires_grad=False))
    return other.eval()


def _shards(tensors: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    part: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if part and 2 * sum(map(math.prod, [*part.values(), shape])) > SHARD:
            yield part
            part = {}
        part[name] = shape
    yield part


def _values(name: str, shape: tuple[int, ...], family: Family, cfg: LoopedConfig) -> Tensor:
    """Random matrices that keep the size of what they are given; norms of 1, and scales that do nothing."""
    if len(shape) == 1 and not name.endswith("_init"):
        dory = {"suv_gate": cfg.d_model**-0.5, "suv_up": cfg.d_model**-0.5}
        usual = float(name.endswith(".weight")) if cfg.family != "dory" else cfg.options["spread"]
        return torch.full(shape, dory.get(name.rpartition(".")[2], usual), dtype=torch.bfloat16)
    seed = family.TIED[0] if cfg.tied and name in family.TIED else name
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5, generator=generator)
