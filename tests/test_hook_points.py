"""Hook points: which fire, what their names mean, what an edit there reaches, and what shapes they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from switches import SWITCHES, edit, switch_on
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_act_name
from zoo import FAMILIES, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedBridge, LoopedCache, LoopedError

TOKENS = random_tokens()
pytestmark = pytest.mark.usefixtures("no_grad")


@FAMILIES
@pytest.mark.parametrize("switch", [None, *SWITCHES])
def test_every_hook_point_fires_and_reading_changes_nothing(name: str, switch: str | None) -> None:
    changes = {"n_kv_heads": 3} if switch == "attn_in" else {}  # refused where keys are grouped
    bridge = random_bridge(name, torch.float64, **changes)
    logits = bridge(TOKENS)
    if switch is not None:
        switch_on(bridge, switch)
    cached_logits, cache = bridge.run_with_cache(TOKENS)
    fireable = {n for n, h in bridge.hook_dict.items() if bridge._gated_hook_reason(h.name) is None}
    assert set(cache.keys()) == fireable
    if switch in (None, "hook_mlp_in"):
        assert torch.equal(cached_logits, logits)
    torch.testing.assert_close(cached_logits, logits, atol=1e-10, rtol=0)  # forked projections sum in another order


@pytest.mark.slow
@FAMILIES
def test_patching_a_run_with_its_own_cache_is_a_no_op(name: str) -> None:
    bridge = shared_bridge(name)
    logits, cache = bridge.run_with_cache(TOKENS)
    for point in set(bridge.hook_dict[name] for name in cache):  # each once, and not under every name
        patched = bridge.run_with_hooks(TOKENS, fwd_hooks=[(point.name, lambda t, hook, n=point.name: cache[n].clone())])
        assert torch.equal(patched, logits), point.name


def one_layer_and_all_passes(bridge: LoopedBridge, cache: LoopedCache) -> list[str]:
    """The float hook points of one looped layer, of every pass, and of the ends of the model."""
    inside = f"blocks.{bridge.schedule.passes[-1].first}."
    chosen = [n for n in cache if n.startswith(inside) or not n.startswith("blocks.")]
    return [n for n in chosen if cache[n].is_floating_point()]


@pytest.mark.slow
@FAMILIES
def test_own_cache_is_a_no_op_with_gradients_too(name: str) -> None:
    bridge = shared_bridge(name)
    with torch.enable_grad():
        logits, cache = bridge.run_with_cache(TOKENS)
        assert torch.equal(logits, bridge(TOKENS))
        for hook_name in one_layer_and_all_passes(bridge, cache):
            patched = bridge.run_with_hooks(TOKENS, fwd_hooks=[(hook_name, lambda t, hook, n=hook_name: cache[n].clone())])
            assert torch.equal(patched, logits), hook_name


@pytest.mark.slow
@FAMILIES
def test_an_edit_in_place_equals_an_edit_returned(name: str) -> None:
    bridge = shared_bridge(name)
    _, cache = bridge.run_with_cache(TOKENS)
    state = torch.randn(2, 7, 24)
    for hook_name in one_layer_and_all_passes(bridge, cache):

        def in_place(tensor: torch.Tensor, hook: object) -> None:
            tensor[:, 1:] *= 1.5

        def returned(tensor: torch.Tensor, hook: object) -> torch.Tensor:
            edited = tensor.clone()
            edited[:, 1:] *= 1.5
            return edited

        given = state.clone()
        one, other = (bridge.run_with_hooks(TOKENS, [(hook_name, f)], initial_state=given) for f in (in_place, returned))
        assert torch.equal(one, other), hook_name
        assert torch.equal(given, state)


def test_an_edit_in_place_leaves_the_cache_of_earlier_layers_alone() -> None:
    bridge = shared_bridge("huginn")
    _, clean = bridge.run_with_cache(TOKENS)
    for hook_name in ("blocks.5.hook_resid_pre", "loops.1.hook_state", "loops.1.hook_injection"):
        with bridge.hooks(fwd_hooks=[(hook_name, lambda t, hook: t.mul_(2))]):
            _, edited = bridge.run_with_cache(TOKENS)
        for early in ("blocks.4.hook_resid_post", "loops.0.hook_out", "loops.0.hook_injection", "blocks.1.hook_resid_post"):
            assert torch.equal(clean[early], edited[early]), (hook_name, early)


@pytest.mark.slow
@FAMILIES
def test_an_edit_reaches_later_layers_only(name: str) -> None:
    bridge = shared_bridge(name)
    _, clean = bridge.run_with_cache(TOKENS)
    for layer in range(bridge.cfg.n_layers):
        for hook in ("hook_resid_pre", "attn.hook_pattern", "attn.hook_z", "hook_resid_mid", "mlp.hook_post"):
            with bridge.hooks(fwd_hooks=[(bridge.schedule.name(layer, hook), edit)]):
                _, edited = bridge.run_with_cache(TOKENS)
            earlier = [n for n in clean if n.startswith("blocks.") and int(n.split(".")[1]) < layer]
            assert all(torch.equal(clean[n], edited[n]) for n in earlier)
            assert not torch.equal(clean[f"blocks.{layer}.hook_resid_post"], edited[f"blocks.{layer}.hook_resid_post"])
            assert not torch.equal(clean["unembed.hook_out"], edited["unembed.hook_out"])


@FAMILIES
def test_an_edit_of_the_injection_affects_one_pass_only(name: str) -> None:
    bridge = shared_bridge(name)
    if bridge.looped_cfg.injection == "none":
        assert not any("hook_injection" in n for n in bridge.hook_dict)
        return
    _, clean = bridge.run_with_cache(TOKENS)
    first, second = (bridge.schedule.pass_prefix(p) for p in bridge.schedule.passes[:2])
    hooks = [(f"{first}.hook_injection", lambda t, hook: t + 1)]
    with bridge.hooks(fwd_hooks=hooks):
        _, edited = bridge.run_with_cache(TOKENS)
    assert not torch.equal(clean[f"{first}.hook_in"], edited[f"{first}.hook_in"])
    assert torch.equal(clean[f"{first}.hook_state"], edited[f"{first}.hook_state"])
    assert torch.equal(clean[f"{second}.hook_injection"], edited[f"{second}.hook_injection"])


@FAMILIES
def test_hook_points_of_a_pass_mean_what_they_say(name: str) -> None:
    bridge = shared_bridge(name)
    _, cache = bridge.run_with_cache(TOKENS)
    schedule = bridge.schedule
    for p in schedule.passes:
        prefix = schedule.pass_prefix(p)
        assert torch.equal(cache[f"{prefix}.hook_in"], cache["resid_pre", p.first])
        followers = [q for q in schedule.passes if q.stack == p.stack and q.loop == p.loop + 1]
        for q in followers:
            entrance = "entry_norm.hook_in" if bridge.looped_cfg.entry_norm else "hook_state"
            assert torch.equal(cache[f"{prefix}.hook_out"], cache[f"{schedule.pass_prefix(q)}.{entrance}"])


@FAMILIES
def test_shapes_are_those_of_transformer_lens(name: str) -> None:
    bridge = random_bridge(name)
    switch_on(bridge, "attn_result", "split_qkv_input", "hook_mlp_in")
    _, cache = bridge.run_with_cache(TOKENS)
    cfg = bridge.looped_cfg
    (batch, pos), kv = TOKENS.shape, cfg.n_kv_heads
    expected = {
        "q": (batch, pos, 3, 8), "k": (batch, pos, kv, 8), "v": (batch, pos, kv, 8), "z": (batch, pos, 3, 8),
        "rot_q": (batch, pos, 3, 8), "rot_k": (batch, pos, kv, 8), "result": (batch, pos, 3, 24),
        "pattern": (batch, 3, pos, pos), "attn_scores": (batch, 3, pos, pos), "resid_mid": (batch, pos, 24),
        "q_input": (batch, pos, 3, 24), "k_input": (batch, pos, kv, 24), "pre": (batch, pos, 20), "post": (batch, pos, 20),
        "attn_out": (batch, pos, 24), "mlp_out": (batch, pos, 24), "mlp_in": (batch, pos, 24),
    }  # fmt: skip
    for short, shape in expected.items():
        assert tuple(cache[short, 1].shape) == shape, short
    torch.testing.assert_close(cache["pattern", 1].sum(-1), torch.ones(batch, 3, pos))
    assert not cache["pattern", 1].triu(1).any()
    torch.testing.assert_close(cache["result", 1].sum(2), cache["blocks.1.attn.hook_out"], atol=1e-5, rtol=0)


def after_branch(bridge: LoopedBridge, layer: int, branch: str, stream: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The stream after a branch: the sum, or in Dory a step from the point of the sphere that the branch read."""
    if bridge.looped_cfg.residual == "add":
        return stream + out
    site = bridge.schedule.site(layer)
    rate = bridge.plain.canonical_parameters()[f"{site.stack}.{site.layer}.{branch}_write.rate"]
    read = stream / (stream.square().sum(-1, keepdim=True) + bridge.looped_cfg.norm_eps).sqrt()
    return read + rate * (out - read)


@FAMILIES
def test_residual_stream_adds_up_inside_a_block(name: str) -> None:
    bridge = shared_bridge(name)
    _, cache = bridge.run_with_cache(TOKENS)
    for layer in range(bridge.cfg.n_layers):
        mid = after_branch(bridge, layer, "attn", cache["resid_pre", layer], cache["attn_out", layer])
        post = after_branch(bridge, layer, "mlp", cache["resid_mid", layer], cache["mlp_out", layer])
        if bridge.looped_cfg.norm == "stream":
            block = bridge.blocks[layer]
            mid, post = (n._original_component.unhooked(x) for n, x in ((block.ln1_stream, mid), (block.ln2_stream, post)))
        torch.testing.assert_close(mid, cache["resid_mid", layer])
        torch.testing.assert_close(post, cache["resid_post", layer])


@FAMILIES
def test_resid_mid_is_on_the_stream(name: str) -> None:
    bridge = shared_bridge(name)
    last = bridge.cfg.n_layers - 1
    shift = torch.randn(24, generator=torch.Generator().manual_seed(3))
    with bridge.hooks(fwd_hooks=[(f"blocks.{last}.hook_resid_mid", lambda t, hook: t + shift)]):
        _, edited = bridge.run_with_cache(TOKENS)
    stream = after_branch(bridge, last, "mlp", edited["resid_mid", last], edited["mlp_out", last])
    if bridge.looped_cfg.norm == "stream":
        stream = bridge.blocks[last].ln2_stream._original_component.unhooked(stream)
    torch.testing.assert_close(edited["resid_post", last], stream)


@FAMILIES
def test_both_spellings_everywhere(name: str) -> None:
    bridge = shared_bridge(name)
    layer = bridge.cfg.n_layers - 2
    tl_name, loop_name = f"blocks.{layer}.attn.hook_z", bridge.schedule.name(layer, "attn.hook_z")
    expected = bridge.run_with_hooks(TOKENS, fwd_hooks=[(tl_name, edit)])
    assert not torch.equal(expected, bridge(TOKENS))
    assert get_act_name("z", layer) == tl_name
    assert torch.equal(bridge.run_with_hooks(TOKENS, fwd_hooks=[(loop_name, edit)]), expected)
    with bridge.hooks(fwd_hooks=[(loop_name, edit)]):
        assert torch.equal(bridge(TOKENS), expected)
    for add in (bridge.add_hook, bridge.add_perma_hook):
        add(loop_name, edit)
        assert torch.equal(bridge(TOKENS), expected)
        bridge.reset_hooks(including_permanent=True)
    _, cache = bridge.run_with_cache(TOKENS, names_filter=loop_name)
    assert torch.equal(cache[loop_name], cache[tl_name]) and torch.equal(cache[loop_name], cache["z", layer])
    assert loop_name in cache and tl_name in cache and bridge.schedule.name(layer, "attn.hook_q") not in cache
    assert bridge.hook_dict[loop_name] is bridge.hook_dict[tl_name] is bridge.get_hook_point(loop_name)
    assert loop_name in bridge.hook_dict and bridge.hook_dict.get(loop_name) is bridge.hook_dict[tl_name]
    assert "loops.99.hook_out" not in bridge.hook_dict and bridge.get_hook_point("loops.99.hook_out") is None
    assert isinstance(cache, LoopedCache) and isinstance(cache, ActivationCache)
    caught, fwd_hooks, _ = bridge.get_caching_hooks(loop_name)
    bridge.run_with_hooks(TOKENS, fwd_hooks=fwd_hooks)
    assert torch.equal(caught[tl_name], cache[loop_name])


def test_patterns_name_what_brute_force_finds() -> None:
    bridge = shared_bridge("huginn")
    schedule = bridge.schedule
    _, cache = bridge.run_with_cache(TOKENS, names_filter="loops.1:.blocks.*.attn.hook_pattern")
    wanted = [i for i, s in enumerate(schedule.sites) if s.stack == "core" and s.loop >= 1]
    assert {n for n in cache if "hook_pattern" in n} == {f"blocks.{i}.attn.hook_pattern" for i in wanted}
    _, cache = bridge.run_with_cache(TOKENS, names_filter=["loops.-1.hook_out", "coda.blocks.0.hook_mlp_out"])
    assert "loops.2.hook_out" in cache and "blocks.11.hook_mlp_out" in cache and "loops.1.hook_out" not in cache
    zeroed = bridge.run_with_hooks(TOKENS, fwd_hooks=[("loops.*.blocks.1.hook_mlp_out", lambda t, hook: t * 0)])
    one_by_one = [(f"loops.{t}.blocks.1.hook_mlp_out", lambda t, hook: t * 0) for t in range(3)]
    assert torch.equal(zeroed, bridge.run_with_hooks(TOKENS, fwd_hooks=one_by_one))


@FAMILIES
def test_hooks_of_a_virtual_layer_and_persistent_caching_hooks(name: str) -> None:
    bridge = shared_bridge(name)
    last = bridge.cfg.n_layers - 1
    assert bridge.block_hooks(-1) == bridge.block_hooks(last) and "attn.hook_pattern" in bridge.block_hooks(0)
    loop_name = bridge.schedule.name(last, "attn.hook_z")
    caught = bridge.add_caching_hooks([loop_name, "blocks.-1.hook_resid_post"])
    logits, cache = bridge.run_with_cache(TOKENS)
    assert torch.equal(caught[f"blocks.{last}.attn.hook_z"], cache["z", last])
    assert torch.equal(caught[f"blocks.{last}.hook_resid_post"], cache["resid_post", last])
    bridge.reset_hooks()
    caught.clear()
    assert torch.equal(bridge(TOKENS), logits) and not caught


def test_hook_dictionary_holds_each_point_once() -> None:
    shallow, deep = random_bridge("ouro", n_loops=1), random_bridge("ouro", n_loops=5)
    per_loop = len(shallow.hook_dict) - len([n for n in shallow.hook_dict if not n.startswith(("blocks", "loops"))])
    extra_norms = 4 * 4  # hook_in, hook_scale, hook_normalized, hook_out of the norms between passes
    assert len(deep.hook_dict) == len(shallow.hook_dict) + 4 * per_loop + extra_norms


def test_the_last_pass_norm_has_a_loop_name() -> None:
    bridge = shared_bridge("ouro")
    _, cache = bridge.run_with_cache(TOKENS, names_filter="loops.*.norm.hook_scale")
    assert torch.equal(cache["loops.2.norm.hook_scale"], cache["ln_final.hook_scale"])
    assert "loops.0.norm.hook_scale" in cache


@FAMILIES
def test_aliases_are_those_that_transformer_lens_finds(name: str) -> None:
    bridge = shared_bridge(name)
    ours, theirs = (kind._collect_hook_aliases_from_registry(bridge) for kind in (LoopedBridge, TransformerBridge))
    assert ours == theirs


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("loops.7.hook_out", r"3 loops \(0\.\.2\).*n_loops=.*unroll\(8\)"),
        ("loops.1.blocks.4.hook_mlp_out", r"2 layers in a loop \(0\.\.1\)"),
        ("blocks.6.hook_resid_pre", r"6 virtual layers \(0\.\.5\)"),
        ("loops.1.blocks.0.attn.hook_zz", r"loops\.1\.blocks\.0\.attn\.hook_z"),
        ("loops.1.hook_injection", r"loops\.1\.hook_"),
        ("coda.blocks.0.hook_mlp_out", "0 coda layers"),
        ("L.loops.0.hook_out", "'loops"),
        ("loops.*.blocks.*.hook_nothing", "no such hook"),
    ],
)
def test_unknown_names_are_refused_everywhere(asked: str, says: str) -> None:
    bridge = shared_bridge("ouro")
    calls = [
        lambda: bridge.run_with_hooks(TOKENS, fwd_hooks=[(asked, edit)]),
        lambda: bridge.run_with_cache(TOKENS, names_filter=["hook_embed", asked]),
        lambda: bridge.add_hook(asked, edit),
        lambda: bridge.add_perma_hook(asked, edit),
        lambda: bridge.get_caching_hooks(asked),
        lambda: bridge.add_caching_hooks(asked),
        lambda: bridge.hook_dict[asked],
        lambda: bridge.hooks(fwd_hooks=[(asked, edit)]).__enter__(),
    ]
    for call in calls:
        with pytest.raises(LoopedError, match=says):
            call()
    assert not any(h.has_hooks() for h in bridge.hook_points())


def test_functions_of_names_may_be_written_for_either_spelling() -> None:
    bridge = shared_bridge("huginn")
    schedule = bridge.schedule

    def chosen(accepts: Any) -> list[str]:
        seen: list[str] = []
        _, cache = bridge.run_with_cache(TOKENS, names_filter=accepts)
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(accepts, lambda x, hook: seen.append(hook.name))])
        assert seen
        return [schedule.loop_name(name) for name in cache.cache_dict if not name.endswith("attn.o.hook_in")]

    inside = chosen(lambda name: name.startswith("loops.1.") and name.endswith("hook_z"))
    assert inside == [f"loops.1.blocks.{j}.attn.hook_z" for j in range(schedule.n_core)]
    ends = chosen(lambda name: name.startswith("loops.1.") and name.endswith(("hook_out", "hook_resid_post")))
    assert {"loops.1.hook_out", "loops.1.blocks.0.hook_resid_post"} < set(ends)  # passes have no other name
    # A virtual layer of TransformerLens is not one of the same number inside a loop.
    assert chosen(lambda name: "blocks.1.attn.hook_z" in name) == [f"{schedule.layer_name(1)}.attn.hook_z"]
    n_layers = schedule.n_layers
    assert len(chosen(lambda name: name.endswith("hook_resid_pre"))) == n_layers
