"""Relaxed recursive Llama: every loop adds a low-rank matrix of its own to the shared ones, and has norms of its own.

With weight decomposition (`use_dora`) what a loop multiplies by is a constant, and it is made while loading: the layers of all
loops are `own_layers`. The published formula lacks the `W x` of DoRA; it is computed as it stands there, for it is what was
trained. Without decomposition the low-rank part is divided by the size of its output over all positions and rows of the
batch, so that a token's logits depend on later tokens; such a checkpoint is refused. The published code keeps one
key-value slot for all loops, which is wrong unless its cache is off; here every loop has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..kinds import count, flag, number
from ..model.config import LoopedConfig
from ._common import LLAMA_BLOCK, Computed, Shapes, Source, decoder_fields, layers, modules, readout
from ._read import get, need

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a relaxed recursive Llama."""
    return config.get("model_type") == "llama-rrt"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    if not get(config, "use_dora", False, flag):
        raise CheckpointError(
            "this llama-rrt checkpoint has use_dora=False: its low-rank maps are scaled by the size of their output over all "
            "positions and prompts at once, so that what a token gets depends on the tokens after it and on the rest of "
            "the batch. That is no causal model, and it cannot generate with a cache; load a checkpoint with use_dora=True."
        )
    n_core, n_layers = need(config, "recurse_layers", count()), need(config, "num_hidden_layers", count())
    if n_layers % n_core:
        raise CheckpointError(
            f"config.json has num_hidden_layers={n_layers}, which counts the layers of all loops and is no multiple of "
            f"recurse_layers={n_core}. Restore the config.json that the checkpoint was published with."
        )
    scale = need(config, "alpha", number()) / need(config, "rank", count()) ** 0.5
    return LoopedConfig(
        family="llama_rrt",
        n_core=n_core,
        n_loops=n_layers // n_core,
        own_layers=True,
        options={"rank": config["rank"], "scale": scale},
        **decoder_fields(config, default_theta=10000.0),
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source | Computed]:
    """Where every parameter is stored: the shared matrices, and the vectors and low-rank matrices of every loop."""
    found: dict[str, Source | Computed] = {}
    found |= modules(cfg, {**readout(cfg, shapes, "model.embed_tokens", "lm_head"), "ln_final": "model.norm"})
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    rows = {"attn.q": q, "attn.k": kv, "attn.v": kv, "mlp.gate": cfg.d_mlp, "mlp.up": cfg.d_mlp}
    columns = {"attn.o": q, "mlp.down": cfg.d_mlp}
    biased = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.o": "o", "mlp.gate": "gate", "mlp.up": "in", "mlp.down": "out"}
    merge, merge_bias = _merged(cfg.options["scale"], False), _merged(cfg.options["scale"], True)
    for _, stack, j, _ in layers(cfg):
        for t, at in enumerate(cfg.layer_names(stack, j)):
            for ours, theirs in LLAMA_BLOCK.items():
                stored = f"model.layers.{j}.{theirs}"
                if ours in ("ln1", "ln2"):
                    found[f"{at}.{ours}.weight"] = Source(f"{stored}_list.{t}.weight")
                    continue
                n_out, n_in = rows.get(ours, cfg.d_model), columns.get(ours, cfg.d_model)
                of_loop = {
                    f"{stored}.weight_base": (n_out, n_in),
                    f"{stored}.lora_A_list.{t}": (cfg.options["rank"], n_in),
                    f"{stored}.lora_B_list.{t}": (n_out, cfg.options["rank"]),
                    f"{stored}.lora_magnitude_vector_list.{t}": (n_out,),
                }
                found[f"{at}.{ours}.weight"] = Computed(merge, of_loop)
                if biased[ours] in cfg.biases:
                    found[f"{at}.{ours}.bias"] = Computed(merge_bias, {**of_loop, f"{stored}.bias": (n_out,)})
    return found


def _merged(scale: float, bias: bool) -> Callable[..., Tensor]:
    """The matrix of one loop, or its bias: `y = (r - 1) (W x + b) + r s B A x` with `r = m / |W + s B A|`, row by row."""

    def merge(base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, of_base: Tensor | None = None) -> Tensor:
        low = scale * (b @ a)
        ratio = magnitude / (base + low).norm(dim=1)
        if bias and of_base is not None:
            return (ratio - 1) * of_base
        return (ratio - 1)[:, None] * base + ratio[:, None] * low

    return merge
