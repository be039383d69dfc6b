"""What checkpoints of published sizes cost on a CPU: `python experiments/real_sizes.py [MODEL ...] [--in DIRECTORY]`.

Writes a checkpoint of every model, in shards and with fewer layers, loads and uses it, prints a row of a table, and removes it.
Every step is a process of its own on one thread. Memory is the highest resident size beyond that of the process with its
libraries, time is that of the processor. docs/cost.md quotes the table; experiments/gpu/real_sizes.py measures all layers, on a
GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import published
import torch
from torch import Tensor

from tl_looped import LoopedBridge
from tl_looped.checkpoints import load_model, open_checkpoint
from tl_looped.model import LoopedModel
from tl_looped.patching import patch_sweep

T = TypeVar("T")
ROUNDS = 2
HEAD = (
    "model", "layers run", "weights", "load", "peak", "peak in fp32", "forward", "peak", "cache", "peak", "sweep", "peak",
    "save, peak",
)  # fmt: skip


def tokens(pos: int, seed: int = 0) -> Tensor:
    """A prompt that every model has."""
    return torch.randint(0, 40_000, (1, pos), generator=torch.Generator().manual_seed(seed))


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


_start = 0  # bytes of a process that has loaded nothing


def measured(run: Callable[[], object], rounds: int = 1) -> dict[str, float]:
    """The least processor seconds of some runs, and the peak of memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    times: list[float] = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return {"seconds": min(times), "peak": resident("VmHWM") - _start}


def over(own: dict[str, float], bare: dict[str, float]) -> dict[str, float]:
    """What a step costs over the bare model's forward."""
    return {"time": own["seconds"] / bare["seconds"], "peak": own["peak"] / bare["peak"]}


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


def run(directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A prompt of 128 tokens, and one site of all loops cached."""
    bridge, text = LoopedBridge.from_pretrained(directory, dtype=dtype), tokens(128)
    plain, stack = published.twin(bridge.plain), "H." * (len(bridge.schedule.core_stacks) - 1)
    site = f"{stack}loops.*.blocks.0.hook_resid_post"
    logits: list[Tensor] = []
    bare = measured(lambda: logits.append(plain(text).logits), ROUNDS)
    own = measured(lambda: logits.append(bridge(text)), ROUNDS)
    cached = measured(lambda: bridge.run_with_cache(text, names_filter=site), ROUNDS)
    assert all(torch.equal(logits[0], found) for found in logits)
    return {"seconds": bare["seconds"], "forward": over(own, bare), "cache": over(cached, bare)}


def sweep(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """What enters the first layer of every loop, at the last four of 16 tokens, beside a forward a cell."""
    bridge, text = LoopedBridge.from_pretrained(directory, dtype=dtype), tokens(16)
    plain, stack = published.twin(bridge.plain), bridge.schedule.core_stacks[0]
    cells: list[int] = []

    def sweep_once() -> None:
        _, clean = bridge.run_with_cache(tokens(16, seed=1), names_filter="blocks.*.hook_resid_pre")
        found = patch_sweep(
            bridge, text, clean, lambda logits: logits[:, -1, 3], axes=("loop", "pos"), layers=0, positions=range(12, 16),
            stack=stack, verbose=False,
        )  # fmt: skip
        cells.append(found.values.numel())

    bare = measured(lambda: plain(text), ROUNDS)
    return {**over(measured(sweep_once), bare), "cells": cells[0]}


def save(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """`save_pretrained`."""
    bridge = LoopedBridge.from_pretrained(directory, dtype=dtype)
    torch.save(bridge(tokens(16)), directory / "logits")
    return measured(lambda: bridge.save_pretrained(directory / "saved"))


def reload(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    """What was saved says the same."""
    again = LoopedBridge.from_pretrained(directory / "saved")
    return {"same": torch.equal(again(tokens(16)), torch.load(directory / "logits"))}


STEPS = {step.__name__: step for step in (load_bare, load, run, sweep, save, reload)}


def in_child(name: str, directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A step, after the libraries were used once."""
    global _start
    LoopedBridge.from_pretrained("toy:hop", dtype=dtype, device="cpu")("A b ? A")
    _start = resident("VmRSS")
    with torch.no_grad():
        return STEPS[name](directory, dtype)


def apart(function: Callable[..., T], *args: Any) -> T:
    """A call in a process of its own, which has the libraries of this one: no memory is left over from another call."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def step(name: str, directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A step in a process of its own."""
    found = apart(in_child, name, directory, dtype)
    print(f"    {name}, {dtype}: {found}", file=sys.stderr, flush=True)
    return found


def measure(model: str, within: Path | None) -> str:
    """The row of one model."""
    with tempfile.TemporaryDirectory(dir=within) as directory:
        at = Path(directory)
        n_shards = apart(published.write, model, at, {**published.CONFIGS[model], **published.FEWER.get(model, {})})
        found = {name: step(name, at, torch.bfloat16) for name in STEPS}
        wide = step("load", at, torch.float32)
    bare, held, cells = found["load_bare"], found["load_bare"]["nbytes"], found["sweep"]["cells"]
    assert found["reload"]["same"]
    row = [model, str(bare["layers"]), f"{held / 1e9:.2f} GB in {n_shards}"]
    row += [f"{found['load']['seconds']:.1f} s"]
    row += [f"x {found['load']['peak'] / held:.2f}", f"x {wide['peak'] / (2 * held):.2f}"]
    row += [f"x {found['run'][name][of]:.2f}" for name in ("forward", "cache") for of in ("time", "peak")]
    row += [f"x {cells / found['sweep']['time']:.1f} of {cells}", f"x {found['sweep']['peak']:.2f}"]
    return "| " + " | ".join([*row, f"x {found['save']['peak'] / held:.2f}"]) + " |"


def main(argv: list[str] | None = None) -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description="What checkpoints of published sizes cost on a CPU.")
    parser.add_argument("models", nargs="*", default=[*published.CONFIGS], help="which")
    parser.add_argument("--in", dest="within", type=Path, help="where checkpoints are written; 8 GB are needed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for model in args.models:
        print(measure(model, args.within), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
