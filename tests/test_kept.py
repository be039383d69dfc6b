"""Activations that are kept apart from what is freed: as they were, in order, and none once there are too many."""

from __future__ import annotations

import pytest
import torch

from tl_looped.analysis import _kept
from tl_looped.analysis._kept import Kept


@pytest.mark.parametrize("piece", [2**26, 100])
def test_what_is_kept_is_a_copy_and_does_not_overlap(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "PIECE", piece)  # a piece that holds all, and pieces that some activations do not fit into
    values = [torch.randn(3, 5), torch.randn(7, dtype=torch.bfloat16), torch.tensor(2.0), torch.randn(40), torch.randn(5, 4).T]
    kept = Kept[int](10_000)
    for key, value in enumerate(values):
        kept.put(key, value)
        before = [kept for _, kept in kept.items()]
        assert all(torch.equal(a, b) for a, b in zip(before, values, strict=False)) and len(before) == key + 1
    expected = [value.clone() for value in values]
    for value in values:
        value.zero_()
    assert [key for key, _ in kept.items()] == [*range(len(values))] and not kept.is_full
    for (_, value), of in zip(kept.items(), expected, strict=True):
        assert torch.equal(value, of) and value.dtype == of.dtype


def test_with_more_than_there_is_room_for_nothing_is_kept() -> None:
    kept = Kept[int](100)
    kept.put(0, torch.zeros(25))
    assert not kept.is_full and len([*kept.items()]) == 1
    for key in (1, 2):
        kept.put(key, torch.zeros(1))
        assert kept.is_full and [*kept.items()] == []
    assert Kept[int](-1).is_full
