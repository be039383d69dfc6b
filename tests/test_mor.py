"""Mixture-of-Recursions: other configurations against their formulas, and what every family must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_checks import check_family, close
from safetensors.torch import load_file
from torch import Tensor
from zoo import GOLDEN

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import attention_distances, fixed_points, step_geometry
from tl_looped.attribution import path_patch
from tl_looped.checkpoints import MemoryCheckpoint, load_model, make_plan
from tl_looped.errors import CheckpointError
from tl_looped.exits import StateChange
from tl_looped.interventions import share_kv
from tl_looped.lenses import logit_lens
from tl_looped.patching import patch_between_loops, patch_sweep

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


@EVERY
@torch.no_grad()
def test_other_configurations_follow_the_formulas(kind: str) -> None:
    tensors = stored_tensors(kind)
    close(load_model(MemoryCheckpoint(config_of(kind), tensors))(TOKENS).logits, reference(tensors, TOKENS, kind))


@EVERY
def test_what_every_family_must_pass(kind: str) -> None:
    bridge = bridge_of(kind)
    check_family(bridge)


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
        "gating=None": {"mor": {"token": {"gating": None}}},
        "router_func": {"mor": {"token": {"alpha": 1.0}}},
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


@torch.no_grad()
def test_every_choice_of_the_reference_and_its_prefix() -> None:
    data, bridge = load_file(GOLDEN / "mor_expert" / "golden.safetensors"), LoopedBridge.from_pretrained(GOLDEN / "mor_expert")
    _, cache = bridge.run_with_cache(data["input_ids"])
    candidates = torch.arange(12).expand(2, -1)
    for t in range(3):
        logit = cache[f"loops.{t}.router.hook_logit"]
        torch.testing.assert_close(logit.gather(1, candidates), data[f"R3/router_logit/loop{t}"], atol=2e-4, rtol=0)
        candidates = cache[f"loops.{t}.hook_active"][..., 0].nonzero()[:, 1].view(2, -1)
        assert torch.equal(candidates, data[f"R3/selected_tokens/loop{t}"])
        torch.testing.assert_close(cache[f"loops.{t}.router.hook_weight"], 0.1 * logit.sigmoid())
    for name in ("mor_expert", "mor_token"):
        data, bridge = load_file(GOLDEN / name / "golden.safetensors"), LoopedBridge.from_pretrained(GOLDEN / name)
        torch.testing.assert_close(bridge(data["input_ids"][:, :7]), data["prefix7/logits"], atol=2e-4, rtol=0)


@EXPERT
@torch.no_grad()
def test_what_looks_at_the_whole_text_is_refused_where_it_must_be_causal(kind: str) -> None:
    bridge = bridge_of(kind)
    assert (bridge(TOKENS)[:, :12] - bridge(TOKENS[:, :12])).abs().max() > 1e-3
    with pytest.raises(LoopedError, match=r"depends on the whole text.*use_past_kv_cache=False"):
        bridge.generate(TOKENS, 2, verbose=False, stop_at_eos=False)
    with pytest.raises(LoopedError, match="depends on the whole text"):
        bridge(TOKENS, return_type="logits_and_cache")
    with pytest.raises(LoopedError, match="depends on the whole text"):
        bridge.record(TOKENS, [], None, True, {})
    with pytest.raises(LoopedError, match="start=3"):
        bridge.record(TOKENS, [], None, False, {}).again([2], 3, [])
    text = TOKENS[:, :4]
    for _ in range(3):
        text = torch.cat((text, bridge(text)[:, -1:].argmax(-1)), 1)
    written = bridge.generate(TOKENS[:, :4], 3, do_sample=False, verbose=False, stop_at_eos=False, use_past_kv_cache=False)
    assert torch.equal(written, text)


@torch.no_grad()
def test_a_late_patch_reaches_early_positions() -> None:
    """A sweep that left out the first positions of its copies would miss that other tokens are kept there."""
    bridge, other, late = bridge_of("expert"), TOKENS.flip(1), [15, 17, 19]
    _, cache = bridge.run_with_cache(TOKENS)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, 2:13].square().sum()

    found = patch_sweep(
        bridge, other, cache, metric, site="state", axes=("loop", "pos"), loops=[1], positions=late, verbose=False
    )
    for i, pos in enumerate(late):

        def patch(x: Tensor, hook: Any, pos: int = pos) -> Tensor:
            x[:, pos] = cache["loops.1.hook_state"][:, pos]
            return x

        close(found.values[0, i], metric(bridge.run_with_hooks(other, fwd_hooks=[("loops.1.hook_state", patch)])))
    assert (found.values - metric(bridge(other))).abs().max() > 1e-3


@torch.no_grad()
def test_what_recursions_share() -> None:
    model = bridge_of("expert").plain
    for i in (1, 3):
        first, later = model.blocks[i], model.blocks[i + 2]
        assert first.mlp.down.weight is later.mlp.down.weight and first.ln1.weight is later.ln1.weight
        assert not torch.equal(first.attn.q.weight, later.attn.q.weight)
    assert not torch.equal(model.passes[0].router.map[0].weight, model.passes[1].router.map[0].weight)
    token = bridge_of("token").plain
    assert token.blocks[1].attn.q.weight is token.blocks[5].attn.q.weight


@EVERY
@torch.no_grad()
def test_processed_weights_compute_the_same(kind: str, tmp_path: Any) -> None:
    bridge = bridge_of(kind)
    logits = bridge(TOKENS).log_softmax(-1)
    bridge.save_pretrained(tmp_path)
    assert torch.equal(LoopedBridge.from_pretrained(tmp_path)(TOKENS), bridge(TOKENS))
    bridge.enable_compatibility_mode()
    close(bridge(TOKENS).log_softmax(-1), logits)
    for block in bridge.plain.blocks:
        assert bool((block.ln1.weight == 1).all() and (block.ln2.weight == 1).all())


@EXPERT
@torch.no_grad()
def test_contributions_with_padding(kind: str) -> None:
    bridge = bridge_of(kind)
    alone = bridge.run_with_cache(TOKENS[:1, 3:])[1].attribute_logits(tokens=7)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    both = bridge.run_with_cache(TOKENS, attention_mask=mask)[1].attribute_logits(tokens=7)
    close(both.values[:, :1], alone.values)


@torch.no_grad()
def test_a_path_holds_the_routing_of_the_run() -> None:
    """What a head writes in the first recursion reaches the logits times the weight with which its token leaves the loop."""
    bridge, clean = bridge_of("token"), TOKENS[:1]
    other = clean.flip(1)
    (_, cache), (_, corrupted) = bridge.run_with_cache(clean), bridge.run_with_cache(other)
    place = "loops.0.blocks.1.attn.hook_z"
    change = (cache[place] - corrupted[place])[:, :, 2] @ bridge.blocks[2].attn.W_O[2]
    reached = corrupted["loops.0.router.hook_weight"][..., None] * change
    moved = corrupted["ln_final.hook_in"] + reached
    expected = bridge.plain.unembed(bridge.last_norm(moved))[0, -1, 4]
    found = path_patch(
        bridge, other, cache, lambda logits: logits[0, -1, 4], sources="loops.0.blocks.1.head.2", receivers="logits"
    )
    close(found.values.squeeze(), expected - bridge(other)[0, -1, 4])


def test_null_options_of_a_recipe() -> None:
    """`gating: null` is not weighted, and `router_func: null` is the logit itself."""
    config = config_of("expert")
    config["config.yaml"]["mor"]["expert"] = {"router_func": None, "gating": None}
    options = make_plan(MemoryCheckpoint(config, stored_tensors("expert"))).cfg.options
    assert (options["router_func"], options["weighted"], options["capacity"]) == ("none", False, [1.0, 2 / 3, 1 / 3])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["token", "token, mlp and bias"])
def test_generation_with_a_cache_is_that_of_the_whole_text(kind: str) -> None:
    bridge = bridge_of(kind)
    options: dict[str, Any] = {"do_sample": False, "verbose": False, "stop_at_eos": False}
    plain = bridge.generate(TOKENS[:, :5], 8, use_past_kv_cache=False, **options)
    assert torch.equal(bridge.generate(TOKENS[:, :5], 8, **options), plain)
    mask = torch.ones_like(TOKENS[:, :5])
    mask[0, :2] = 0
    padded = bridge.generate(TOKENS[:, :5], 8, attention_mask=mask, **options)
    assert torch.equal(padded[:1, 2:], bridge.generate(TOKENS[:1, 2:5], 8, **options))


@EVERY
@torch.no_grad()
def test_contributions_carried_into_the_loops(kind: str) -> None:
    """They sum to the stream anywhere, which is zero where a recursion does not run."""
    bridge = bridge_of(kind)
    _, cache = bridge.run_with_cache(TOKENS)
    for layer in range(bridge.cfg.n_layers):
        found: Any = cache.decompose_resid(layer=layer)
        close(found.sum(0), cache["resid_pre", layer])
    close(cache.decompose_resid().sum(0), cache["ln_final.hook_in"])
    before = cache["unembed.hook_in"] @ bridge.W_U[:, 7]
    for positions, expected in ((-1, before[:, -1]), ([3, 9], before[:, [3, 9]])):
        close(cache.attribute_logits(tokens=7, unit="head", positions=positions).values.sum(0), expected)
