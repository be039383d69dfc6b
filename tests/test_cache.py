"""Reading a cache: by loop and layer, sliced, moved, and what TransformerLens's own methods make of it."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import run
from peak_memory import PeakMemory
from transformer_lens import ActivationCache
from zoo import FAMILIES, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedCache, LoopedError
from tl_looped.errors import OutOfRangeError

TOKENS = random_tokens(pos=4)


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.slow
@FAMILIES
def test_a_view_of_every_layer(name: str) -> None:
    cache = run(shared_bridge(name), TOKENS)
    for index, (stack, loop, layer) in enumerate(cache.model.schedule.sites):
        view = cache.at(loop, layer, stack=stack)
        for short in ("resid_pre", "resid_mid", "resid_post", "pattern", "z", "post", "attn_out"):
            assert view[short] is cache[short, index]
        assert view["attn.hook_pattern"] is cache[f"blocks.{index}.attn.hook_pattern"]
        assert set(view) == {n.removeprefix(f"blocks.{index}.") for n in cache if n.startswith(f"blocks.{index}.")}
        assert len(view) == len(list(view)) > 20 and "hook_resid_post" in view and "hook_nothing" not in view
        assert cache.model.schedule.name(index, "") == repr(view).split("'")[1] + "."


@FAMILIES
def test_a_view_of_every_pass(name: str) -> None:
    cache = run(shared_bridge(name), TOKENS)
    schedule = cache.model.schedule
    for p in schedule.passes:
        view, prefix = cache.at(loop=p.loop, stack=p.stack), schedule.pass_prefix(p)
        assert {"hook_state", "hook_in", "hook_out"} <= set(view) and not any(n.startswith("blocks") for n in view)
        assert all(view[n] is cache[f"{prefix}.{n}"] for n in view)
        assert view["out"] is cache[f"{prefix}.hook_out"]
    assert cache.at(loop=-1, stack=schedule.passes[-1].stack)["hook_out"] is view["hook_out"]


def test_the_norm_of_the_last_pass() -> None:
    cache = run(shared_bridge("ouro"), TOKENS)
    assert cache.at(loop=-1)["norm.hook_scale"] is cache["ln_final.hook_scale"]


def test_views_that_do_not_exist() -> None:
    huginn, hrm = run(shared_bridge("huginn"), TOKENS), run(shared_bridge("hrm_text"), TOKENS)
    cases = [
        (huginn, {"loop": 3, "layer": 0}, "loop 3 is out of range: there are 3 loops"),
        (huginn, {"loop": 0, "layer": 3}, "layer 3 is out of range"),
        (huginn, {"layer": 0}, "pass loop="),
        (huginn, {"layer": 0, "loop": 0, "stack": "coda"}, "runs once"),
        (huginn, {"stack": "prelude"}, "pass layer="),
        (huginn, {"layer": 2, "stack": "prelude"}, "layer 2 is out of range"),
        (huginn, {"layer": 0, "loop": 0, "stack": "H"}, "loops 'core'"),
        (hrm, {"layer": 0, "loop": 0}, "pass stack='L' or stack='H'"),
        (hrm, {"layer": 0, "loop": 0, "stack": "core"}, "loops 'L' and 'H'"),
    ]
    for cache, where, message in cases:
        with pytest.raises(LoopedError, match=message):
            cache.at(**where)
    with pytest.raises(KeyError, match="no such hook point"):
        huginn.at(0, 0)["hook_nothing"]


@FAMILIES
def test_selecting_loops(name: str) -> None:
    cache = run(shared_bridge(name), TOKENS)
    schedule = cache.model.schedule
    last = cache.select_loops([-1])
    assert isinstance(last, LoopedCache) and last.has_batch_dim
    assert all(last[n] is cache[n] for n in last)
    kept = [p for p in schedule.passes if p.index >= len(schedule.passes) - len(schedule.passes) // schedule.n_loops]
    edges = [i for i, site in enumerate(schedule.sites) if site.loop is None]
    layers = {int(n.split(".")[1]) for n in last if n.startswith("blocks.")}
    assert layers == {*edges, *(i for p in kept for i in p.layers)}
    prefixes = {schedule.pass_prefix(p) for p in kept}
    assert {n.rsplit(".hook_state")[0] for n in last if n.endswith("hook_state")} == prefixes
    assert "hook_embed" in last and "ln_final.hook_scale" in last
    assert set(cache.select_loops(range(schedule.n_loops))) == set(cache)
    with pytest.raises(OutOfRangeError, match="out of range"):
        cache.select_loops([schedule.n_loops])


@FAMILIES
def test_batch_axis_device_and_order_keep_the_type(name: str) -> None:
    cache = run(shared_bridge(name), TOKENS)
    keys = list(cache)
    assert keys == list(cache.keys()) == [n for n, _ in cache.items()] and len(cache) == len(keys) == len(cache.values())
    row = cache.apply_slice_to_batch_dim(1)
    assert isinstance(row, LoopedCache) and not row.has_batch_dim and list(row) == keys
    rows = cache.apply_slice_to_batch_dim((0, 1))
    assert isinstance(rows, LoopedCache) and rows.has_batch_dim
    bare = rows.remove_batch_dim()
    assert isinstance(bare, LoopedCache) and not bare.has_batch_dim
    for hook in ("resid_post", "pattern", "z"):
        assert torch.equal(row[hook, 1], cache[hook, 1][1]) and torch.equal(bare[hook, 1], cache[hook, 1][0])
    torch.testing.assert_close(row.decompose_resid(), cache.decompose_resid()[:, 1], atol=1e-5, rtol=1e-5)
    moved = cache.to("cpu")
    assert isinstance(moved, LoopedCache) and torch.equal(moved["z", 0][0], bare["z", 0])


@FAMILIES
def test_stacks_of_activations_read_virtual_layers(name: str) -> None:
    cache = run(shared_bridge(name), TOKENS)
    n_layers = cache.model.cfg.n_layers
    stacked = cache.stack_activation("z")
    assert len(stacked) == n_layers and torch.equal(stacked, torch.stack([cache["z", i] for i in range(n_layers)]))


@FAMILIES
def test_computed_head_results_are_what_the_hook_would_hold(name: str) -> None:
    bridge = random_bridge(name)
    _, cache = bridge.run_with_cache(TOKENS)
    bridge.set_use_attn_result(True)
    _, with_results = bridge.run_with_cache(TOKENS)
    before = cache.stack_head_results()
    cache.compute_head_results()
    for i in range(bridge.cfg.n_layers):
        torch.testing.assert_close(cache["result", i], with_results["result", i], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.stack_head_results(), before, atol=1e-5, rtol=1e-5)


def test_state_space_methods_are_refused() -> None:
    cache = run(shared_bridge("ouro"), TOKENS)
    assert cache.ssm_layers() == []
    for method in (cache.compute_ssm_state, cache.compute_ssm_effective_attention):
        with pytest.raises(RuntimeError, match="No SSM mixer layers"):
            method()


@pytest.mark.slow
@FAMILIES
def test_stacks_of_passes_and_of_layers(name: str) -> None:
    cache = run(shared_bridge(name), TOKENS)
    schedule = cache.model.schedule
    for stack in schedule.core_stacks:
        prefixes = [schedule.pass_prefix(p) for p in schedule.passes if p.stack == stack]
        for hook in ("hook_state", "hook_injection", "hook_in", "hook_out", "hook_exit_logit", "norm.hook_scale"):
            if f"{prefixes[0]}.{hook}" not in cache:
                with pytest.raises(KeyError, match="no such hook point"):
                    cache.stack_loops(hook, stack=stack)
                continue
            wanted = torch.stack([cache[f"{prefix}.{hook}"] for prefix in prefixes])
            assert torch.equal(cache.stack_loops(hook, stack=stack), wanted), hook
            if hook.startswith("hook_"):
                assert torch.equal(cache.stack_loops(hook.removeprefix("hook_"), stack=stack), wanted), hook
        layers = [p.layers for p in schedule.passes if p.stack == stack]
        outs = torch.stack([cache[f"blocks.{i[0]}.hook_out"] for i in layers])
        assert torch.equal(cache.stack_loops("hook_out", layer=0, stack=stack), outs)
        for hook, short in (("hook_resid_post", "resid_post"), ("attn.hook_z", "z"), ("mlp.hook_post", "post")):
            wanted = torch.stack([torch.stack([cache[f"blocks.{i}.{hook}"] for i in p]) for p in layers])
            assert torch.equal(cache.stack_loops(hook, stack=stack), wanted), hook
            assert torch.equal(cache.stack_loops(short, loops=slice(-1, None), stack=stack), wanted[-1:]), short


@FAMILIES
def test_transformer_lens_constructor_makes_a_cache_that_knows_the_loops(name: str) -> None:
    bridge = shared_bridge(name)
    activations, fwd_hooks, _ = bridge.get_caching_hooks()
    bridge.run_with_hooks(TOKENS, fwd_hooks=fwd_hooks)
    _, plain = bridge.run_with_cache(TOKENS, return_cache_object=False)
    for cache in (ActivationCache(activations, bridge), ActivationCache(cache_dict=plain, model=bridge, has_batch_dim=True)):
        assert isinstance(cache, LoopedCache) and cache.has_batch_dim
        total, stream = cache.decompose_resid().sum(0), cache["ln_final.hook_in"]
        assert (total - stream).abs().max() < 1e-4 * stream.abs().max()
    assert isinstance(copy.copy(cache), LoopedCache)
    assert type(ActivationCache({}, object())) is ActivationCache


@FAMILIES
def test_a_run_cut_to_positions(name: str) -> None:
    bridge = shared_bridge(name)
    tokens = random_tokens(pos=11)  # a length that no other axis has
    _, whole = bridge.run_with_cache(tokens)
    for asked, index in ((-1, [10]), ((1, 4), [1, 2, 3]), ([0, 5], [0, 5])):
        _, cut = bridge.run_with_cache(tokens, pos_slice=asked)
        assert set(cut) == set(whole)
        for key, value in whole.items():
            assert torch.equal(cut[key], value.index_select(value.shape.index(11), torch.tensor(index))), key
        stream = whole["ln_final.hook_in"][:, index]
        assert (cut.decompose_resid().sum(0) - stream).abs().max() < 1e-4 * stream.abs().max()


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "looped_qwen"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_filtered_run_holds_what_the_filter_names_and_no_more(name: str, grad: bool) -> None:
    bridge = shared_bridge(name)
    last = bridge.schedule.pass_prefix(bridge.schedule.passes[-1])
    middle = bridge.schedule.passes[len(bridge.schedule.passes) // 2].first
    tokens = random_tokens(pos=16)
    cases = [[f"{last}.hook_out"], [bridge.schedule.name(middle, "attn.hook_z"), "blocks.*.hook_resid_post"]]
    with torch.set_grad_enabled(grad):
        with PeakMemory(bridge) as plain:
            bridge(tokens)
        for names in cases:
            with PeakMemory(bridge) as seen:
                _, cache = bridge.run_with_cache(tokens, names_filter=names)
            wanted = {n for name in names for n in bridge.expand_name(name)}
            values = {t.data_ptr(): t.nbytes for t in cache.values()}
            storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in cache.values()}
            assert wanted <= set(cache) and {cache[n].data_ptr() for n in wanted} == set(values)  # the rest are other names
            assert storages == values  # nothing larger is kept alive
            # A hook gets a tensor of its own, beside the one that the run goes on with.
            assert seen.nbytes <= plain.nbytes + sum(values.values()) + max(values.values())
        with PeakMemory(bridge) as everything:
            bridge.run_with_cache(tokens)
    assert everything.nbytes > plain.nbytes + 3 * sum(values.values())  # the measure sees what is cached


def test_what_is_no_name() -> None:
    cache = run(shared_bridge("ouro"), TOKENS)
    for key in (5, None, (), slice(1)):
        with pytest.raises(LoopedError, match="pass a name"):
            cache[key]


def test_errors_quote_what_was_asked_and_suggest_its_spelling() -> None:
    bridge = shared_bridge("huginn")
    _, cache = bridge.run_with_cache(random_tokens(), names_filter="loops.*.hook_out")
    for asked, why in (
        ("loops.1.blocks.0.hook_z", r"'loops.1.blocks.0.hook_z' was asked.* Nearest: loops.1.blocks.0.attn.hook_z"),
        ("loops.0.hook_resid_pre", r"'loops.0.hook_resid_pre' was asked.* Nearest: loops.0.blocks.\d.hook_resid_pre"),
        ("loops.1.blocks.0.attn.hook_z", r"'loops.1.blocks.0.attn.hook_z' exists, but was not cached"),
        (("resid_pre", 0, 1), r"cache.at\(loop=0, layer=1\)\['resid_pre'\]"),
    ):
        with pytest.raises(LoopedError, match=why):
            cache[asked]


def test_slices_and_earlier_stacks_of_streams_are_no_contributions() -> None:
    bridge = shared_bridge("ouro")
    _, cache = bridge.run_with_cache(random_tokens())
    first, second = cache.accumulated_resid(layer=None), cache.accumulated_resid(layer=None, incl_mid=True)
    for streams in (first, second, first[:3], second[1:, :, -1]):
        with pytest.raises(LoopedError, match="no parts of the final one"):
            cache.logit_attrs(streams, 1)
    cache.logit_attrs(cache.accumulated_resid(carried=True), 1)


@pytest.mark.parametrize("batch", [True, False])
def test_a_token_for_every_position(batch: bool) -> None:
    bridge = shared_bridge("ouro")
    tokens = random_tokens(2 if batch else 1)
    logits, cache = bridge.run_with_cache(tokens, remove_batch_dim=not batch)
    wanted = tokens.roll(-1, 1) if batch else tokens[0].roll(-1)
    logits = logits if batch else logits[0]
    expected = logits.gather(-1, wanted[..., None])[..., 0]
    torch.testing.assert_close(cache.attribute_logits(wanted, positions=None).values.sum(0), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(cache.attribute_logits(wanted).values.sum(0), expected[..., -1], atol=1e-4, rtol=0)
    found = cache.attribute_logits(wanted, positions=[1, 3]).values.sum(0)
    torch.testing.assert_close(found, expected[..., [1, 3]], atol=1e-4, rtol=0)
