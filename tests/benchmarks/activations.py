"""How fast activations are written and read, against the bare disk, the bare forward and a copy of the mapped files.

`python activations.py 3` measures three rounds by the clock, on an idle machine; `python activations.py 3 cpu` in seconds of
processor time, which others on the machine change little.
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
from tl_looped.activations import ActivationStore

CASES = {
    "d_model 512, 24 virtual layers, 4 activations a token": (
        LoopedConfig(512, 8, 1000, n_core=6, n_loops=4, n_ctx=512), {"sites": "resid_post", "layers": -1}, 32,
    ),
    "d_model 512, 128 loops of 1 layer, 128 activations a token": (
        LoopedConfig(512, 8, 1000, n_core=1, n_loops=128, n_ctx=512), {"sites": "resid_post"}, 16,
    ),
    "d_model 128, 8 virtual layers, 40 activations a token": (
        LoopedConfig(128, 4, 1000, n_core=2, n_loops=4, n_ctx=512),
        {"sites": ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]}, 128,
    ),
}  # fmt: skip
LENGTH, BATCH = 128, 8
BUSY = sys.argv[2:] == ["cpu"]


def seconds(action: Callable[[], object]) -> float:
    clock = time.process_time if BUSY else time.perf_counter
    start = clock()
    action()
    return clock() - start


@torch.no_grad()
def forward(model: LoopedBridge, tokens: torch.Tensor) -> None:
    """The bare model, in the same batches, without the unembedding."""
    for rows in tokens.split(BATCH):
        model(rows, stop_at_layer=model.cfg.n_layers)


def disk(path: Path, n_bytes: int) -> None:
    """As many bytes in one file, and on the disk."""
    piece = torch.randint(0, 255, (2**23,), dtype=torch.uint8).numpy()
    with path.open("wb") as file:
        for start in range(0, n_bytes, len(piece)):
            file.write(piece[: n_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def copied(store: ActivationStore) -> None:
    """Every number once, in the order of the files, in pieces of 4096 rows."""
    for shard in store.shards:
        for name in store.names:
            for piece in shard.rows(name).split(4096):
                piece.clone()


def read(store: ActivationStore, shuffle: bool) -> None:
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name in store.names:
        shapes.setdefault(store.collection.shapes[name], []).append(name)
    for names in shapes.values():
        for _ in store.select(names).batches(4096, shuffle=shuffle):
            pass


def measured(case: str, folder: Path) -> dict[str, float]:
    """The times of one round, in seconds."""
    cfg, asked, n_prompts = CASES[case]
    model = LoopedBridge.from_config(cfg, seed=0)
    tokens = torch.randint(0, 1000, (n_prompts, LENGTH), generator=torch.Generator().manual_seed(0))
    forward(model, tokens[:BATCH])
    settings = {**asked, "dtype": torch.bfloat16, "batch_tokens": BATCH * LENGTH, "verbose": False}
    times = {"collect": seconds(lambda: collect(model, tokens, out=folder / "store", **settings))}
    n_bytes = sum(path.stat().st_size for path in (folder / "store").iterdir())
    store = load_activations(folder / "store")
    times["forward"] = seconds(lambda: forward(model, tokens))
    times["disk"] = seconds(lambda: disk(folder / "bare", n_bytes))
    times["copy"] = seconds(lambda: copied(store))
    times["in order"] = seconds(lambda: read(store, shuffle=False))
    times["shuffled"] = seconds(lambda: read(store, shuffle=True))
    return {**times, "MB": n_bytes / 1e6}


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians; shares are taken round by round, so that a drifting machine cancels out."""
    found = {name: round(statistics.median(times[name] for times in rounds), 3) for name in rounds[0]}
    shares = {
        "written, of what forward and disk allow": lambda t: (sum if BUSY else max)((t["forward"], t["disk"])) / t["collect"],
        "read in order, of a copy of the mapped files": lambda t: t["copy"] / t["in order"],
        "read shuffled, of a copy of the mapped files": lambda t: t["copy"] / t["shuffled"],
        "MB/s read shuffled": lambda t: t["MB"] / t["shuffled"],
    }
    return found | {name: round(statistics.median(map(share, rounds)), 2) for name, share in shares.items()}


if __name__ == "__main__":
    n_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for name in CASES:
        all_rounds = list[dict[str, float]]()
        for _ in range(n_rounds):
            with tempfile.TemporaryDirectory() as place:
                all_rounds.append(measured(name, Path(place)))
        print(json.dumps({name: summary(all_rounds)}, indent=1), flush=True)
