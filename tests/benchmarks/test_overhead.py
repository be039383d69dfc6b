"""What the bridge costs over the plain model, as ratios from one run. Run with `make bench`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.model import LoopedModel

pytestmark = pytest.mark.benchmark

RESIDUALS = ["blocks.*.hook_resid_pre", "blocks.*.hook_resid_mid", "blocks.*.hook_resid_post"]


def plain_twin(bridge: LoopedBridge) -> LoopedModel:
    """The same model with the same parameters, never touched by the bridge."""
    with torch.device("meta"):
        model = LoopedModel(bridge.looped_cfg)
    for name, parameter in bridge.original_model.canonical_parameters().items():
        model.set_parameter(name, parameter)
    return model.eval()


def paired_ratio(measured: Callable[[], object], baseline: Callable[[], object], rounds: int) -> float:
    """Median over rounds of time(measured) / time(baseline), the two in turn so that a drifting machine cancels out."""
    measured(), baseline()
    ratios = []
    for _ in range(rounds):
        times = []
        for run in (measured, baseline):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


@pytest.mark.parametrize(
    ("d_model", "n_heads", "pos", "rounds", "limits"),
    [(1024, 16, 64, 15, {"forward": 1.10, "cache residuals": 1.15}), (64, 4, 16, 60, {"forward": 2.0})],
)
def test_overhead(d_model: int, n_heads: int, pos: int, rounds: int, limits: dict[str, float]) -> None:
    cfg = LoopedConfig(
        d_model=d_model, n_heads=n_heads, d_vocab=1000, n_core=6, n_loops=4, norm="sandwich", pass_norm=True, final_norm=False
    )
    bridge = LoopedBridge.from_config(cfg)
    plain = plain_twin(bridge)
    tokens = torch.randint(0, cfg.d_vocab, (1, pos), generator=torch.Generator().manual_seed(0))
    runs = {
        "forward": lambda: bridge(tokens),
        "cache residuals": lambda: bridge.run_with_cache(tokens, names_filter=RESIDUALS),
        "cache everything": lambda: bridge.run_with_cache(tokens),
    }
    with torch.no_grad():
        assert torch.equal(bridge(tokens), plain(tokens).logits)
        ratios = {name: paired_ratio(run, lambda: plain(tokens), rounds) for name, run in runs.items()}
    for name, ratio in ratios.items():
        print(f"\nd_model {d_model}, {cfg.schedule.n_layers} virtual layers, {pos} positions, {name}: x{ratio:.3f}", end="")
    for name, limit in limits.items():
        assert ratios[name] <= limit
