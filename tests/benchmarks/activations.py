"""How fast activations are written and read, against the bare disk, the bare forward and a copy of the mapped files."""

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

from tl_looped import LoopedBridge, LoopedConfig, collect
from tl_looped.activations import ActivationStore

CASES = {
    "d_model 768, 24 virtual layers, 4 activations a token": (
        LoopedConfig(768, 12, 1000, n_core=6, n_loops=4, n_ctx=512), {"sites": "resid_post", "layers": -1}, 48,
    ),
    "d_model 512, 256 virtual layers (128 loops), 128 activations a token": (
        LoopedConfig(512, 8, 1000, n_core=2, n_loops=128, n_ctx=512), {"sites": "out"}, 12,
    ),
    "d_model 256, 8 virtual layers, 56 activations a token": (
        LoopedConfig(256, 4, 1000, n_core=2, n_loops=4, n_ctx=512),
        {"sites": ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "q", "z"]}, 192,
    ),
}  # fmt: skip
LENGTH, BATCH = 128, 8


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


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
    """Every number once, in the order of the files, into the same memory."""
    rows = 4096
    into = torch.empty(rows, *next(iter(store.collection.shapes.values())), dtype=store.dtype)
    for shard in store.shards:
        for name in store.names:
            for piece in shard.rows(name).split(rows):
                into[: len(piece)].copy_(piece)


def read(store: ActivationStore, shuffle: bool) -> None:
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name in store.names:
        shapes.setdefault(store.collection.shapes[name], []).append(name)
    for names in shapes.values():
        for _ in store.select(names).batches(4096, shuffle=shuffle):
            pass


def measured(case: str, rounds: int) -> dict[str, float]:
    cfg, asked, n_prompts = CASES[case]
    model = LoopedBridge.from_config(cfg, seed=0)
    tokens = torch.randint(0, 1000, (n_prompts, LENGTH), generator=torch.Generator().manual_seed(0))
    forward(model, tokens[:BATCH])
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings = {**asked, "dtype": torch.bfloat16, "batch_tokens": BATCH * LENGTH, "verbose": False}
            stores: list[ActivationStore] = []
            times = {"collect": seconds(lambda: stores.append(collect(model, tokens, out=f"{folder}/store", **settings)))}
            store = stores[0]
            n_bytes = sum(path.stat().st_size for path in Path(folder, "store").iterdir())
            times["forward"] = seconds(lambda: forward(model, tokens))
            times["disk"] = seconds(lambda: disk(Path(folder, "bare"), n_bytes))
            same = [name for name in store.names if len(store.collection.shapes[name]) == 1]
            for what, action in (
                ("copy", lambda: copied(store) if len(same) == len(store.names) else None),
                ("in order", lambda: read(store, shuffle=False)),
                ("shuffled", lambda: read(store, shuffle=True)),
            ):
                times[what] = seconds(action)
            times["MB"] = n_bytes / 1e6
        for name, value in times.items():
            found.setdefault(name, []).append(value)
    middle = {name: statistics.median(values) for name, values in found.items()}
    slower = [max(f, d) / c for f, d, c in zip(found["forward"], found["disk"], found["collect"], strict=True)]
    return {
        **{name: round(value, 3) for name, value in middle.items()},
        "share of the slower of forward and disk": round(statistics.median(slower), 2),
        "MB/s collected": round(middle["MB"] / middle["collect"]),
        "MB/s shuffled": round(middle["MB"] / middle["shuffled"]),
        "MB/s in order": round(middle["MB"] / middle["in order"]),
    }


if __name__ == "__main__":
    n_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(json.dumps({case: measured(case, n_rounds) for case in CASES}, indent=1))
