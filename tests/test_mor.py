"""Mixture-of-Recursions: other configurations against their formulas, and what every family must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import check_family, close
from mor_reference import EVERY, EXPERT, TOKENS, bridge_of, config_of, reference, stored_tensors
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
