"""The driver of measures: they survive pickle, what they find is added up in order, and what fails is left out."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import same
from linear import model
from zoo import random_tokens

from tl_looped import analysis, compare, exits, run
from tl_looped.errors import LoopedError
from tl_looped.results import Estimate
from tl_looped.runs import driver, store

PROMPTS = [random_tokens(2, 5), random_tokens(1, 4)[0]]
QUIET: dict[str, Any] = {"verbose": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "fixed_points": {"n_loops": 3, "positions": slice(1, None), "initial_state": 1},
    "limiting_behaviour": {"n_loops": 24},
    "local_stability": {"n_loops": 4, "n_exponents": 1, "iterations": 2},
    "path_independence": {"n_loops": 8, "initial_states": (0, 1)},
    "exit_steps": {"policies": [exits.KL(0.1)], "answers": [1, 2, 3]},
    "more_loops": {"answers": [1, 2, 3]},
    "injection_effect": {"from_loop": 1},
    "trajectories": {"over": "loop_ends", "n_components": 2},
}
ASK: dict[str, Callable[..., Any]] = {
    name: getattr(analysis, name)
    for name in analysis.__all__
    if "prompts" in getattr(inspect.signature(getattr(analysis, name)), "parameters", ())
} | {"compare": compare}
SETTINGS["compare"] = {"n_loops": (2, 3)}


@pytest.mark.parametrize("name", ASK)
def test_a_measure_goes_through_pickle_and_finds_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> Any:
        return ASK[name](model("huginn"), PROMPTS, **SETTINGS.get(name, {}), **QUIET)

    here, sent = ask(), list[str]()
    totals = driver.totals

    def elsewhere(measure: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        sent.append(type(measure).__name__)
        return totals(pickle.loads(pickle.dumps(measure)), *args, **kwargs)

    monkeypatch.setattr(driver, "totals", elsewhere)
    assert same(ask(), here) and sent and all(kind.endswith("Measure") for kind in sent)


def test_an_analysis_that_is_run_goes_through_pickle() -> None:
    asked = store.Asked(analysis.fixed_points, {"n_loops": 3})
    found = pickle.loads(pickle.dumps(asked))(model("huginn"), PROMPTS[0])
    assert same(found, analysis.fixed_points(model("huginn"), PROMPTS[0], n_loops=3, **QUIET))


@dataclass(frozen=True)
class Length:
    """Of a prompt, which must not be 3."""

    def __call__(self, model: object, batch: torch.Tensor) -> Estimate:
        if batch.shape[1] == 3:
            raise LoopedError("three")
        return Estimate.of(torch.full((len(batch),), batch.shape[1] + 0.0), (), {}, "length")


def lengths(*n: int) -> list[torch.Tensor]:
    return [torch.ones(1, k) for k in n]


def test_sums_begin_anywhere_and_leave_out_what_fails() -> None:
    *_, first = driver.totals(Length(), None, lengths(1, 3), driver.Total(), skip=True, n_batches=4)
    assert first.failed == ((1, "LoopedError: three"),) and first.done == 2
    *_, all_four = driver.totals(Length(), None, lengths(5, 3), first, skip=True, n_batches=4)
    assert all_four.result is not None and (all_four.result.count, float(all_four.result.values)) == (2, 3.0)
    assert [index for index, _ in all_four.failed] == [1, 3] and all_four.done == 4
    with pytest.raises(LoopedError, match="three"):
        driver.over(Length(), None, lengths(1, 3), what="length", verbose=False)


def test_batches_are_read_one_at_a_time() -> None:
    seen: list[str] = []

    def batches() -> Iterator[torch.Tensor]:
        for batch in lengths(1, 2):
            seen.append(f"read {batch.shape[1]}")
            yield batch

    for total in driver.totals(Length(), None, batches(), driver.Total()):
        seen.append(f"done {total.done}")
    assert seen == ["read 1", "done 1", "read 2", "done 2"]


def test_what_is_run_is_a_sum_of_its_measure(tmp_path: Any) -> None:
    found = run(analysis.fixed_points, model("huginn"), PROMPTS, out=tmp_path / "run", n_loops=3, **QUIET)
    measure = store.Asked(analysis.fixed_points, {"n_loops": 3})
    assert same(found.result, measure(model("huginn"), PROMPTS[0]) + measure(model("huginn"), PROMPTS[1]))
