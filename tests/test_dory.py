"""Dory: the three layouts of its tensors, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from zoo import GOLDEN, golden_tensors, with_config

from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError


def check(tensors: dict[str, Tensor]) -> None:
    data = load_file(GOLDEN / "dory" / "golden.safetensors")
    model = load_model(MemoryCheckpoint(with_config("dory").config, tensors))
    with torch.no_grad():
        torch.testing.assert_close(model(data["input_ids"]).logits, data["R2/logits"], atol=2e-4, rtol=0)


def test_tensors_named_by_layers_as_transformers_saves_them() -> None:
    check(load_file(GOLDEN / "dory" / "model_saved.safetensors"))


def test_tensors_named_as_in_the_state_dict() -> None:
    saved = load_file(GOLDEN / "dory" / "model_saved.safetensors")
    names = {name: name.replace("backbone.embeddings", "model.embed_tokens").replace("backbone.", "model.") for name in saved}
    check({ours.replace("self_attn.g_proj", "self_attn.gate_proj"): saved[name] for name, ours in names.items()})


def test_counts_may_be_those_of_layers() -> None:
    """A config.json whose layer_types has no "mlp" counts layers, not blocks."""
    config = dict(with_config("dory").config)
    counts = ("num_hidden_layers", "n_input_layers", "n_recurrent_layers", "n_output_layers")
    config |= {key: config[key] // 2 for key in counts} | {"layer_types": config["layer_types"][::2]}
    tensors = golden_tensors("dory")
    by_blocks, by_layers = (load_model(MemoryCheckpoint(c, tensors)).cfg for c in (with_config("dory").config, config))
    assert by_blocks == by_layers and by_layers.n_core == 3


HELD = {
    "model_type": "dory", "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 89, "intermediate_size": 52,
    "num_hidden_layers": 14, "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 8,
    "layer_types": [kind for full in (1, 1, 0, 0, 0, 0, 1) for kind in (("sliding", "full")[full] + "_attention", "mlp")],
    "n_recurrent_loops": 3, "sliding_window": 3, "initializer_range": 0.02, "ngpt_alpha_init": 0.08,
    "max_position_embeddings": 96, "rope_parameters": {
        "full_attention": {"rope_theta": 25000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 700.0, "rope_type": "default"},
    },
}  # fmt: skip


def released_tensors() -> dict[str, Tensor]:
    """Random tensors of that config under released names, float64."""
    generator, d, q, kv, m = torch.Generator().manual_seed(3), 40, 48, 16, 52
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.weight": (89, d),
        "lm_head.weight": (89, d),
        "lm_head.logit_scale": (89,),
    }
    for i in range(7):
        attn, mlp = f"backbone.layers.{2 * i}", f"backbone.layers.{2 * i + 1}"
        shapes |= {f"{attn}.mixer.{p}_proj.weight": (rows, d) for p, rows in (("q", q), ("k", kv), ("v", kv), ("g", q))}
        shapes |= {f"{attn}.mixer.o_proj.weight": (d, q), f"{attn}.mixer.sqk": (q,), f"{attn}.mixer.s_gate": (q,)}
        shapes |= {f"{mlp}.mixer.{p}_proj.weight": (m, d) for p in ("gate", "up")} | {f"{mlp}.mixer.down_proj.weight": (d, m)}
        shapes |= {f"{mlp}.mixer.suv_{p}": (m,) for p in ("gate", "up")}
        shapes |= {f"{attn}.attn_alpha": (d,), f"{mlp}.mlp_alpha": (d,)}
    noise = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: t * (0.02 if t.ndim == 1 else t.shape[-1] ** -0.5) for name, t in noise.items()}


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def reference(tensors: dict[str, Tensor], tokens: Tensor, n_loops: int) -> Tensor:
    """Logits by the formulas of the paper, on stored tensors."""
    d, n_heads, d_head, s0, a0 = 40, 6, 8, 0.02, 0.08
    n, distance = tokens.shape[1], torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])

    def rotated(x: Tensor, base: float) -> Tensor:  # [batch, pos, head, d_head]
        frequencies = base ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)
        angles = (torch.arange(n).float()[:, None] * frequencies)[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    def layer(h: Tensor, i: int) -> Tensor:
        full = HELD["layer_types"][2 * i].startswith("full")
        at = {name.removeprefix(f"backbone.layers.{2 * i}."): t for name, t in tensors.items()}
        x = unit(h)
        q, k, v = ((x @ at[f"mixer.{p}_proj.weight"].T).unflatten(-1, (-1, d_head)) for p in "qkv")
        base = 25000.0 if full else 700.0
        q = rotated(unit(q), base) * (at["mixer.sqk"] * d_head**0.5 / s0).square().view(n_heads, d_head)
        k, v = (t.repeat_interleave(3, 2) for t in (rotated(unit(k), base), v))
        seen = (distance >= 0) & (full | (distance < 3))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / d_head**0.5
        z = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(-2)
        gate = (x @ at["mixer.g_proj.weight"].T) * (at["mixer.s_gate"] * d**0.25 / s0).square()
        out = unit(unit(z * gate.sigmoid()) @ at["mixer.o_proj.weight"].T)
        h = x + (at["attn_alpha"] * a0 / s0).abs() * (out - x)
        at = {name.removeprefix(f"backbone.layers.{2 * i + 1}."): t for name, t in tensors.items()}
        x = unit(h)
        gate, up = ((x @ at[f"mixer.{p}_proj.weight"].T) * at[f"mixer.suv_{p}"] * d**0.5 for p in ("gate", "up"))
        out = unit(unit(torch.nn.functional.silu(gate) * up) @ at["mixer.down_proj.weight"].T)
        return x + (at["mlp_alpha"] * a0 / s0).abs() * (out - x)

    h = layer(tensors["backbone.embeddings.weight"][tokens], 0)
    embed = unit(h)
    for _ in range(n_loops):
        h = unit(h) + embed
        for i in (1, 2):
            h = layer(h, i)
    for i in (3, 4, 5, 6):
        h = layer(h, i)
    return unit(h) @ tensors["lm_head.weight"].T * tensors["lm_head.logit_scale"] / s0


@pytest.mark.parametrize("n_loops", [1, 3, 5])
@torch.no_grad()
def test_another_configuration_computes_the_formulas(n_loops: int) -> None:
    tensors, tokens = released_tensors(), torch.randint(89, (2, 9), generator=torch.Generator().manual_seed(4))
    model = load_model(MemoryCheckpoint(HELD, tensors), n_loops=n_loops)
    assert model.embed.weight.dtype == torch.float64
    torch.testing.assert_close(model(tokens).logits, reference(tensors, tokens, n_loops), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"recurrent_kv_cache_mode": "last_loop"}, "recurrent_kv_cache_mode='last_loop'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"n_output_layers": 4}, "they must agree"),
        ({"hybrid_layer_pattern": "S-S-"}, "format 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}, "rope_type='yarn'"),
        ({"rope_parameters": {"chunked_attention": {}}}, "chunked_attention"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        load_model(with_config("dory", **changes))
