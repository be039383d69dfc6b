"""`at_loop=` and `n_loops=` in sweeps: the answer after loop t is that of the model with t + 1 loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import random_tokens, shared_bridge

from tl_looped import LoopedBridge, LoopedError
from tl_looped.attribution import attribution_sweep, edge_sweep, influence, path_patch, weight_gradients_by_pass
from tl_looped.metrics import logit_diff
from tl_looped.patching import patch_between_loops, patch_sweep

CLEAN, CORRUPTED = random_tokens(2, 4, seed=1), random_tokens(2, 4)
EDGE = {"sources": "loops.0.blocks.1.head.1", "receivers": "loops.1.blocks.0.mlp_in"}
METRIC = logit_diff([4, 5], [7, 8])
Tool = Callable[..., Any]

TOOLS: dict[str, Tool] = {
    "patch_sweep": lambda model, cache, **at: patch_sweep(model, CORRUPTED, cache, METRIC, verbose=False, **at),
    "attribution_sweep": lambda model, cache, **at: attribution_sweep(model, CORRUPTED, cache, METRIC, **at),
    "edge_sweep": lambda model, cache, **at: edge_sweep(model, CORRUPTED, cache, METRIC, **EDGE, **at),
    "path_patch": lambda model, cache, **at: path_patch(model, CORRUPTED, cache, METRIC, **EDGE, **at),
    "patch_between_loops": lambda model, cache, **at: patch_between_loops(model, CORRUPTED, METRIC, verbose=False, **at),
}


def cache_of(model: LoopedBridge, **given: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(CLEAN, **given)[1]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", ["looped_qwen", "ouro"])
def test_the_answer_after_a_loop_is_that_of_so_many_loops(name: str, tool: str) -> None:
    model = shared_bridge(name, torch.float64)
    assert model.n_loops == 3
    cache, sweep = cache_of(model), TOOLS[tool]
    expected = sweep(model.unroll(2), cache_of(model.unroll(2)))
    others = ({"n_loops": 2}, {"at_loop": 1, "n_loops": 5}, {"at_loop": -2})  # each for one tool
    for given in ({"at_loop": 1}, *(others if tool == "attribution_sweep" else ())):
        found = sweep(model, cache, **given)
        assert found.labels == expected.labels
        torch.testing.assert_close(found.values, expected.values, equal_nan=True)
    deeper = sweep(model, cache, n_loops=4)
    torch.testing.assert_close(deeper.values, sweep(model.unroll(4), cache_of(model.unroll(4))).values, equal_nan=True)
    if tool == "patch_sweep":
        with torch.no_grad():
            torch.testing.assert_close(sweep(model, cache, at_loop=1).baseline_clean, METRIC(model.readout(CLEAN, loop=1)))


def test_a_filtered_cache_is_made_again_with_what_it_held() -> None:
    model = shared_bridge("huginn", torch.float64)
    few = cache_of(model, names_filter=["loops.*.hook_out"], initial_state=5)
    found = patch_sweep(model, CORRUPTED, few, METRIC, site="out", at_loop=0, verbose=False)
    one = model.unroll(1)
    expected = patch_sweep(one, CORRUPTED, cache_of(one, initial_state=5), METRIC, site="out", verbose=False)
    torch.testing.assert_close(found.values, expected.values)
    with pytest.raises(LoopedError, match="lacks prelude"):
        patch_sweep(model, CORRUPTED, few, METRIC, at_loop=0, verbose=False)


def test_what_cannot_be_made_again_is_refused() -> None:
    model = shared_bridge("ouro", torch.float64)
    cache = cache_of(model)
    with pytest.raises(LoopedError, match="loop 5 is out of range"):
        patch_sweep(model, CORRUPTED, cache, METRIC, at_loop=5, verbose=False)
    with pytest.raises(LoopedError, match="loop 2 is out of range: there are 2"):
        edge_sweep(model, CORRUPTED, cache, METRIC, **EDGE, at_loop=2, n_loops=2)
    with model.hooks(fwd_hooks=[("loops.0.hook_out", lambda x, hook: x * 2)]):
        hooked = cache_of(model)
        with pytest.raises(LoopedError, match="that has hooks, such as"):
            patch_sweep(model, CORRUPTED, cache, METRIC, at_loop=1, verbose=False)
    for other in (hooked, cache_of(model, return_cache_object=False)):
        with pytest.raises(LoopedError, match="cannot be made again"):
            patch_sweep(model, CORRUPTED, other, METRIC, at_loop=1, verbose=False)


def test_weight_gradients() -> None:
    model = shared_bridge("ouro", torch.float64)
    found = weight_gradients_by_pass(model, CLEAN, METRIC, at_loop=1)
    expected = weight_gradients_by_pass(model.unroll(2), CLEAN, lambda logits: METRIC(logits).mean())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert found["core.0.attn.q.weight"].shape[0] == 2
    moved = influence(model, CLEAN, CORRUPTED, n_loops=2)
    torch.testing.assert_close(moved.values, influence(model.unroll(2), CLEAN, CORRUPTED).values)
