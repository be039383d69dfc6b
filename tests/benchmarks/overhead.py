"""What the bridge costs over the plain model, as ratios from one run, printed as JSON.

`python overhead.py` measures by the clock, on an idle machine; `OMP_NUM_THREADS=1 python overhead.py cpu` in seconds of the
processor, which others on the machine change little.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.model import LoopedModel

CLOCK = time.process_time if sys.argv[1:] == ["cpu"] else time.perf_counter
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
            start = CLOCK()
            run()
            times.append(CLOCK() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def overhead(d_model: int, n_heads: int, pos: int, rounds: int) -> dict[str, float]:
    """Ratios to the plain model at 24 virtual layers."""
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
        return {name: round(paired_ratio(run, lambda: plain(tokens), rounds), 3) for name, run in runs.items()}


def seconds_to_build_132_layers() -> float:
    """Time to unroll a small model to 132 virtual layers."""
    cfg = LoopedConfig(d_model=64, n_heads=4, d_vocab=1000, n_core=4, n_loops=4, n_prelude=2, n_coda=2, norm="stream")
    bridge = LoopedBridge.from_config(cfg)
    start = CLOCK()
    assert bridge.unroll(32).cfg.n_layers == 132
    return round(CLOCK() - start, 2)


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "d_model 1024, 64 positions": overhead(1024, 16, 64, rounds=15),
                "d_model 64, 16 positions": overhead(64, 4, 16, rounds=60),
                "seconds to build 132 virtual layers": seconds_to_build_132_layers(),
            },
            indent=1,
        )
    )
