"""The geometry of the steps from loop to loop, and of the tokens within a loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._precision import wide
from ..errors import LoopedError
from ..looped import Looped, at_depth
from ..names import stack_prefix
from ..panels import Panel, curves
from ..record import InitialState
from ..results import Estimate, Result, table
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ..schedule import Indices, LoopSelector, Site, select_indices
from ._directions import cosine, direction, ratio
from ._streaming import at_positions, last_norm, layer_hooks, need_loops, visit

PER_LOOP = (
    "norm",
    "step_norm",
    "step_cosine",
    "turning_angle",
    "acceleration",
    "normalised_acceleration",
    "curvature",
    "anisotropy",
)


@dataclass(frozen=True, eq=False)
class StepGeometry(Result):
    """What `step_geometry` found: estimates over the examples, axis (loop) unless stated otherwise. `a + b` merges.

    With the state `x[t]` and the step `D[t] = x[t] - x[t-1]` of every token, each a mean over tokens:

    Args:
        norm: `|x[t]|`.
        step_norm: `|D[t]|`, from the second loop on.
        step_cosine: `cos(D[t], D[t-1])`, from the third loop on. A step of less than 8 times the resolution of the dtype is
            rounding and has no direction: such tokens are left out, and if all of an example are, the mean is NaN.
        turning_angle: the angle between `D[t]` and `D[t-1]`, in radians; NaN likewise.
        acceleration: `|D[t] - D[t-1]|`.
        normalised_acceleration: `|D[t] - D[t-1]| / |D[t]|`; a step shorter than the resolution of the dtype counts as that. A
            state that is zero has no resolution and is left out here, as it is of the anisotropy.
        curvature: the mean angle, in radians, between the steps from one token to the next (arXiv 2602.11451), without steps
            between equal states; NaN if there are no others.
        anisotropy: the mean cosine between the states of two tokens; NaN if there are no two that are not zero.
        cka: linear CKA between the states of two loops, tokens as samples, axes (loop, other). With fewer tokens than about
            d_model it is high whatever the states are: compare it only between runs of equal length. NaN if all tokens have
            one state up to rounding.
        hook: which state it is.
        after_norm: whether the model's last norm was applied to it.
    """

    norm: Estimate
    step_norm: Estimate
    step_cosine: Estimate
    turning_angle: Estimate
    acceleration: Estimate
    normalised_acceleration: Estimate
    curvature: Estimate
    anisotropy: Estimate
    cka: Estimate
    hook: str
    after_norm: bool

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row per loop and a column, with its standard error, per quantity; for CKA see `cka`."""
        return table(*(getattr(self, name) for name in PER_LOOP))

    def panels(self) -> list[Panel]:
        """One per quantity over the loops; `cka.plot()` is the heat map of loops against loops."""
        where = f"{self.hook}{', after the last norm' if self.after_norm else ''}"
        units = {
            "turning_angle": "turning angle (radians)",
            "curvature": "curvature (radians between steps from token to token)",
        }
        return curves([replace(grid, name=units.get(grid.name, grid.name)) for grid in map(self._of, PER_LOOP)], title=where)

    def _of(self, name: str) -> Estimate:
        return getattr(self, name)


def step_geometry(
    model: Looped,
    prompts: Prompts,
    *,
    n_loops: int | None = None,
    layer: int | None = None,
    after_norm: bool = False,
    positions: Indices = None,
    cka_loops: LoopSelector | None = None,
    stack: str | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> StepGeometry:
    """Step norms, angles and accelerations from loop to loop, and how alike the tokens and the loops are.

    Steps and accelerations are those of arXiv 2509.23314; curvature, anisotropy and CKA those of arXiv 2602.11451. Published
    cosines of one model disagree, as some are of normed states and some are not: all quantities are returned together, and with
    them the hook point and whether a norm was applied.

    The run is read once and holds three states, and for CKA `pos * (pos + 1) / 2` numbers per example and compared loop.

    Args:
        model: the model. Hooks on it act on the run, if it has `n_loops` loops itself.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example of at least 3 tokens.
        n_loops: how many loops to run (H cycles for HRM-Text); None for the model's own.
        layer: read the residual stream leaving this layer of every loop (`hook_resid_post`); None for the state leaving the
            loop (`hook_out`, after its norm where a loop ends with one: Ouro, HRM-Text, Nanbeige).
        after_norm: apply the model's last norm to every state first. Our choice is not to: norms hide growth.
        positions: whose states are looked at, three or more; None for all. `slice(1, None)` leaves out a first token that
            dwarfs the others.
        cka_loops: the loops compared by CKA: an int, a slice, several ints, "all" or "last"; None for all, but no more than 16,
            evenly spaced from the first to the last.
        stack: "L" or "H" for HRM-Text; not needed elsewhere.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; fewer than three loops; a prompt of fewer than three tokens; an activation that is not finite.
        OutOfRangeError: no such layer or loops.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.analysis import step_geometry
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=4), seed=0)
        >>> found = step_geometry(model, torch.tensor([[1, 2, 3, 4]]), verbose=False)
        >>> found.step_cosine.labels["loop"], found.hook
        ([2, 3], 'loops.*.hook_out')
        >>> bool((found.cka.values.diagonal() - 1).abs().max() < 1e-5)
        True
    """
    deep = at_depth(model, n_loops)
    schedule, looped = deep.schedule, deep.schedule.looped_stack(stack)
    passes = schedule.passes_of("all", stack)
    need_loops(len(passes), 3, "step_geometry", "an acceleration")
    if layer is not None:
        layer = schedule.site(schedule.virtual(Site(looped, 0, layer))).layer
    spaced = sorted({round(k * (len(passes) - 1) / 15) for k in range(16)})
    compared = tuple(schedule.select_loops(spaced if cka_loops is None else cka_loops, stack))
    measure = StepGeometryMeasure(layer, after_norm, positions, compared, looped, initial_state)
    return over_prompts(measure, deep, prompts, what="step_geometry", verbose=verbose)


@dataclass(frozen=True)
class StepGeometryMeasure:
    """What `step_geometry` measures of a batch."""

    layer: int | None
    after_norm: bool
    positions: Indices
    cka_loops: tuple[int, ...]
    stack: str
    initial_state: InitialState

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> StepGeometry:
        """Measure one batch."""
        n_tokens = len(select_indices(self.positions, tokens.shape[1], "positions"))
        if n_tokens < 3:
            raise LoopedError(f"step_geometry was asked of {n_tokens} tokens, but the curvature needs at least 3.")
        schedule = model.schedule
        passes = schedule.passes_of("all", self.stack)
        if self.layer is None:
            hooks, stop, hook = {f"{schedule.pass_prefix(p)}.hook_out": p.loop for p in passes}, None, "hook_out"
        else:
            hooks = {name: t for name, (t, j) in layer_hooks(schedule, passes, "hook_resid_post").items() if j == self.layer}
            stop, hook = passes[-1].layers.stop, f"blocks.{self.layer}.hook_resid_post"
        found: dict[str, list[Tensor]] = {name: [] for name in PER_LOOP}
        grams: dict[int, Tensor] = {}
        earlier: list[Tensor] = []  # the state before, and the step that led to it

        def measure(loop: int, state: Tensor) -> None:
            state = at_positions(state, self.positions)
            x = wide(last_norm(model, state) if self.after_norm else state)
            eps = torch.finfo(state.dtype).eps
            parts = {"norm": x.norm(dim=-1), "curvature": _curvature(x, eps), "anisotropy": _anisotropy(x)}
            step = x - earlier[0] if earlier else None
            if step is not None:
                parts["step_norm"] = step.norm(dim=-1)
            if step is not None and len(earlier) > 1:
                parts |= _turn(step, earlier[1], eps * parts["norm"])
            for name, part in parts.items():
                found[name].append(part.nanmean(1))
            if loop in self.cka_loops:
                grams[loop] = _gram(x, eps)
            earlier[:] = [x] if step is None else [x, step]

        visit(model, tokens, hooks, measure, stop=stop, initial_state=self.initial_state)

        def estimate(name: str) -> Estimate:
            values = torch.stack(found[name], 1).cpu()
            loops = [p.loop for p in passes[-values.shape[1] :]]
            return Estimate.of(values, ("loop",), {"loop": loops}, name)

        features = torch.stack([grams[loop] for loop in self.cka_loops], 1)
        cka, loops = (features @ features.mT).clamp(max=1).cpu(), list(self.cka_loops)
        return StepGeometry(
            **{name: estimate(name) for name in PER_LOOP},
            cka=Estimate.of(cka, ("loop", "other"), {"loop": loops, "other": loops}, "cka"),
            hook=f"{stack_prefix(self.stack)}loops.*.{hook}",
            after_norm=self.after_norm,
        )


def _turn(
    step: Float[Tensor, "batch pos d_model"], before: Float[Tensor, "batch pos d_model"], resolution: Float[Tensor, "batch pos"]
) -> dict[str, Float[Tensor, "batch pos"]]:
    """How a step differs from the one before it; the direction of a step that is all rounding is NaN."""
    change, length = (step - before).norm(dim=-1), step.norm(dim=-1)
    moves = length.minimum(before.norm(dim=-1)) > 8 * resolution
    between = cosine(step, before).where(moves, torch.nan)
    return {
        "step_cosine": between,
        "turning_angle": between.arccos(),
        "acceleration": change,
        "normalised_acceleration": ratio(change, length.maximum(resolution)),
    }


def _curvature(x: Float[Tensor, "batch pos d_model"], eps: float) -> Float[Tensor, "batch turn"]:
    """The angles between successive steps from token to token.

    They are NaN where two tokens have one state up to rounding, as equal tokens at the beginning of a text do.
    """
    steps = x.diff(dim=1)
    length = steps.norm(dim=-1, keepdim=True)
    steps = (steps / length).where(length > 8 * eps * x[:, 1:].norm(dim=-1, keepdim=True), torch.nan)
    return (steps[:, 1:] * steps[:, :-1]).sum(-1).clamp(-1, 1).arccos()


def _anisotropy(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch 1"]:
    """The mean cosine over all pairs of different tokens that have a direction.

    Computed from the squared norm of the sum of all directions, without the cosines of a token with itself.
    """
    directions = direction(x)
    n = (~directions.isnan().any(-1)).sum(1).to(x.dtype)
    directions = directions.nan_to_num()
    own = directions.square().sum((1, 2))
    return ratio(directions.sum(1).square().sum(-1) - own, n * (n - 1))[:, None]


def _gram(x: Float[Tensor, "batch pos d_model"], eps: float) -> Float[Tensor, "batch pair"]:
    """Inner products of all pairs of tokens, of length 1 as a vector, for centred features: their inner products are CKA.

    A Gram matrix is symmetric, so one half is kept, with the weight of both. It is NaN where the features are the same for all
    tokens up to rounding.
    """
    x = x / x.abs().amax((1, 2), keepdim=True)
    centred = x - x.mean(1, keepdim=True)
    varies = torch.linalg.matrix_norm(centred) > 8 * eps * torch.linalg.matrix_norm(x)
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    weight = torch.full_like(rows, math.sqrt(2), dtype=x.dtype).masked_fill(rows == columns, 1.0)
    return direction((centred @ centred.mT)[:, rows, columns] * weight).where(varies[:, None], torch.nan)
