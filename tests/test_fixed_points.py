"""Fixed points against the whole cache, against linear loops solved by hand, and their limits."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers import states_by_layer, word_tokenizer
from linear import D, deep_loop, linear_loop, model, one_loop_bytes, rotation
from peak_memory import PeakMemory
from zoo import FAMILIES, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import FixedPoints, _streaming, fixed_points

TOKENS = random_tokens()


def run(bridge: LoopedBridge, tokens: Any = TOKENS, n_loops: int | None = None, **options: Any) -> FixedPoints:
    return fixed_points(bridge, tokens, n_loops=n_loops, verbose=False, **options)


def stacks(name: str) -> list[str | None]:
    return ["L", "H"] if name == "hrm_text" else [None]


@FAMILIES
def test_token_distances_equal_those_of_the_whole_cache(name: str) -> None:
    bridge = model(name)
    for stack in stacks(name):
        found, x = run(bridge, stack=stack), states_by_layer(bridge, TOKENS, stack=stack)
        for got, a, b in ((found.successive, x[:-1], x[1:]), (found.distance, x, x[-1:].expand_as(x))):
            l2 = (a - b).norm(dim=-1)
            torch.testing.assert_close(got["l2"].values, l2.mean((2, 3)))
            torch.testing.assert_close(got["relative"].values, (l2 / b.norm(dim=-1)).mean((2, 3)))
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            torch.testing.assert_close(got["cosine"].values, cosine.mean((2, 3)))
        torch.testing.assert_close(found.norm.values, x.norm(dim=-1).mean((2, 3)))
        stderr = x.norm(dim=-1).mean(3).std(2) / len(TOKENS) ** 0.5
        torch.testing.assert_close(found.norm.stderr, stderr)
        assert found.norm.count == len(TOKENS)
        assert found.successive["l2"].labels["loop"] == list(range(1, len(x)))
        assert found.stack == (stack or "core")
        unit = x[-1] / x[-1].norm(dim=-1, keepdim=True)
        pairs = torch.einsum("lbpd,mbpd->lmb", unit, unit) / TOKENS.shape[1]
        torch.testing.assert_close(found.layer_cosine.values, pairs.mean(2))
        torch.testing.assert_close(found.degeneracy.values[0], pairs[0].amin(0).mean())
        torch.testing.assert_close(found.degeneracy.values[1], pairs.amin((0, 1)).mean())


@FAMILIES
def test_patterns_in_frobenius_norm(name: str) -> None:
    bridge = model(name)
    for stack in stacks(name):
        found, x = run(bridge, stack=stack, patterns=True), states_by_layer(bridge, TOKENS, "pattern", stack)
        scale = (x.shape[3] * x.shape[4]) ** 0.5
        assert found.pattern_distance is not None and found.pattern_successive is not None
        torch.testing.assert_close(found.pattern_distance.values, (x - x[-1]).flatten(3).norm(dim=3).mean(2) / scale)
        torch.testing.assert_close(found.pattern_successive.values, (x[1:] - x[:-1]).flatten(3).norm(dim=3).mean(2) / scale)
        assert run(bridge, stack=stack).pattern_distance is None


def test_matrix_reduction() -> None:
    bridge = model("huginn")
    found, x = run(bridge, reduction="matrix"), states_by_layer(bridge, TOKENS).flatten(3)
    l2 = (x - x[-1]).norm(dim=3)
    torch.testing.assert_close(found.distance["l2"].values, l2.mean(2))
    torch.testing.assert_close(found.distance["relative"].values, (l2 / x[-1].norm(dim=2)).mean(2))
    cosine = (x * x[-1]).sum(3) / (x.norm(dim=3) * x[-1].norm(dim=2))
    torch.testing.assert_close(found.distance["cosine"].values, cosine.mean(2))
    torch.testing.assert_close(found.norm.values, x.norm(dim=3).mean(2))
    with pytest.raises(LoopedError, match="reduction"):
        found + run(bridge)


@FAMILIES
def test_a_reference_further_on_is_the_state_of_a_longer_run(name: str) -> None:
    bridge = model(name)
    for stack in stacks(name):
        found = run(bridge, n_loops=2, n_reference=4, stack=stack)
        long = states_by_layer(bridge, TOKENS, stack=stack)
        short = long[: len(found.norm.values)]
        if name in ("ouro", "parcae", "anchored"):
            torch.testing.assert_close(short, states_by_layer(model(name, 2), TOKENS))
        torch.testing.assert_close(found.distance["l2"].values, (short - long[-1]).norm(dim=-1).mean((2, 3)))
        assert found.reference == len(long) - 1
        assert (found.distance["l2"].values[-1] > 0).all()


def test_a_contraction_falls_at_its_rate_to_the_point_solved_for() -> None:
    rate = 0.3
    bridge = linear_loop(rate * torch.eye(D), 2 * torch.eye(D), n_loops=32)
    found = run(bridge, n_loops=8, n_reference=32)
    torch.testing.assert_close(
        found.distance["l2"].values[1:] / found.distance["l2"].values[:-1], torch.full((7, 1), rate).double()
    )
    point = bridge.W_E[TOKENS] * 2 / (1 - rate)
    torch.testing.assert_close(
        found.distance["l2"].values[-1] / found.distance["relative"].values[-1],
        point.norm(dim=-1).mean()[None],
        rtol=0.2,
        atol=0,
    )  # a mean of ratios is near the ratio of means
    torch.testing.assert_close(states_by_layer(bridge, TOKENS)[-1, 0], point)


def test_a_rotation_keeps_its_norm_and_its_step() -> None:
    angle = 0.7
    found = run(linear_loop(rotation(angle), n_loops=6))
    assert torch.allclose(found.successive["cosine"].values, torch.tensor(angle).double().cos())
    assert torch.allclose(found.norm.values, found.norm.values[0])
    step = 2 * torch.tensor(angle / 2).double().sin()
    assert torch.allclose(found.successive["relative"].values, step)
    assert torch.allclose(
        found.distance["cosine"].values[:, 0], torch.tensor([(5 - t) * angle for t in range(6)]).double().cos()
    )
    assert found.distance["relative"].values[-1] == 0


def test_degeneracy_of_layers_that_write_nothing() -> None:
    found = run(linear_loop(0.5 * torch.eye(D), torch.eye(D), n_core=3))
    torch.testing.assert_close(found.degeneracy.values, torch.ones(2).double())
    assert run(linear_loop(torch.eye(D))).degeneracy.values.isnan().all()  # one layer has none to be compared with


def test_work_that_was_split_gives_the_same() -> None:
    bridge = model("huginn")
    prompts = [random_tokens(2, 5, seed=1), random_tokens(1, 9, seed=2), random_tokens(3, 4, seed=3)[0]]
    whole = run(bridge, iter(prompts), patterns=True)
    parts = [run(bridge, p, patterns=True) for p in prompts]
    merged = parts[0] + (parts[1] + parts[2])
    assert whole.norm.count == merged.norm.count == 4
    pd_a, pd_b = whole.to_dataframe(), merged.to_dataframe()
    assert list(pd_a.columns) == list(pd_b.columns) and len(pd_a) == 12
    numbers = pd_a.columns[2:]
    torch.testing.assert_close(
        torch.tensor(pd_a[numbers].values.astype(float)), torch.tensor(pd_b[numbers].values.astype(float)), equal_nan=True
    )
    with pytest.raises(LoopedError, match="was added to"):
        whole + run(model("huginn", 2), TOKENS, patterns=True)


def test_initial_states() -> None:
    bridge = model("retrofit_llama")
    generator = torch.Generator().manual_seed(5)
    found = run(bridge, initial_state=generator)  # both runs start from one state
    assert (found.distance["l2"].values[-1] == 0).all()
    x = states_by_layer(bridge, TOKENS, initial_state=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found.norm.values, x.norm(dim=-1).mean((2, 3)))
    zero = run(bridge, initial_state="zero")
    torch.testing.assert_close(
        zero.norm.values, states_by_layer(bridge, TOKENS, initial_state="zero").norm(dim=-1).mean((2, 3))
    )


def test_hooks_act_on_the_run_and_texts_are_read() -> None:
    bridge = random_bridge("ouro")
    bridge.tokenizer = word_tokenizer()
    plain = run(bridge, "1 2 3")
    with bridge.hooks([("loops.1.blocks.0.hook_mlp_out", lambda value, hook: value * 0)]):
        ablated = run(bridge, "1 2 3")
        with pytest.raises(LoopedError, match=r"unroll\(5\)"):
            run(bridge, "1 2 3", n_loops=5)
    changed = (plain.norm.values != ablated.norm.values).tolist()
    assert changed == [[False, False], [True, True], [True, True]]


def test_low_precision_is_measured_in_high() -> None:
    bridge = random_bridge("ouro", torch.bfloat16)
    found, x = run(bridge), states_by_layer(bridge, TOKENS).double()
    torch.testing.assert_close(found.distance["l2"].values, (x - x[-1]).norm(dim=-1).mean((2, 3)), rtol=1e-5, atol=1e-5)


@FAMILIES
def test_one_run_and_two_runs_find_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, runs, found = model(name), list[int](), list[FixedPoints]()
    first = bridge.schedule.name(0, "hook_resid_pre")
    for room, n_runs in ((_streaming.KEPT, 1), (0, 2), (3000, 2)):  # the last is used up in the middle of a run
        monkeypatch.setattr(_streaming, "KEPT", room)
        runs.clear()
        with bridge.hooks([(first, lambda value, hook: runs.append(1))]):
            found.append(run(bridge, patterns=True, stack=stacks(name)[-1]))
        assert len(runs) == n_runs
    frames = [result.to_dataframe() for result in found]
    assert frames[0].equals(frames[1]) and frames[0].equals(frames[2])


def test_128_loops_need_the_memory_of_a_few_activations_and_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_streaming, "KEPT", 0)  # as for a model whose loops are too large to be kept
    bridge, tokens = deep_loop(), random_tokens(2, 32)
    runs: list[int] = []
    with PeakMemory(bridge) as peak, bridge.hooks([("loops.*.blocks.0.hook_resid_pre", lambda value, hook: runs.append(1))]):
        found = fixed_points(bridge, tokens, verbose=False)
    assert found.norm.values.shape == (128, 1) and len(runs) == 2 * 128
    assert peak.nbytes <= 3 * one_loop_bytes(tokens)


def test_what_cannot_be_answered_is_refused(unchecked: None) -> None:
    bridge = random_bridge("ouro")
    with pytest.raises(LoopedError, match="1 loops, but a successive difference needs at least 2"):
        fixed_points(bridge, TOKENS, n_loops=1)
    with pytest.raises(LoopedError, match="no prompts"):
        run(bridge, [], n_loops=3)
    with pytest.raises(LoopedError, match="prompt 1 of fixed_points is empty"):
        run(bridge, [TOKENS, torch.empty(1, 0).long()], n_loops=3)
    with pytest.raises(LoopedError, match="the prompt of fixed_points is empty"):  # who numbers prompts asks of one by one
        run(bridge, torch.empty(1, 0).long(), n_loops=3)
    with pytest.raises(LoopedError, match="n_reference=2"):
        run(bridge, n_loops=3, n_reference=2)
    with pytest.raises(LoopedError, match="reduction='mean'"):
        run(bridge, n_loops=3, reduction="mean")
    with pytest.raises(LoopedError, match="stack='L' or stack='H'"):
        run(model("hrm_text"))
    bridge.tokenizer = None
    with pytest.raises(LoopedError, match="no tokenizer"):
        run(bridge, "text", n_loops=3)


def test_the_first_activation_that_is_not_finite_is_named() -> None:
    bridge = random_bridge("huginn")

    def spoil(value: torch.Tensor, hook: object) -> torch.Tensor:
        return value * torch.nan

    with bridge.hooks([("loops.1.blocks.2.hook_mlp_out", spoil)]):
        for patterns in (False, True):
            with pytest.raises(LoopedError, match=r"loops\.1\.blocks\.2\.hook_resid_post holds NaN"):
                run(bridge, patterns=patterns)


def test_figures(unchecked: None) -> None:
    pytest.importorskip("plotly")
    found = run(model("huginn"))
    by_layer = found.plot("successive", "l2")
    assert [line.name for line in by_layer.data] == ["layer 0", "layer 1", "layer 2"]
    assert list(by_layer.data[0].x) == [1, 2, 3] and by_layer.layout.yaxis.type == "log"
    torch.testing.assert_close(torch.tensor(by_layer.data[1].y).double(), found.successive["l2"].values[:, 1])
    distance = found.plot("distance", "cosine", group_by="recurrence")
    assert [line.name for line in distance.data] == [f"loop {t}" for t in range(4)]
    assert list(distance.data[0].x) == [0, 50, 100] and torch.tensor(distance.data[3].y).isnan().all()
    assert len(found.plot("norm", group_by="depth").data[0].x) == 12
    assert found.norm.plot().data
    with pytest.raises(LoopedError, match="l3"):
        found.plot("norm", "l3")


def test_numbers_need_no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    found = run(model("ouro"))
    assert len(found.to_dataframe()) == 8
    with pytest.raises(LoopedError, match="viz"):
        found.plot()
