"""Mixture-of-Recursions: other configurations against their formulas, and what every family must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_checks import check_attribution, check_family, close
from torch import Tensor
from zoo import GOLDEN

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import attention_distances, fixed_points, step_geometry
from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError
from tl_looped.exits import StateChange
from tl_looped.interventions import share_kv
from tl_looped.lenses import logit_lens
from tl_looped.patching import patch_between_loops

LLAMA = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3,
         "head_dim": 4, "vocab_size": 31, "rms_norm_eps": 1e-5, "max_position_embeddings": 24, "rope_theta": 700.0}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "token": {"type": "token", "sharing": "middle_cycle", "n_loops": 3, "n_core": 2},
    "token, mlp and bias": {"type": "token", "sharing": "cycle", "n_loops": 4, "n_core": 2, "router_type": "mlp",
                            "token": {"router_func": "sigmoid", "alpha": 0.7, "balancing": "loss_free"}},
}  # fmt: skip
EVERY = pytest.mark.parametrize("kind", KINDS)


def config_of(kind: str) -> dict[str, Any]:
    """What lies in config.json, and under its name in config.yaml."""
    given = dict(KINDS[kind])
    recursive = {"enable": True, "num_recursion": given["n_loops"], "sharing": given["sharing"], "ln_share": True}
    n_ends = 2 if given["sharing"] == "middle_cycle" else 0
    recipe = {
        "mor": {"enable": True, "token": {}, "expert": {}, **given},
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
    first = 1 if given["sharing"] == "middle_cycle" else 0
    for i in (0, 2) if first else ():
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer().items()}
    for j in range(given["n_core"]):
        shared = layer()
        for t in range(given["n_loops"]):
            tensors |= {f"model.layers.{first}.block_list.{t}.{j}.{name}": tensor for name, tensor in shared.items()}
    router = f"model.layers.{first}.mor_router.router"
    if given.get("router_type") == "mlp":
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


def reference(p: dict[str, Tensor], tokens: Tensor, kind: str) -> Tensor:
    given, rows = KINDS[kind], list[Tensor]()
    first = 1 if given["sharing"] == "middle_cycle" else 0
    for row in tokens:
        x, positions = p["model.embed_tokens.weight"][row], torch.arange(len(row))
        if first:
            x = layer_of(p, "model.layers.0.", x, positions)
        x = token_choice(p, x, given, first)
        if first:
            x = layer_of(p, "model.layers.2.", x, positions)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["model.norm.weight"]
        rows.append(x @ p["lm_head.weight"].T)
    return torch.stack(rows)


def bridge_of(kind: str) -> LoopedBridge:
    checkpoint = MemoryCheckpoint(config_of(kind), stored_tensors(kind))
    return LoopedBridge(load_model(checkpoint), None, "mor")


TOKENS = torch.randint(0, 31, (2, 20), generator=torch.Generator().manual_seed(0))


@EVERY
@torch.no_grad()
def test_other_configurations_follow_the_formulas(kind: str) -> None:
    tensors = stored_tensors(kind)
    close(load_model(MemoryCheckpoint(config_of(kind), tensors))(TOKENS).logits, reference(tensors, TOKENS, kind))


@EVERY
def test_what_every_family_must_pass(kind: str) -> None:
    bridge = bridge_of(kind)
    check_family(bridge)
    check_attribution(bridge)


@torch.no_grad()
def test_what_does_not_run_is_zero_and_what_is_patched_there_has_no_effect() -> None:
    bridge = bridge_of("token")
    logits, cache = bridge.run_with_cache(TOKENS)
    depth = cache["loops.0.router.hook_depth"]
    close(cache["loops.0.router.hook_weight"], cache["loops.0.router.hook_logit"].softmax(-1).max(-1).values)
    for t in range(3):
        idle = depth < t
        assert torch.equal(cache[f"loops.{t}.hook_active"][..., 0] == 0, idle)
        for hook in ("hook_resid_pre", "hook_attn_out", "mlp.hook_post", "attn.hook_k", "hook_resid_post"):
            assert not cache[f"loops.{t}.blocks.1.{hook}"][idle].any(), hook
        patterns = cache[f"loops.{t}.blocks.1.attn.hook_pattern"].movedim(1, -1)  # [batch, query, key, head]
        assert (patterns.diagonal(dim1=1, dim2=2).movedim(-1, 1)[idle] == 1).all()
        assert not patterns.transpose(1, 2)[idle].sum(1).sub(1).any()  # nothing else looks there
        close(cache[f"loops.{t}.hook_out"][idle], cache[f"loops.{t}.hook_state"][idle])

        def noise(x: Tensor, hook: Any, idle: Tensor = idle) -> Tensor:
            return x + idle[..., None]

        close(bridge.run_with_hooks(TOKENS, fwd_hooks=[(f"loops.{t}.blocks.0.hook_resid_pre", noise)]), logits)


@torch.no_grad()
def test_a_token_can_be_sent_deeper_by_hand() -> None:
    """The edit acts as if the router had said so: bias it until it does, and take its weight without the bias."""
    bridge, at = bridge_of("token"), 6

    def deepest(x: Tensor, hook: Any) -> Tensor:
        x[:, at] = 2
        return x

    edits = [("loops.0.router.hook_depth", deepest)]
    logits = bridge.run_with_hooks(TOKENS, fwd_hooks=edits)
    with bridge.hooks(edits):
        _, cache = bridge.run_with_cache(TOKENS)
    close(cache["loops.0.router.hook_weight"][:, at], cache["loops.0.router.hook_logit"][:, at].softmax(-1)[:, 2])
    assert bool((cache["loops.2.hook_active"][:, at] == 1).all())
    assert bool((logits[:, :at] == bridge(TOKENS)[:, :at]).all()) and not torch.equal(logits, bridge(TOKENS))


@torch.no_grad()
def test_states_patched_between_loops_equal_patches_by_hand() -> None:
    bridge, other = bridge_of("token"), TOKENS.flip(1)
    clean, cache = bridge.run_with_cache(TOKENS)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3].mean()

    found = patch_between_loops(bridge, other, metric, source_tokens=TOKENS, site="state", positions=[4, 19], verbose=False)
    for source, target in ((0, 1), (2, 1), (1, 2), (1, 0)):

        def patch(x: Tensor, hook: Any, source: int = source) -> Tensor:
            x[:, [4, 19]] = cache[f"loops.{source}.hook_state"][:, [4, 19]]
            return x

        expected = metric(bridge.run_with_hooks(other, fwd_hooks=[(f"loops.{target}.hook_state", patch)]))
        close(found.values[source, target], expected)
    assert clean.shape == (2, 20, 31)


def test_what_has_no_meaning_is_refused() -> None:
    bridge = bridge_of("token")
    _, cache = bridge.run_with_cache(TOKENS)
    for asked in (
        lambda: bridge.unroll(2),
        lambda: bridge.unroll(4),
        lambda: bridge.readout(TOKENS, loop=1),
        lambda: bridge.readout(TOKENS, loop="all"),
        lambda: LoopedBridge.from_pretrained(GOLDEN / "mor_token", n_loops=2),
    ):
        with pytest.raises(LoopedError, match="fewer or more"):
            asked()
    with pytest.raises(LoopedError, match="fewer or more"):
        bridge.exit_policy = StateChange(0.1)
    for refused in (
        lambda: logit_lens(bridge, TOKENS),
        lambda: share_kv(bridge, "last"),
        lambda: attention_distances(bridge, TOKENS, n_loops=3, verbose=False),
        lambda: fixed_points(bridge, TOKENS, n_loops=3, verbose=False),
    ):
        with pytest.raises(LoopedError, match="some of the positions only"):
            refused()
    with pytest.raises(LoopedError, match="also needs what entered the pass"):
        bridge(cache["resid_pre", 3], start_at_layer=3)
    assert step_geometry(bridge, TOKENS, n_loops=3, verbose=False)  # states between loops are those of every position
    assert torch.equal(bridge.readout(TOKENS, loop=-1), bridge(TOKENS))


def test_checkpoints_that_are_refused() -> None:
    tensors = stored_tensors("token")

    def load(changes: dict[str, Any] | None = None, **parts: Any) -> None:
        config = config_of("token")
        for part, values in parts.items():
            config["config.yaml"] = {**config["config.yaml"], part: {**config["config.yaml"].get(part, {}), **values}}
        load_model(MemoryCheckpoint(config | (changes or {}), tensors))

    for match, parts in {
        "kv_sharing.enable": {"kv_sharing": {"enable": True}},
        "relaxation.enable": {"relaxation": {"enable": True}},
        "gating='gated'": {"mor": {"token": {"gating": "gated"}}},
        "ln_share": {"recursive": {"ln_share": False}},
        "temp": {"mor": {"temp": 0.5}},
        "rand_router": {"mor": {"rand_router": True}},
        "sharing='sequence'": {"recursive": {"sharing": "sequence"}},
        "cannot be divided": {"recursive": {"num_recursion": 4}},
    }.items():
        with pytest.raises(CheckpointError, match=match):
            load(**parts)
    with pytest.raises(CheckpointError, match="attention_bias"):
        load({"attention_bias": True})
    with pytest.raises(CheckpointError, match=r"no config.yaml beside config.json"):
        load({"config.yaml": None})
    tensors["model.layers.1.block_list.2.0.mlp.up_proj.weight"] = torch.zeros(20, 24, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"block_list.0.0.mlp.up_proj.weight and .*block_list.2.0.mlp.*differ"):
        load()
