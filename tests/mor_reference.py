"""Mixture-of-Recursions: configurations, tensors, and a forward written out from the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tl_looped import LoopedBridge
from tl_looped.checkpoints import MemoryCheckpoint, load_model

LLAMA = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3,
         "head_dim": 4, "vocab_size": 31, "rms_norm_eps": 1e-5, "max_position_embeddings": 24, "rope_theta": 700.0}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "token": {"type": "token", "sharing": "middle_cycle", "n_loops": 3, "n_core": 2},
    "token, mlp and bias": {"type": "token", "sharing": "cycle", "n_loops": 4, "n_core": 2, "router_type": "mlp",
                            "token": {"router_func": "sigmoid", "alpha": 0.7, "balancing": "loss_free"}},
    "expert": {"type": "expert", "sharing": "middle_cycle", "n_loops": 3, "n_core": 2,
               "expert": {"router_func": "sigmoid", "alpha": 0.3}},
    "expert, mlp and tanh": {"type": "expert", "sharing": "cycle", "n_loops": 2, "n_core": 2, "router_type": "mlp", "temp": 0.5,
                             "capacity": "0.77,0.31", "expert": {"router_func": "tanh", "alpha": 0.6}},
    "expert, no weights": {"type": "expert", "sharing": "cycle", "n_loops": 3, "n_core": 2, "capacity": [0.9, 0.5, 0.02],
                           "expert": {"router_func": None, "gating": "none"}},
}  # fmt: skip
EVERY = pytest.mark.parametrize("kind", KINDS)
EXPERT = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("expert")])


def config_of(kind: str) -> dict[str, Any]:
    """What lies in config.json, and under its name in config.yaml."""
    given = dict(KINDS[kind])
    recursive = {"enable": True, "num_recursion": given["n_loops"], "sharing": given["sharing"], "ln_share": True}
    n_ends = 2 if given["sharing"] == "middle_cycle" else 0
    recipe = {
        "mor": {"enable": True, "token": {"router_func": "softmax", "alpha": 1.0}, **given},
        "recursive": recursive,
        "kv_sharing": {"enable": False},
    }
    return {**LLAMA, "num_hidden_layers": n_ends + given["n_loops"] * given["n_core"], "config.yaml": recipe}


def stored_tensors(kind: str) -> dict[str, Tensor]:
    generator, given = torch.Generator().manual_seed(6), KINDS[kind]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def layer() -> dict[str, Tensor]:
        shapes = {"self_attn.q": (24, 24), "self_attn.k": (12, 24), "self_attn.v": (12, 24), "self_attn.o": (24, 24)}
        shapes |= {"mlp.gate": (20, 24), "mlp.up": (20, 24), "mlp.down": (24, 20)}
        found = {f"{name}_proj.weight": drawn(*shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        return found | {f"{name}_layernorm.weight": 1 + 0.2 * drawn(24) for name in ("input", "post_attention")}

    tensors = {
        "model.embed_tokens.weight": drawn(31, 24),
        "lm_head.weight": drawn(31, 24) / 5,
        "model.norm.weight": 1 + 0.2 * drawn(24),
    }
    first, by_token = 1 if given["sharing"] == "middle_cycle" else 0, given["type"] == "token"
    for i in (0, 2 if by_token else given["n_loops"] + 1) if first else ():
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer().items()}
    for j in range(given["n_core"]):
        shared = layer()
        for t in range(given["n_loops"]):
            at = f"model.layers.{first}.block_list.{t}.{j}" if by_token else f"model.layers.{first + t}.block.{j}"
            own = {} if by_token else {name: tensor for name, tensor in layer().items() if "self_attn" in name}
            tensors |= {f"{at}.{name}": tensor for name, tensor in {**shared, **own}.items()}
    for t in () if by_token else range(given["n_loops"]):
        router = f"model.layers.{first + t}.mor_router.router"
        if given.get("router_type") == "mlp":
            tensors |= {f"{router}.0.weight": drawn(48, 24) / 3, f"{router}.2.weight": drawn(1, 48) / 3}
        else:
            tensors[f"{router}.weight"] = drawn(1, 24) / 5
    router = f"model.layers.{first}.mor_router.router"
    if not by_token:
        pass
    elif given.get("router_type") == "mlp":
        tensors |= {f"{router}.0.weight": drawn(48, 24) / 3, f"{router}.2.weight": drawn(given["n_loops"], 48) / 3}
    else:
        tensors[f"{router}.weight"] = drawn(given["n_loops"], 24) / 5
    if "token" in given:
        tensors[f"model.layers.{first}.router_bias"] = 0.05 * drawn(given["n_loops"])
    return tensors


def layer_of(p: dict[str, Tensor], at: str, h: Tensor, positions: Tensor) -> Tensor:
    """One layer on the tokens [pos, d] that run, at their positions in the text."""

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{at}{name}.weight"]

    angle = positions[:, None] * (1 / 700.0 ** (torch.arange(0, 4, 2).float() / 4))
    cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = rms(h, "input_layernorm")
    q, k, v = ((x @ p[f"{at}self_attn.{s}_proj.weight"].T).unflatten(-1, (-1, 4)) for s in "qkv")
    q, k, v = turned(q), turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("qhi,khi->hqk", q, k) / 2
    pattern = scores.masked_fill(positions[:, None] < positions, -torch.inf).softmax(-1)
    h = h + torch.einsum("hqk,khi->qhi", pattern, v).flatten(1) @ p[f"{at}self_attn.o_proj.weight"].T
    x = rms(h, "post_attention_layernorm")
    gated = F.silu(x @ p[f"{at}mlp.gate_proj.weight"].T) * (x @ p[f"{at}mlp.up_proj.weight"].T)
    return h + gated @ p[f"{at}mlp.down_proj.weight"].T


def router_of(p: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    if f"{at}.weight" in p:
        return x @ p[f"{at}.weight"].T
    return F.gelu(x @ p[f"{at}.0.weight"].T) @ p[f"{at}.2.weight"].T


def token_choice(p: dict[str, Tensor], x: Tensor, given: dict[str, Any], first: int) -> Tensor:
    """The recursions of one row, [pos, d]: only the tokens that run are given to the layers."""
    logits = router_of(p, f"model.layers.{first}.mor_router.router", x)
    scores = logits.softmax(-1) if "token" not in given else 0.7 * logits.sigmoid()
    depth = (scores + p.get(f"model.layers.{first}.router_bias", torch.zeros(()))).argmax(-1)
    assert set(depth.tolist()) == set(range(given["n_loops"])), "the example must have every depth"
    out, h = x.clone(), x.clone()
    for t in range(given["n_loops"]):
        runs = (depth >= t).nonzero()[:, 0]
        v = h[runs]
        for j in range(given["n_core"]):
            v = layer_of(p, f"model.layers.{first}.block_list.{t}.{j}.", v, runs)
        h[runs] = v
        leave = runs[depth[runs] == t]
        out[leave] = x[leave] + scores[leave, t][:, None] * h[leave]
    return out


def expert_choice(p: dict[str, Tensor], x: Tensor, given: dict[str, Any], first: int) -> Tensor:
    """The recursions of one row, [pos, d]."""
    h, alive, n_loops = x.clone(), torch.arange(len(x)), given["n_loops"]
    shares = given.get("capacity", [(n_loops - t) / n_loops for t in range(n_loops)])
    shares = [float(share) for share in shares.split(",")] if isinstance(shares, str) else shares
    for t in range(n_loops):
        z = router_of(p, f"model.layers.{first + t}.mor_router.router", h[alive] / given.get("temp", 1.0))[:, 0]
        func, alpha = given["expert"]["router_func"], given["expert"].get("alpha", 1.0)
        weight = z if func is None else alpha * (z.sigmoid() if func == "sigmoid" else z.tanh())
        kept = weight.topk(max(1, int(shares[t] * len(x)))).indices.sort().values
        alive, weight = alive[kept], weight[kept]
        v = h[alive]
        for j in range(given["n_core"]):
            v = layer_of(p, f"model.layers.{first + t}.block.{j}.", v, alive)
        h[alive] += v if given["expert"].get("gating") == "none" else weight[:, None] * v
    return h


def reference(p: dict[str, Tensor], tokens: Tensor, kind: str) -> Tensor:
    given, rows = KINDS[kind], list[Tensor]()
    first = 1 if given["sharing"] == "middle_cycle" else 0
    for row in tokens:
        x, positions = p["model.embed_tokens.weight"][row], torch.arange(len(row))
        if first:
            x = layer_of(p, "model.layers.0.", x, positions)
        x = (token_choice if given["type"] == "token" else expert_choice)(p, x, given, first)
        if first:
            x = layer_of(p, f"model.layers.{2 if given['type'] == 'token' else given['n_loops'] + 1}.", x, positions)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["model.norm.weight"]
        rows.append(x @ p["lm_head.weight"].T)
    return torch.stack(rows)


def bridge_of(kind: str) -> LoopedBridge:
    checkpoint = MemoryCheckpoint(config_of(kind), stored_tensors(kind))
    return LoopedBridge(load_model(checkpoint), None, "mor")


TOKENS = torch.randint(0, 31, (2, 20), generator=torch.Generator().manual_seed(0))
