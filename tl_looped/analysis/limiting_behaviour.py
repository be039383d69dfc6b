"""Where tokens end: at a fixed point, on an orbit, or still sliding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._precision import wide
from .._together import stacked
from ..errors import LoopedError
from ..looped import Looped, at_depth, check_model
from ..panels import Panel
from ..record import InitialState
from ..results import Estimate, Grid, Result
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ..schedule import check_count
from ._directions import cosine
from ._streaming import At, Plan, carry_out, need_loops, run_twice

__all__ = ["BehaviourRule", "TokenBehaviour", "LimitingBehaviour", "limiting_behaviour"]

LABELS = ("fixed", "orbit", "slider", "unknown", "undefined")
FIXED, ORBIT, SLIDER, UNKNOWN, UNDEFINED = range(5)


@dataclass(frozen=True)
class BehaviourRule:
    """When a token counts as fixed, orbit, slider or neither, by `c[t] = cos(x[t], x[last])` (arXiv 2604.11791, appendix C).

    The body of the paper's Algorithm 1 is not public; only `tau` and `rho` are. This is a reconstruction, and absolute numbers
    move with its parameters. After `warm_up` loops a token is, whichever holds first,

    - undefined, if its state is zero at the end or on the way, which has no cosine;
    - fixed, if `1 - c[t] < tau` in at least a share `rho` of the loops;
    - slider, if `c` rises steadily to the end: its net rise is at least `rho` times the sum of all its changes;
    - orbit, if it comes back to where it ends: at least `returns` times `1 - c` grows beyond `2 tau` after it was below `tau`
      (the end is such a place, so every departure has its return);
    - unknown otherwise.

    Args:
        tau: how near counts as there; the paper's 0.05.
        rho: the paper's 0.9.
        warm_up: loops left out at the beginning; None for a quarter of them (our choice).
        returns: least number of returns of an orbit (our choice).

    Example:
        >>> import torch
        >>> t = torch.arange(128) * 1.0
        >>> signals = torch.stack([1 - 0.5**t, (0.7 * (t - 127)).cos(), (0.01 * (t - 127)).cos()], 1)
        >>> [LABELS[i] for i in BehaviourRule().classify(signals).tolist()]
        ['fixed', 'orbit', 'slider']
    """

    tau: float = 0.05
    rho: float = 0.9
    warm_up: int | None = None
    returns: int = 2

    def __post_init__(self) -> None:
        for name in ("tau", "rho"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise LoopedError(f"{name}={value!r} was asked, but {name} is a number between 0 and 1.")
        check_count("warm_up", 0 if self.warm_up is None else self.warm_up, 0)
        check_count("returns", self.returns)

    def classify(self, signal: Float[Tensor, "loop ..."]) -> Int[Tensor, ...]:
        """The place in `LABELS` of every token.

        Args:
            signal: cosine to the last loop's state, which the last entry belongs to; NaN where one of the two is zero.

        Raises:
            LoopedError: fewer than four loops after the warm-up.
        """
        warm_up = len(signal) // 4 if self.warm_up is None else self.warm_up
        if len(signal) - warm_up < 4:
            raise LoopedError(
                f"{len(signal)} loops with warm_up={warm_up} leave fewer than 4 to judge by; pass a larger n_loops= or a "
                "shorter warm-up."
            )
        c = signal[warm_up:]
        near = 1 - c < self.tau
        fixed = near.sum(0) >= self.rho * len(c)
        slider = c[-1] - c[0] >= self.rho * c.diff(dim=0).abs().sum(0)
        inside = torch.zeros_like(near[0])
        departures = torch.zeros_like(inside, dtype=torch.long)
        for close, far in zip(near, 1 - c > 2 * self.tau, strict=True):
            departures += inside & far
            inside = (inside & ~far) | close
        label = torch.where(departures >= self.returns, ORBIT, UNKNOWN)
        label = torch.where(fixed, FIXED, torch.where(slider, SLIDER, label))
        return label.masked_fill(c.isnan().any(0), UNDEFINED)


@dataclass(frozen=True, eq=False)
class TokenBehaviour:
    """How the tokens of one example end.

    Args:
        labels: the place in `LABELS`.
        rotation_power: share of the power of the state around its mean that is in the period asked for.
        steps_to_settle: the first loop that moved the state by less than `settle`; NaN if none did.
        signal: cosine to the last loop's state; None unless kept.
    """

    labels: Int[Tensor, "layer pos"]
    rotation_power: Float[Tensor, "layer pos"]
    steps_to_settle: Float[Tensor, "layer pos"]
    signal: Float[Tensor, "loop layer pos"] | None


@dataclass(frozen=True, eq=False)
class LimitingBehaviour(Result):
    """What `limiting_behaviour` found; `a + b` has the examples of both.

    Args:
        examples: the tokens of every example, in the order of the prompts.
        rule: what the labels mean.
        period: of `rotation_power`, in loops.
        window: how many of the last loops it was taken over.
        settle: the step length of `steps_to_settle`.
        stack: the looped stack.
        n_loops: how many loops it ran.
    """

    examples: tuple[TokenBehaviour, ...]
    rule: BehaviourRule
    period: int
    window: int
    settle: float
    stack: str
    n_loops: int

    @property
    def _layers(self) -> list[int]:
        return list(range(len(self.examples[0].labels)))

    @property
    def counts(self) -> Grid:
        """How many tokens of all examples have each label, axes (layer, label)."""
        labels = torch.cat([example.labels for example in self.examples], 1)
        values = torch.stack([(labels == k).sum(1) for k in range(len(LABELS))], 1)
        return Grid(values, ("layer", "label"), {"layer": self._layers, "label": [*LABELS]}, "tokens")

    @property
    def fractions(self) -> Estimate:
        """The share of the tokens of an example with each label, mean over examples, axes (layer, label).

        The share of all tokens, in which longer examples count more, is `counts` over its sum.
        """
        rows = [torch.stack([(e.labels == k).double().mean(1) for k in range(len(LABELS))], 1) for e in self.examples]
        labels = {"layer": self._layers, "label": [*LABELS]}
        return Estimate.of(torch.stack(rows), ("layer", "label"), labels, "fraction")

    @property
    def rotation_power(self) -> Estimate:
        """The rotation power, mean over the tokens of an example, then over examples, axis (layer)."""
        rows = torch.stack([example.rotation_power.double().mean(1) for example in self.examples])
        return Estimate.of(rows, ("layer",), {"layer": self._layers}, "rotation_power")

    @property
    def co_occurrence(self) -> Grid:
        """P(a token has a label in any layer | it has `given` in any layer), axes (given, label); NaN where no token has it."""
        labels = torch.cat([example.labels for example in self.examples], 1)
        has = torch.stack([(labels == k).any(0) for k in range(len(LABELS))]).double()
        both = has @ has.T
        values = both / both.diagonal()[:, None]
        return Grid(values, ("given", "label"), {"given": [*LABELS], "label": [*LABELS]}, "probability")

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row per (example, layer, pos): label, rotation power and steps to settle."""
        import pandas as pd

        frames = []
        for n, e in enumerate(self.examples):
            layer, pos = torch.ones_like(e.labels).nonzero().T.tolist()
            columns = {"layer": layer, "pos": pos, "label": [LABELS[k] for k in e.labels.flatten().tolist()]}
            numbers = {name: getattr(e, name).flatten().tolist() for name in ("rotation_power", "steps_to_settle")}
            frames.append(pd.DataFrame({"example": n, **columns, **numbers}))
        return pd.concat(frames, ignore_index=True)

    def panels(self) -> list[Panel]:
        """A heat map of the share of tokens with each label in every layer."""
        return self.fractions.panels(title=f"Share of tokens with each label after {self.n_loops} loops")


def limiting_behaviour(
    model: Looped,
    prompts: Prompts,
    *,
    n_loops: int | None = 128,
    rule: BehaviourRule | None = None,
    period: int = 6,
    window: int = 24,
    settle: float = 0.1,
    keep_signal: bool = False,
    stack: str | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> LimitingBehaviour:
    """How every token ends in every layer: at a fixed point, on an orbit, sliding, or none of these (arXiv 2604.11791, app. C).

    States are residual streams leaving the layers (`hook_resid_post`). The label follows from the cosine to the last loop's
    state; see `BehaviourRule`, which is a reconstruction. The rotation power is the share of the power of the discrete Fourier
    transform over the last `window` loops, without the constant, at `period` loops, over all of d_model: 1 for a rotation of
    that period; 0 where the state moves by less than the resolution of the dtype. (Varaksin et al. 2026 use period 6, window 24
    and call more than 0.6677 a rotation.) Steps to settle count to the first loop whose step is shorter than `settle` in the
    units of the stream, their 0.1 for Huginn; choose it anew for a model of another scale.

    Each batch is run twice, first for the steps and the last loop's states; or once, if the streams of all loops take 64 MB
    or less. Else four loops of them are held (one and three sums for the transform), and one cosine per token, layer and loop.

    Args:
        model: the model. Hooks on it act on the runs, if it has `n_loops` loops itself.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        n_loops: how many loops to run (H cycles for HRM-Text); the paper's 128 unless told, None for the model's own.
        rule: when a token counts as what; `BehaviourRule()` if None.
        period: loops per turn of the rotation looked for; divides `window`.
        window: how many of the last loops to look for it in.
        settle: length of a step below which a token has settled.
        keep_signal: keep the cosines of every token.
        stack: "L" or "H" for HRM-Text; not needed elsewhere.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; fewer loops than `window`, or too few after the warm-up; an activation that is not finite.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.analysis import limiting_behaviour
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=1, n_loops=3, injection="concat", initial_state="noise")
        >>> found = limiting_behaviour(LoopedBridge.from_config(cfg), torch.tensor([[1, 2, 3]]), n_loops=24, verbose=False)
        >>> found.counts.values.tolist(), found.counts.labels["label"]
        ([[3, 0, 0, 0, 0]], ['fixed', 'orbit', 'slider', 'unknown', 'undefined'])
    """
    if isinstance(settle, bool) or not isinstance(settle, (int, float)) or settle <= 0:
        raise LoopedError(f"settle={settle!r} was asked; it is the length of a step, a number above 0.")
    rule, deep = checked(model, n_loops, rule, period, window, stack)
    stack = deep.schedule.looped_stack(stack)
    measure = LimitingBehaviourMeasure(rule, period, window, settle, keep_signal, stack, initial_state)
    return over_prompts(measure, deep, prompts, what="limiting_behaviour", verbose=verbose)


def checked(
    model: Looped, n_loops: int | None, rule: BehaviourRule | None, period: int, window: int, stack: str | None
) -> tuple[BehaviourRule, Looped]:
    """The rule, and the model at its depth if that many loops can answer the question."""
    if check_count("window", window, 2) % check_count("period", period, 2):
        raise LoopedError(f"period={period} does not divide window={window}, so no frequency of the transform stands for it.")
    check_model(model)
    if rule is not None and not isinstance(rule, BehaviourRule):
        raise LoopedError(f"rule={rule!r} was given; pass a BehaviourRule.")
    rule, deep = rule or BehaviourRule(), at_depth(model, n_loops)
    n = deep.schedule.n_loops_of(deep.schedule.looped_stack(stack))
    need_loops(n, window, "the limiting behaviour", f"window={window}")
    rule.classify(torch.ones(n, dtype=torch.float32, device="cpu"))
    return rule, deep


@dataclass(frozen=True)
class LimitingBehaviourMeasure:
    """What `limiting_behaviour` finds in a batch."""

    rule: BehaviourRule
    period: int
    window: int
    settle: float
    keep_signal: bool
    stack: str
    initial_state: InitialState

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> LimitingBehaviour:
        """Measure one batch."""
        return carry_out(model, tokens, self.plan(model, tokens))

    def plan(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> Plan[LimitingBehaviour]:
        """The runs of one batch that it takes."""
        found, n_loops = tuple((yield from self.rows(model, tokens))), model.schedule.n_loops_of(self.stack)
        return LimitingBehaviour(found, self.rule, self.period, self.window, self.settle, self.stack, n_loops)

    def rows(
        self,
        model: Looped,
        tokens: Int[Tensor, "batch pos"],
        also: Callable[[At, Tensor], None] = lambda at, value: None,
    ) -> Plan[list[TokenBehaviour]]:
        """The behaviour of every row of a batch."""
        passes = model.schedule.passes_of("all", self.stack)
        n, n_layers = len(passes), passes[0].n_layers
        waves: dict[int, _Wave] = {}
        settled = torch.full((n_layers, *tokens.shape), torch.nan, dtype=torch.float32, device=tokens.device)
        dtype = torch.promote_types(model.cfg.dtype, torch.float32)
        signal = torch.empty(n, n_layers, *tokens.shape, dtype=dtype, device=tokens.device)

        def step(hook: str, at: At, before: Tensor, value: Tensor) -> None:
            loop, layer = at
            short = (wide(value) - wide(before)).norm(dim=-1) < self.settle
            settled[layer] = settled[layer].where(settled[layer].isfinite() | ~short.to(settled.device), float(loop))

        def measure(hook: str, at: At, value: Tensor, end: Tensor) -> None:
            also(at, value)
            loop, layer = at
            x, end = wide(value), wide(end)
            signal[loop, layer] = cosine(x, end)
            if loop >= n - self.window:
                waves.setdefault(layer, _Wave(self.period, torch.finfo(value.dtype).eps * end.norm(dim=-1))).add(x - end)

        yield from run_twice(model, ["hook_resid_post"], passes, passes[-1], self.initial_state, step, measure)
        cosines, settled = signal.cpu(), settled.cpu()
        labels = torch.stack([self.rule.classify(cosines[:, layer]) for layer in range(n_layers)])
        power = stacked(waves[j].share() for j in range(n_layers)).cpu()
        kept = cosines if self.keep_signal else None
        return [
            TokenBehaviour(labels[:, b], power[:, b], settled[:, b], None if kept is None else kept[:, :, b])
            for b in range(len(tokens))
        ]


class _Wave:
    """The discrete Fourier transform of states that come one by one, at one period and at zero frequency, and their power.

    Args:
        period: in states.
        resolution: deviations from the mean below this count as none.
    """

    def __init__(self, period: int, resolution: Float[Tensor, "batch pos"]):
        self.period, self.resolution = period, resolution
        self.n = 0
        self.sums: list[Tensor] = []
        self.power = torch.zeros_like(resolution)

    def add(self, x: Float[Tensor, "batch pos d_model"]) -> None:
        """Add the next state; one that is small where the states hardly move, so that their mean does not hide it."""
        angle = 2 * math.pi * self.n / self.period
        parts = (x, x * math.cos(angle), x * math.sin(angle))
        if self.sums:
            for total, part in zip(self.sums, parts, strict=True):
                total += part
        else:
            self.sums = [part.clone() for part in parts]
        self.power += x.square().sum(-1)
        self.n += 1

    def share(self) -> Float[Tensor, "batch pos"]:
        """The power at the period over all power but that at zero frequency (Parseval); 0 where the states do not move."""
        constant, cosine, sine = (total.square().sum(-1) for total in self.sums)
        moving = self.n * self.power - constant  # n^2 times the mean square distance to the mean
        at_period = (cosine + sine) * (1 if self.period == 2 else 2)  # each frequency but the highest also as its negative
        is_moving = moving > (self.n * self.resolution).square()
        return torch.where(is_moving, at_period / moving.where(is_moving, 1.0), 0.0).clamp(0, 1)
