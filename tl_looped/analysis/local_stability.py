"""Local stability of a loop: spectral radius at its fixed point, Lyapunov exponents along its way there, contraction rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import LoopedError
from ..looped import Looped, check_model
from ..panels import Axis, Mark, Panel
from ..record import InitialState
from ..results import Estimate, Result
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ..schedule import check_count
from ._directions import CONVERGED
from ._streaming import check_finite, need_loops

__all__ = ["LocalStability", "local_stability"]

QUANTITIES = ("residual", "contraction", "spectral_radius", "ritz_residual")


@dataclass(frozen=True, eq=False)
class LocalStability(Result):
    """What `local_stability` found, example by example; `a + b` has the examples of both.

    Args:
        residual: for every example, how much the last loop changed its state, `|x_R - x_{R-1}| / |x_R|`.
        contraction: factor by which the change shrinks from loop to loop; above 1 it grows. NaN if too few loops moved the
            state by more than rounding errors.
        spectral_radius: largest absolute eigenvalue of the Jacobian of a loop at its fixed point; NaN for an example that is
            not at one (`residual` above 0.001, our choice).
        ritz_residual: `|J v - lambda v| / |lambda|` of its unit eigenvector: near 0 the iteration has converged; if it
            is not, pass more `iterations`.
        lyapunov: the leading Lyapunov exponents of every example, largest first, in nats per loop: mean rates at which small
            changes of the initial state grow.
        n_loops: how many loops were run.
        n_exponents: how many exponents were asked for.
        iterations: products with the Jacobian that were allowed for the spectral radius.
    """

    residual: tuple[float, ...]
    contraction: tuple[float, ...]
    spectral_radius: tuple[float, ...]
    ritz_residual: tuple[float, ...]
    lyapunov: tuple[tuple[float, ...], ...]
    n_loops: int
    n_exponents: int
    iterations: int

    def estimates(self) -> dict[str, Estimate]:
        """Mean, standard error and count of every quantity, over the examples that have it; left out where none has it."""

        def column(name: str) -> Tensor:
            return torch.tensor(getattr(self, name), dtype=torch.float64, device="cpu")

        columns = {name: column(name) for name in QUANTITIES}
        found = {name: values[~values.isnan()] for name, values in columns.items()}
        estimates = {name: Estimate.of(values, (), {}, name) for name, values in found.items() if len(values)}
        labels = {"exponent": list(range(len(self.lyapunov[0])))}
        return estimates | {"lyapunov": Estimate.of(column("lyapunov"), ("exponent",), labels, "lyapunov")}

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per example."""
        import pandas as pd

        exponents = {f"lyapunov_{k}": column for k, column in enumerate(zip(*self.lyapunov, strict=True))}
        return pd.DataFrame({name: getattr(self, name) for name in QUANTITIES} | exponents)

    def panels(self) -> list[Panel]:
        """For every example, spectral radius, contraction rate, and the growth per loop by the first exponent."""
        growth = [math.exp(row[0]) for row in self.lyapunov]
        parts = {"spectral radius": self.spectral_radius, "contraction": self.contraction, "exp(first exponent)": growth}
        symbols = ("circle", "x", "diamond-open")  # they may lie on each other
        lines = [
            {"name": name, "x": list(range(len(values))), "y": list(values), "points": symbol}
            for (name, values), symbol in zip(parts.items(), symbols, strict=True)
        ]
        roles = {"x": Axis("example", form="count"), "y": Axis("factor per loop")}
        return [Panel("lines", lines, roles, [Mark(y=1.0)], "What a loop makes of a small change; below 1 it shrinks")]


def local_stability(
    model: Looped,
    prompts: Prompts,
    *,
    n_loops: int = 128,
    n_exponents: int = 4,
    iterations: int = 50,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> LocalStability:
    """How a loop treats small changes of its state: whether its fixed point attracts, and how fast.

    The map is one loop over all positions of a prompt (of HRM-Text: one H cycle, over the states of both stacks), so its
    Jacobian has pos * d_model rows; it is only multiplied with vectors. `n_exponents` orthonormal directions are carried along
    the run and made orthonormal again after every loop (Benettin et al. 1980; top-8 exponents in arXiv 2608.18222): the mean
    logarithms of their stretching are the Lyapunov exponents of these `n_loops` loops, transients included.

    The spectral radius is that of the Jacobian at the last state, from a power iteration that keeps its iterates (Arnoldi): the
    eigenvalues of the Jacobian on their span are right for a complex pair too, where iterating one vector (arXiv 2605.26733)
    would turn forever. The contraction rate needs no Jacobian: it is fitted to `log |x_t - x_{t-1}|` over the later half
    of the loops that move the state by more than rounding errors.

    Hooks of the model do not act here. `n_exponents` states are held, and `iterations` of them at the end.

    Args:
        model: the model, in fp32 or fp64.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        n_loops: how many loops to run towards the fixed point, the 128 of arXiv 2604.11791 unless told.
        n_exponents: how many exponents.
        iterations: products with the Jacobian for the spectral radius; with as many as it has rows the result is exact.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; fewer than four loops; a model in half precision, whose rounding hides the fixed point; states
            that are not finite.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.analysis import local_stability
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, injection="concat")
        >>> found = local_stability(LoopedBridge.from_config(cfg, seed=0), torch.tensor([[1, 2, 3]]), n_loops=8, verbose=False)
        >>> found.spectral_radius[0] < 1, len(found.lyapunov[0])
        (True, 4)
    """
    need_loops(check_count("n_loops", n_loops), 4, "local_stability", "a rate of change")
    check_count("n_exponents", n_exponents)
    check_count("iterations", iterations)
    check_model(model)
    if model.cfg.dtype in (torch.float16, torch.bfloat16):
        raise LoopedError(
            f"local_stability was asked of a model in {model.cfg.dtype}, too coarse for a fixed point; use float32."
        )

    measure = LocalStabilityMeasure(n_loops, n_exponents, iterations, initial_state)
    return over_prompts(measure, model, prompts, what="local_stability", verbose=verbose)


@dataclass(frozen=True)
class LocalStabilityMeasure:
    """What `local_stability` measures of a batch."""

    n_loops: int
    n_exponents: int
    iterations: int
    initial_state: InitialState

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> LocalStability:
        """Measure one batch."""
        loop, k = model.step_map(tokens, self.initial_state), self.n_exponents
        width = loop.start[:, 0].numel()
        if k > width:
            raise LoopedError(f"n_exponents={k} was asked, but the state of this prompt has {width} numbers.")
        x, changes, growth = loop.start, [], []
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn((k, *x.shape), generator=generator, dtype=torch.float32, device="cpu").to(x)
        directions, _ = orthonormal(noise)
        for t in range(self.n_loops):
            with torch.no_grad():
                new = loop(x)
            check_finite(new, f"the state leaving loop {t}")
            changed = loop.jvp(x, directions)
            check_finite(changed, f"the Jacobian of loop {t}")
            directions, stretch = orthonormal(changed)
            growth.append(stretch.clamp(min=torch.finfo(stretch.dtype).tiny).log())
            changes.append((new - x).double().flatten(2).transpose(0, 1).flatten(1).norm(dim=1))
            x = new
        size = x.double().transpose(0, 1).flatten(1).norm(dim=1)
        residual = changes[-1] / size
        products = min(self.iterations, width)
        radius, error = spectral_radius(lambda v: loop.jvp(x, v[None])[0], directions.sum(0), products)
        radius = torch.where(residual <= CONVERGED, radius, torch.nan)
        floor = 100 * torch.finfo(x.dtype).eps * size
        rates = [contraction_rate(row, float(least)) for row, least in zip(torch.stack(changes, 1), floor, strict=True)]
        lyapunov = torch.stack(growth).mean(0).sort(dim=-1, descending=True).values  # [batch, direction]
        return LocalStability(
            residual=tuple(residual.tolist()),
            contraction=tuple(rates),
            spectral_radius=tuple(radius.tolist()),
            ritz_residual=tuple(torch.where(radius.isnan(), radius, error).tolist()),
            lyapunov=tuple(tuple(row) for row in lyapunov.tolist()),
            n_loops=self.n_loops,
            n_exponents=k,
            iterations=self.iterations,
        )


def orthonormal(
    directions: Float[Tensor, "direction stack batch pos d_model"],
) -> tuple[Float[Tensor, "direction stack batch pos d_model"], Float[Tensor, "batch direction"]]:
    """The directions of every example made orthonormal one after the other, and how far each stuck out of those before."""
    shape = directions.shape
    q, r = torch.linalg.qr(_columns(directions))
    stretch = r.diagonal(dim1=-2, dim2=-1).abs()
    return q.unflatten(1, (shape[1], *shape[3:])).permute(4, 1, 0, 2, 3).contiguous(), stretch


def contraction_rate(changes: Float[Tensor, " loop"], floor: float) -> float:
    """The factor per loop of a geometric decay (or growth), fitted to the later half of the changes that are above `floor`."""
    below = (changes <= floor).nonzero()
    above = changes[: int(below[0])] if len(below) else changes
    later = above[len(above) // 2 :].log()
    if len(later) < 3:
        return float("nan")
    t = torch.arange(len(later), dtype=later.dtype, device="cpu")
    t = t - t.mean()
    return float(((t * later.cpu()).sum() / t.square().sum()).exp())


def _columns(directions: Float[Tensor, "direction stack batch pos d_model"]) -> Float[Tensor, "batch row direction"]:
    return directions.permute(2, 1, 3, 4, 0).flatten(1, 3)


def spectral_radius(
    product: Callable[[Float[Tensor, "stack batch pos d_model"]], Float[Tensor, "stack batch pos d_model"]],
    start: Float[Tensor, "stack batch pos d_model"],
    iterations: int,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The largest absolute eigenvalue of every example's Jacobian by Arnoldi, and the relative residual of its vector."""
    n_stacks, batch, *rest = start.shape

    def rows(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1)  # [batch, row]

    basis = rows(start).new_zeros(batch, rows(start).shape[1], iterations + 1)
    small = basis.new_zeros(batch, iterations + 1, iterations)  # the Jacobian in the basis
    basis[..., 0] = rows(start) / rows(start).norm(dim=1, keepdim=True)
    for k in range(iterations):
        image = rows(product(basis[..., k].unflatten(1, (n_stacks, *rest)).transpose(0, 1)))
        size = image.norm(dim=1)
        for _ in range(2):  # once more for what rounding left
            along = (image[:, None] @ basis)[:, 0]
            small[:, :, k] += along
            image = image - (basis @ along[..., None])[..., 0]
        left = image.norm(dim=1)
        new = left > 10 * torch.finfo(left.dtype).eps * size  # else the basis is complete, and what is left is rounding
        small[:, k + 1, k] = torch.where(new, left, 0.0)
        basis[..., k + 1] = torch.where(new[:, None], image / left.clamp(min=torch.finfo(left.dtype).tiny)[:, None], 0.0)
    values, vectors = torch.linalg.eig(small[:, :-1])
    top = values.abs().argmax(-1)
    radius = values.gather(1, top[:, None])[:, 0].abs()
    last = vectors[:, -1].gather(1, top[:, None])[:, 0].abs()
    return radius, small[:, -1, -1] * last / radius.clamp(min=torch.finfo(radius.dtype).tiny)
