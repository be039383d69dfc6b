"""Labels on planted behaviours, the rule against a slow loop, the Fourier power against torch's, and path independence."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import states_by_layer
from linear import D, deep_loop, linear_loop, model, one_loop_bytes, rotation
from peak_memory import PeakMemory
from zoo import FAMILIES, random_tokens

from tl_looped import LoopedError
from tl_looped.analysis import (
    BehaviourRule,
    LimitingBehaviour,
    TokenBehaviour,
    _streaming,
    limiting_behaviour,
    path_independence,
)
from tl_looped.analysis.limiting_behaviour import LABELS

TOKENS = random_tokens()
RULE = BehaviourRule(warm_up=0)
SHORT: dict[str, Any] = {"window": 4, "period": 4, "rule": RULE, "n_loops": None, "verbose": False}


def label_by_hand(c: list[float], rule: BehaviourRule, warm_up: int) -> str:
    """The rule of the docstring, one token at a time."""
    c = c[warm_up:]
    if sum(1 - v < rule.tau for v in c) >= rule.rho * len(c):
        return "fixed"
    if c[-1] - c[0] >= rule.rho * sum(abs(b - a) for a, b in pairwise(c)):
        return "slider"
    came, departures = False, 0
    for v in c:
        if came and 1 - v > 2 * rule.tau:
            came, departures = False, departures + 1
        came = came or 1 - v < rule.tau
    return "orbit" if departures >= rule.returns else "unknown"


def power_by_hand(x: torch.Tensor, period: int) -> torch.Tensor:
    """Share of non-constant power at a period, of [loop, ..., d_model]."""
    power = torch.fft.fft(x, dim=0).abs().square().sum(-1)
    at = {len(x) // period, len(x) - len(x) // period}
    return sum(power[k] for k in at) / power[1:].sum(0)


@FAMILIES
def test_all_numbers_equal_those_of_the_whole_cache(name: str) -> None:
    bridge = model(name)
    for stack in ["L", "H"] if name == "hrm_text" else [None]:
        found = limiting_behaviour(bridge, TOKENS, stack=stack, settle=3.0, keep_signal=True, **SHORT)
        x = states_by_layer(bridge, TOKENS, stack=stack)
        c = torch.cosine_similarity(x, x[-1:], dim=-1)
        steps = (x[1:] - x[:-1]).norm(dim=-1)
        for b, example in enumerate(found.examples):
            assert example.signal is not None
            torch.testing.assert_close(example.signal, c[:, :, b])
            torch.testing.assert_close(example.rotation_power, power_by_hand(x[-4:, :, b], 4))
            for layer in range(x.shape[1]):
                for pos in range(x.shape[3]):
                    label = label_by_hand(c[:, layer, b, pos].tolist(), RULE, 0)
                    assert LABELS[int(example.labels[layer, pos])] == label
                    short = [t + 1 for t, step in enumerate(steps[:, layer, b, pos].tolist()) if step < 3.0]
                    expected = torch.tensor(short[0] if short else math.nan)
                    torch.testing.assert_close(example.steps_to_settle[layer, pos], expected, equal_nan=True, check_dtype=False)


def test_the_rule_equals_its_docstring() -> None:
    generator = torch.Generator().manual_seed(0)
    walks = 1 - (0.05 * torch.randn(40, 300, generator=generator)).cumsum(0).abs()
    walks = torch.cat((walks, 1 - 0.2 * torch.rand(40, 100, generator=generator), walks[:, :50].sort(dim=0).values), 1)
    walks[-1] = 1
    for rule, warm_up in ((BehaviourRule(), 10), (BehaviourRule(tau=0.1, rho=0.5, warm_up=0, returns=3), 0)):
        got = [LABELS[i] for i in rule.classify(walks).tolist()]
        assert got == [label_by_hand(c, rule, warm_up) for c in walks.T.tolist()]
        assert set(got) >= {"orbit", "slider", "unknown"}


@pytest.mark.slow
def test_planted_behaviours() -> None:
    def label(state: torch.Tensor, injection: torch.Tensor | None = None) -> tuple[set[str], TokenBehaviour]:
        bridge = linear_loop(state, injection, n_loops=48)
        found = limiting_behaviour(bridge, TOKENS, n_loops=None, verbose=False)
        return {LABELS[k] for e in found.examples for k in e.labels.flatten().tolist()}, found.examples[0]

    found, example = label(0.5 * torch.eye(D), torch.eye(D))
    assert found == {"fixed"} and example.rotation_power.max() < 0.5
    found, example = label(rotation(2 * math.pi / 6))
    assert found == {"orbit"} and example.steps_to_settle.isnan().all()
    torch.testing.assert_close(example.rotation_power, torch.ones_like(example.rotation_power))
    found, example = label(rotation(2 * math.pi / 8))
    assert found == {"orbit"} and example.rotation_power.max() < 1e-9
    found, example = label(rotation(math.pi / 2 / 48))
    assert found == {"slider"}
    found, example = label(torch.zeros(D, D), torch.eye(D))  # nothing moves at all
    assert found == {"fixed"} and (example.rotation_power == 0).all() and (example.steps_to_settle == 1).all()


@pytest.mark.parametrize("period", [2, 3, 4, 6, 12])
def test_every_period_of_a_rotation_is_found(period: int) -> None:
    bridge = linear_loop(rotation(2 * math.pi / period), n_loops=12)
    found = limiting_behaviour(bridge, TOKENS, n_loops=None, window=12, period=period, verbose=False)
    torch.testing.assert_close(found.rotation_power.values, torch.ones(1).double())


def test_rounding_is_no_rotation() -> None:
    settled = linear_loop(0.5 * torch.eye(D), torch.eye(D), n_loops=120)
    found = limiting_behaviour(settled, TOKENS, n_loops=None, verbose=False)
    assert (found.rotation_power.values == 0).all()


def example(labels: list[list[int]]) -> TokenBehaviour:
    zeros = torch.zeros(len(labels), len(labels[0]))
    return TokenBehaviour(torch.tensor(labels), zeros, zeros, None)


def test_counts_fractions_and_co_occurrence() -> None:
    a, b = example([[0, 0, 1], [0, 1, 1]]), example([[0, 3], [2, 3]])
    found = LimitingBehaviour((a, b), BehaviourRule(), 6, 24, 0.1, "core", 128)
    assert found.counts.values.tolist() == [[3, 1, 0, 1, 0], [1, 2, 1, 1, 0]]
    expected = torch.tensor([[2 / 3 + 1 / 2, 1 / 3, 0, 1 / 2, 0], [1 / 3, 2 / 3, 1 / 2, 1 / 2, 0]]).double() / 2
    torch.testing.assert_close(found.fractions.values, expected)
    assert found.fractions.count == 2
    # tokens: {fixed}, {fixed, orbit}, {orbit}, {fixed, slider}, {unknown}
    expected = torch.tensor([[1, 1 / 3, 1 / 3, 0], [1 / 2, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).double()
    torch.testing.assert_close(found.co_occurrence.values[:4, :4], expected)
    assert found.co_occurrence.values[4].isnan().all() and (found.co_occurrence.values[:4, 4] == 0).all()
    only = LimitingBehaviour((example([[0, 0]]),), BehaviourRule(), 6, 24, 0.1, "core", 128)
    assert only.co_occurrence.values[1].isnan().all()
    assert found.to_dataframe()["label"].value_counts().to_dict() == {"fixed": 4, "orbit": 3, "unknown": 2, "slider": 1}


def test_split_work() -> None:
    bridge = model("huginn")
    prompts = [random_tokens(2, 5, seed=1), random_tokens(1, 9, seed=2)]
    whole, parts = limiting_behaviour(bridge, prompts, **SHORT), [limiting_behaviour(bridge, p, **SHORT) for p in prompts]
    merged = parts[0] + parts[1]
    assert whole.to_dataframe().equals(merged.to_dataframe()) and len(whole.examples) == 3
    assert torch.equal(whole.fractions.stderr, merged.fractions.stderr)
    with pytest.raises(LoopedError, match="rule="):
        whole + limiting_behaviour(bridge, TOKENS, **{**SHORT, "rule": BehaviourRule(tau=0.1, warm_up=0)})


def test_path_independence_of_a_contraction_and_of_a_rotation() -> None:
    bridge = linear_loop(0.5 * torch.eye(D), torch.eye(D), n_loops=12)
    found = path_independence(bridge, TOKENS, n_loops=None, verbose=False)
    assert found.initial_spread.values > 0.5 and found.n_states == 4
    x = torch.stack(
        [states_by_layer(bridge, TOKENS, initial_state=seed)[:, :, :, :] for seed in range(4)]
    )  # [seed, loop, layer, batch, pos, d]
    pairs = torch.stack([(x[i] - x[j]).square().sum(-1) for i in range(4) for j in range(i)]).mean(0)
    expected = (pairs / 2 / x.square().sum(-1).mean(0)).sqrt().mean((2, 3))
    torch.testing.assert_close(found.spread.values, expected)
    assert found.spread.values[-1] < 1e-2 * found.spread.values[0]
    turned = path_independence(linear_loop(rotation(0.7), n_loops=12), TOKENS, n_loops=None, verbose=False)
    torch.testing.assert_close(turned.spread.values, turned.initial_spread.values.expand(12)[:, None])


def test_agreement_of_labels() -> None:
    plane = torch.block_diag(rotation(2 * math.pi / 6)[:2, :2], torch.zeros(D - 2, D - 2))
    bridge = linear_loop(plane, torch.block_diag(torch.zeros(2, 2), torch.eye(D - 2)), n_loops=24)
    still, turning = torch.zeros(2, 7, D).double(), torch.zeros(2, 7, D).double()
    turning[:, :3, 0] = 100.0  # only the first three tokens turn
    found = path_independence(bridge, TOKENS, initial_states=[still, turning], n_loops=None, verbose=False)
    torch.testing.assert_close(found.agreement.values, torch.tensor([4 / 7]).double())
    merged = path_independence(bridge, TOKENS[:1], initial_states=[still[:1], turning[:1]], n_loops=None, verbose=False)
    merged += path_independence(bridge, TOKENS[1:], initial_states=[still[:1], turning[:1]], n_loops=None, verbose=False)
    torch.testing.assert_close(found.spread.values, merged.spread.values)
    assert found.agreement.count == merged.agreement.count == 2
    assert len(found.to_dataframe()) == 24


def test_families_without_a_random_state_take_tensors_only() -> None:
    bridge = model("hrm_text")
    with pytest.raises(LoopedError, match="not random"):
        path_independence(bridge, TOKENS, n_loops=None, stack="H", rule=RULE, verbose=False)
    found = path_independence(
        bridge, TOKENS, initial_states=[None, torch.randn(2, 7, D).double()], n_loops=None, rule=RULE, stack="H", verbose=False
    )
    assert found.spread.values.shape == (4, 2)
    with pytest.raises(LoopedError, match="initial states 0 and 1 are the same"):
        path_independence(model("huginn"), TOKENS, initial_states=[None, 0], n_loops=None, rule=RULE, verbose=False)
    with pytest.raises(LoopedError, match="at least two"):
        path_independence(model("huginn"), TOKENS, initial_states=[1], n_loops=None, rule=RULE, verbose=False)


def test_128_loops_need_the_memory_of_a_few_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_streaming, "KEPT", 0)  # as for a model whose loops are too large to be kept
    bridge, tokens = deep_loop(), random_tokens(2, 32)
    with PeakMemory(bridge) as peak:
        found = limiting_behaviour(bridge, tokens, verbose=False)
    assert found.n_loops == 128 and int(found.counts.values.sum()) == 64
    assert peak.nbytes <= 3 * one_loop_bytes(tokens)


def test_what_cannot_be_answered_is_refused() -> None:
    bridge = model("ouro")
    with pytest.raises(LoopedError, match="4 loops, but window=24 needs at least 24"):
        limiting_behaviour(bridge, TOKENS, n_loops=None, verbose=False)
    with pytest.raises(LoopedError, match="does not divide window=24"):
        limiting_behaviour(bridge, TOKENS, period=5, verbose=False)
    with pytest.raises(LoopedError, match="leave fewer than 4"):
        limiting_behaviour(bridge, TOKENS, **{**SHORT, "rule": BehaviourRule(warm_up=1)})
    with pytest.raises(LoopedError, match=r"tau=1\.5"):
        BehaviourRule(tau=1.5)
    with pytest.raises(LoopedError, match="no prompts"):
        limiting_behaviour(bridge, [], **SHORT)
    with bridge.hooks([("loops.2.blocks.1.hook_mlp_out", lambda value, hook: value * torch.inf)]):
        with pytest.raises(LoopedError, match=r"loops\.3\.blocks\.0\.hook_resid_post|loops\.2\.blocks\.1\.hook_resid_post"):
            limiting_behaviour(bridge, TOKENS, **SHORT)


def test_figures() -> None:
    pytest.importorskip("plotly")
    found = limiting_behaviour(model("huginn"), TOKENS, **SHORT)
    assert found.plot().data[0].type == "heatmap" and found.co_occurrence.plot().data
    assert path_independence(model("huginn"), TOKENS, n_loops=None, rule=RULE, verbose=False).plot().data
