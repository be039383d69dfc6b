"""Stored activations, read as samples and pairs, in any order."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from collecting import PROMPTS, TINY, quiet, tiny
from torch.utils.data import DataLoader
from zoo import random_tokens

from tl_looped import LoopedBridge, LoopedError, load_activations
from tl_looped.activations import ActivationStore, Batch


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("stored")
    return quiet(tiny(), list(random_tokens(20, 9)), ["resid_mid", "mlp_out", "resid_post", "out"], out, shard_bytes=40_000)


def test_every_sample_is_read_once_in_any_order_with_where_it_is_from(stored: ActivationStore) -> None:
    samples = stored.select("resid_post", loops=[0, 2])
    assert len(stored.shards) > 2 and len(samples) == 20 * 9 * 2 * 2
    for shuffle in (True, False):
        seen = Counter[tuple[int, ...]]()
        for batch in samples.batches(64, shuffle=shuffle, seed=3):
            where = torch.stack([batch.prompt, batch.position, batch.loop, batch.layer], 1).tolist()
            seen.update(map(tuple, where))
            for row in range(0, len(where), 13):
                p, position, loop, layer = where[row]
                name = f"loops.{loop}.blocks.{layer}.hook_resid_post"
                assert torch.equal(batch.values[row], stored.of_prompt(name, p)[position])
                assert int(batch.token[row]) == int(stored.prompt(p).tokens[position])
        assert set(seen.values()) == {1} and len(seen) == len(samples)


def test_orders_are_those_of_the_seed_and_no_order_is_preferred(stored: ActivationStore) -> None:
    samples = stored.select("resid_post", loops=0, layers=0, prompts=0, positions=slice(3))

    def orders(seed: int, epochs: int) -> list[tuple[int, ...]]:
        batches = samples.batches(3, seed=seed, epochs=epochs)
        return [tuple(batch.position.tolist()) for batch in batches]

    assert orders(1, 3) == orders(1, 3) != orders(2, 3)
    counts = Counter(orders(0, 600))  # each of six orders 100 times, give or take 9
    assert len(counts) == 6 and all(60 < n < 140 for n in counts.values())


def test_a_buffer_smaller_than_the_store_mixes_from_everywhere_and_reads_each_sample_once(stored: ActivationStore) -> None:
    pairs = stored.select("resid_post", prompts=slice(1, None), positions=slice(1, None)).next_loop()  # rows with gaps
    sizes = {"batch_size": 50, "buffer_bytes": 20_000}  # windows of 150 samples of 64 bytes

    def read(epochs: int | None = 1, **settings: Any) -> list[Batch]:
        return list(islice(pairs.batches(**sizes, epochs=epochs, **settings), 100))

    def places(batches: list[Batch]) -> list[tuple[int, ...]]:
        return [
            row for b in batches for row in zip(*(c.tolist() for c in (b.prompt, b.position, b.loop, b.layer)), strict=True)
        ]

    epochs = read(2, seed=4)
    n = -(-len(pairs) // 50)
    first, second = places(epochs[:n]), places(epochs[n:])
    everything = {(p, q, t, layer) for p in range(1, 20) for q in range(1, 9) for t in (0, 1) for layer in (0, 1)}
    for found in (first, second):
        assert len(found) == len(pairs) and set(found) == everything
    assert first != second and places(read(2, seed=4)) == first + second and places(read(seed=5)) != first
    assert [len(b.prompt) for b in read(None, drop_last=True)] == [50] * 100
    for b in epochs[:3]:  # a window has something of every shard
        assert set(b.prompt.tolist()) >= {1, 19} and set(b.layer.tolist()) == {0, 1} == set(b.loop.tolist())
    loader: Any = DataLoader(pairs.batches(**sizes, seed=4), batch_size=None, num_workers=2)
    shared = list(loader)
    assert len(shared) == n and Counter(places(shared)) == Counter(everything)
    for b in (*epochs, *shared):
        p, q, t, layer = places([b])[7]
        for side in (0, 1):
            assert torch.equal(b.values[7, side], stored.of_prompt(f"loops.{t + side}.blocks.{layer}.hook_resid_post", p)[q])


def test_a_shard_that_ends_while_it_is_read_is_named(tmp_path: Path) -> None:
    store = quiet(tiny(), PROMPTS, "resid_post", tmp_path)
    samples = store.select("resid_post")
    batches = samples.batches(4)
    samples.read(torch.arange(2))  # of the index all that batches need
    path = store.shards[0].path
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(LoopedError, match=r"shard-000000.safetensors' is damaged: it ends \d+ bytes before"):
        list(batches)


def test_two_loops_of_a_token_stand_side_by_side(stored: ActivationStore) -> None:
    pairs = stored.select("resid_post", layers=1).next_loop()
    assert len(pairs) == 20 * 9 * 2 and pairs.names == [f"loops.{t}.blocks.1.hook_resid_post" for t in (0, 1)]
    batch = next(pairs.batches(32))
    for k in range(0, 32, 5):
        p, q, t = (int(column[k]) for column in (batch.prompt, batch.position, batch.loop))
        here, later = (stored.of_prompt(f"loops.{loop}.blocks.1.hook_resid_post", p)[q] for loop in (t, t + 1))
        assert torch.equal(batch.values[k, 0], here) and torch.equal(batch.values[k, 1], later)
    both = next(stored.select("resid_mid", loops=1, layers=0).beside("mlp_out").batches(8))
    p, q = int(both.prompt[0]), int(both.position[0])
    assert torch.equal(both.values[0, 1], stored.of_prompt("loops.1.blocks.0.hook_mlp_out", p)[q])
    with pytest.raises(LoopedError, match="a loop 3 later was asked"):
        stored.select("resid_post").next_loop(3)


def test_it_is_a_data_set_of_torch(stored: ActivationStore) -> None:
    samples = stored.select("out")
    loader: Any = DataLoader(samples, batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))
    read = [(int(p), int(q), int(t)) for b in loader for p, q, t in zip(b.prompt, b.position, b.loop, strict=True)]
    assert len(read) == len(set(read)) == 20 * 9 * 3
    loader = DataLoader(samples.batches(50, seed=1), batch_size=None, num_workers=2)
    found = torch.cat([b.values for b in loader])
    plain = torch.cat([b.values for b in samples.batches(50, seed=1)])
    assert found.shape == plain.shape and torch.equal(found.sum(1).sort().values, plain.sum(1).sort().values)
    data = samples.tensors(128, dtype=torch.float64)  # without end
    assert [next(data).shape for _ in range(9)] == [(128, 8)] * 9


def test_what_is_not_there_is_said(stored: ActivationStore) -> None:
    for wrong, message in (
        (lambda: stored.select("z"), "'z' with loops='all', layers=None was asked, which is not in ActivationStore"),
        (lambda: stored.select("resid_post", loops=3), "loop 3 is out of range"),
        (lambda: stored.select(["resid_post"], layers=2), "layers 2 is out of range"),
        (lambda: stored.select("resid_post", prompts=20)[0], "prompts 20 is out of range"),
        (lambda: stored.of_prompt("loops.0.hook_out", 20), "prompt 20 was asked, which is not in"),
        (lambda: stored.of_prompt("loops.0.hook_on", 0), "'loops.0.hook_on'"),
        (lambda: load_activations(stored.directory / "no"), "is no store of activations"),
        (lambda: load_activations(stored.directory, LoopedBridge.from_config(TINY, seed=1)), "result of another model"),
    ):
        with pytest.raises(LoopedError, match=message):
            wrong()
