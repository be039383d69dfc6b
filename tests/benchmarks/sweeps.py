"""What sweeps over (loop, layer, position, head) cost, as ratios from one run, printed as JSON.

(a) `transformer_lens.patching` on the same bridge; (b) nnsight on the same transformers model, one trace per cell; (c) the
naive limit: one forward pass of the plain model per cell. `cpu` as in overhead.py.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from overhead import CLOCK, plain_twin
from transformer_lens import patching

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.patching import patch_sweep

SIZES = {
    "d_model 64, 16 virtual layers, 10 positions": (LoopedConfig(64, 4, 1000, n_core=4, n_loops=4), 10, 3),
    "d_model 512, 24 virtual layers, 32 positions": (LoopedConfig(512, 8, 1000, n_core=6, n_loops=4), 32, 1),
}


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 3] - logits[0, -1, 4]


def timed(run: Callable[[], torch.Tensor], rounds: int) -> tuple[torch.Tensor, float]:
    """What a run returns, and its median time in seconds."""
    times, value = [], torch.empty(0)
    for _ in range(rounds):
        start = CLOCK()
        value = run()
        times.append(CLOCK() - start)
    return value, statistics.median(times)


def prompts(d_vocab: int, n_pos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts that differ everywhere, so that no cell is idle."""
    tokens = torch.randint(0, d_vocab // 2, (1, n_pos), generator=torch.Generator().manual_seed(0))
    return tokens, tokens + d_vocab // 2


def against_transformer_lens(cfg: LoopedConfig, n_pos: int, rounds: int) -> dict[str, float]:
    """Times of TransformerLens's sweeps and of the naive limit, over ours."""
    bridge = LoopedBridge.from_config(cfg)
    plain, (corrupted, clean) = plain_twin(bridge), prompts(cfg.d_vocab, n_pos)
    _, cache = bridge.run_with_cache(clean)
    bridge.run_with_hooks(corrupted, fwd_hooks=[("hook_embed", lambda x, hook: x)])  # first calls are slow
    found = {}
    for site, axes, theirs in (
        ("resid_pre", ("loop", "layer", "pos"), patching.get_act_patch_resid_pre),
        ("z", ("loop", "layer", "head"), patching.get_act_patch_attn_head_out_all_pos),
    ):
        ours, own = timed(partial(sweep, bridge, corrupted, cache, site, axes), 3 * rounds)
        expected, other = timed(partial(theirs, bridge, corrupted, cache, metric), rounds)
        torch.testing.assert_close(ours.flatten(), expected.flatten(), atol=1e-5, rtol=1e-4)
        _, forward = timed(lambda: plain(corrupted).logits, 9)
        found[f"{site}: cells"] = ours.numel()
        found[f"{site}: transformer_lens"] = round(other / own, 1)
        found[f"{site}: plain forward x cells"] = round(forward * ours.numel() / own, 1)
    return found


def sweep(bridge: LoopedBridge, corrupted: torch.Tensor, cache: Any, site: str, axes: Any, **kwargs: Any) -> torch.Tensor:
    return patch_sweep(bridge, corrupted, cache, metric, site=site, axes=axes, verbose=False, **kwargs).values


def against_nnsight(d_model: int, n_pos: int) -> dict[str, float]:
    """Time of nnsight's patches of the same transformers model (HRM-Text, H_cycles 2, L_cycles 3), over ours."""
    from nnsight import NNsight
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=1000, hidden_size=d_model, intermediate_size=2 * d_model, num_attention_heads=4, num_key_value_heads=4,
        head_dim=d_model // 4, num_layers_per_stack=2, H_cycles=2, L_cycles=3, use_cache=False, max_position_embeddings=64,
    )  # fmt: skip
    hf = HrmTextForCausalLM(config).eval()
    bridge, (corrupted, clean) = LoopedBridge.from_hf(hf), prompts(1000, n_pos)
    _, cache = bridge.run_with_cache(clean)
    traced, stack, last = NNsight(hf), "L", n_pos - 1
    n_loops, n_layers = bridge.schedule.n_loops_of(stack), bridge.schedule.n_core

    def theirs(positions: range) -> torch.Tensor:
        values = torch.empty(n_loops, n_layers, len(positions))
        for t, j, p in product(range(n_loops), range(n_layers), positions):
            clean_value = cache.at(t, j, stack=stack)["resid_post"][0, p]
            with traced.trace(corrupted) as tracer:
                for _ in tracer.iter[t]:
                    traced.model.L_module.layers[j].output[0, p] = clean_value
                logits = traced.lm_head.output.save()
            values[t, j, p - positions.start] = metric(logits)
        return values

    ours, own = timed(partial(sweep, bridge, corrupted, cache, "resid_post", ("loop", "layer", "pos"), stack=stack), 3)
    expected, other = timed(lambda: theirs(range(last, n_pos)), 1)
    torch.testing.assert_close(ours[..., last:], expected, atol=1e-5, rtol=1e-4)
    return {"resid_post: cells": ours.numel(), "resid_post: nnsight (one position timed)": round(other * n_pos / own, 1)}


if __name__ == "__main__":
    with torch.no_grad():
        found = {name: against_transformer_lens(*size) for name, size in SIZES.items()}
        found["HRM-Text, d_model 64, 16 virtual layers, 10 positions"] = against_nnsight(64, 10)
    print(json.dumps(found, indent=1))
