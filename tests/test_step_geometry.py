"""Step geometry against the whole cache, token by token, and loops whose geometry is known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import states
from linear import D, deep_loop, linear_loop, model, one_loop_bytes, rotation
from peak_memory import PeakMemory
from zoo import FAMILIES, random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import StepGeometry, step_geometry
from tl_looped.errors import OutOfRangeError

TOKENS = 2 * torch.arange(14).view(2, 7)  # no token twice


def run(bridge: LoopedBridge, tokens: Any = TOKENS, **options: Any) -> StepGeometry:
    return step_geometry(bridge, tokens, verbose=False, **options)


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm())))))


def by_hand(x: torch.Tensor) -> dict[str, list[float]]:
    """Every quantity of one example [loop, pos, d_model], with one token after the other."""
    n_loops, n_pos = x.shape[:2]
    found: dict[str, list[float]] = {}

    def average(name: str, values: list[Any]) -> None:
        found.setdefault(name, []).append(sum(float(v) for v in values) / len(values))

    for t in range(n_loops):
        tokens = list(x[t])
        average("norm", [token.norm() for token in tokens])
        average("curvature", [angle(tokens[p + 2] - tokens[p + 1], tokens[p + 1] - tokens[p]) for p in range(n_pos - 2)])
        average("anisotropy", [math.cos(angle(tokens[p], tokens[q])) for p in range(n_pos) for q in range(p)])
        if t >= 1:
            average("step_norm", [step.norm() for step in x[t] - x[t - 1]])
        if t >= 2:
            pairs = list(zip(x[t] - x[t - 1], x[t - 1] - x[t - 2], strict=True))
            average("step_cosine", [math.cos(angle(a, b)) for a, b in pairs])
            average("turning_angle", [angle(a, b) for a, b in pairs])
            average("acceleration", [(a - b).norm() for a, b in pairs])
            average("normalised_acceleration", [(a - b).norm() / a.norm() for a, b in pairs])
    return found


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Kornblith et al. 2019, equation 4, on features [sample, feature]."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


@FAMILIES
@pytest.mark.parametrize("layer", [None, -1])
def test_all_quantities_equal_those_by_hand(name: str, layer: int | None) -> None:
    bridge = model(name)
    for stack in ["L", "H"] if name == "hrm_text" else [None]:
        prefix = f"{stack}.loops.*" if stack else "loops.*"
        hook = f"{prefix}.hook_out" if layer is None else f"{prefix}.blocks.{bridge.looped_cfg.n_core - 1}.hook_resid_post"
        found, x = run(bridge, layer=layer, stack=stack), states(bridge, TOKENS, hook)
        assert found.hook == hook and not found.after_norm
        examples = [by_hand(x[:, b]) for b in range(len(TOKENS))]
        for quantity in examples[0]:
            estimate = getattr(found, quantity)
            expected = torch.tensor([e[quantity] for e in examples], dtype=torch.float64)
            torch.testing.assert_close(estimate.values, expected.mean(0), rtol=1e-6, atol=1e-6)  # arccos near 0
            torch.testing.assert_close(estimate.stderr, expected.std(0) / 2**0.5, rtol=1e-4, atol=1e-6)
            assert estimate.labels["loop"] == list(range(len(x) - expected.shape[1], len(x)))
        cka = torch.tensor([[[linear_cka(a, b) for b in x[:, k]] for a in x[:, k]] for k in range(len(TOKENS))]).double()
        torch.testing.assert_close(found.cka.values, cka.mean(0), rtol=1e-5, atol=1e-6)


def test_after_the_last_norm() -> None:
    bridge = model("huginn")
    x = bridge.ln_final(states(bridge, TOKENS, "loops.*.hook_out")).detach()
    found = run(bridge, after_norm=True)
    assert found.after_norm
    expected = torch.tensor([by_hand(x[:, b])["step_norm"] for b in range(2)]).double().mean(0)
    torch.testing.assert_close(found.step_norm.values, expected)
    with pytest.raises(LoopedError, match="after_norm"):
        found + run(bridge)


def test_a_rotation_turns_by_its_angle() -> None:
    theta = 0.6
    found = run(linear_loop(rotation(theta), n_loops=5))
    for quantity, value in {
        "step_cosine": math.cos(theta),
        "turning_angle": theta,
        "normalised_acceleration": 2 * math.sin(theta / 2),
    }.items():
        estimate = getattr(found, quantity).values
        torch.testing.assert_close(estimate, torch.full_like(estimate, value))
    torch.testing.assert_close(found.cka.values, torch.ones(5, 5).double())  # CKA does not see rotations
    torch.testing.assert_close(found.curvature.values, found.curvature.values[:1].expand(5))


def test_a_contraction_goes_straight_and_ever_slower() -> None:
    found = run(linear_loop(0.5 * torch.eye(D), torch.eye(D), n_loops=6))
    torch.testing.assert_close(found.step_cosine.values, torch.ones(4).double())
    torch.testing.assert_close(found.normalised_acceleration.values, torch.ones(4).double())
    torch.testing.assert_close(found.step_norm.values[1:], found.step_norm.values[:-1] / 2)


def test_a_state_that_stands_still_has_no_direction_and_no_acceleration() -> None:
    found = run(linear_loop(torch.zeros(D, D), torch.eye(D), n_loops=4))
    for quantity in ("step_norm", "acceleration", "normalised_acceleration"):
        assert (getattr(found, quantity).values == 0).all()
    for quantity in ("step_cosine", "turning_angle"):
        assert getattr(found, quantity).values.isnan().all()


def test_equal_states_have_no_curvature_between_them() -> None:
    bridge = model("ouro")
    repeated = torch.tensor([[3, 3, 9, 4, 8]])  # equal tokens see equal tokens only, and stay equal
    found = run(bridge, repeated)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(repeated, names_filter="loops.0.hook_out")
    x = cache["loops.0.hook_out"][0]
    assert torch.allclose(x[0], x[1])
    angles = [angle(x[p + 2] - x[p + 1], x[p + 1] - x[p]) for p in (1, 2)]
    torch.testing.assert_close(found.curvature.values[0], torch.tensor(sum(angles) / 2).double())


def test_limits_of_curvature_anisotropy_and_cka() -> None:
    bridge = linear_loop(torch.eye(D), n_loops=3)
    line = torch.arange(1.0, 8)[None, :, None] * torch.ones(1, 1, D)  # all tokens in one direction, on a straight line
    found = run(bridge, TOKENS[:1], initial_state=line.double())
    torch.testing.assert_close(found.curvature.values, torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.anisotropy.values, torch.ones(3).double())
    apart = torch.eye(D)[None, :7]
    found = run(bridge, TOKENS[:1], initial_state=apart.double())
    torch.testing.assert_close(found.anisotropy.values, torch.zeros(3).double())
    torch.testing.assert_close(found.curvature.values, torch.full((3,), 2 * math.pi / 3).double())
    forget = torch.block_diag(torch.eye(1), torch.zeros(D - 1, D - 1))  # keeps the first direction only
    first = linear_loop(forget, n_loops=3)
    cka = run(first, TOKENS[:1], initial_state=apart.double()).cka.values
    torch.testing.assert_close(cka[0], torch.ones(3).double())  # the loops' outputs all are that direction


def test_split_work_and_tables() -> None:
    bridge = model("huginn")
    prompts = [random_tokens(2, 5, seed=1), random_tokens(1, 9, seed=2)]
    whole, parts = run(bridge, prompts), [run(bridge, p) for p in prompts]
    merged = parts[0] + parts[1]
    for quantity in ("norm", "step_cosine", "curvature", "cka"):
        torch.testing.assert_close(getattr(whole, quantity).values, getattr(merged, quantity).values)
        torch.testing.assert_close(getattr(whole, quantity).stderr, getattr(merged, quantity).stderr)
    frame = whole.to_dataframe()
    assert len(frame) == 4 and frame["count"].tolist() == [3] * 4
    assert frame["step_cosine"].isna().tolist() == [True, True, False, False]
    torch.testing.assert_close(torch.tensor(frame["norm"].to_numpy()), whole.norm.values)


def test_some_loops_only_in_cka() -> None:
    bridge = model("ouro")
    whole, some = run(bridge).cka, run(bridge, cka_loops=[3, 0]).cka
    assert some.labels["other"] == [3, 0]
    torch.testing.assert_close(some.values, whole.values[[3, 0]][:, [3, 0]])


def test_128_loops_need_little_memory_and_one_run() -> None:
    bridge, tokens = deep_loop(), random_tokens(2, 16)
    runs: list[int] = []
    with PeakMemory(bridge) as peak, bridge.hooks([("loops.*.blocks.0.hook_resid_pre", lambda value, hook: runs.append(1))]):
        found = run(bridge, tokens)
    assert found.norm.values.shape == (128,) and len(runs) == 128
    loops = [int(t) for t in found.cka.labels["loop"]]
    assert len(loops) == 16 and loops[0] == 0 and loops[-1] == 127 and {b - a for a, b in pairwise(loops)} == {8, 9}
    assert peak.nbytes <= 3 * one_loop_bytes(tokens)


def test_what_cannot_be_answered_is_refused() -> None:
    bridge = model("ouro")
    with pytest.raises(LoopedError, match="2 loops, but an acceleration needs at least 3"):
        run(bridge, n_loops=2)
    with pytest.raises(LoopedError, match="2 tokens, but the curvature needs at least 3"):
        run(bridge, TOKENS[:, :2])
    with pytest.raises(LoopedError, match="no prompts"):
        run(bridge, [])
    with pytest.raises(OutOfRangeError, match="layer 7"):
        run(bridge, layer=7)
    with pytest.raises(LoopedError, match="stack='L' or stack='H'"):
        run(model("hrm_text"))
    with bridge.hooks([("loops.1.hook_out", lambda value, hook: value * torch.nan)]):
        with pytest.raises(LoopedError, match=r"loops\.1\.hook_out holds NaN"):
            run(bridge)


def test_figures() -> None:
    pytest.importorskip("plotly")
    found = run(model("ouro"))
    figure = found.plot()
    assert [line.name for line in figure.data][:2] == ["norm", "step_norm"] and len(figure.data) == 8
    assert list(figure.data[2].x) == [2, 3] and figure.layout.title.text == "loops.*.hook_out"
    assert found.cka.plot().data[0].type == "heatmap"


def test_what_has_settled_has_no_direction() -> None:
    found = step_geometry(linear_loop(0.5 * torch.eye(D), torch.eye(D)), TOKENS, n_loops=80, verbose=False)
    assert found.step_cosine.values[:30].isfinite().all() and found.step_norm.values[-1] < 1e-12
    for name in ("step_cosine", "turning_angle"):
        assert getattr(found, name).values[-1].isnan(), name
    assert found.normalised_acceleration.values[-1].isfinite()
