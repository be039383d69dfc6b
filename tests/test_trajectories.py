"""Principal components against torch's SVD of the cached states, and planted circles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import states
from linear import D, deep_loop, linear_loop, model, one_loop_bytes, rotation
from peak_memory import PeakMemory
from zoo import FAMILIES, random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import Path, Trajectories, trajectories
from tl_looped.errors import OutOfRangeError

TOKENS = random_tokens()


def run(bridge: LoopedBridge, tokens: Any = TOKENS, **options: Any) -> Trajectories:
    return trajectories(bridge, tokens, verbose=False, **options)


def check(path: Path, x: torch.Tensor, k: int = 3) -> None:
    """Against the SVD of exactly these states [state, d_model]."""
    centred = x - x.mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(path.mean, x.mean(0))
    torch.testing.assert_close(path.explained, (s**2 / (s**2).sum())[:k])
    signs = torch.sign((path.directions * vh[:k]).sum(1, keepdim=True))
    torch.testing.assert_close(path.directions, signs * vh[:k], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(path.coordinates.values.reshape(-1, k), centred @ path.directions.T)


@FAMILIES
def test_one_token_over_all_layers(name: str) -> None:
    bridge = model(name)
    found, x = run(bridge), states(bridge, TOKENS, "blocks.*.hook_resid_post")
    assert len(x) == bridge.schedule.n_layers <= D  # the states are held
    for b, path in enumerate(found.paths):
        check(path, x[:, b, -1])
    labels = found.paths[0].coordinates.labels["layer"]
    assert labels == [bridge.schedule.name(i, "x").removesuffix(".x") for i in range(len(x))]
    check(run(bridge, positions=2).paths[1], x[:, 1, 2])
    stacks = bridge.schedule.core_stacks
    only = [i for i, site in enumerate(bridge.schedule.sites) if site.stack == stacks[-1]]
    check(run(bridge, stack=stacks[-1]).paths[0], x[only, 0, -1])


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "parcae", "anchored"])
def test_all_tokens_at_loop_ends(name: str) -> None:
    bridge = model(name)
    for stack in ["L", "H"] if name == "hrm_text" else [None]:
        found = run(bridge, over="loop_ends", stack=stack)
        x = states(bridge, TOKENS, f"{stack}.loops.*.hook_out" if stack else "loops.*.hook_out")
        assert len(x) * x.shape[2] > D  # their covariance is summed
        for b, path in enumerate(found.paths):
            check(path, x[:, b].flatten(0, 1))
            assert path.coordinates.axes == ("loop", "pos", "component")
            assert tuple(path.coordinates.values.shape) == (len(x), TOKENS.shape[1], 3)


def test_after_the_last_norm() -> None:
    bridge = model("huginn")
    x = bridge.ln_final(states(bridge, TOKENS, "loops.*.hook_out")).detach()
    check(run(bridge, over="loop_ends", after_norm=True).paths[0], x[:, 0].flatten(0, 1))


def test_a_random_state_is_the_same_in_both_runs() -> None:
    bridge = model("retrofit_llama")
    found = run(bridge, over="loop_ends", initial_state=torch.Generator().manual_seed(3))
    x = states(bridge, TOKENS, "loops.*.hook_out", initial_state=torch.Generator().manual_seed(3))
    check(found.paths[1], x[:, 1].flatten(0, 1))


def test_a_planted_circle_has_two_components() -> None:
    n_loops = 12
    bridge = linear_loop(rotation(2 * math.pi / n_loops), n_loops=n_loops)
    state = torch.zeros(1, 7, D, dtype=torch.float64)
    state[..., 0] = torch.arange(1.0, 8)  # turns in the plane of the first two directions
    path = run(bridge, TOKENS[:1], initial_state=state, n_components=2).paths[0]
    torch.testing.assert_close(path.explained, torch.full((2,), 0.5).double())
    torch.testing.assert_close(path.coordinates.values.norm(dim=1), torch.full((n_loops,), 7.0).double())
    torch.testing.assert_close(path.directions[:, 2:], torch.zeros(2, D - 2).double(), atol=1e-9, rtol=0)
    rings = run(bridge, TOKENS[:1], initial_state=state, n_components=2, over="loop_ends").paths[0]
    torch.testing.assert_close(rings.explained, torch.full((2,), 0.5).double())
    radii = rings.coordinates.values.norm(dim=-1)
    torch.testing.assert_close(radii, torch.arange(1.0, 8).double().expand(n_loops, 7))


def test_a_straight_line_has_one_component() -> None:
    bridge = linear_loop(0.5 * torch.eye(D), n_loops=5)
    torch.testing.assert_close(run(bridge, n_components=1).explained.values, torch.ones(1).double())


def test_split_work_and_tables() -> None:
    bridge = model("huginn")
    prompts = [random_tokens(2, 5, seed=1), random_tokens(1, 9, seed=2)]
    whole, parts = run(bridge, prompts), [run(bridge, p) for p in prompts]
    merged = parts[0] + parts[1]
    assert whole.explained.count == merged.explained.count == 3
    torch.testing.assert_close(whole.explained.values, merged.explained.values)
    torch.testing.assert_close(whole.paths[2].coordinates.values, merged.paths[2].coordinates.values)
    frame = run(bridge, over="loop_ends").to_dataframe()
    assert list(frame.columns) == ["loop", "pos", "PC1", "PC2", "PC3", "example"] and len(frame) == 2 * 4 * 7
    with pytest.raises(LoopedError, match="over="):
        whole + run(bridge, over="loop_ends")


@pytest.mark.parametrize("over", ["layers", "loop_ends"])
def test_128_loops_need_the_memory_of_a_few_activations(over: Any) -> None:
    bridge, tokens = deep_loop(), random_tokens(2, 32)
    with PeakMemory(bridge) as peak:
        run(bridge, tokens, over=over, n_components=2)
    assert peak.nbytes <= 3 * one_loop_bytes(tokens)


def test_what_cannot_be_answered_is_refused(unchecked: None) -> None:
    bridge = model("ouro")
    with pytest.raises(LoopedError, match="n_components=8 was asked of 8 states"):
        run(bridge, n_components=8)
    with pytest.raises(LoopedError, match="no prompts"):
        run(bridge, [])
    with pytest.raises(OutOfRangeError, match=r"positions 7 is out of range: there are 7 positions \(0\.\.6\)"):
        run(bridge, positions=7)
    with pytest.raises(LoopedError, match=r"positions=\[1, 2\].*follows one token"):
        run(bridge, positions=[1, 2])
    with pytest.raises(LoopedError, match="over='loops'"):
        run(bridge, over="loops")
    with pytest.raises(LoopedError, match="all the same"):
        run(linear_loop(torch.eye(D), n_loops=4), initial_state="zero", n_components=1)
    with pytest.raises(LoopedError, match="stack='L' or stack='H'"):
        run(model("hrm_text"), over="loop_ends")
    with bridge.hooks([("loops.1.blocks.0.hook_mlp_out", lambda value, hook: value * torch.nan)]):
        with pytest.raises(LoopedError, match=r"loops\.1\.blocks\.0\.hook_resid_post holds NaN"):
            run(bridge)


def test_figures() -> None:
    pytest.importorskip("plotly")
    found = run(model("huginn"))
    figure = found.plot(example=1, components=(1, 2))
    (line,) = figure.data
    torch.testing.assert_close(torch.tensor(line.x).double(), found.paths[1].coordinates.values[:, 1])
    assert line.text[0] == "prelude.blocks.0" and figure.layout.xaxis.title.text.startswith("PC2 (")
    rings = run(model("huginn"), over="loop_ends").plot()
    assert len(rings.data) == 7 and list(rings.data[0].text) == [f"loop {t}" for t in range(4)]
