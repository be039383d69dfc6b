"""States that are zero or tiny, and numbers of nothing."""

from __future__ import annotations

import pytest
import torch
from linear import linear_loop
from torch import Tensor
from zoo import random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import (
    fixed_points,
    inference_stages,
    injection_effect,
    limiting_behaviour,
    path_independence,
    step_geometry,
    trajectories,
)
from tl_looped.report.question import Question
from tl_looped.report.sections import fixed_points as section


def halving(n_loops: int) -> tuple[LoopedBridge, Tensor]:
    """A loop that halves its state and does nothing else, and states of which that of position 2 is zero."""
    state = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state[:, 2] = 0
    return linear_loop(0.5 * torch.eye(24), n_loops=n_loops), state


def test_a_state_that_is_zero_has_no_direction_and_is_left_out() -> None:
    # Every state is 2^-t times the first: cosines are 1, distances from the last loop over its norm are 2^(11 - t) - 1, and
    # the only thing that can be said of position 2 is that it is zero.
    model, state = halving(12)
    tokens, options = random_tokens(), {"n_loops": None, "initial_state": state, "verbose": False}
    found = fixed_points(model, tokens, **options)
    expected = torch.tensor([2.0 ** (11 - t) - 1 for t in range(12)], dtype=torch.float64)
    assert torch.allclose(found.distance["relative"].values[:, 0], expected)
    assert torch.allclose(found.successive["relative"].values, torch.ones(11, 1, dtype=torch.float64))
    assert torch.allclose(found.distance["cosine"].values, torch.ones(12, 1, dtype=torch.float64))
    ends = limiting_behaviour(model, tokens, period=3, window=6, keep_signal=True, **options)
    assert ends.counts.labels["label"][0] == "fixed" and ends.counts.labels["label"][-1] == "undefined"
    assert ends.counts.values.tolist() == [[12, 0, 0, 0, 2]]
    assert torch.allclose(ends.fractions.values[0, [0, -1]], torch.tensor([6 / 7, 1 / 7], dtype=torch.float64))
    assert ends.to_dataframe().query("label == 'undefined'")["pos"].tolist() == [2, 2]
    assert ends.plot().data[0].z[0][-1] == pytest.approx(1 / 7)
    assert ends.examples[0].signal is not None and ends.examples[0].signal[:, 0, 2].isnan().all()
    geometry = step_geometry(model, tokens, **options)
    others = [
        torch.cosine_similarity(state[b, i], state[b, j], 0)
        for b in (0, 1)
        for i in range(7)
        for j in range(i)
        if 2 not in (i, j)
    ]
    assert torch.allclose(geometry.anisotropy.values, torch.stack(others).mean().expand(12))
    assert torch.allclose(geometry.normalised_acceleration.values, torch.ones(10, dtype=torch.float64))  # |D - 2 D| / |D|
    again = path_independence(model, tokens, initial_states=[state, -state], n_loops=None, verbose=False)
    assert again.agreement.values.tolist() == [1.0]  # of the tokens that end somewhere
    assert torch.allclose(again.spread.values, torch.full((12, 1), 2**0.5, dtype=torch.float64))  # sqrt(2 |s|^2 / |s|^2)


def test_small_states_have_a_direction() -> None:
    # The squares of states of 1e-25 are 0 in fp32; they halve and keep their direction all the same.
    model, state = halving(8)
    model.to(torch.float32)
    options = {"n_loops": None, "initial_state": 1e-25 * state.float(), "verbose": False}
    found = fixed_points(model, random_tokens(), **options)
    assert torch.allclose(found.successive["relative"].values, torch.ones(7, 1, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.distance["cosine"].values, torch.ones(8, 1, dtype=torch.float64), atol=1e-6)
    assert limiting_behaviour(model, random_tokens(), period=3, window=6, **options).counts.values.tolist() == [
        [12, 0, 0, 0, 2]
    ]


def test_what_is_nothing_over_nothing_is_not_a_number() -> None:
    model, tokens = linear_loop(torch.zeros(24, 24), n_loops=12), random_tokens()
    zero = {"n_loops": None, "verbose": False}
    found, geometry = fixed_points(model, tokens, **zero), step_geometry(model, tokens, **zero)
    assert (found.norm.values == 0).all() and (found.distance["l2"].values == 0).all()
    for each in (*(d[m] for d in (found.distance, found.successive) for m in ("relative", "cosine")), found.degeneracy):
        assert each.values.isnan().all()
    for each in (geometry.anisotropy, geometry.cka, geometry.normalised_acceleration, geometry.step_cosine):
        assert each.values.isnan().all()
    assert limiting_behaviour(model, tokens, period=3, window=6, **zero).counts.values.tolist() == [[0, 0, 0, 0, 14]]
    again = path_independence(model, tokens, **zero)
    assert again.agreement.values.isnan().all() and again.spread.values.isnan().all() and again.initial_spread.values > 0.5
    assert injection_effect(model, tokens, from_loop=1, **zero).state_change.values[1:].isnan().all()
    assert inference_stages(model, tokens, verbose=False).entropy.values.isnan().all()
    with pytest.raises(LoopedError, match="all the same"):
        trajectories(linear_loop(torch.eye(24), n_loops=4), tokens, verbose=False)  # not zero, but nothing else than rounding
    asked = Question(model, [tokens], 12, None, None)
    assert (
        section.read(asked, *section.measure(asked)).sentences[0]
        == "The state is zero, so it has no direction, and no step is a share of its norm."
    )
