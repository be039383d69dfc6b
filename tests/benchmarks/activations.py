"""How fast activations are written and read, against a bare forward, a bare write and a bare sequential read of the same bytes.

`python activations.py 3` measures three rounds. Every share is taken by the clock and by processor time; where others use the
machine, the latter is the one to trust.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tl_looped import LoopedBridge, LoopedConfig, collect, load_activations

CASES = {
    "d_model 64, 128 loops of 1 layer, 128 activations a token": (
        LoopedConfig(64, 4, 1000, n_core=1, n_loops=128, n_ctx=512), {"sites": "resid_post"}, 64,
    ),
    "d_model 128, 8 virtual layers, 40 activations a token": (
        LoopedConfig(128, 4, 1000, n_core=2, n_loops=4, n_ctx=512),
        {"sites": ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]}, 128,
    ),
    "d_model 512, 24 virtual layers, 24 activations a token": (
        LoopedConfig(512, 8, 1000, n_core=6, n_loops=4, n_ctx=512), {"sites": "resid_post"}, 32,
    ),
    "d_model 2048, 8 virtual layers, 40 activations a token": (
        LoopedConfig(2048, 16, 1000, n_core=1, n_loops=8, n_ctx=512),
        {"sites": ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]}, 8,
    ),
}  # fmt: skip
LENGTH, BATCH, READ = 128, 8, 4096
Times = tuple[float, float]  # by the clock, of the processor


def seconds(action: Callable[[], object]) -> Times:
    start = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start[0], time.process_time() - start[1]


@torch.no_grad()
def forward(model: LoopedBridge, tokens: torch.Tensor) -> None:
    """The bare model, in the same batches, without the unembedding."""
    for rows in tokens.split(BATCH):
        model(rows, stop_at_layer=model.cfg.n_layers)


def written(shards: list[Path], folder: Path) -> None:
    """As many bytes in as many files, and on the disk."""
    piece = memoryview(torch.randint(0, 255, (2**20,), dtype=torch.uint8).numpy())
    for shard in shards:
        with (folder / shard.name).open("wb", buffering=0) as file:
            for start in range(0, shard.stat().st_size, len(piece)):
                file.write(piece[: shard.stat().st_size - start])
            os.fsync(file.fileno())


def in_sequence(shards: list[Path], n_bytes: int) -> None:
    """Every byte once, from the beginning to the end, each piece into a new tensor as large as a batch."""
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while file.readinto(memoryview(torch.empty(n_bytes, dtype=torch.uint8).numpy())):
                pass


def read(folder: Path, shuffle: bool) -> None:
    store = load_activations(folder)
    for _ in store.select(store.names).batches(READ, shuffle=shuffle):
        pass


def forget(shards: list[Path]) -> None:
    """Have the system read the files from the disk again."""
    for shard in shards:
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(case: str, folder: Path) -> dict[str, Times]:
    """The times of one round."""
    cfg, asked, n_prompts = CASES[case]
    model = LoopedBridge.from_config(cfg, seed=0)
    tokens = torch.randint(0, 1000, (n_prompts, LENGTH), generator=torch.Generator().manual_seed(0))
    forward(model, tokens[:BATCH])
    settings = {**asked, "dtype": torch.bfloat16, "batch_tokens": BATCH * LENGTH, "verbose": False}
    times = {"forward": seconds(lambda: forward(model, tokens))}
    times["collect"] = seconds(lambda: collect(model, tokens, out=folder / "store", **settings))
    shards = sorted((folder / "store").glob("shard-*"))
    times["write"] = seconds(lambda: written(shards, folder))
    n_bytes = READ * cfg.d_model * 2
    for name, action in (
        ("sequence", lambda: in_sequence(shards, n_bytes)),
        ("order", lambda: read(folder / "store", shuffle=False)),
        ("shuffled", lambda: read(folder / "store", shuffle=True)),
    ):
        forget(shards)
        times[f"{name}, disk"] = seconds(action)
        times[f"{name}, memory"] = seconds(action)
    size = sum(path.stat().st_size for path in shards) / 1e6
    return {**times, "MB": (size, size)}


def summary(rounds: list[dict[str, Times]]) -> dict[str, list[float]]:
    """Medians, by the clock and of the processor; shares are taken round by round, so that a drifting machine cancels out."""

    def median(of: Callable[[dict[str, float]], float], clock: int) -> float:
        return statistics.median(of({name: times[clock] for name, times in found.items()}) for found in rounds)

    shares: dict[str, Callable[[dict[str, float]], float]] = {
        "collect, of a forward and a write one after the other": lambda t: (t["forward"] + t["write"]) / t["collect"],
        "collect, of the longer of the two": lambda t: max(t["forward"], t["write"]) / t["collect"],
        "in order, of a sequential read from memory": lambda t: t["sequence, memory"] / t["order, memory"],
        "shuffled, of a sequential read from memory": lambda t: t["sequence, memory"] / t["shuffled, memory"],
        "in order, of a sequential read from the disk": lambda t: t["sequence, disk"] / t["order, disk"],
        "shuffled, of a sequential read from the disk": lambda t: t["sequence, disk"] / t["shuffled, disk"],
        "GB/s in sequence from the disk": lambda t: t["MB"] / t["sequence, disk"] / 1e3,
        "GB/s shuffled from the disk": lambda t: t["MB"] / t["shuffled, disk"] / 1e3,
        "GB/s shuffled from memory": lambda t: t["MB"] / t["shuffled, memory"] / 1e3,
    }
    times = {name: [round(median(lambda t, name=name: t[name], clock), 3) for clock in (0, 1)] for name in rounds[0]}
    return times | {name: [round(median(share, clock), 2) for clock in (0, 1)] for name, share in shares.items()}


if __name__ == "__main__":
    n_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(1)
    for name in [case for case in CASES if case.startswith(sys.argv[2] if len(sys.argv) > 2 else "")]:
        all_rounds = list[dict[str, Times]]()
        for _ in range(n_rounds):
            with tempfile.TemporaryDirectory() as place:
                all_rounds.append(measured(name, Path(place)))
        found = {what: f"{by_clock} {of_processor}" for what, (by_clock, of_processor) in summary(all_rounds).items()}
        print(json.dumps({name: found}, indent=1), flush=True)
