"""A tiny model, prompts of several lengths, and stores of their activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import random_tokens

from tl_looped import LoopedBridge, LoopedConfig, collect
from tl_looped.activations import ActivationStore

LENGTHS = (5, 3, 7, 3, 1)
PROMPTS = [row[:n] for row, n in zip(random_tokens(5, 7), LENGTHS, strict=True)]
TINY = LoopedConfig(d_model=8, n_heads=2, d_vocab=31, n_core=2, n_loops=3, n_prelude=1, n_coda=1)


def tiny() -> LoopedBridge:
    return LoopedBridge.from_config(TINY, seed=0)


def quiet(model: Any, prompts: Any, sites: Any, out: Path, **settings: Any) -> ActivationStore:
    return collect(model, prompts, sites, out=out, verbose=False, **settings)


def stack_of(model: LoopedBridge) -> str | None:
    stacks = model.schedule.core_stacks
    return stacks[-1] if len(stacks) > 1 else None


def content(store: ActivationStore) -> dict[tuple[int, int], Tensor]:
    """All that a store has of every token, by prompt and position; each token must be there once."""
    found: dict[tuple[int, int], Tensor] = {}
    for shard in store.shards:
        values = torch.cat([shard.rows(name).flatten(1) for name in store.names], 1)
        where = zip(shard.index("row.prompt").tolist(), shard.index("row.position").tolist(), strict=True)
        for key, row in zip(where, values, strict=True):
            assert key not in found
            found[key] = row.clone()
    return found


def same(a: ActivationStore, b: ActivationStore) -> bool:
    one, other = content(a), content(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# What stops it

SIZES = {"shard_bytes": 2400, "batch_tokens": 16}
