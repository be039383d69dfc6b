"""Shares: which one a process takes, and what is in it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tl_looped.errors import LoopedError
from tl_looped.runs.shares import ARRAY, Share
from tl_looped.runs.units import Batch, Unit, share_of

pytestmark = pytest.mark.usefixtures("by_hand")


@pytest.mark.parametrize(
    ("env", "index", "of"),
    [
        ({}, 0, 1),
        ({"RANK": "1", "WORLD_SIZE": "4"}, 1, 4),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, 2, 3),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, 1, 2),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, 3, 4),
        (dict(zip(ARRAY, ("7", "1", "2", "4"), strict=True)), 3, 4),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "1", "WORLD_SIZE": "2"}, 3, 4),
    ],
)  # fmt: skip
def test_a_share_is_what_started_the_process_says(env: dict[str, str], index: int, of: int, monkeypatch: Any) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    share = Share.read(None)
    assert (share.index, share.of) == (index, of)
    assert (Share.read("2/5").index, Share.read("2/5").of) == (1, 5)  # by hand goes first


def test_what_is_no_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("0/8", "9/8", "3", "a/b", "3/8/2", "²/3", "-1/3", f"1/{'9' * 5000}"):
        with pytest.raises(LoopedError, match="counted from 1/8"):
            Share.read(text)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LoopedError, match="RANK=2 and WORLD_SIZE=2"):
        Share.read(None)
    monkeypatch.setenv("RANK", "1")
    for name, value in zip(ARRAY, ("9", "1", "1", "3"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(LoopedError, match="with gaps"):
        Share.read(None)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (("2", "1", "0", "2"), "SLURM_ARRAY_TASK_STEP=0 is in the environment.*unset"),
        (("2", "1", "1", "0"), "SLURM_ARRAY_TASK_COUNT=0 is in the environment.*unset"),
        (("2", "1", "1", "-3"), "SLURM_ARRAY_TASK_COUNT=-3 is in the environment.*unset"),
        (("2", "1", "1", ""), "SLURM_ARRAY_TASK_ID=2 is in the environment without SLURM_ARRAY_TASK_COUNT.*by hand"),
    ],
)
def test_what_is_no_slurm_array_is_refused(env: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(ARRAY, env, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(LoopedError, match=says):
        Share.read(None)
    assert Share.read("3/8").index == 2


def test_the_share_that_a_message_names_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(ARRAY, ("2", "", "", "2"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(LoopedError, match="with gaps") as said:
        Share.read(None)
    assert Share.read(str(said.value).split()[-1].rstrip(".")).of == 2


def test_of_more_shares_than_units_the_first_have_one_each() -> None:
    units = [Unit(k, (Batch((k,), None, 1 + k % 3),)) for k in range(5)]
    of = 10**9
    order = random.Random(of).sample(units, len(units))
    assert [share_of(units, Share(k, of)) for k in range(6)] == [*([unit] for unit in order), []]
    assert share_of(units, Share(of - 1, of)) == []
