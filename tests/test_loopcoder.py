"""LoopCoder and LoopCoder-V2: other configurations against their formulas, and what every family must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_checks import check_family, close, random_model
from safetensors.torch import load_file
from torch import Tensor
from zoo import GOLDEN, golden_tensors, with_config

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import local_stability
from tl_looped.attribution import path_patch
from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError
from tl_looped.families import loopcoder
from tl_looped.interventions import drop_injection, freeze_attention
from tl_looped.sites import select_places

LLAMA = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6,
         "num_hidden_layers": 2, "vocab_size": 31, "rms_norm_eps": 1e-5, "max_position_embeddings": 24,
         "rope_theta": 700.0}  # fmt: skip
V1 = {"model_type": "iquestloopcoder", "loop_num": 3, "loop_window_size": 2, **LLAMA}
V2 = {"model_type": "iquestpltcoder", "plt_num_loops": 3, "plt_window_size": [1, 0], "plt_emb_scale": 0.6, **LLAMA}
KINDS = {
    "v1": V1,
    "v2": {**V2, "plt_hidden_scale": 0.7, "plt_normalize_per_loop": True, "plt_gate_use_hidden_states": True},
    "v2 plain": V2,
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def stored_tensors(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (31, 24), "lm_head.weight": (31, 24)}
    shapes["model.norm.weight"] = (24,)
    for j in range(2):
        at = f"model.layers.{j}."
        gate = f"model.gate_projections.{j}" if kind == "v1" else f"{at}self_attn.plt_gate"
        matrices = {"self_attn.q": (36, 24), "self_attn.k": (18, 24), "self_attn.v": (18, 24), "self_attn.o": (24, 36)}
        matrices |= {"mlp.gate": (20, 24), "mlp.up": (20, 24), "mlp.down": (24, 20)}
        shapes |= {f"{at}{name}_proj.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{at}input_layernorm.weight": (24,), f"{at}post_attention_layernorm.weight": (24,)}
        shapes |= {f"{gate}.weight": (6, 24 if kind == "v2" else 6), f"{gate}.bias": (6,)}
        if kind == "v2":
            shapes[f"{gate}.gate_norm.weight"] = (24,)
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) / s[-1] ** 0.5 for n, s in shapes.items()}
    return {n: 1 + t if "norm" in n else t for n, t in tensors.items()}


def reference(p: dict[str, Tensor], tokens: Tensor, kind: str, n_loops: int) -> Tensor:
    """The forward, from its formulas."""
    n = tokens.shape[1]
    angle = torch.arange(n)[:, None] * (1 / 700.0 ** (torch.arange(0, 6, 2).float() / 6))
    cos, sin = angle.cos().double(), angle.sin().double()
    back = torch.arange(n)[:, None] - torch.arange(n)
    first: dict[int, tuple[Tensor, Tensor]] = {}

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return (q @ k.mT / 6**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    embed = h = p["model.embed_tokens.weight"][tokens]
    for t in range(n_loops):
        if t and kind == "v1":
            pass
        elif t:
            before = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), 1)
            h = 0.6 * embed + (0.7 if kind == "v2" else 1.0) * before
        for j in range(2):
            at = f"model.layers.{j}."
            x = rms(h, f"{at}input_layernorm")
            q, k, v = ((x @ p[f"{at}self_attn.{s}_proj.weight"].T).unflatten(-1, (-1, 6)).transpose(1, 2) for s in "qkv")
            q, k, v = turned(q), turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            first.setdefault(j, (k, v))
            z = attention(q, *first[j], back < 0)
            if t:
                gate = f"model.gate_projections.{j}" if kind == "v1" else f"{at}self_attn.plt_gate"
                weight, bias = p[f"{gate}.weight"], p[f"{gate}.bias"]
                if kind != "v2":
                    logit = (q * weight[:, None]).sum(-1) + bias[:, None]
                else:
                    logit = (rms(h, f"{gate}.gate_norm") @ weight.T + bias).transpose(1, 2)
                g = logit.sigmoid()[..., None]
                z = g * z + (1 - g) * attention(q, k, v, (back < 0) | (back >= 2))
            h = h + z.transpose(1, 2).flatten(2) @ p[f"{at}self_attn.o_proj.weight"].T
            x = rms(h, f"{at}post_attention_layernorm")
            gated = F.silu(x @ p[f"{at}mlp.gate_proj.weight"].T) * (x @ p[f"{at}mlp.up_proj.weight"].T)
            h = h + gated @ p[f"{at}mlp.down_proj.weight"].T
        h = rms(h, "model.norm") if kind == "v2" else h
    return (h if kind == "v2" else rms(h, "model.norm")) @ p["lm_head.weight"].T


def bridge_of(kind: str) -> LoopedBridge:
    return random_model(loopcoder.looped_config(KINDS[kind], {}))


@EVERY
@torch.no_grad()
def test_other_configurations_follow_the_formulas(kind: str) -> None:
    tensors, tokens = stored_tensors(kind), torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    model = load_model(MemoryCheckpoint(KINDS[kind], tensors))
    for n_loops in (1, 2, 3, 5):
        close(model.unrolled(n_loops)(tokens).logits, reference(tensors, tokens, kind, n_loops))


@EVERY
def test_what_every_family_must_pass(kind: str) -> None:
    bridge = bridge_of(kind)
    check_family(bridge)


@EVERY
@torch.no_grad()
def test_contributions_of_padded_rows_are_those_of_the_rows_alone(kind: str) -> None:
    bridge, tokens = bridge_of(kind), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    alone = bridge.run_with_cache(tokens[:1, 2:])[1].attribute_logits(tokens=7, unit="head")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    both = bridge.run_with_cache(tokens, attention_mask=mask)[1].attribute_logits(tokens=7, unit="head")
    assert alone.labels == both.labels
    close(both.values[:, :1], alone.values)


@torch.no_grad()
def test_a_component_is_read_as_many_positions_later_as_loops_follow() -> None:
    """Its contribution to a logit is the derivative of the logit along it, with norms and gates held."""
    bridge, tokens = bridge_of("v2 plain"), torch.tensor([[3, 1, 4, 1, 5, 9]])
    _, cache = bridge.run_with_cache(tokens)
    parts = cache.attribute_logits(tokens=7, positions=None)
    out = cache["loops.0.blocks.1.hook_mlp_out"]
    direct = F.pad(out, (0, 0, 2, 0))[:, :6] / cache["ln_final.hook_scale"] * bridge.ln_final.weight
    close(parts.values[parts.labels.index("loops.0.blocks.1.mlp_out")], direct @ bridge.W_U[:, 7])
    assert {"embed", "loops.1.injection", "loops.2.injection"} < set(parts.labels)
    found: Any = cache.decompose_resid(layer=4, return_labels=True)
    stack, labels = found
    close(stack[labels.index("1_mlp_out")], F.pad(out, (0, 0, 2, 0))[:, :6])
    close(stack.sum(0), cache["resid_pre", 4])


@torch.no_grad()
def test_hooks_of_both_sources() -> None:
    bridge, tokens = bridge_of("v1"), torch.tensor([[3, 1, 4, 1, 5, 9]])
    _, cache = bridge.run_with_cache(tokens)
    at = "loops.1.blocks.0.attn."
    assert "loops.0.blocks.0.attn.hook_source_gate" not in bridge.hook_dict
    values = [cache[f"loops.{t}.blocks.0.attn.hook_v"].repeat_interleave(2, 2) for t in (0, 1)]
    z = [
        torch.einsum("bhqk,bkhd->bqhd", cache[f"{at}{p}"], v)
        for p, v in zip(("hook_first_pattern", "hook_pattern"), values, strict=True)
    ]
    close(cache[f"{at}hook_first_z"], z[0])
    close(cache[f"{at}hook_own_z"], z[1])
    gate = cache[f"{at}hook_source_gate"][..., None]
    close(cache[f"{at}hook_z"], gate * z[0] + (1 - gate) * z[1])
    assert float(cache[f"{at}hook_pattern"].tril(-2).abs().max()) == 0  # the window is of two positions
    shut = [("loops.1:.blocks.*.attn.hook_source_gate", lambda x, hook: torch.zeros_like(x))]
    with bridge.hooks(shut):
        close(bridge.run_with_cache(tokens)[1][f"{at}hook_z"], z[1])


@torch.no_grad()
def test_a_run_cut_to_positions() -> None:
    for kind in KINDS:
        bridge, tokens = bridge_of(kind), torch.tensor([[3, 1, 4, 1, 5, 9]])
        whole, cut = bridge.run_with_cache(tokens)[1], bridge.run_with_cache(tokens, pos_slice=(2, 5))[1]
        at = "loops.1.blocks.1.attn."
        close(cut[f"{at}hook_first_pattern"], whole[f"{at}hook_first_pattern"][:, :, 2:5])
        close(cut[f"{at}hook_source_gate"], whole[f"{at}hook_source_gate"][:, 2:5])
        if kind == "v1":
            close(cut.decompose_resid().sum(0), whole["ln_final.hook_in"][:, 2:5])
            continue
        with pytest.raises(LoopedError, match="a cache of some positions"):
            cut.decompose_resid()
        if kind == "v2 plain":
            close(whole.decompose_resid(pos_slice=(2, 5)).sum(0), whole["ln_final.hook_in"][:, 2:5])


def test_generation_under_an_exit_policy_and_with_a_cache() -> None:
    for kind in KINDS:
        bridge, tokens = bridge_of(kind), torch.tensor([[3, 1, 4], [9, 2, 6]])
        options: dict[str, Any] = {"do_sample": False, "verbose": False, "stop_at_eos": False}
        with torch.no_grad():
            plain = bridge.generate(tokens, 4, use_past_kv_cache=False, **options)
            assert torch.equal(bridge.generate(tokens, 4, **options), plain)
            bridge.exit_policy = lambda history: torch.tensor([history.loop >= 1, history.loop >= 0])
            text = tokens
            for _ in range(4):
                logits = [bridge.readout(text, loop=loop)[row, -1] for row, loop in ((0, 1), (1, 0))]
                text = torch.cat((text, torch.stack(logits).argmax(-1, keepdim=True)), 1)
            assert torch.equal(bridge.generate(tokens, 4, **options), text)


def test_windows_of_the_reference() -> None:
    data = load_file(GOLDEN / "iquestloopcoder" / "golden.safetensors")
    for window in (1, 4096):
        model = load_model(with_config("iquestloopcoder", loop_window_size=window))
        with torch.no_grad():
            found = model(data["input_ids"]).logits
        torch.testing.assert_close(found, data[f"R2_window{window}/logits"], atol=2e-4, rtol=0)


def test_other_names_of_the_gates() -> None:
    names = {"iquestloopcoder": ("model.gate_projections.1.", "model.layers.1.gate_projection.")}
    names["iquestpltcoder"] = ("model.layers.1.self_attn.plt_gate.", "model.layers.1.self_attn.loop_gate_proj.")
    for checkpoint, (usual, other) in names.items():
        tensors = golden_tensors(checkpoint)
        renamed = {name.replace(usual, other): tensor for name, tensor in tensors.items()}
        model: Any = load_model(MemoryCheckpoint(with_config(checkpoint).config, renamed))
        assert torch.equal(model.blocks[1].attn.source_gate.weight, tensors[f"{usual}weight"])


def test_what_has_no_meaning_is_refused() -> None:
    bridge, tokens = bridge_of("v2"), torch.tensor([[3, 1, 4, 1]])
    _, cache = bridge.run_with_cache(tokens)
    with pytest.raises(LoopedError, match="keys and values of the first"):
        bridge(cache["resid_pre", 3], start_at_layer=3)
    with pytest.raises(LoopedError, match="keys and values of the first"):
        local_stability(bridge, tokens)
    with pytest.raises(LoopedError, match="position further on"):
        path_patch(bridge, tokens, cache, lambda x: x[0, -1, 4], sources="loops.1.blocks.0.head.2", receivers="logits")
    with pytest.raises(LoopedError, match="two patterns"):
        freeze_attention(bridge, 0)
    with pytest.raises(CheckpointError, match="no positions on the right"):
        load_model(with_config("iquestpltcoder", plt_window_size=[3, 1]))
    with pytest.raises(CheckpointError, match=r"missing: model.gate_projections"):
        llama = {name: t for name, t in golden_tensors("iquestloopcoder").items() if "gate_projections" not in name}
        load_model(MemoryCheckpoint(with_config("iquestloopcoder").config, llama))


def test_an_injection_that_not_every_loop_has_is_not_said_to_be_none() -> None:
    bridge = bridge_of("v2 plain")
    for refused in (lambda: drop_injection(bridge), lambda: select_places(bridge, "injection")):
        with pytest.raises(LoopedError, match=r"the first loop has no injection, and the later ones the embedding"):
            refused()
