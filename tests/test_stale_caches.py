"""A cache is read with the weights that made it, and with no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import FAMILIES, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedCache, LoopedError
from tl_looped.attribution import attribution_sweep, edge_sweep
from tl_looped.interventions import ablate
from tl_looped.patching import patch_sweep


def _edited(name: str) -> Callable[[LoopedBridge], object]:
    """One way to change the weights of a model."""

    def data(model: LoopedBridge) -> Tensor:
        return model.blocks[1].mlp.out.weight.data

    def trained(model: LoopedBridge) -> None:
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        model(random_tokens(), return_type="loss").backward()
        optimiser.step()
        optimiser.zero_grad()

    def replaced(model: LoopedBridge) -> None:
        parameter = model.original_model.canonical_parameters()["unembed.weight"]
        for _ in range(2):  # the second copy may lie where the first weights lay
            parameter.data = parameter.data * 1.5

    ways: dict[str, Callable[[LoopedBridge], object]] = {
        "one entry": lambda model: data(model)[3, 4].add_(1e-3),
        "two rows exchanged": lambda model: data(model).copy_(data(model)[[1, 0, *range(2, 24)]]),
        "two columns exchanged": lambda model: data(model).copy_(data(model)[:, [1, 0, *range(2, 20)]]),
        "one sign": lambda model: data(model)[0].neg_(),
        "in place": lambda model: torch.no_grad()(model.blocks[1].attn.o.weight.mul_)(0.5),
        "replaced twice": replaced,
        "a training step": trained,
        "compatibility mode": lambda model: model.enable_compatibility_mode(disable_warnings=True),
        "bfloat16": lambda model: model.to(torch.bfloat16),
    }
    return ways[name]


def _users(model: LoopedBridge, cache: LoopedCache, other: Tensor) -> dict[str, Callable[[], object]]:
    """Everything that reads a cache together with the weights of a model."""

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 5]

    return {
        "decompose_resid": cache.decompose_resid,
        "accumulated_resid": cache.accumulated_resid,
        "as they are": lambda: cache.accumulated_resid(layer=None),
        "stack_head_results": cache.stack_head_results,
        "stack_neuron_results": lambda: cache.stack_neuron_results(layer=None),
        "get_neuron_results": lambda: cache.get_neuron_results(1),
        "full": cache.get_full_resid_decomposition,
        "attribute_logits": lambda: cache.attribute_logits(5),
        "logit_attrs": lambda: cache.logit_attrs(torch.zeros(1, 2, 7, 24), 5),
        "apply_ln_to_stack": lambda: cache.apply_ln_to_stack(torch.zeros(1, 2, 7, 24)),
        "logit_lens": cache.logit_lens,
        "compute_head_results": cache.compute_head_results,
        "some rows": lambda: cache.apply_slice_to_batch_dim(0).decompose_resid(),
        "some loops": lambda: cache.select_loops("all").attribute_logits(5),
        "patch_sweep": lambda: patch_sweep(model, other, cache, metric, axes=("loop",), verbose=False),
        "attribution_sweep": lambda: attribution_sweep(model, other, cache, metric, axes=("loop",)),
        "edge_sweep": lambda: edge_sweep(model, other, cache, metric),
        "ablate": lambda: ablate(model, loops=0, part="mlp", mode="mean", cache=cache),
    }


def test_a_cache_is_not_read_with_weights_that_did_not_make_it() -> None:
    model, other = random_bridge("looped_qwen", n_loops=2), random_tokens(seed=5)
    _, cache = model.run_with_cache(random_tokens())
    for user in _users(model, cache, other).values():
        user()
    _edited("one entry")(model)
    for user in _users(model, cache, other).values():
        with pytest.raises(LoopedError, match="other weights made this cache"):
            user()


@pytest.mark.parametrize(
    "way",
    ["one entry", "two rows exchanged", "two columns exchanged", "one sign", "in place", "replaced twice", "a training step",
     "compatibility mode", "bfloat16"],
)  # fmt: skip
def test_every_change_of_weights_is_noticed(way: str) -> None:
    model = random_bridge("looped_qwen")
    _, cache = model.run_with_cache(random_tokens(), names_filter="ln_final.hook_scale")
    stack = torch.zeros(1, 2, 7, 24)
    cache.logit_attrs(stack, 5)
    _edited(way)(model)
    with pytest.raises(LoopedError, match="other weights made this cache"):
        cache.logit_attrs(stack, 5)
    _, fresh = model.run_with_cache(random_tokens(), names_filter="ln_final.hook_scale")
    fresh.logit_attrs(stack, 5)


@FAMILIES
def test_a_cache_knows_its_model(name: str) -> None:
    model, clean, corrupted = random_bridge(name), random_tokens(seed=1), random_tokens(seed=2)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3]

    def sweep(of: LoopedBridge, cache: Any) -> Tensor | None:
        stack = "L" if len(of.schedule.core_stacks) > 1 else None
        return patch_sweep(of, corrupted, cache, metric, site="state", loops=0, stack=stack, verbose=False).baseline_clean

    right = model(clean)[:, -1, 3]  # the clean prompt, run
    _, cache = model.run_with_cache(clean)
    same = model.unroll(model.n_loops)  # the same parameters
    found = sweep(same, cache)
    assert found is not None and torch.allclose(found, right, atol=1e-5)
    model.to("cpu")
    model.requires_grad_(False)
    assert torch.allclose(cache.attribute_logits(3).values.sum(0), _before_cap(model, clean)[:, -1, 3], atol=2e-3)

    # Another model of the same schedule: only its own cache tells what its clean run says.
    stranger = random_bridge(name)
    with torch.no_grad():
        stranger.original_model.canonical_parameters()["embed.weight"].mul_(1.01)
    with pytest.raises(LoopedError, match=r"embed.weight changed.*LoopedCache\(dict"):
        sweep(stranger, cache)
    strange = stranger.run_with_cache(clean)[1]
    found = sweep(stranger, strange)
    assert found is not None and torch.allclose(found, stranger(clean)[:, -1, 3], atol=1e-5)
    taken = LoopedCache(dict(cache.items()), stranger)  # on purpose; what a clean run says is then not known
    assert sweep(stranger, taken) is None and sweep(stranger, dict(cache.items())) is None
    moved = stranger.run_with_hooks(corrupted, fwd_hooks=[("unembed.hook_in", lambda x, hook: cache["unembed.hook_in"])])
    expected = cache["unembed.hook_in"] @ stranger.W_U
    cap = stranger.looped_cfg.logit_softcap
    assert torch.allclose(moved, expected if cap is None else cap * torch.tanh(expected / cap), atol=1e-5)


def _before_cap(model: LoopedBridge, tokens: Tensor) -> Tensor:
    """Logits before the soft cap, from what the unembedding writes."""
    seen: list[Tensor] = []
    model.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_out", lambda x, hook: seen.append(x))])
    return seen[0]
