"""TransformerLens's patching, of activations, paths and attributions, on looped models."""

from __future__ import annotations

import inspect
from functools import cache as once
from typing import Any

import pytest
import torch
from helpers import plain_model
from short_models import CLEAN, CORRUPTED, SHORT, metric, short
from torch import nn
from transformer_lens import patching
from transformer_lens.tools.analysis import (
    EdgeAttributionConfig,
    attribution_patch,
    faithfulness,
)
from zoo import FAMILIES, ZOO, random_bridge, shared_bridge

from tl_looped import LoopedBridge, LoopedError
from tl_looped.bridge.processing import stream_break
from tl_looped.model import LoopedModel

BROKEN = [name for name in ZOO if name != "looped_qwen"]

# transformer_lens.patching

VECTORS = {"out": "attn.hook_z", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}
STREAMS = {"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}


def sweeps() -> dict[str, tuple[str, str]]:
    """For every `get_act_patch_*`: the hook it patches and its axes: batch, what the indices pick, ":" for all positions."""
    found = {f"get_act_patch_{name}": (hook, "b p") for name, hook in STREAMS.items()}
    for name, hook in VECTORS.items():
        found[f"get_act_patch_attn_head_{name}_by_pos"] = (hook, "b p h")
        found[f"get_act_patch_attn_head_{name}_all_pos"] = (hook, "b : h")
    pattern = "attn.hook_pattern"
    found["get_act_patch_attn_head_pattern_all_pos"] = (pattern, "b h")
    found["get_act_patch_attn_head_pattern_by_pos"] = (pattern, "b h p")
    found["get_act_patch_attn_head_pattern_dest_src_pos"] = (pattern, "b h p p")
    return found


def each_of_two_structures() -> list[Any]:
    """Every sweep with every structure; all but two in turn are slow."""
    names = [*SHORT]
    return [
        pytest.param(sweep, name, marks=() if (j - i) % len(names) in (0, 2) else pytest.mark.slow)
        for i, sweep in enumerate(sweeps())
        for j, name in enumerate(names)
    ]


@once
@torch.no_grad()
def short_run(name: str) -> tuple[LoopedBridge, Any]:
    """A short model that is left as it is, and a clean run."""
    bridge = short(name)
    return bridge, bridge.run_with_cache(CLEAN)[1]


@pytest.mark.parametrize(("sweep", "name"), each_of_two_structures())
def test_patching_equals_a_patch_by_hand(name: str, sweep: str) -> None:
    bridge, clean = short_run(name)
    hook, axes = sweeps()[sweep]
    with torch.no_grad():
        scores = getattr(patching, sweep)(bridge, CORRUPTED, clean, metric)
        assert scores.shape[0] == bridge.cfg.n_layers
        for layer, site in enumerate(bridge.schedule.sites):
            loop = "" if site.loop is None else f"loops.{site.loop}."
            stack = "" if site.stack == "core" else f"{site.stack}."
            name_of_layer = f"{stack}{loop}blocks.{site.layer}.{hook}"
            for index in {(0,) * (scores.ndim - 1), tuple(n - 1 for n in scores.shape[1:])}:
                where = (slice(None), *([slice(None)] * (":" in axes)), *index)

                def patch(tensor: torch.Tensor, hook: object, where: tuple = where, n: str = name_of_layer) -> torch.Tensor:
                    new = tensor.clone()
                    new[where] = clean[n][where]
                    return new

                by_hand = metric(bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(name_of_layer, patch)]))
                torch.testing.assert_close(scores[(layer, *index)], by_hand)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hrm_text", "looped_qwen"])
def test_combined_sweeps_are_the_single_ones(name: str) -> None:
    bridge = short(name)
    with torch.no_grad():
        _, clean = bridge.run_with_cache(CLEAN)
        every = {
            "get_act_patch_block_every": [f"get_act_patch_{n}" for n in ("resid_pre", "attn_out", "mlp_out")],
            "get_act_patch_attn_head_all_pos_every": [
                f"get_act_patch_attn_head_{n}_all_pos" for n in ("out", "q", "k", "v", "pattern")
            ],
            "get_act_patch_attn_head_by_pos_every": [f"get_act_patch_attn_head_{n}_by_pos" for n in ("out", "q", "k", "v")],
        }
        for combined, singles in every.items():
            scores = getattr(patching, combined)(bridge, CORRUPTED, clean, metric)
            for row, single in zip(scores, singles, strict=False):
                expected = getattr(patching, single)(bridge, CORRUPTED, clean, metric)
                torch.testing.assert_close(row[..., : expected.shape[-1]], expected)  # grouped heads are padded


def test_no_sweep_is_forgotten() -> None:
    known = {*sweeps(), "get_act_patch_block_every", "get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"}
    known |= {"get_act_patch_attn_head_all_pos_every", "get_act_patch_attn_head_by_pos_every"}
    assert {name for name, _ in inspect.getmembers(patching, callable) if name.startswith("get_act_patch")} == known


def direct_path_by_hand(bridge: LoopedBridge, clean, corrupted, source: tuple[int, int], target: tuple[int, int]) -> float:
    """Recompute one head's query from the stream to which the source head's change was added."""
    (layer, head), (to_layer, to_head) = source, target
    d_head = bridge.cfg.d_head
    change = clean["z", layer][:, :, head] - corrupted["z", layer][:, :, head]
    rows = slice(head * d_head, (head + 1) * d_head)
    stream = corrupted["resid_pre", to_layer] + change @ bridge.blocks[layer].attn.o.weight[:, rows].T
    block = bridge.blocks[to_layer].original_component
    normed = stream * (stream.pow(2).mean(-1, keepdim=True) + bridge.looped_cfg.norm_eps).rsqrt()
    normed = normed if bridge.blocks[to_layer].ln1.weight is None else normed * bridge.blocks[to_layer].ln1.weight
    query = block.attn.q.original_component(normed).unflatten(-1, (-1, d_head))[:, :, to_head]

    def patch(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        new = tensor.clone()
        new[:, :, to_head] = query
        return new

    return float(metric(bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{to_layer}.attn.hook_q", patch)])))


@pytest.mark.parametrize(
    ("name", "layer", "to_layer"),
    [("looped_qwen", 0, 2), ("looped_qwen", 1, 5), ("nanbeige", 4, 5), ("retrofit_llama", 6, 8), ("hrm_text", 10, 11)],
)
def test_direct_path_patching_where_the_stream_is_a_running_sum(name: str, layer: int, to_layer: int) -> None:
    bridge = shared_bridge(name, torch.float64)
    with torch.no_grad():
        _, clean = bridge.run_with_cache(CLEAN)
        _, corrupted = bridge.run_with_cache(CORRUPTED)
        scores = patching.get_act_patch_direct_path(bridge, CORRUPTED, clean, corrupted, metric, layer, 1, verbose=False)
        by_hand = direct_path_by_hand(bridge, clean, corrupted, (layer, 1), (to_layer, 2))
    assert float(scores[to_layer, 2]) == pytest.approx(by_hand, rel=1e-5)  # TransformerLens stores scores in fp32


@pytest.mark.parametrize("name", BROKEN)
def test_tools_over_paths_are_refused_where_it_is_not(name: str) -> None:
    bridge = shared_bridge(name)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CORRUPTED)
    first = next(i for i in range(bridge.cfg.n_layers) if stream_break(bridge.looped_cfg, i))
    calls = [
        lambda: patching.get_act_patch_direct_path(bridge, CORRUPTED, cache, cache, metric, first, 0, verbose=False),
        lambda: patching.get_act_patch_direct_path_all_sources(bridge, CORRUPTED, cache, cache, metric, verbose=False),
        lambda: attribution_patch(bridge, CLEAN, CORRUPTED, metric, EdgeAttributionConfig(granularity="edge")),
        lambda: faithfulness(bridge, CLEAN, CORRUPTED, metric, []),
        lambda: bridge.all_composition_scores("Q"),
    ]
    for call in calls:
        with pytest.raises(LoopedError, match="running sum"):
            call()
    assert not bridge.cfg.use_split_qkv_input and not any(h.has_hooks() for h in bridge.hook_points())


@FAMILIES
def test_stream_breaks_are_where_an_added_vector_does_not_stay(name: str) -> None:
    """What is added to a layer's output reaches the stream of every later layer unchanged, or that layer is named a break."""
    bridge = shared_bridge(name, torch.float64)
    shift = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    last = bridge.cfg.n_layers - 1
    with torch.no_grad():
        _, clean = bridge.run_with_cache(CORRUPTED)
        for layer in range(last):
            # Branches of later layers react to the shift; without them the stream carries it, or something else happens to it.
            later = range(layer + 1, last + 1)
            freeze = [
                (f"blocks.{i}.{hook}", lambda t, hook, n=f"blocks.{i}.{hook}": clean[n].clone())
                for i in later
                for hook in ("hook_attn_out", "hook_mlp_out")
            ]
            output = f"blocks.{layer}.hook_mlp_out"
            output = output.replace("hook_mlp_out", "mlp.hook_out")  # before a norm on the branch
            with bridge.hooks(fwd_hooks=[*freeze, (output, lambda t, hook: t + shift)]):
                _, moved = bridge.run_with_cache(CORRUPTED, names_filter="blocks.*.hook_resid_post")
            stays = all(
                torch.allclose(moved["resid_post", i] - clean["resid_post", i], shift.expand(1, 3, 24), atol=1e-9)
                for i in (layer, *later)
            )
            assert stays == (stream_break(bridge.looped_cfg, layer) is None), (layer, stream_break(bridge.looped_cfg, layer))


# attribution


def plain_nodes(plain: LoopedModel, tokens: torch.Tensor, with_gradient: bool) -> dict[str, torch.Tensor]:
    """Embedding, z and MLP output of every virtual layer of the plain model, or the metric's gradient with respect to them."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        seen[name] = tensor

    handles = [plain.embed.register_forward_hook(lambda m, i, out: keep("embed", out))]
    for layer, block in enumerate(plain.blocks):
        written: nn.Module = block.mlp if block.ln2_post is None else block.ln2_post
        handles += [
            block.attn.o.register_forward_pre_hook(lambda m, i, n=layer: keep(f"z{n}", i[0])),
            written.register_forward_hook(lambda m, i, out, n=layer: keep(f"mlp{n}", out)),
        ]
    value = metric(plain(tokens).logits)
    for handle in handles:
        handle.remove()
    if not with_gradient:
        return {name: tensor.detach() for name, tensor in seen.items()}
    return dict(zip(seen, torch.autograd.grad(value, list(seen.values())), strict=True))


@FAMILIES
@pytest.mark.parametrize("compatible", [False, True])
def test_attribution_patching_is_the_first_order_term_of_the_plain_model(name: str, compatible: bool) -> None:
    bridge = random_bridge(name, torch.float64)
    plain = plain_model(bridge)
    if compatible:
        bridge.enable_compatibility_mode(center_unembed=False, fold_value_biases=False)
    scores = attribution_patch(bridge, CLEAN, CORRUPTED, metric).node_scores
    clean, corrupted = (plain_nodes(plain, tokens, False) for tokens in (CLEAN, CORRUPTED))
    gradient = plain_nodes(plain, CORRUPTED, True)
    effect = {key: (clean[key] - corrupted[key]) * gradient[key] for key in gradient}
    assert len(scores) == 3 * (1 + bridge.cfg.n_layers * 4)
    for node, score in scores.items():
        if node.kind == "embed":
            expected = effect["embed"][0, node.position].sum()
        elif node.kind == "mlp_out":
            expected = effect[f"mlp{node.layer}"][0, node.position].sum()
        else:
            expected = effect[f"z{node.layer}"][0, node.position].view(3, 8)[node.head].sum()
        assert score == pytest.approx(float(expected), rel=1e-7, abs=1e-10), node


def test_edge_attribution_and_faithfulness_where_the_stream_is_a_running_sum() -> None:
    bridge = short("looped_qwen", torch.float64, n_kv_heads=3)
    edges = attribution_patch(bridge, CLEAN, CORRUPTED, metric, EdgeAttributionConfig(granularity="edge"))
    nodes = attribution_patch(bridge, CLEAN, CORRUPTED, metric).node_scores
    for node, score in nodes.items():  # what a node does is the sum of what it does along its edges
        assert edges.node_scores[node] == pytest.approx(score, rel=1e-7, abs=1e-10), node
    everything = faithfulness(bridge, CLEAN, CORRUPTED, metric, list(edges.edge_scores))
    nothing = faithfulness(bridge, CLEAN, CORRUPTED, metric, [])
    assert everything.recovered == pytest.approx(1) and nothing.recovered == pytest.approx(0, abs=1e-9)
