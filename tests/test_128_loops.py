"""Every analysis at 128 loops: the memory of a few loops, and a fixed number of runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear import deep_loop, one_loop_bytes
from peak_memory import PeakMemory
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge, exits
from tl_looped.analysis import (
    _streaming,
    attention_distances,
    attention_stability,
    exit_steps,
    fixed_points,
    inference_stages,
    injection_effect,
    local_stability,
    more_loops,
    path_independence,
)
from tl_looped.model.step_map import StepMap

pytestmark = pytest.mark.slow  # many loops

TOKENS = random_tokens(2, 32)
N_LOOPS, N_LAYERS = 128, 130  # one of prelude and coda each
POLICIES = [exits.KL(1e-9), exits.StateChange(1e-9), exits.TwoHitAcceleration(1e-9)]

# Every analysis, how often it runs a batch, and whether it looks at patterns.
ANALYSES: dict[str, tuple[Callable[..., Any], int, bool]] = {
    "fixed_points": (lambda m, x: fixed_points(m, x, n_loops=None, patterns=True, verbose=False), 2, True),
    "attention_stability": (lambda m, x: attention_stability(m, x, verbose=False), 2, True),
    "inference_stages": (lambda m, x: inference_stages(m, x, verbose=False), 1, True),
    "exit_steps": (lambda m, x: exit_steps(m, x, policies=POLICIES, verbose=False), 1, False),
    "injection_effect": (lambda m, x: injection_effect(m, x, from_loop=64, verbose=False), 1, False),
}


def counted(bridge: LoopedBridge, analysis: Callable[..., Any], tokens: torch.Tensor) -> tuple[int, int]:
    """The most bytes at once, and how many runs reached the last loop."""
    passed: list[int] = []
    prefix = bridge.schedule.pass_prefix(bridge.schedule.passes[-1])
    with PeakMemory(bridge) as peak, bridge.hooks([(f"{prefix}.hook_in", lambda value, hook: passed.append(1))]):
        analysis(bridge, tokens)
    return peak.nbytes, len(passed)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models whose loops are too large to be kept."""
    monkeypatch.setattr(_streaming, "KEPT", 0)


@pytest.mark.parametrize("name", ANALYSES)
def test_memory_is_that_of_a_few_loops_and_time_that_of_a_few_runs(name: str) -> None:
    analysis, n_runs, patterns = ANALYSES[name]
    nbytes, runs = counted(deep_loop(), analysis, TOKENS)
    assert runs == n_runs
    assert nbytes <= 3 * one_loop_bytes(TOKENS, patterns)


def test_a_matrix_of_loops_is_all_that_grows() -> None:
    nbytes, runs = counted(deep_loop(), lambda m, x: more_loops(m, x, n_loops=N_LOOPS, trained=1, verbose=False), TOKENS)
    matrix = 8 * len(TOKENS) * N_LOOPS**2  # fp64
    assert runs == 1  # and one of a single loop
    assert nbytes <= 3 * one_loop_bytes(TOKENS) + 4 * matrix


def test_distances_of_all_pairs_run_again_rather_than_hold_all_patterns() -> None:
    tokens = random_tokens(1, 6)
    nbytes, runs = counted(deep_loop(), lambda m, x: attention_distances(m, x, verbose=False), tokens)
    assert (
        runs <= math.ceil(N_LOOPS * 6 / (16 * 8 + 4 * 6)) + 1
    )  # as the docstring says; a hook is attached, so nothing is masked
    assert nbytes <= 3 * one_loop_bytes(tokens, patterns=True) + 5 * 8 * N_LAYERS**2
    assert attention_distances(deep_loop().unroll(4), tokens, verbose=False).values.shape == (6, 6)


def test_local_stability_holds_a_few_states() -> None:
    bridge, tokens = random_bridge("retrofit_llama", n_core=1), random_tokens(1, 4)
    with PeakMemory(bridge) as peak:
        local_stability(bridge, tokens, n_loops=N_LOOPS, n_exponents=1, iterations=2, verbose=False)
    loop = StepMap(bridge.plain, tokens)
    with PeakMemory(bridge) as one:
        loop.jvp(loop.start, loop.start[None])
    assert peak.nbytes <= 3 * one.nbytes


def test_path_independence_holds_a_few_loops_of_every_initial_state() -> None:
    nbytes, runs = counted(deep_loop(), lambda m, x: path_independence(m, x, initial_states=(0, 1), verbose=False), TOKENS)
    assert runs == 2 and nbytes <= 3 * one_loop_bytes(TOKENS.repeat(2, 1))
