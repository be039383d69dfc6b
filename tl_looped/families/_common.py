"""What the family files share: where a parameter is stored, and what decoders with Llama's keys have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..kinds import count, flag, number, shown, table
from ..model.config import LoopedConfig, scaling
from ._read import get, model_kind, need, only

Shapes = Mapping[str, tuple[int, ...]]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
LLAMA_BLOCK = {
    "ln1": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_BIASES = {
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.o": "o",
    "attn.gate": "attn_gate",
    "mlp.gate": "gate",
    "mlp.up": "in",
    "mlp.down": "out",
}


@dataclass(frozen=True)
class Source:
    """Where a parameter is stored: in rows of one tensor.

    Args:
        name: the stored tensor, read as rows of the parameter's width.
        first: the first row that is read.
        shape: the shape of the whole stored tensor, where it is not the parameter's own.
    """

    name: str
    first: int = 0
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Computed:
    """A parameter computed from whole stored tensors, where it is no rows of one: transposed, permuted, scaled, a product.

    Args:
        compute: makes the parameter of the stored tensors, in the dtype and on the device of the model.
        stored: the names of these tensors and their shapes, in the order of the arguments of `compute`.

    Example:
        >>> import torch
        >>> transposed = Computed(lambda weight: weight.T, {"mlp.c_fc.weight": (16, 64)})
        >>> tuple(transposed.compute(torch.zeros(16, 64)).shape)
        (64, 16)
    """

    compute: Callable[..., Tensor]
    stored: Mapping[str, tuple[int, ...]]


def activation(config: Mapping[str, Any], key: str = "hidden_act") -> Any:
    """The activation function of the MLP, SiLU by default.

    Args:
        config: the content of config.json.
        key: the key that names it.

    Raises:
        CheckpointError: it is not implemented.
    """
    name = get(config, key, "silu")
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise CheckpointError(
            f"this {model_kind(config)} checkpoint has {key}={shown(name)}; implemented are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name.lower()]


def rope(config: Mapping[str, Any], default_theta: float | None) -> dict[str, Any]:
    """The rotary fields, as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) writes them.

    Args:
        config: the content of config.json.
        default_theta: the base where config.json has none; None if it must have one.

    Raises:
        CheckpointError: an option that is not implemented.
        LoopedError: values of the wrong kind.
    """
    new, old = (get(config, key, {}, table) for key in ("rope_parameters", "rope_scaling"))
    if new and old and any(new.get(key, value) != value for key, value in old.items()):
        raise CheckpointError(
            f"config.json has rope_parameters={shown(new)} and rope_scaling={shown(old)}, which contradict each other. "
            "Remove the one that the model was not trained with."
        )
    given = new or old
    if any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(
            f"this {model_kind(config)} checkpoint has rotary parameters per layer type ({', '.join(given)}), which are not "
            "implemented; only one set for all layers is. Load another checkpoint."
        )
    only(config, partial_rotary_factor=1.0)
    only({"model_type": model_kind(config), **given}, partial_rotary_factor=1.0)
    theta = get(given, "rope_theta", get(config, "rope_theta", default_theta))
    if theta is None:
        need(config, "rope_theta")
    parameters = {key: value for key, value in given.items() if key not in ("rope_theta", "partial_rotary_factor")}
    checked = scaling("rope_scaling", parameters)
    return {
        "rope_theta": number(1.0, above=True)("rope_theta", theta),
        "rope_scaling": None if checked["rope_type"] == "default" else checked,
    }


def decoder_fields(config: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """The fields of `LoopedConfig` that a decoder with Llama's config keys determines, whatever is looped."""
    biases = ("q", "k", "v", "o") if get(config, "attention_bias", False, flag) else ()
    return {
        "d_model": need(config, "hidden_size", count()),
        "n_heads": need(config, "num_attention_heads", count()),
        "n_kv_heads": get(config, "num_key_value_heads", 0, count()),
        "d_head": get(config, "head_dim", 0, count()),
        "d_mlp": need(config, "intermediate_size", count()),
        "d_vocab": need(config, "vocab_size", count()),
        "n_ctx": get(config, "max_position_embeddings", 2048, count()),
        "norm_eps": get(config, "rms_norm_eps", 1e-6, number()),
        "act_fn": activation(config),
        "biases": biases + (("gate", "in", "out") if get(config, "mlp_bias", False, flag) else ()),
        "tied": get(config, "tie_word_embeddings", False, flag),
        **rope(config, default_theta),
    }


def stored_layers(shapes: Shapes, prefix: str) -> int:
    """How many layers are stored under a prefix, such as "model.layers."; numbered from 0, as everywhere."""
    indices = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    return 1 + max((int(index) for index in indices if index.isdecimal() and len(index) < 10), default=-1)


def layers(cfg: LoopedConfig) -> Iterator[tuple[str, str, int, int]]:
    """Every physical layer: its canonical prefix, its stack, its index in the stack and among all layers."""
    sites = [(stack, j) for stack, n in cfg.schedule.stacks.items() for j in range(n)]
    return ((f"{stack}.{j}", stack, j, i) for i, (stack, j) in enumerate(sites))


def modules(cfg: LoopedConfig, table: Mapping[str, str]) -> dict[str, Source]:
    """Sources of modules stored one by one.

    Args:
        cfg: what the checkpoint computes.
        table: stored modules by canonical ones, {"core.0.attn.q": "model.layers.0.self_attn.q_proj"}; `cfg.biases` says which
            have biases.
    """
    sources = {f"{ours}.weight": Source(f"{theirs}.weight") for ours, theirs in table.items()}
    for ours, theirs in table.items():
        if _BIASES.get(".".join(ours.split(".")[2:])) in cfg.biases:
            sources[f"{ours}.bias"] = Source(f"{theirs}.bias")
    return sources


def fused(stored: str, width: int, parts: Mapping[str, int], bias: bool = False) -> dict[str, Source]:
    """Sources of modules stored as one matrix.

    Args:
        stored: the name of the fused module.
        width: its number of columns.
        parts: rows of each canonical module, in the stored order.
        bias: it has a bias too.

    Example:
        >>> found = fused("h.0.qkv", 8, {"core.0.attn.q": 8, "core.0.attn.k": 4, "core.0.attn.v": 4})
        >>> found["core.0.attn.v.weight"].first, found["core.0.attn.v.weight"].shape
        (12, (16, 8))
    """
    sources, first, total = {}, 0, sum(parts.values())
    for ours, rows in parts.items():
        sources[f"{ours}.weight"] = Source(f"{stored}.weight", first, (total, width))
        if bias:
            sources[f"{ours}.bias"] = Source(f"{stored}.bias", first, (total,))
        first += rows
    return sources


def attention_rows(cfg: LoopedConfig, at: str, order: str) -> dict[str, int]:
    """The rows of a fused attention matrix, as `fused` wants them.

    Args:
        cfg: what the checkpoint computes.
        at: a physical layer, such as "core.0".
        order: the parts as they are stored, for example "q k v" or "gate q k v".
    """
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    return {f"{at}.attn.{part}": kv if part in ("k", "v") else q for part in order.split()}


def mlp_rows(cfg: LoopedConfig, at: str) -> dict[str, int]:
    """The rows of a fused gated MLP, as `fused` wants them: the gate comes first.

    Args:
        cfg: what the checkpoint computes.
        at: a physical layer, such as "core.0".
    """
    return {f"{at}.mlp.gate": cfg.d_mlp, f"{at}.mlp.up": cfg.d_mlp}


def readout(cfg: LoopedConfig, shapes: Shapes, embed: str, unembed: str) -> dict[str, str]:
    """The embedding and, unless it is tied, the unembedding; of tied ones, either copy may be the stored one.

    Args:
        cfg: what the checkpoint computes.
        shapes: the shape of every stored tensor, by its name.
        embed: the stored module of the embedding.
        unembed: that of the unembedding.
    """
    if not cfg.tied:
        return {"embed": embed, "unembed": unembed}
    return {"embed": embed if f"{embed}.weight" in shapes or f"{unembed}.weight" not in shapes else unembed}


def llama_sources(cfg: LoopedConfig, shapes: Shapes, block: Mapping[str, str] = LLAMA_BLOCK) -> dict[str, Source]:
    """Sources of a decoder with Llama's tensor names, its layers numbered in the order prelude, core, coda."""
    table = {f"{at}.{ours}": f"model.layers.{i}.{theirs}" for at, _, _, i in layers(cfg) for ours, theirs in block.items()}
    table |= readout(cfg, shapes, "model.embed_tokens", "lm_head")
    table["pass_norm" if cfg.pass_norm_is_final else "ln_final"] = "model.norm"
    return modules(cfg, table)
