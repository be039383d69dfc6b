"""Latent trajectories: the principal components of the states that a run passes through."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..kinds import plain
from ..looped import Looped, at_depth
from ..panels import Panel, paths
from ..record import InitialState, rehearsal
from ..results import Estimate, Grid, Result
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ..schedule import Indices, Schedule, check_count, check_index, select_indices
from ._streaming import at_positions, last_norm, visit

Over = Literal["layers", "loop_ends"]
Reader = Callable[[slice, Tensor], object]  # gets the rows of some states, and the states [batch, row, d_model]


@dataclass(frozen=True, eq=False)
class Path:
    """The states of one example in the basis of their own principal components.

    Args:
        coordinates: axes (layer, component), or (loop, pos, component); the mean state is at the origin.
        explained: share of the variance along every component.
        mean: the mean state.
        directions: unit vectors; the entry of each that is largest in size is positive.
    """

    coordinates: Grid
    explained: Float[Tensor, " component"]
    mean: Float[Tensor, " d_model"]
    directions: Float[Tensor, "component d_model"]


@dataclass(frozen=True, eq=False)
class Trajectories(Result):
    """What `trajectories` found; `a + b` has the examples of both.

    Args:
        paths: one per example, in the order of the prompts.
        over: "layers" or "loop_ends".
        after_norm: whether the model's last norm was applied to the states.
        positions: which token, for "layers"; None for "loop_ends".
        stack: the stack asked for.
        n_loops: how many loops were run.
        n_components: how many components were kept.
        schedule: what ran.
    """

    paths: tuple[Path, ...]
    over: Over
    after_norm: bool
    positions: int | None
    stack: str | None
    n_loops: int
    n_components: int
    schedule: Schedule

    @property
    def pos(self) -> int | None:
        """The former name of `positions`."""
        warnings.warn("Trajectories.pos is now Trajectories.positions.", FutureWarning, stacklevel=2)
        return self.positions

    @property
    def explained(self) -> Estimate:
        """Share of the variance along each component of an example's own basis, mean over examples, axis (component)."""
        values = torch.stack([path.explained for path in self.paths])
        return Estimate.of(values, ("component",), {"component": self.paths[0].coordinates.labels["component"]}, "explained")

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row per state: the example, where the state was, and a column per component."""
        import pandas as pd

        frames = []
        for example, path in enumerate(self.paths):
            grid = path.coordinates
            (*axes, _), names = grid.axes, grid.labels["component"]
            first = Grid(grid.values[..., 0], tuple(axes), {a: grid.labels[a] for a in axes}, names[0]).to_dataframe()
            rest = {name: grid.values[..., k].flatten().tolist() for k, name in enumerate(names) if k}
            frames.append(first.assign(**rest, example=example))
        return pd.concat(frames, ignore_index=True)

    @accepts_old("example", "components")
    def panels(self, *, example: int = 0, components: tuple[int, int] = (0, 1)) -> list[Panel]:
        """One example's path in a plane (figures 5 and 26 to 28 of arXiv 2604.11791; 12 of 2502.05171).

        Args:
            example: which one.
            components: the components across and upwards, 0-based.

        Raises:
            OutOfRangeError: an example or a component that there is not.
        """
        path = self.paths[check_index(example, len(self.paths), "example")]
        for component in components:
            check_index(component, self.n_components, "component")
        grid, share = path.coordinates, path.explained.tolist()
        values = grid.values[..., list(components)].tolist()
        across, upwards = (f"{grid.labels['component'][c]} ({share[c]:.0%})" for c in components)
        if self.over == "layers":
            where = grid.labels["layer"]
            token = "The last token" if self.positions == -1 else f"Token {self.positions}"
            title = f"{token} over all layers, in its principal components"
            index = {self.schedule.layer_name(i): float(i) for i in range(self.schedule.n_layers)}
            order = [index[name] for name in where]
            axes, what = (across, upwards), "virtual layer"
            return [paths({"": values}, order, hover=where, axes=axes, title=title, colour_name=what)]
        loops = grid.labels["loop"]
        lines = {f"position {pos}": [row[k] for row in values] for k, pos in enumerate(grid.labels["pos"])}
        title = "All tokens at the ends of the loops, in principal components"
        hover = [f"loop {t}" for t in loops]
        return [paths(lines, [float(t) for t in loops], hover=hover, axes=(across, upwards), title=title)]


@accepts_old(pos="positions")
def trajectories(
    model: Looped,
    prompts: Prompts,
    *,
    over: Over = "layers",
    n_components: int = 3,
    after_norm: bool = False,
    positions: Indices = None,
    n_loops: int | None = None,
    stack: str | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> Trajectories:
    """Principal components of the states of a run, fitted for every example on exactly those states.

    `over="layers"` (figure 5 of arXiv 2604.11791) takes the residual stream of one token leaving every virtual layer
    (`hook_resid_post`), prelude and coda included. `over="loop_ends"` (figure 12 of arXiv 2502.05171, there after the last
    norm) takes the state of every token leaving every loop (`hook_out`, after its norm where a loop ends with one).

    Never more than d_model states of an example are held; if there are more, their covariance is summed in one run and they
    are projected in a second.

    Args:
        model: the model. Hooks on it act on the runs, if it has `n_loops` loops itself.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        over: "layers" or "loop_ends".
        n_components: how many components to keep.
        after_norm: apply the model's last norm to every state first; not to, as in arXiv 2604.11791, is the default.
        positions: for "layers" which token, None for the last; for "loop_ends" which tokens, None for all. `slice(1, None)`
            leaves out a first one that dwarfs the others.
        n_loops: how many loops to run (H cycles for HRM-Text); None for the model's own.
        stack: for "layers" the layers of this looped stack only, None for all virtual layers; for "loop_ends" "L" or "H" for
            HRM-Text, not needed elsewhere.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; too few states for the components; states that are all the same; a prompt without that
            position; an activation that is not finite.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.analysis import trajectories
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = trajectories(model, torch.tensor([[1, 2, 3]]), verbose=False)
        >>> found.paths[0].coordinates.values.shape, found.paths[0].coordinates.labels["layer"][-1]
        (torch.Size([6, 3]), 'loops.2.blocks.1')
        >>> trajectories(model, torch.tensor([[1, 2, 3]]), over="loop_ends", verbose=False).paths[0].coordinates.axes
        ('loop', 'pos', 'component')
    """
    if over not in get_args(Over):
        raise LoopedError(f'over={over!r} was asked; choose "layers" or "loop_ends".')
    one = plain(-1 if positions is None else positions)
    if over == "layers" and not isinstance(one, int):
        raise LoopedError(f'positions={positions} was asked of over="layers", which follows one token; pass an int.')
    check_count("n_components", n_components)
    chosen = one if over == "layers" else positions
    measure = TrajectoriesMeasure(over, n_components, after_norm, chosen, stack, initial_state)
    return over_prompts(measure, at_depth(model, n_loops), prompts, what="trajectories", verbose=verbose)


@dataclass(frozen=True)
class TrajectoriesMeasure:
    """What `trajectories` finds in a batch."""

    over: Over
    n_components: int
    after_norm: bool
    positions: Any
    stack: str | None
    initial_state: InitialState

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> Trajectories:
        """Measure one batch."""
        schedule, k = model.schedule, self.n_components
        if self.over == "layers":
            chosen = range(schedule.n_layers)
            if self.stack is not None:
                chosen = [i for p in schedule.passes_of("all", self.stack) for i in p.layers]
            hooks = {schedule.name(i, "hook_resid_post"): k for k, i in enumerate(chosen)}
            stop, rows = chosen[-1] + 1, [name.removesuffix(".hook_resid_post") for name in hooks]
        else:
            passes = schedule.passes_of("all", self.stack)
            hooks = {f"{schedule.pass_prefix(p)}.hook_out": p.loop for p in passes}
            stop, rows = None, [p.loop for p in passes]
        chosen_pos = select_indices(self.positions, tokens.shape[1], "positions")
        width = len(chosen_pos)
        if len(rows) * width <= k:
            raise LoopedError(
                f"n_components={k} was asked of {len(rows) * width} states, which span {len(rows) * width - 1} directions "
                "around their mean; ask for fewer, or for more loops with n_loops=."
            )

        def states(read: Reader, state: InitialState) -> None:
            def take(row: int, value: Tensor) -> None:
                x = at_positions(value, chosen_pos)
                read(slice(row * width, (row + 1) * width), (last_norm(model, x) if self.after_norm else x).double())

            visit(model, tokens, hooks, take, stop=stop, initial_state=state)

        shape = (len(tokens), len(rows) * width, model.cfg.d_model)
        dtype = torch.promote_types(model.cfg.dtype, torch.float32)
        mean, directions, explained, coordinates = (
            part.cpu() for part in _principal_components(states, shape, k, self.initial_state, tokens.device, dtype)
        )
        axes: tuple[str, ...] = ("layer", "component")
        labels: dict[str, list[Any]] = {"layer": rows, "component": [f"PC{c + 1}" for c in range(k)]}
        if self.over == "loop_ends":
            axes = ("loop", "pos", "component")
            labels = {"loop": rows, "pos": list(chosen_pos), "component": labels["component"]}
            coordinates = coordinates.unflatten(1, (len(rows), width))
        found = zip(coordinates, explained, mean, directions, strict=True)
        return Trajectories(
            tuple(Path(Grid(c, axes, labels, "coordinate"), e, m, d) for c, e, m, d in found),
            over=self.over,
            after_norm=self.after_norm,
            positions=self.positions if self.over == "layers" else None,
            stack=self.stack,
            n_loops=model.n_loops,
            n_components=k,
            schedule=schedule,
        )


def _principal_components(
    states: Callable[[Reader, InitialState], None],
    shape: tuple[int, int, int],
    k: int,
    initial_state: InitialState,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, `k` directions, their shares of the variance, and coordinates (in `dtype`) of what `states` reads."""
    n, d_model = shape[1:]
    if k > d_model:
        raise LoopedError(f"n_components={k} was asked of states of {d_model} dimensions.")
    if n <= d_model:
        x = torch.empty(shape, dtype=torch.float64, device=device)
        states(lambda rows, value: x[:, rows].copy_(value), initial_state)
        mean = x.mean(1)
        x -= mean[:, None]
        variance, vectors = torch.linalg.eigh(x @ x.mT)  # as many as states, fewer than dimensions
        directions = _signed(torch.nn.functional.normalize(vectors[..., -k:].flip(-1).mT @ x, dim=-1))
        coordinates = (x @ directions.mT).to(dtype)
    else:
        mean, variance, vectors = _eigen(states, shape, rehearsal(initial_state), device)
        directions = _signed(vectors[..., -k:].flip(-1).mT)
        coordinates = torch.empty(*shape[:2], k, dtype=dtype, device=device)
        states(lambda rows, value: coordinates[:, rows].copy_((value - mean[:, None]) @ directions.mT), initial_state)
    whole = variance.sum(-1, keepdim=True)
    rounding = n * (torch.finfo(mean.dtype).eps * mean.norm(dim=-1, keepdim=True)).square()
    if bool((whole <= rounding).any()):
        raise LoopedError("the states of a prompt are all the same, so they have no principal components.")
    return mean, directions, variance[..., -k:].flip(-1).clamp(min=0) / whole, coordinates


def _eigen(
    states: Callable[[Reader, InitialState], None],
    shape: tuple[int, int, int],
    initial_state: InitialState,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of states that are not held, and the eigenvalues and eigenvectors of n times their covariance."""
    batch, n, d_model = shape
    total = torch.zeros(batch, d_model, dtype=torch.float64, device=device)
    moment = torch.zeros(batch, d_model, d_model, dtype=torch.float64, device=device)
    origin: list[Tensor] = []  # near the states, so that little is lost when the mean is taken off afterwards

    def add_up(rows: slice, value: Tensor) -> None:
        origin[:] = origin or [value[:, :1]]
        shifted = value - origin[0]
        total.add_(shifted.sum(1))
        moment.add_(shifted.mT @ shifted)

    states(add_up, initial_state)
    mean = total / n
    variance, vectors = torch.linalg.eigh(moment - n * mean[:, :, None] * mean[:, None])
    return mean + origin[0][:, 0], variance, vectors


def _signed(directions: Float[Tensor, "batch component d_model"]) -> Float[Tensor, "batch component d_model"]:
    """With the sign that makes the entry of each that is largest in size positive."""
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    return directions.where(largest >= 0, -directions)
