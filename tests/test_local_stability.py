"""Local stability against explicit Jacobians, and against maps whose eigenvalues are planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from zoo import SMALL, ZOO, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.analysis import local_stability
from tl_looped.analysis._directions import CONVERGED
from tl_looped.analysis.local_stability import contraction_rate, spectral_radius
from tl_looped.model.step_map import StepMap


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "parcae", "anchored"])
def test_one_loop_again_and_again_is_the_run(name: str) -> None:
    bridge, tokens = random_bridge(name, torch.float64), random_tokens()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter="loops.*.hook_out" if name != "hrm_text" else None)
        loop = StepMap(bridge.plain, tokens)
        x = loop.start
        for t in range(bridge.n_loops):
            x = loop(x)
            for k, stack in enumerate(bridge.schedule.core_stacks):
                last = [p for p in bridge.schedule.passes_of("all", stack) if p.index <= bridge.schedule.pass_of_loop(t).index][
                    -1
                ]
                assert torch.allclose(x[k], cache[f"{bridge.schedule.pass_prefix(last)}.hook_out"], atol=1e-10), (t, stack)


def jacobian(loop: StepMap, x: torch.Tensor) -> torch.Tensor:
    """Of one example, by reverse mode, as a matrix."""
    n = x.numel()
    return torch.autograd.functional.jacobian(loop, x).reshape(n, n)


@pytest.mark.parametrize("name", ["huginn", "hrm_text", "parcae", "looped_qwen"])
def test_jacobian_products_are_those_of_reverse_mode(name: str) -> None:
    loop = StepMap(random_bridge(name, torch.float64).plain, random_tokens(1, 3))
    u, v = torch.randn(2, *loop.start.shape, dtype=torch.float64)
    _, pulled = torch.autograd.functional.vjp(loop, loop.start, u)
    expected = (pulled * v).sum().item()
    assert (u * loop.jvp(loop.start, v[None])[0]).sum().item() == pytest.approx(expected, rel=1e-9)


def linear_loop(matrix: torch.Tensor) -> LoopedBridge:
    """A model whose loop is `matrix @ state + embedding` at every position: its layers write nothing."""
    d = len(matrix)
    cfg = LoopedConfig(d_model=d, n_heads=2, d_vocab=11, n_core=1, n_loops=2, injection="concat", initial_state="noise")
    bridge = LoopedBridge.from_config(cfg).to(torch.float64)
    parameters = bridge.original_model.canonical_parameters()
    for name, parameter in parameters.items():
        if name.endswith(("attn.o.weight", "mlp.down.weight")):
            parameter.data.zero_()
    parameters["inject.weight"].data = torch.cat((matrix, torch.eye(d, dtype=torch.float64)), 1)
    return bridge


def planted(*blocks: tuple[float, float]) -> torch.Tensor:
    """A matrix with planted eigenvalues `radius * exp(+-i angle)` in a random basis."""
    parts = [r * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for r, a in blocks]
    basis = torch.eye(2 * len(blocks)).double() + 0.3 * torch.randn(2 * len(blocks), 2 * len(blocks)).double()
    return basis @ torch.block_diag(*parts).double() @ torch.linalg.inv(basis)


@pytest.mark.parametrize(("radius", "angle"), [(0.6, 0.9), (-0.6, 0.0)])
def test_planted_eigenvalues_complex_and_negative_ones_too(radius: float, angle: float) -> None:
    matrix = planted((radius, angle), (0.2, 2.0))
    found = local_stability(
        linear_loop(matrix), torch.tensor([[1], [2]]), n_loops=25, n_exponents=2, iterations=8, verbose=False
    )
    for b in range(2):
        assert found.spectral_radius[b] == pytest.approx(abs(radius), rel=1e-5) and found.ritz_residual[b] < 1e-5
        assert found.contraction[b] == pytest.approx(abs(radius), rel=0.05)
        # Finite-time rates: the basis shifts the log of every product by a constant, which is divided by 25.
        assert found.lyapunov[b] == pytest.approx([math.log(abs(radius))] * 2, abs=0.1)


def test_an_unstable_map_is_not_at_a_fixed_point() -> None:
    bridge = linear_loop(planted((1.2, 0.5), (0.4, 0.3)))
    found = local_stability(bridge, torch.tensor([[1]]), n_loops=25, n_exponents=1, iterations=2, verbose=False)
    assert found.residual[0] > 0.1 and math.isnan(found.spectral_radius[0]) and math.isnan(found.ritz_residual[0])
    assert found.contraction[0] == pytest.approx(1.2, rel=0.05) and found.lyapunov[0][0] == pytest.approx(
        math.log(1.2), abs=0.1
    )
    assert "spectral_radius" not in found.estimates() and found.estimates()["lyapunov"].count == 1


@pytest.mark.parametrize("name", ["retrofit_llama", "hrm_text"])
def test_against_the_eigenvalues_and_products_of_explicit_jacobians(name: str) -> None:
    small = {"n_core": 1, "d_model": 6, **({} if name == "hrm_text" else {"embed_scale": 50.0})}
    bridge = LoopedBridge.from_config(ZOO[name].replace(**small)).to(torch.float64)
    tokens = random_tokens(1, 2)
    found = local_stability(bridge, tokens, n_loops=4, n_exponents=2, iterations=30 if name != "hrm_text" else 1, verbose=False)
    loop = StepMap(bridge.plain, tokens)
    x, growth = loop.start, []
    noise = torch.randn((2, *x.shape), generator=torch.Generator().manual_seed(0)).double()
    q = np.linalg.qr(noise.flatten(1).T.numpy())[0]
    for t in range(5):
        j = torch.autograd.functional.jacobian(loop, x).reshape(x.numel(), x.numel()).numpy()  # by reverse mode
        if t < 4:
            q, r = np.linalg.qr(j @ q)
            growth.append(np.log(np.abs(np.diag(r))))
            with torch.no_grad():
                x = loop(x)
    assert found.lyapunov[0] == pytest.approx(sorted(np.mean(growth, 0), reverse=True), rel=1e-6)
    if name == "hrm_text":  # its state may keep moving: then there is no fixed point to be stable at
        assert math.isnan(found.spectral_radius[0]) == (found.residual[0] > CONVERGED)
    else:
        assert found.residual[0] < 1e-3
        assert found.spectral_radius[0] == pytest.approx(np.abs(np.linalg.eigvals(j)).max(), rel=1e-6)


def test_the_radius_of_a_matrix_by_fewer_products_than_rows() -> None:
    values = torch.cat((torch.linspace(0, 0.6, 38), torch.tensor([0.9, -0.95]))).double()
    basis = torch.randn(40, 40).double()
    matrix = basis @ torch.diag(values) @ torch.linalg.inv(basis)
    start = torch.randn(1, 1, 5, 8).double()
    radius, residual = spectral_radius(lambda v: (matrix @ v.flatten()).view_as(v), start, 25)
    assert radius.item() == pytest.approx(0.95, rel=1e-6) and residual.item() < 1e-4
    early, residual = spectral_radius(lambda v: (matrix @ v.flatten()).view_as(v), start, 2)
    assert residual.item() > 0.05 and abs(early.item() - 0.95) > 1e-3  # it says that it has not converged


def test_merging_tables_and_figure() -> None:
    bridge, prompts = random_bridge("ouro", n_core=1), [random_tokens(2, 3), random_tokens(1, 4, seed=2)]
    options = {"n_loops": 4, "n_exponents": 2, "iterations": 1, "verbose": False}
    whole = local_stability(bridge, iter(prompts), **options)
    merged = local_stability(bridge, prompts[0], **options) + local_stability(bridge, prompts[1], **options)
    assert whole.lyapunov == merged.lyapunov and whole.residual == merged.residual
    frame = whole.to_dataframe()
    assert len(frame) == 3 and list(frame["lyapunov_1"]) == [row[1] for row in whole.lyapunov]
    residual = whole.estimates()["residual"]
    assert residual.values.item() == pytest.approx(np.mean(whole.residual), rel=1e-5) and residual.count == 3
    assert len(whole.plot().data) == 3


def test_contraction_rate_ignores_what_is_rounding() -> None:
    t = torch.arange(20, dtype=torch.float64)
    assert contraction_rate(3 * 0.5**t, 0.0) == pytest.approx(0.5)
    assert contraction_rate(torch.cat((0.5**t, torch.full((50,), 1e-9).double())), 1e-8) == pytest.approx(0.5)
    assert math.isnan(contraction_rate(0.5 ** t[:4], 0.0))


def test_refusals() -> None:
    bridge, tokens = random_bridge("ouro"), random_tokens()
    with pytest.raises(LoopedError, match="at least 4"):
        local_stability(bridge, tokens, n_loops=3, verbose=False)
    with pytest.raises(LoopedError, match="float32"):
        local_stability(random_bridge("ouro", torch.bfloat16), tokens, verbose=False)
    with pytest.raises(LoopedError, match="no prompts"):
        local_stability(bridge, [], verbose=False)
    with pytest.raises(LoopedError, match="the state of this prompt has 24"):
        local_stability(bridge, tokens[:, :1], n_exponents=SMALL["d_model"] + 1, verbose=False)
    # Fused attention leaves NaN scores out, as if nothing were wrong; the Jacobian goes through plain attention.
    spoilt = random_bridge("ouro")
    spoilt.original_model.canonical_parameters()["core.1.attn.q.weight"].data[:] = torch.nan
    with pytest.raises(LoopedError, match=r"the (Jacobian of|state leaving) loop 0 holds NaN"):
        local_stability(spoilt, tokens, n_loops=4, verbose=False)
    bridge.original_model.canonical_parameters()["core.0.mlp.down.weight"].data[:] = torch.nan
    with pytest.raises(LoopedError, match="the state leaving loop 0 holds NaN"):
        local_stability(bridge, tokens, n_loops=4, verbose=False)


def test_hooks_that_would_not_act_are_refused() -> None:
    bridge, few = random_bridge("huginn"), {"n_loops": 4, "n_exponents": 1, "iterations": 1, "verbose": False}
    with bridge.hooks(fwd_hooks=[("loops.*.hook_injection", lambda x, hook: 0 * x)]):
        with pytest.raises(LoopedError, match=r"has hooks, such as at loops.0.hook_injection"):
            local_stability(bridge, random_tokens(1), **few)
    local_stability(bridge, random_tokens(1), **few)
