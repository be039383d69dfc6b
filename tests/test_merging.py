"""Results of different settings answer different questions, so their sum is refused; those of split work are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear import model
from zoo import random_tokens

from tl_looped import LoopedError, exits
from tl_looped.analysis import (
    BehaviourRule,
    attention_stability,
    exit_steps,
    fixed_points,
    inference_stages,
    injection_effect,
    limiting_behaviour,
    local_stability,
    more_loops,
    path_independence,
    step_geometry,
    trajectories,
)

TOKENS = random_tokens(2, 5)
RULE = BehaviourRule(warm_up=0)
LIMITING: dict[str, Any] = {"n_loops": 4, "rule": RULE, "window": 4, "period": 4}
LOCAL: dict[str, Any] = {"n_loops": 4, "n_exponents": 2, "iterations": 2}

# An analysis, what both runs are asked, and what only the second is.
SETTINGS: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = [
    (fixed_points, {"n_loops": 3}, {"n_reference": 4}, "reference="),
    (fixed_points, {"n_loops": 3}, {"patterns": True}, "pattern_successive="),
    (inference_stages, {}, {"tau": 0.5}, "tau="),
    (trajectories, {}, {"positions": 1}, "positions="),
    (trajectories, {}, {"n_loops": 3}, "n_loops="),
    (trajectories, {}, {"n_components": 2}, "n_components="),
    (step_geometry, {}, {"layer": 1}, "hook="),
    (limiting_behaviour, LIMITING, {"settle": 1.0}, "settle="),
    (path_independence, {"n_loops": 4, "rule": RULE}, {"initial_states": (4, 5, 6, 7)}, "states="),
    (local_stability, LOCAL, {"n_exponents": 1}, "n_exponents="),
    (injection_effect, {"from_loop": 1}, {"replacement": "mean"}, "replacement="),
    (more_loops, {}, {"answers": [1, 2]}, "scored="),
    (exit_steps, {"policies": {"mine": exits.KL(0.1)}}, {"policies": {"mine": exits.KL(0.2)}}, "policies="),
    (exit_steps, {"policies": [exits.KL(0.1)]}, {"answers": [1, 2]}, "scored="),
]


@pytest.mark.parametrize(("analysis", "both", "second", "said"), SETTINGS)
def test_other_settings_are_refused(
    analysis: Callable[..., Any], both: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    a = analysis(model("huginn"), TOKENS, verbose=False, **both)
    b = analysis(model("huginn"), TOKENS, verbose=False, **(both | second))
    with pytest.raises(LoopedError, match=said):
        a + b
    with pytest.raises(LoopedError, match=said):
        b + a


def test_stacks_are_not_mixed() -> None:
    for analysis, options in ((attention_stability, {}), (injection_effect, {"from_loop": 0})):
        a, b = (analysis(model("hrm_text", 2), TOKENS, stack=stack, verbose=False, **options) for stack in ("L", "H"))
        with pytest.raises(LoopedError, match=r"stack=|was added to"):
            a + b


def test_what_has_no_stable_name_can_still_be_split() -> None:
    def policies() -> dict[str, Any]:
        return {"second": lambda history: torch.full(history.states[0].shape[:2], history.loop >= 1)}

    parts = [exit_steps(model("huginn"), TOKENS[k : k + 1], policies=policies(), verbose=False) for k in range(2)]
    assert (parts[0] + parts[1]).cost.values[0] == 2
    states = [
        path_independence(
            model("huginn"),
            TOKENS[k : k + 1],
            initial_states=[torch.Generator().manual_seed(1), 5],
            n_loops=4,
            rule=RULE,
            verbose=False,
        )
        for k in range(2)
    ]
    assert (states[0] + states[1]).spread.count == 2
