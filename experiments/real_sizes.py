"""What checkpoints of published sizes cost on a CPU: `python experiments/real_sizes.py [MODEL ...] [--in DIRECTORY]`.

Writes a checkpoint of every model, in shards and with fewer layers, loads and uses it, prints a row of a table, and removes it.
Every step is a process of its own on one thread. Memory is the highest resident size beyond that of the process with its
libraries, time is that of the processor. docs/cost.md quotes the table; experiments/gpu/real_sizes.py measures all layers, on a
GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import published
import torch
from torch import Tensor

from tl_looped import LoopedBridge
from tl_looped.checkpoints import load_model, open_checkpoint
from tl_looped.model import LoopedModel
from tl_looped.patching import patch_sweep

ROUNDS = 2
HEAD = (
    "model", "layers run", "weights", "load, bf16", "fp32", "peak, bf16", "fp32", "forward", "peak", "cache", "peak", "sweep",
    "peak", "save, peak",
)  # fmt: skip


def tokens(pos: int, seed: int = 0) -> Tensor:
    """A prompt that every model has."""
    return torch.randint(0, 40_000, (1, pos), generator=torch.Generator().manual_seed(seed))


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


START = resident("VmRSS")


def measured(run: Callable[[], object], rounds: int = 1) -> dict[str, float]:
    """The least processor seconds of some runs, and the peak of memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    times: list[float] = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return {"seconds": min(times), "peak": resident("VmHWM") - START}


def beside(own: Callable[[], object], bare: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """What a step costs, and the bare model's forward beside it."""
    a, b = measured(own, rounds), measured(bare, rounds)
    return {"seconds": a["seconds"], "time": a["seconds"] / b["seconds"], "peak": a["peak"] / b["peak"]}


def load_bare(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """The loader without the bridge; what the model itself holds."""
    kept: list[LoopedModel] = []
    found = measured(lambda: kept.append(load_model(open_checkpoint(directory), dtype=dtype)))
    parameters = {id(p): p for p in kept[0].parameters()}.values()
    layers = kept[0].cfg.schedule.n_layers
    return {**found, "nbytes": sum(p.nbytes for p in parameters), "layers": layers}


def load(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """`from_pretrained`."""
    kept: list[LoopedBridge] = []
    return measured(lambda: kept.append(LoopedBridge.from_pretrained(directory, dtype=dtype)))


def forward(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """A prompt of 128 tokens."""
    bridge, text = LoopedBridge.from_pretrained(directory, dtype=dtype), tokens(128)
    plain = published.twin(bridge.plain)
    assert torch.equal(bridge(text), plain(text).logits)
    return beside(lambda: bridge(text), lambda: plain(text))


def cache(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """One site of all loops, of a prompt of 128 tokens."""
    bridge, text = LoopedBridge.from_pretrained(directory, dtype=dtype), tokens(128)
    plain, stack = published.twin(bridge.plain), "H." * (len(bridge.schedule.core_stacks) - 1)
    site = f"{stack}loops.*.blocks.0.hook_resid_post"
    return beside(lambda: bridge.run_with_cache(text, names_filter=site), lambda: plain(text))


def sweep(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """What enters the first layer of every loop, at the last four of 16 tokens, beside a forward a cell."""
    bridge, text = LoopedBridge.from_pretrained(directory, dtype=dtype), tokens(16)
    plain, stack = published.twin(bridge.plain), bridge.schedule.core_stacks[0]
    cells: list[int] = []

    def run() -> None:
        _, clean = bridge.run_with_cache(tokens(16, seed=1), names_filter="blocks.*.hook_resid_pre")
        found = patch_sweep(
            bridge, text, clean, lambda logits: logits[:, -1, 3], axes=("loop", "pos"), layers=0, positions=range(12, 16),
            stack=stack, verbose=False,
        )  # fmt: skip
        cells.append(found.values.numel())

    found = beside(run, lambda: plain(text), rounds=1)
    return {**found, "cells": cells[0]}


def save(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """`save_pretrained`."""
    bridge = LoopedBridge.from_pretrained(directory, dtype=dtype)
    torch.save(bridge(tokens(16)), directory / "logits")
    return measured(lambda: bridge.save_pretrained(directory / "saved"))


def reload(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """What was saved says the same."""
    again = LoopedBridge.from_pretrained(directory / "saved")
    return {"same": torch.equal(again(tokens(16)), torch.load(directory / "logits"))}


STEPS = {step.__name__: step for step in (load_bare, load, forward, cache, sweep, save, reload)}


def step(name: str, directory: Path, dtype: str) -> dict[str, float]:
    """A step in a process of its own."""
    command = [sys.executable, __file__, "--step", name, "--dtype", dtype, "--in", str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"    {name}, {dtype}: {found}", file=sys.stderr, flush=True)
    return found


def measure(model: str, within: Path | None) -> str:
    """The row of one model."""
    with tempfile.TemporaryDirectory(dir=within) as directory:
        at = Path(directory)
        n_shards = published.write(model, at, {**published.CONFIGS[model], **published.FEWER.get(model, {})})
        found = {name: step(name, at, "bfloat16") for name in STEPS}
        wide = {name: step(name, at, "float32") for name in ("load_bare", "load")}
    bare, held, cells = found["load_bare"], found["load_bare"]["nbytes"], found["sweep"]["cells"]
    assert found["reload"]["same"]
    row = [model, str(bare["layers"]), f"{held / 1e9:.2f} GB in {n_shards}"]
    row += [f"x {one['load']['seconds'] / one['load_bare']['seconds']:.2f}" for one in (found, wide)]
    row += [f"x {one['load']['peak'] / one['load_bare']['nbytes']:.2f}" for one in (found, wide)]
    row += [f"x {found[name][of]:.2f}" for name in ("forward", "cache") for of in ("time", "peak")]
    row += [f"x {cells / found['sweep']['time']:.1f} of {cells}", f"x {found['sweep']['peak']:.2f}"]
    return "| " + " | ".join([*row, f"x {found['save']['peak'] / held:.2f}"]) + " |"


def main(argv: list[str] | None = None) -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description="What checkpoints of published sizes cost on a CPU.")
    parser.add_argument("models", nargs="*", default=[*published.CONFIGS], help="which")
    parser.add_argument("--in", dest="within", type=Path, help="where checkpoints are written; 8 GB are needed")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        with torch.no_grad():
            print(json.dumps(STEPS[args.step](args.within, getattr(torch, args.dtype))))
        return 0
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for model in args.models:
        print(measure(model, args.within), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
