"""Keys and values shared between loops, against runs by hand that keep as many sets."""

from __future__ import annotations

import torch
from interventions_by_hand import TOKENS, bridge_of, close, write_text
from torch import Tensor
from transformers import DynamicCache
from zoo import FAMILIES

from tl_looped import LoopedBridge
from tl_looped.interventions import (
    SharedKeyValues,
    share_kv,
)

# Shared keys and values.


def shared_by_hand(bridge: LoopedBridge, policy: str | int, tokens: Tensor, new: int) -> Tensor:
    """Greedy logits: before every step, the cache of an ordinary run is overwritten with what the loops share."""
    schedule = bridge.schedule
    logits, cache = bridge(tokens, return_type="logits_and_cache", use_cache=True)
    own = [(layer.keys, layer.values) for layer in cache.layers]
    found = [logits[:, -1]]
    for _ in range(new - 1):
        filled = DynamicCache()
        for i, (stack, loop, layer) in enumerate(schedule.sites):
            n = 1 if loop is None else schedule.n_loops_of(stack)
            same = [i] if loop is None else [p.layers[layer] for p in schedule.passes_of("all", stack)]
            if loop is None or policy == "mean":
                chosen = same
            elif policy in ("first", "last"):
                chosen = [same[0 if policy == "first" else -1]]
            else:
                chosen = [same[max(t for t in range(n) if t % policy == loop % policy)]]
            filled.update(*(torch.stack([own[c][side] for c in chosen]).mean(0) for side in (0, 1)), i)
        logits, cache = bridge(found[-1].argmax(-1)[:, None], return_type="logits_and_cache", past_key_values=filled)
        new_ones = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers]
        own = [tuple(torch.cat(pair, 2) for pair in zip(a, b, strict=True)) for a, b in zip(own, new_ones, strict=True)]
        found.append(logits[:, -1])
    return torch.stack(found, dim=1)


@FAMILIES
def test_shared_keys_are_those_of_the_policy(name: str) -> None:
    bridge = bridge_of(name, n_loops=2 if name == "hrm_text" else 5)
    plain_logits = write_text(bridge, [], new=3)[1]
    for policy in ("first", "last", "mean", 2) if name in ("huginn", "hrm_text") else ("mean", 2):
        _, logits = write_text(bridge, share_kv(bridge, policy), new=3)
        close(logits, shared_by_hand(bridge, policy, TOKENS, 3))
        assert torch.equal(logits[:, 0], plain_logits[:, 0]) and not torch.allclose(logits, plain_logits)


def test_one_set_is_the_last_and_enough_sets_share_nothing() -> None:
    bridge = bridge_of("huginn")
    one, last, all_loops = (write_text(bridge, share_kv(bridge, policy))[1] for policy in (1, "last", 3))
    assert torch.equal(one, last) and torch.equal(all_loops, write_text(bridge, [])[1])


def test_shared_keys_take_the_memory_they_say() -> None:
    bridge = bridge_of("huginn", n_loops=8)
    for policy, sets in (("mean", 2 + 3 + 1), (4, 2 + 4 * 3 + 1)):
        with bridge.hooks(fwd_hooks=share_kv(bridge, policy)):
            _, cache = bridge(TOKENS, return_type="logits_and_cache", use_cache=True)
        assert isinstance(cache, SharedKeyValues) and cache.n_sets == sets == len(cache._kept) and not cache._new
        assert all(t.shape == (2, 3, 6, 8) for pair in cache._kept.values() for t in pair)
    assert SharedKeyValues(bridge_of("hrm_text").schedule, "last").n_sets == 4


def test_padded_rows_share_like_rows_alone() -> None:
    bridge = bridge_of("retrofit_llama")
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), TOKENS[:1, :4]], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    _, logits = write_text(bridge, share_kv(bridge, "mean"), torch.cat([padded, TOKENS[1:]]), attention_mask=mask)
    close(logits[0], write_text(bridge, share_kv(bridge, "mean"), TOKENS[:1, :4])[1][0])
