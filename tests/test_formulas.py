"""Families against their formulas, written out below."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_runs import assert_close, logits
from torch import Tensor

from tl_looped.checkpoints import MemoryCheckpoint, load_model


def rms(x: Tensor, gain: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if gain is None else gain * x


def rope(x: Tensor, theta: float, pairs: bool) -> Tensor:
    """Rotate [batch, pos, head, dim] as complex numbers."""
    n, half = x.shape[1], x.shape[-1] // 2
    angle = torch.arange(n)[:, None] * theta ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(n, half), angle.float())[:, None]
    real, imaginary = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
    turned = torch.complex(real.contiguous(), imaginary.contiguous()) * turn
    parts = (turned.real, turned.imag)
    return torch.stack(parts, -1).flatten(-2) if pairs else torch.cat(parts, -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [batch, pos, head, dim]; key head j serves query heads j*g .. j*g+g-1."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)


def heads(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (-1, dim))


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    def one(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape) * (1.2 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3) + (len(shape) == 1)

    return {name: one(shape) for name, shape in shapes.items()}


LLAMA_LIKE = [
    {"layers": 2, "d": 24, "heads": 3, "kv": 1, "dim": 8, "ff": 20, "loops": 3},
    {"layers": 1, "d": 20, "heads": 5, "kv": 5, "dim": 6, "ff": 33, "loops": 5},
    {"layers": 3, "d": 32, "heads": 6, "kv": 2, "dim": 4, "ff": 16, "loops": 2},
]


@pytest.mark.parametrize("sizes", LLAMA_LIKE)
@pytest.mark.parametrize("family", ["ouro", "nanbeige"])
@pytest.mark.parametrize("transformers_5", [False, True])
def test_ouro_and_nanbeige_from_their_formulas(family: str, sizes: dict[str, int], transformers_5: bool):
    d, dim, ff, vocab = sizes["d"], sizes["dim"], sizes["ff"], 31
    q, kv = sizes["heads"] * dim, sizes["kv"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d)}
    shapes["model.norm.weight"] = (d,)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "ouro":
        norms += ["input_layernorm_2", "post_attention_layernorm_2"]
        shapes |= {"model.early_exit_gate.weight": (1, d), "model.early_exit_gate.bias": (1,)}
    for i in range(sizes["layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{norm}.weight": (d,) for norm in norms}
        shapes |= {f"{at}self_attn.{p}_proj.weight": (n, d) for p, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"{at}self_attn.o_proj.weight": (d, q), f"{at}mlp.down_proj.weight": (d, ff)}
        shapes |= {f"{at}mlp.gate_proj.weight": (ff, d), f"{at}mlp.up_proj.weight": (ff, d)}
    w = draw(shapes)
    config = {
        "model_type": family,
        "hidden_size": d,
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv"],
        "head_dim": dim,
        "intermediate_size": ff,
        "vocab_size": vocab,
        "total_ut_steps" if family == "ouro" else "num_loops": sizes["loops"],
        **({"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}} if transformers_5 else {"rope_theta": 700.0}),
    }
    ids = torch.randint(0, vocab, (2, 6))
    h = w["model.embed_tokens.weight"][ids]
    for _ in range(sizes["loops"]):
        for i in range(sizes["layers"]):
            p = {name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): tensor for name, tensor in w.items()}
            a = rms(h, p["input_layernorm"])
            parts = [heads(a @ p[f"self_attn.{part}_proj"].T, dim) for part in "qkv"]
            out = attend(rope(parts[0], 700.0, False), rope(parts[1], 700.0, False), parts[2]) @ p["self_attn.o_proj"].T
            h = h + (rms(out, p["input_layernorm_2"]) if family == "ouro" else out)
            m = rms(h, p["post_attention_layernorm"])
            out = (F.silu(m @ p["mlp.gate_proj"].T) * (m @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
            h = h + (rms(out, p["post_attention_layernorm_2"]) if family == "ouro" else out)
        h = rms(h, w["model.norm.weight"])
    assert_close(logits(load_model(MemoryCheckpoint(config, w)), input_ids=ids), h @ w["lm_head.weight"].T)


RAVEN = [
    {"parts": (1, 2, 1), "d": 24, "heads": 3, "kv": 3, "ff": 20, "loops": 3},
    {"parts": (3, 1, 2), "d": 40, "heads": 5, "kv": 5, "ff": 17, "loops": 2},
    {"parts": (1, 3, 2), "d": 24, "heads": 6, "kv": 2, "ff": 30, "loops": 4},
]


@pytest.mark.parametrize("sizes", RAVEN)
@pytest.mark.parametrize("block", ["huginn", "llama", "olmo"])
def test_huginn_and_retrofits_from_their_formulas(block: str, sizes: dict[str, Any]):
    d, n_q, n_kv, ff, vocab = sizes["d"], sizes["heads"], sizes["kv"], sizes["ff"], 31
    dim, biased = d // n_q, block == "huginn" and n_q == n_kv
    stacks = dict(zip(("prelude", "core_block", "coda"), sizes["parts"], strict=True))
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, d), "transformer.ln_f.weight": (d,)}
    shapes |= {"transformer.adapter.weight": (d, 2 * d)} | ({} if block == "huginn" else {"lm_head.weight": (vocab, d)})
    for at in [f"transformer.{stack}.{j}." for stack, n in stacks.items() for j in range(n)]:
        shapes |= {f"{at}norm_{i}.weight": (d,) for i in range(1, 5 if block == "huginn" else 3)}
        shapes |= {f"{at}attn.Wqkv.weight": ((n_q + 2 * n_kv) * dim, d), f"{at}attn.proj.weight": (d, n_q * dim)}
        shapes |= {f"{at}mlp.fc.weight": (2 * ff, d), f"{at}mlp.proj.weight": (d, ff)}
        shapes |= {f"{at}attn.qk_bias": (2, 1, n_q, dim)} if biased else {}
        if block == "olmo":
            shapes |= {f"{at}attn.q_norm.weight": (n_q * dim,), f"{at}attn.k_norm.weight": (n_kv * dim,)}
    w = draw(shapes)
    config = {
        "model_type": "huginn_raven",
        "n_embd": d,
        "n_heads": n_q,
        "num_key_value_heads": n_kv,
        "intermediate_size": ff,
        "padded_vocab_size": vocab,
        "n_layers_in_prelude": sizes["parts"][0],
        "n_layers_in_recurrent_block": sizes["parts"][1],
        "n_layers_in_coda": sizes["parts"][2],
        "mean_recurrence": sizes["loops"],
        "norm_eps": 1e-5,
        "rope_base": 300,
        "rope_theta": 700.0,
        "qk_bias": biased,
        "tie_embeddings": block == "huginn",
        "init_values": None if block == "huginn" else {"std": 0.01, "embed_scale": 1.0},
    }

    def run(h: Tensor, at: str) -> Tensor:
        p = {name.removeprefix(at).removesuffix(".weight"): tensor for name, tensor in w.items()}

        def attention(x: Tensor) -> Tensor:
            q, k, v = (x @ p["attn.Wqkv"].T).split([n_q * dim, n_kv * dim, n_kv * dim], -1)
            if block == "olmo":
                q, k = rms(q, p["attn.q_norm"], 1e-5), rms(k, p["attn.k_norm"], 1e-5)
            q, k, v = heads(q, dim), heads(k, dim), heads(v, dim)
            if biased:
                q, k = q + p["attn.qk_bias"][0, 0], k + p["attn.qk_bias"][1, 0]
            theta = 300 if block == "huginn" else 700.0
            return attend(rope(q, theta, block == "huginn"), rope(k, theta, block == "huginn"), v) @ p["attn.proj"].T

        def mlp(x: Tensor) -> Tensor:
            gate, up = (x @ p["mlp.fc"].T).chunk(2, -1)
            return (F.silu(gate) * up) @ p["mlp.proj"].T

        gains = [p.get(f"norm_{i}") for i in range(1, 5)]
        if block == "huginn":
            h = rms(attention(rms(h, gains[0], 1e-5)) + h, gains[1], 1e-5)
            return rms(mlp(rms(h, gains[2], 1e-5)) + h, gains[3], 1e-5)
        if block == "llama":
            h = h + attention(rms(h, gains[0], 1e-5))
            return h + mlp(rms(h, gains[1], 1e-5))
        h = h + rms(attention(h), gains[0], 1e-5)
        return h + rms(mlp(h), gains[1], 1e-5)

    ids = torch.randint(0, vocab, (2, 6))
    state = s = torch.randn(2, 6, d)
    e = w["transformer.wte.weight"][ids] * (math.sqrt(d) if block == "huginn" else 1)
    for j in range(stacks["prelude"]):
        e = run(e, f"transformer.prelude.{j}.")
    for _ in range(sizes["loops"]):
        s = torch.cat([s, e], -1) @ w["transformer.adapter.weight"].T
        for j in range(stacks["core_block"]):
            s = run(s, f"transformer.core_block.{j}.")
    s = rms(s, w["transformer.ln_f.weight"], 1e-5) if block == "huginn" else s
    for j in range(stacks["coda"]):
        s = run(s, f"transformer.coda.{j}.")
    expected = (
        rms(s, w["transformer.ln_f.weight"], 1e-5) @ w["transformer.wte.weight" if block == "huginn" else "lm_head.weight"].T
    )
    model = load_model(MemoryCheckpoint(config, w))
    assert_close(logits(model, input_ids=ids, initial_state=state), expected)
    std = math.sqrt(2 / (5 * d)) if block == "huginn" else 0.01
    assert model.cfg.noise_std == pytest.approx(std)


@pytest.mark.parametrize("sizes", RAVEN)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("plain", [False, True])
def test_parcae_from_its_formulas(sizes: dict[str, Any], softcap: float | None, plain: bool):
    d, n_q, n_kv, ff, vocab, width = sizes["d"], sizes["heads"], sizes["kv"], sizes["ff"], 31, 7
    dim = d // n_q
    stacks = dict(zip(("prelude", "core_block", "coda"), sizes["parts"], strict=True))
    places = [f"transformer.{stack}.{j}." for stack, n in stacks.items() for j in range(n)]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, d), "transformer.C.weight": (d, d)}
    shapes |= {f"transformer.{norm}.weight": (d,) for norm in ("ln_f", *(() if plain else ("ln_prelude",)))}
    shapes |= {f"transformer.adapter.{name}": (d,) for name in ("A_log", "dt_bias")} | {"transformer.adapter.B": (d, d)}
    shapes |= {"lm_head.weight": (vocab, d)} if plain else {}
    for i, at in enumerate(places):
        shapes |= {f"{at}norm_{k}.weight": (d,) for k in (1, 2)}
        shapes |= {f"{at}attn.c_{p}.weight": (n * dim, d) for p, n in (("q", n_q), ("k", n_kv), ("v", n_kv))}
        shapes |= {f"{at}attn.c_proj.weight": (d, d), f"{at}mlp.fc.weight": (ff, d), f"{at}mlp.proj.weight": (d, ff)}
        if i % 2 == 0 or i == 1:  # layer 1 has a gate without a table
            shapes[f"{at}attn.ve_gate.weight"] = (n_kv, width)
        if i % 2 == 0 or i == 3:  # layer 3 has a table without a gate
            shapes[f"value_embeds.{i}.weight"] = (vocab, n_kv * dim)
    w = draw(shapes)
    config = {
        "_class_name": "ParcaeConfig",
        "n_embd": d,
        "num_attention_heads": n_q,
        "num_key_value_heads": n_kv,
        "intermediate_size": ff,
        "padded_vocab_size": vocab,
        "n_layers_in_prelude": sizes["parts"][0],
        "n_layers_in_recurrent_block": sizes["parts"][1],
        "n_layers_in_coda": sizes["parts"][2],
        "mean_recurrence": sizes["loops"],
        "logit_softcap": softcap,
        "rope_settings": {"rope_base": 300},
        **({"prelude_norm": False, "qk_norm": False, "tie_embeddings": False} if plain else {}),
    }
    ids = torch.randint(0, vocab, (2, 6))

    def run(h: Tensor, i: int) -> Tensor:
        p = {name.removeprefix(places[i]).removesuffix(".weight"): tensor for name, tensor in w.items()}
        a = rms(h, p["norm_1"], 1e-5)
        q, k, v = (heads(a @ p[f"attn.c_{part}"].T, dim) for part in "qkv")
        if i % 2 == 0:
            gate = 2 * torch.sigmoid(a[..., :width] @ p["attn.ve_gate"].T)
            v = v + gate[..., None] * heads(w[f"value_embeds.{i}.weight"][ids], dim)
        q, k = rope(q, 300, True), rope(k, 300, True)
        if not plain:
            q, k = (rms(x, eps=torch.finfo(x.dtype).eps) for x in (q, k))
        h = h + attend(q, k, v) @ p["attn.c_proj"].T
        return h + (0.5 * F.relu(rms(h, p["norm_2"], 1e-5) @ p["mlp.fc"].T) ** 2) @ p["mlp.proj"].T

    n_prelude, n_core, n_coda = sizes["parts"]
    e = w["transformer.wte.weight"][ids]
    for i in range(n_prelude):
        e = run(e, i)
    e = e if plain else rms(e, w["transformer.ln_prelude.weight"], 1e-5)
    state = s = torch.randn(2, 6, d)
    step = torch.log1p(w["transformer.adapter.dt_bias"].exp())
    for _ in range(sizes["loops"]):
        s = torch.exp(-step * w["transformer.adapter.A_log"].exp()) * s + step * (e @ w["transformer.adapter.B"].T)
        for i in range(n_prelude, n_prelude + n_core):
            s = run(s, i)
    s = s @ w["transformer.C.weight"].T
    for i in range(n_prelude + n_core, n_prelude + n_core + n_coda):
        s = run(s, i)
    expected = rms(s, w["transformer.ln_f.weight"], 1e-5) @ w["lm_head.weight" if plain else "transformer.wte.weight"].T
    expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
    assert_close(logits(load_model(MemoryCheckpoint(config, w)), input_ids=ids, initial_state=state), expected)
