"""Think-at-Hard, traced: tokens that run as often as a decider says, from embeddings made of logits."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from think_at_hard import ThinkAtHard
from torch import Tensor

from tl_looped import LoopedBridge
from tl_looped.patching import patch_sweep

TAH = Path(__file__).parent / "golden_traced" / "tah"
HOOKS = {"resid_pre": "hook_resid_pre", "resid_post": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
DATA = load_file(TAH / "golden.safetensors")
TOKENS = DATA["input_ids"]


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_every_state_of_the_reference_by_the_name_of_its_loop() -> None:
    module = ThinkAtHard(TAH).eval()
    bridge = LoopedBridge.trace(module, TOKENS, verbose=False)
    assert bridge.schedule.describe() == "3 loops over one stack of 3 layers, 0 prelude and 0 coda layers: 9 virtual layers"
    depths = {"adaptive": None, "oracle": DATA["oracle/iter_count_labels"], "R3": torch.full_like(TOKENS, 3)}
    for run, depth in depths.items():
        logits, cache = bridge.run_with_cache(TOKENS, **({} if depth is None else {"depth": depth}))
        near(logits, DATA[f"{run}/logits"])
        assert torch.equal(module.depth, DATA[f"{run}/iter_count"])
        n_checked = 0
        for key, expected in DATA.items():
            if match := re.fullmatch(rf"{run}/(\w+)/layer(\d)/loop(\d)", key):
                near(cache[f"loops.{match[3]}.blocks.{match[2]}.{HOOKS[match[1]]}"], expected)
                n_checked += 1
        assert n_checked == 36
    near(module(TOKENS, torch.full_like(TOKENS, 1)), DATA["R1/logits"])
    near(module(TOKENS, torch.full_like(TOKENS, 2)), DATA["R2/logits"])


@torch.no_grad()
def test_a_patch_goes_through_logits_into_the_next_iteration() -> None:
    bridge = LoopedBridge.trace(ThinkAtHard(TAH).eval(), TOKENS, verbose=False)
    other = TOKENS.flip(1)
    _, cache = bridge.run_with_cache(TOKENS)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3].mean()

    found = patch_sweep(
        bridge, other, cache, metric, axes=("loop", "layer", "pos"), loops=[0, 1], layers=[1], positions=[4], verbose=False
    )
    for t in (0, 1):
        name = f"loops.{t}.blocks.1.hook_resid_pre"

        def patch(x: Tensor, hook: object, name: str = name) -> Tensor:
            x = x.clone()
            x[:, 4] = cache[name][:, 4]
            return x

        with bridge.hooks(fwd_hooks=[(name, patch)]):
            logits, patched = bridge.run_with_cache(other)
        near(found.values[t, 0, 0], metric(logits))
        if t == 0:
            _, plain = bridge.run_with_cache(other)
            later = "loops.1.blocks.0.hook_resid_pre"
            assert not torch.equal(patched[later], plain[later])
