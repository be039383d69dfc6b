"""Stages of inference: attention and residual metrics over the depth of a run, by pass, and against a feed-forward model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._old_calls import accepts_old
from .._old_names import moved
from .._precision import wide
from ..errors import LoopedError
from ..looped import Hooked, Looped, at_depth
from ..panels import GroupBy, Panel, grouped
from ..record import InitialState
from ..results import Estimate, Grid, Result, table
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ..schedule import Indices, Schedule
from ._streaming import Look, Plan, at_positions, carry_out, check_bridge, need_loops

METRICS = ("colsum", "sink_rate", "mixing", "entropy", "norm")


def colsum_concentration(pattern: Float[Tensor, "*rows query key"]) -> Float[Tensor, "*rows"]:
    """How much of the attention goes to few keys, 0 (all alike) to 1 (one key): `1 + sum_j c_j log c_j / log T`.

    `c_j` is the share of key `j` in all attention paid; arXiv 2604.11791 prints the sums unscaled, which would leave [0, 1].

    Args:
        pattern: attention, [..., query, key].
    """
    shares = pattern.sum(-2, dtype=torch.float64) / pattern.shape[-2]
    return 1 + torch.xlogy(shares, shares).sum(-1) / math.log(pattern.shape[-1])


def sink_score(pattern: Float[Tensor, "*rows query key"]) -> Float[Tensor, "*rows"]:
    """The mean attention paid to the first token.

    Args:
        pattern: attention, [..., query, key].
    """
    return pattern[..., 0].double().mean(-1)


def mixing_score(pattern: Float[Tensor, "*rows query key"]) -> Float[Tensor, "*rows"]:
    """Mean entropy of the rows of an attention pattern, in nats.

    Args:
        pattern: attention, [..., query, key].
    """
    return -torch.xlogy(pattern, pattern).sum(-1).double().mean(-1)


def matrix_entropy(
    resid: Float[Tensor, "*rows pos d_model"], centred: bool = False, unit: Literal["nats", "bits"] = "nats"
) -> Float[Tensor, "*rows"]:
    """Entropy of the squared singular values of a matrix as shares of their sum; 0 for a matrix of rank one, NaN of zeros.

    Args:
        resid: the states of all positions.
        centred: subtract the mean over positions first.
        unit: of the entropy.
    """
    x = resid.double()
    x = x - x.mean(-2, keepdim=True) if centred else x
    size = x.square().sum((-2, -1), keepdim=True).sqrt()
    x = x / size.clamp(min=torch.finfo(x.dtype).tiny)
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x  # its eigenvalues are the squared singular values
    shares = torch.linalg.eigvalsh(gram).clamp(min=0)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    entropy = (entropy / math.log(2) if unit == "bits" else entropy).clamp(min=0)
    return entropy.where(size[..., 0, 0] > 0, torch.nan)


@dataclass(frozen=True, eq=False)
class InferenceStages(Result):
    """Metrics over the depth of a run; made by `inference_stages`.

    Every metric is an `Estimate` with one entry per executed layer, in the order of the run: a mean over examples with its
    standard error. `a + b` is the result over the prompts of both.

    Args:
        colsum: ColSum concentration, 0 to 1, mean over heads.
        sink_rate: share of the heads whose mean attention to the first token is at least `tau`.
        mixing: mixing score in nats, mean over heads.
        entropy: entropy of the residual matrix leaving the layer, in the unit asked for.
        norm: L2 norm of the residual stream leaving the layer, mean over positions.
        schedule: which layer ran when; a feed-forward model is one loop over all of its layers.
        tau: how much attention to the first token makes a head a sink.
    """

    colsum: Estimate
    sink_rate: Estimate
    mixing: Estimate
    entropy: Estimate
    norm: Estimate
    schedule: Schedule
    tau: float

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per executed layer; for every metric its mean and standard error."""
        return table(*(getattr(self, m) for m in METRICS))

    def panels(self, metric: str = "colsum", group_by: GroupBy = "depth") -> list[Panel]:
        """One metric, in one of the paper's three groupings.

        Args:
            metric: "colsum", "sink_rate", "mixing", "entropy" or "norm".
            group_by: one line over all layers ("depth"), one per pass ("recurrence") or one per layer ("layer").

        Raises:
            LoopedError: an unknown metric or grouping.
        """
        grid = self._metric(metric)
        name = {"colsum": "ColSum concentration", "sink_rate": "sink rate", "norm": "residual norm (L2)"}.get(metric, grid.name)
        layers, values = range(self.schedule.n_layers), grid.values.tolist()
        return [grouped(values, self.schedule, layers=layers, group_by=group_by, name=name)]

    def _metric(self, metric: str) -> Estimate:
        if metric not in METRICS:
            raise LoopedError(f"metric={metric!r} was asked; there are {', '.join(METRICS)}.")
        return getattr(self, metric)

    @accepts_old("edges")
    def curves(self, metric: str, stack: str | None = None, *, edges: bool = False) -> Float[Tensor, "loop layer"]:
        """The means of one metric, one row per pass of a looped stack.

        Args:
            metric: "colsum", "sink_rate", "mixing", "entropy" or "norm".
            stack: "L" or "H" for HRM-Text; not needed elsewhere.
            edges: put the layers of prelude and coda around those of every pass, as the paper's plots by recurrence do.

        Raises:
            LoopedError: an unknown metric; a stack that does not exist.
        """
        values, schedule = self._metric(metric).values, self.schedule
        before, after = values[: schedule.n_prelude], values[schedule.first_coda_layer :]
        passes = [values[p.first : p.layers.stop] for p in schedule.passes_of("all", stack)]
        return torch.stack([torch.cat((before, one, after)) if edges else one for one in passes])

    def compare(self, feed_forward: InferenceStages, stack: str | None = None) -> Grid:
        """How much the curve of every pass, prelude and coda included, resembles a feed-forward model's on relative depth.

        The first layer is at depth 0 and the last at 1; both curves are interpolated linearly to 101 depths (our choice, as are
        the scores): "correlation" is Pearson's, which ignores level and scale, "concordance" is Lin's (1989), which is 1 only
        for the same curve. A correlation with a constant curve is NaN.

        Args:
            feed_forward: the stages of another model, such as the one that this model was made from.
            stack: "L" or "H" for HRM-Text; not needed elsewhere.

        Returns:
            Axes (loop, metric, score).

        Raises:
            LoopedError: stages measured with another `tau`, unit or centring; a model of one layer.
        """
        for what, mine, other in (
            ("tau", self.tau, feed_forward.tau),
            ("the entropy", self.entropy.name, feed_forward.entropy.name),
        ):
            if mine != other:
                raise LoopedError(f"stages with {what} {mine} and {other} were compared; measure both alike.")

        def pair(metric: str) -> tuple[Tensor, Tensor]:
            reference = getattr(feed_forward, metric).values[None]
            ours = self.curves(metric, stack, edges=True)
            if min(ours.shape[-1], reference.shape[-1]) < 2:  # resampled, a point would look like a curve
                return ours, reference
            return _resample(ours), _resample(reference).expand(len(ours), -1)

        return self._scores(pair, 0, "similarity", stack)

    def repetition(self, stack: str | None = None) -> Grid:
        """How much every pass but the first repeats the curve of the pass before it, over the layers of the loop alone.

        Scores as in `compare`: stages that repeat in every loop have a concordance near 1; passes that do something new, one
        near 0 or below. The paper shows the curves; the score is our choice.

        Args:
            stack: "L" or "H" for HRM-Text; not needed elsewhere.

        Returns:
            Axes (loop, metric, score); loops from 1 on.

        Raises:
            LoopedError: one loop only, or a loop of one layer.
        """
        need_loops(
            self.schedule.n_loops_of(self.schedule.looped_stack(stack)), 2, "repetition", "a comparison of successive loops"
        )
        return self._scores(lambda metric: ((c := self.curves(metric, stack))[1:], c[:-1]), 1, "repetition", stack)

    def _scores(self, pair: Callable[[str], tuple[Tensor, Tensor]], first: int, name: str, stack: str | None) -> Grid:
        rows = []
        for metric in METRICS:
            a, b = pair(metric)
            if min(a.shape[-1], b.shape[-1]) < 2:
                raise LoopedError(f"{name} compares curves over layers, but one of them is over one layer and no curve.")
            rows.append(torch.stack([correlation(a, b), _concordance(a, b)], -1))
        n_loops = self.schedule.n_loops_of(self.schedule.looped_stack(stack))
        labels = {
            "loop": list(range(first, n_loops)),
            "metric": [*METRICS],
            "score": ["correlation", "concordance"],
        }
        return Grid(torch.stack(rows, 1), ("loop", "metric", "score"), labels, name)


def inference_stages(
    model: Hooked,
    prompts: Prompts,
    *,
    n_loops: int | None = None,
    tau: float = 0.3,
    centred: bool = False,
    unit: Literal["nats", "bits"] = "nats",
    positions: Indices = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> InferenceStages:
    """The stages-of-inference metrics of every executed layer (arXiv 2604.11791, section 5 and appendix E).

    Attention metrics are means over heads, then over examples. One pattern and one residual stream are held at a time.

    Args:
        model: a looped model, or any TransformerBridge to compare it with.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; at least two tokens each.
        n_loops: loops to run, beyond the trained number too; None for the model's own.
        tau: a head counts as a sink when it pays the first token at least this much on average (the paper's 0.3).
        centred: subtract the mean over positions before the residual matrix entropy; the paper does not say, False is our
            choice.
        unit: of the residual matrix entropy; nats is our choice. The mixing score is in nats, as natural logarithms are usual.
        positions: whose states entropy and norm are of; None for all. `slice(1, None)` leaves out a first token that dwarfs the
            others.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts, a prompt of one token, an activation that is not finite; `n_loops` or `initial_state` for a
            feed-forward model.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> stages = inference_stages(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), n_loops=4, verbose=False)
        >>> stages.colsum.labels["depth"][-1], stages.curves("entropy").shape, stages.colsum.count
        ('loops.3.blocks.1', torch.Size([4, 2]), 2)
        >>> stages.repetition().axes
        ('loop', 'metric', 'score')
    """
    check_bridge(model)
    if unit not in ("nats", "bits"):
        raise LoopedError(f'unit={unit!r} was asked; choose "nats" or "bits".')
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
        raise LoopedError(f"tau={tau!r} was asked; it is a share of attention, from 0 to 1.")
    if isinstance(model, Looped):
        model = at_depth(model, n_loops)
    elif n_loops is not None:
        raise LoopedError(f"n_loops={n_loops} was asked of a {type(model).__name__}, which does not loop; leave it out.")
    elif initial_state is not None:
        raise LoopedError(f"initial_state was given for a {type(model).__name__}, which has none; leave it out.")
    measure = InferenceStagesMeasure(tau, centred, unit, positions, initial_state)
    return over_prompts(measure, model, prompts, what="inference_stages", verbose=verbose)


@dataclass(frozen=True)
class InferenceStagesMeasure:
    """What `inference_stages` measures of a batch."""

    tau: float
    centred: bool
    unit: Literal["nats", "bits"]
    positions: Indices
    initial_state: InitialState

    def __call__(self, model: Hooked, tokens: Int[Tensor, "batch pos"]) -> InferenceStages:
        """Measure one batch."""
        return carry_out(model, tokens, self.plan(model, tokens))

    def plan(self, model: Hooked, tokens: Int[Tensor, "batch pos"]) -> Plan[InferenceStages]:
        """The run of one batch that it takes."""
        if tokens.shape[1] < 2:
            raise LoopedError("a prompt of one token was given; attention and matrix entropy need at least two.")
        schedule = model.schedule if isinstance(model, Looped) else Schedule(model.cfg.n_layers, 1)
        n, names = schedule.n_layers, [f"blocks.{i}" for i in range(schedule.n_layers)]
        if isinstance(model, Looped):
            names = [schedule.layer_name(i) for i in range(n)]
        nothing = torch.full((len(tokens), n), torch.nan, dtype=torch.float64, device="cpu")
        values = {m: nothing.clone() for m in METRICS}

        def read(key: tuple[str, int], value: Tensor) -> None:
            hook, i = key
            if hook == "attn.hook_pattern":
                pattern = wide(value)
                values["colsum"][:, i] = colsum_concentration(pattern).mean(1)
                values["sink_rate"][:, i] = (sink_score(pattern) >= self.tau).double().mean(1)
                values["mixing"][:, i] = mixing_score(pattern).mean(1)
            else:
                resid = at_positions(value, self.positions)
                values["entropy"][:, i] = matrix_entropy(resid, self.centred, self.unit)
                values["norm"][:, i] = resid.double().norm(dim=-1).mean(-1)

        hooks = {f"{names[i]}.{hook}": (hook, i) for i in range(n) for hook in ("attn.hook_pattern", "hook_resid_post")}
        yield Look(hooks, read, n if isinstance(model, Looped) else None, self.initial_state)
        if values["colsum"].isnan().any():
            raise LoopedError(
                "some layers showed no attention pattern; inference_stages needs attention that has one in every layer, "
                'such as attn_implementation="eager".'
            )
        titles = {"entropy": f"{'centred ' * self.centred}matrix entropy ({self.unit})", "mixing": "mixing (nats)"}
        estimates = [Estimate.of(values[m], ("depth",), {"depth": names}, titles.get(m, m)) for m in METRICS]
        return InferenceStages(*estimates, schedule=schedule, tau=self.tau)


def _resample(curves: Float[Tensor, "loop layer"], n: int = 101) -> Float[Tensor, "loop depth"]:
    if curves.shape[-1] < 2:
        return curves
    return torch.nn.functional.interpolate(curves[:, None], n, mode="linear", align_corners=True)[:, 0]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's coefficient; NaN where a curve is constant up to rounding.

    Args:
        a: curves, [..., layer].
        b: others.
    """
    varies = [x.var(-1, correction=0) > (8 * torch.finfo(x.dtype).eps * x.mean(-1)).square() for x in (a, b)]
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    found = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return found.where(varies[0] & varies[1], torch.nan)


def _concordance(a: Tensor, b: Tensor) -> Tensor:
    """Lin's coefficient; 1 for equal curves, constant ones included."""
    shift = (a.mean(-1) - b.mean(-1)).square()
    covariance = ((a - a.mean(-1, keepdim=True)) * (b - b.mean(-1, keepdim=True))).mean(-1)
    spread = a.var(-1, correction=0) + b.var(-1, correction=0) + shift
    return torch.where(spread > 0, 2 * covariance / spread, torch.ones_like(spread))


def __getattr__(name: str) -> object:
    return moved(__name__, name)
