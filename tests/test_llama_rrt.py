"""Relaxed recursive Llama: another configuration against its formulas, and what follows from weights that differ by loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_checks import check_family, random_model
from safetensors.torch import load_file
from torch import Tensor
from zoo import GOLDEN, with_config

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.analysis import local_stability
from tl_looped.attribution import weight_gradients_by_pass
from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError
from tl_looped.model.sizes import sizes

CONFIG = LoopedConfig(
    d_model=24, n_heads=3, n_kv_heads=1, d_mlp=20, d_vocab=31, n_ctx=12, n_prelude=1, n_core=2, n_loops=3, own_layers=True,
    biases=("q", "o"), family="llama_rrt",
)  # fmt: skip
HELD = {"model_type": "llama-rrt", "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "head_dim": 4,
        "num_key_value_heads": 3, "num_hidden_layers": 6, "recurse_layers": 3, "vocab_size": 53, "rms_norm_eps": 1e-5,
        "rope_theta": 500.0, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "use_dora": True,
        "rank": 3, "alpha": 5}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (24, 24),
    "self_attn.k_proj": (12, 24),
    "self_attn.v_proj": (12, 24),
    "self_attn.o_proj": (24, 24),
}
MLP = {"mlp.gate_proj": (20, 24), "mlp.up_proj": (20, 24), "mlp.down_proj": (24, 20)}


def stored_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (53, 24), "lm_head.weight": (53, 24)}
    shapes["model.norm.weight"] = (24,)
    for j in range(3):
        for name, (n_out, n_in) in {**SHAPES, **MLP}.items():
            at = f"model.layers.{j}.{name}."
            shapes |= {f"{at}weight_base": (n_out, n_in), f"{at}bias": (n_out,)}
            for t in range(2):
                shapes |= {f"{at}lora_A_list.{t}": (3, n_in), f"{at}lora_B_list.{t}": (n_out, 3)}
                shapes |= {f"{at}lora_magnitude_vector_list.{t}": (n_out,)}
        for norm in ("input_layernorm_list", "post_attention_layernorm_list"):
            shapes |= {f"model.layers.{j}.{norm}.{t}.weight": (24,) for t in range(2)}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) / s[-1] ** 0.5 for n, s in shapes.items()}
    return {n: 1.5 + t if "norm" in n or "magnitude" in n else t for n, t in tensors.items()}


def reference(p: dict[str, Tensor], tokens: Tensor, n_loops: int) -> Tensor:
    """The published forward, from its formulas."""
    n = tokens.shape[1]
    angle = torch.arange(n)[:, None] * (1 / 500.0 ** (torch.arange(0, 4, 2).float() / 4))
    cos, sin = angle.cos().double(), angle.sin().double()

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]

    def linear(x: Tensor, at: str, t: int) -> Tensor:
        base, scale = p[f"{at}.weight_base"], 5 / 3**0.5
        low = scale * p[f"{at}.lora_B_list.{t}"] @ p[f"{at}.lora_A_list.{t}"]
        ratio = p[f"{at}.lora_magnitude_vector_list.{t}"] / torch.linalg.vector_norm(base + low, dim=1)
        return (ratio - 1) * (x @ base.T + p[f"{at}.bias"]) + ratio * (x @ low.T)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    h = p["model.embed_tokens.weight"][tokens]
    for t in range(n_loops):
        for j in range(3):
            at = f"model.layers.{j}."
            x = rms(h, f"{at}input_layernorm_list.{t}")
            q, k, v = (linear(x, f"{at}self_attn.{s}_proj", t).unflatten(-1, (-1, 4)).transpose(1, 2) for s in "qkv")
            k, v = turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = (turned(q) @ k.mT / 2).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            h = h + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{at}self_attn.o_proj", t)
            x = rms(h, f"{at}post_attention_layernorm_list.{t}")
            gate, up = (linear(x, f"{at}mlp.{part}_proj", t) for part in ("gate", "up"))
            h = h + linear(F.silu(gate) * up, f"{at}mlp.down_proj", t)
    return rms(h, "model.norm") @ p["lm_head.weight"].T


@torch.no_grad()
def test_another_configuration_follows_the_formulas() -> None:
    tensors, tokens = stored_tensors(), torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(0))
    checkpoint = MemoryCheckpoint(HELD, tensors)
    for n_loops in (1, 2):
        expected = reference(tensors, tokens, n_loops)
        torch.testing.assert_close(load_model(checkpoint, n_loops=n_loops)(tokens).logits, expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(load_model(checkpoint).unrolled(n_loops)(tokens).logits, expected, atol=1e-9, rtol=0)
    with pytest.raises(LoopedError, match=r"n_loops=3 was asked.*those of 2"):
        load_model(checkpoint, n_loops=3)


def test_what_every_family_must_pass() -> None:
    bridge = random_model(CONFIG)
    check_family(bridge)


def test_every_loop_has_weights_of_its_own(tmp_path: Path) -> None:
    bridge = random_model(CONFIG)
    names = set(bridge.plain.canonical_parameters())
    assert {"prelude.0.attn.q.weight", "core.1.loops.2.mlp.down.weight"} <= names and "core.1.mlp.down.weight" not in names
    assert bridge.blocks[1].attn.q.weight is not bridge.blocks[3].attn.q.weight
    shared = sizes(CONFIG.replace(own_layers=False))
    assert sizes(CONFIG).parameters["core"] == 3 * shared.parameters["core"]
    assert sizes(CONFIG).flops_per_loop == shared.flops_per_loop
    fewer = bridge.unroll(2)
    assert fewer.blocks[4].attn.q.weight is bridge.blocks[4].attn.q.weight
    with pytest.raises(LoopedError, match="there are those of 2"):
        fewer.unroll(3)
    bridge.save_pretrained(tmp_path)
    tokens = torch.tensor([[3, 1, 4, 1]])
    with torch.no_grad():
        again = LoopedBridge.from_pretrained(tmp_path, device="cpu")
        assert torch.equal(again(tokens), bridge(tokens))
        two = LoopedBridge.from_pretrained(tmp_path, device="cpu", n_loops=2)
        assert torch.equal(two(tokens), fewer(tokens))


@torch.no_grad()
def test_processed_weights_keep_the_probabilities() -> None:
    bridge, tokens = random_model(CONFIG), torch.tensor([[3, 1, 4, 1]])
    before = bridge(tokens).log_softmax(-1)
    bridge.enable_compatibility_mode(disable_warnings=True)
    norms = [value for name, value in bridge.plain.canonical_parameters().items() if ".ln" in name]
    assert len(norms) == 14 and all(bool((norm == 1).all()) for norm in norms)
    torch.testing.assert_close(bridge(tokens).log_softmax(-1), before, atol=1e-9, rtol=0)


def test_what_has_no_meaning_is_refused() -> None:
    bridge, tokens = random_model(CONFIG), torch.tensor([[3, 1, 4, 1]])
    asked: list[Any] = [lambda: local_stability(bridge, tokens), lambda: weight_gradients_by_pass(bridge, tokens)]
    for call, match in zip(asked, ("weights of its own", "do not share"), strict=True):
        with pytest.raises(LoopedError, match=match):
            call()
    with pytest.raises(LoopedError, match="one looped stack"):
        LoopedConfig(d_model=8, n_heads=2, d_vocab=9, n_core=1, n_loops=2, own_layers=True, l_cycles=2, pass_norm=True,
                     injection="add", initial_state="learned")  # fmt: skip
    with pytest.raises(CheckpointError, match="depends on the tokens after it"):
        load_model(with_config("llama_rrt", use_dora=False))
    with pytest.raises(CheckpointError, match="no multiple of"):
        load_model(with_config("llama_rrt", num_hidden_layers=5))


def test_rows_and_prefixes_are_runs_of_their_own() -> None:
    data, bridge = load_file(GOLDEN / "llama_rrt" / "golden.safetensors"), LoopedBridge.from_pretrained(GOLDEN / "llama_rrt")
    with torch.no_grad():
        torch.testing.assert_close(bridge(data["input_ids"][:, :7]), data["prefix7/logits"], atol=2e-4, rtol=0)
        torch.testing.assert_close(bridge(data["input_ids"][:1]), data["row0/logits"], atol=2e-4, rtol=0)
