"""TransformerLens's names, labels and idioms on a looped model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_llama
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.errors import UnknownNameError
from tl_looped.interventions import ablate
from tl_looped.lenses import logit_lens


def _llama_of_transformer_lens(hf: Any) -> Any:
    """An ordinary decoder in TransformerLens's own bridge."""
    return build_bridge_from_module(copy.deepcopy(hf), "LlamaForCausalLM", hf_config=hf.config, model_name="ordinary")


@pytest.mark.parametrize("compatible", [False, True])
def test_hooks_have_the_names_that_an_ordinary_bridge_gives_them(compatible: bool) -> None:
    """Right is what TransformerLens calls them in its own bridge around the same decoder."""
    hf = tiny_llama()
    ours, theirs = LoopedBridge.loop_layers(hf, start=1, stop=3, n_loops=1), _llama_of_transformer_lens(hf)
    if compatible:
        for model in (ours, theirs):
            model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    wanted = {name: point.name for name, point in theirs.hook_dict.items() if "rotary" not in name}
    # TransformerLens has no hook on the stream between attention and MLP, and gives the input of ln2 that name.
    differing = {
        n: (ours.hook_dict[n].name, at) for n, at in wanted.items() if n in ours.hook_dict and ours.hook_dict[n].name != at
    }
    assert all("resid_mid" in str(names) or "ln2.hook_in" in name for name, names in differing.items()), differing
    assert len(wanted.keys() & ours.hook_dict.keys()) > 100
    assert (ours.hook_dict["blocks.3.attn.hook_z"].name == "blocks.3.attn.hook_z") == compatible


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "parcae", "looped_qwen"])
def test_a_hook_that_looks_at_its_name_acts_and_its_cache_knows_the_name(name: str) -> None:
    bridge, tokens = random_bridge(name), random_tokens()
    before = {n: p.name for n, p in bridge.hook_dict.items()}
    bridge.enable_compatibility_mode(disable_warnings=True)
    last = bridge.cfg.n_layers - 1
    legacy = [
        f"blocks.{last}.{hook}" for hook in ("attn.hook_z", "attn.hook_q", "hook_attn_out", "hook_mlp_out", "mlp.hook_post")
    ]
    plain = bridge(tokens)
    for place in [*legacy, "hook_embed"]:

        def by_name(x: Tensor, hook: Any, place: str = place) -> Tensor:
            return torch.zeros_like(x) if hook.name == place else x

        assert (bridge.run_with_hooks(tokens, fwd_hooks=[(place, by_name)]) - plain).abs().max() > 1e-4, place
        for filter in (place, before[place]):  # cached under either name
            _, cache = bridge.run_with_cache(tokens, names_filter=filter)
            point = bridge.hook_dict[place]
            assert cache[point.name] is cache[place] is cache[before[place]], (place, filter)


@pytest.mark.parametrize("name", ["ouro", "huginn", "retrofit_olmo", "hrm_text", "parcae", "anchored"])
def test_the_manual_loop_of_a_key_value_cache_equals_one_run(name: str) -> None:
    """TransformerLens documents the loop; right is the run of the whole text."""
    bridge, tokens = random_bridge(name, torch.float64), random_tokens(2, 6)
    whole = bridge(tokens)
    logits, kept = bridge(tokens[:, :3], return_type="logits_and_cache")
    parts = [logits]
    for at in range(3, 6):
        logits, kept = bridge(tokens[:, at : at + 1], return_type="logits_and_cache", past_key_values=kept)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("as_index", [np.int64, torch.tensor, lambda i: np.array(i, dtype=np.uint8)])
def test_ints_of_numpy_and_torch_are_ints(as_index: Any, unchecked: None) -> None:
    bridge, tokens = random_bridge("retrofit_llama"), random_tokens(1, 5)
    two, both = as_index(2), [as_index(1), as_index(2)]
    logits, cache = bridge.run_with_cache(tokens)
    assert cache["pattern", two] is cache["pattern", 2] and cache.at(loop=two, layer=as_index(1))["z"] is cache.at(2, 1)["z"]
    assert torch.equal(cache.stack_loops("pattern", as_index(0), loops=two), cache.stack_loops("pattern", 0, loops=2))
    assert torch.equal(cache.stack_loops("z", 0, loops=both), cache.stack_loops("z", 0, loops=[1, 2]))
    assert torch.equal(cache.stack_loops("z", 0, loops=np.array([1, 2])), cache.stack_loops("z", 0, loops=[1, 2]))
    assert torch.equal(cache.stack_head_results(two), cache.stack_head_results(2))
    assert torch.equal(cache.decompose_resid(two, pos_slice=two), cache.decompose_resid(2, pos_slice=2))
    assert torch.equal(cache.attribute_logits(5, positions=two).values, cache.attribute_logits(5, positions=2).values)
    assert torch.equal(bridge(tokens, stop_at_layer=two), cache["resid_pre", 2]) and bridge.block_hooks(
        two
    ) == bridge.block_hooks(2)
    n_layers = as_index(bridge.cfg.n_layers)
    assert torch.equal(bridge(tokens, stop_at_layer=n_layers), cache["resid_post", -1])
    injection = cache["loops.0.hook_injection"]
    restarted = bridge(cache["resid_pre", 2], start_at_layer=two, injection=injection)
    torch.testing.assert_close(restarted, logits)
    assert (
        torch.equal(bridge.readout(tokens, loop=as_index(1)), bridge.readout(tokens, loop=1))
        and bridge.unroll(two).n_loops == 2
    )
    for mine, usual in ((two, 2), (both, [1, 2])):
        hooks = [ablate(bridge, "attn", loops=which, layers=as_index(0), positions=which) for which in (mine, usual)]
        assert torch.equal(*(bridge.run_with_hooks(tokens, fwd_hooks=h) for h in hooks))
    assert torch.equal(
        logit_lens(bridge, tokens, targets=as_index(7), positions=two).ranks,
        logit_lens(bridge, tokens, targets=7, positions=2).ranks,
    )
    for wrong in (True, np.bool_(True), torch.tensor(True), 1.0, np.float64(1.0)):
        with pytest.raises(LoopedError):
            cache["pattern", wrong]
        with pytest.raises(LoopedError):
            bridge.schedule.select_loops(wrong)


def test_a_run_that_stops_has_no_gradients() -> None:
    bridge = random_bridge("nanbeige")
    with pytest.raises(LoopedError, match="stop_at_layer=2 and incl_bwd=True"):
        bridge.run_with_cache(random_tokens(), return_type="loss", incl_bwd=True, stop_at_layer=2)


def test_tokens_of_one_axis_are_a_prompt_everywhere() -> None:
    bridge, tokens = random_bridge("huginn"), random_tokens(1, 5)
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for cached in (True, False):
        one, two = (bridge.generate(t, use_past_kv_cache=cached, **options) for t in (tokens[0], tokens))
        assert torch.equal(one, two)
    one, two = (torch.cat([*bridge.generate_stream(t, **options)], dim=1) for t in (tokens[0], tokens))
    assert torch.equal(one, two)
    assert torch.equal(bridge.readout(tokens[0], loop=0), bridge.readout(tokens, loop=0))


def test_labels_are_those_of_transformer_lens_in_its_methods_and_loops_in_ours() -> None:
    """Right is what TransformerLens calls the components of the same decoder in its own bridge."""
    hf, tokens = tiny_llama(), random_tokens(1, 4)
    ours, theirs = LoopedBridge.loop_layers(hf, start=1, stop=3, n_loops=1), _llama_of_transformer_lens(hf)
    theirs.set_use_attn_result(True)
    (_, mine), (_, cache) = ours.run_with_cache(tokens), theirs.run_with_cache(tokens)
    for method, options in (
        ("decompose_resid", {}),
        ("accumulated_resid", {"incl_mid": True}),
        ("stack_head_results", {"incl_remainder": True}),
        ("stack_neuron_results", {"layer": -1}),
        ("get_full_resid_decomposition", {}),
    ):
        _, found = getattr(mine, method)(return_labels=True, **options)
        _, wanted = getattr(cache, method)(return_labels=True, **options)
        assert found == wanted or set(found) == set(wanted), method
        assert [ours.schedule.names.tl_label(ours.schedule.loop_label(label)) for label in found] == found
    _, heads = mine.stack_head_results(return_labels=True)
    assert [ours.schedule.loop_label(label) for label in heads] == list(
        mine.attribute_logits(3, unit="head").labels[: len(heads)]
    )


@pytest.mark.parametrize(
    ("hook", "switch"),
    [("attn.hook_result", "use_attn_result"), ("hook_mlp_in", "use_hook_mlp_in"), ("hook_q_input", "use_split_qkv_input")],
)
def test_a_hook_that_needs_a_setting_says_which(hook: str, switch: str) -> None:
    bridge = random_bridge("nanbeige")
    _, cache = bridge.run_with_cache(random_tokens(), names_filter=lambda name: "hook_z" in name)
    for name in (f"blocks.1.{hook}", f"loops.0.blocks.1.{hook}"):
        with pytest.raises(UnknownNameError, match=rf"fires after model.set_{switch}\(True\)"):
            cache[name]
    with pytest.raises(UnknownNameError, match="name it in names_filter"):
        cache["pattern", 1]
