"""Path independence: whether where a token ends depends on the initial state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._precision import wide
from ..errors import LoopedError
from ..looped import Looped
from ..panels import Panel
from ..record import InitialState
from ..results import Estimate, Result
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ._streaming import by_layer, carry_out, visit
from .limiting_behaviour import UNDEFINED, BehaviourRule, LimitingBehaviourMeasure, checked


@dataclass(frozen=True, eq=False)
class PathIndependence(Result):
    """What `path_independence` found: estimates over the examples. `a + b` merges.

    The spread of a token's states over the initial states is their root mean square distance over sqrt(2) times their root mean
    square norm: 0 if they are the same, 1 if they are unrelated. Tokens whose states are all zero have none and are left out;
    an example without others has NaN.

    Args:
        initial_spread: of the states entering the first loop, axis (state).
        spread: of the states leaving every layer in every loop, mean over tokens, axes (loop, layer).
        agreement: share of the tokens that have the same label from every initial state, of those that have one from each (are
            nowhere "undefined"), axis (layer); NaN if there are none.
        n_states: how many initial states.
        states: which ones: seeds, "zero", "tensor", "generator", or "None" for the model's own.
        rule: what the labels mean.
        stack: the looped stack.
    """

    initial_spread: Estimate
    spread: Estimate
    agreement: Estimate
    n_states: int
    states: str
    rule: BehaviourRule
    stack: str

    def to_dataframe(self) -> Any:
        """A pandas DataFrame of the spread with a row per (loop, layer)."""
        return self.spread.to_dataframe()

    def panels(self) -> list[Panel]:
        """A heat map of the spread, loops by layers."""
        return self.spread.panels(title=f"Spread over {self.n_states} initial states (1: unrelated)")


def path_independence(
    model: Looped,
    prompts: Prompts,
    *,
    initial_states: Sequence[InitialState] = (0, 1, 2, 3),
    n_loops: int | None = 128,
    rule: BehaviourRule | None = None,
    stack: str | None = None,
    verbose: bool = True,
) -> PathIndependence:
    """Whether tokens end in the same place, and behave alike, from several initial states (arXiv 2502.05171).

    All initial states run together as one batch.

    Args:
        model: the model. Hooks on it act on the runs, if it has `n_loops` loops itself.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        initial_states: at least two seeds, for families whose initial state is random; or tensors [batch, pos, d_model],
            "zero", None for the model's own.
        n_loops: how many loops to run (H cycles for HRM-Text); the paper's 128 unless told, None for the model's own.
        rule: when a token counts as what; `BehaviourRule()` if None.
        stack: "L" or "H" for HRM-Text; not needed elsewhere.
        verbose: show a progress bar.

    Raises:
        LoopedError: fewer than two initial states, or two that are the same; seeds for a family whose initial state is not
            random; no prompts; too few loops; an activation that is not finite.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.analysis import path_independence
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=1, n_loops=3, injection="concat", initial_state="noise")
        >>> found = path_independence(LoopedBridge.from_config(cfg), torch.tensor([[1, 2, 3]]), n_loops=12, verbose=False)
        >>> bool(found.initial_spread.values > 0.5), bool(found.spread.values[-1] < 1e-4), found.agreement.values.tolist()
        (True, True, [1.0])
    """
    rule, deep = checked(model, n_loops, rule, 2, 2, stack)
    looped = deep.schedule.looped_stack(stack)
    if len(initial_states) < 2:
        raise LoopedError(f"{len(initial_states)} initial states were given to path_independence; it compares at least two.")
    measure = PathIndependenceMeasure(tuple(initial_states), rule, looped)
    return over_prompts(measure, deep, prompts, what="path_independence", verbose=verbose)


@dataclass(frozen=True)
class PathIndependenceMeasure:
    """What `path_independence` measures of a batch, from all initial states together."""

    initial_states: tuple[InitialState, ...]
    rule: BehaviourRule
    stack: str

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> PathIndependence:
        """Measure one batch."""
        n_states = len(self.initial_states)
        states = [_state_entering(model, tokens, asked) for asked in self.initial_states]
        for k, state in enumerate(states):
            if same := [i for i in range(k) if torch.equal(states[i], state)]:
                raise LoopedError(f"initial states {same[0]} and {k} are the same; path_independence needs different ones.")
        spread: dict[tuple[int, int], Tensor] = {}

        def measure(at: tuple[int, int], value: Tensor) -> None:
            spread[at] = _spread(value.unflatten(0, (n_states, -1)))

        of_rows = LimitingBehaviourMeasure(self.rule, 2, 2, 0.0, False, self.stack, torch.cat(states))
        rows = tokens.repeat(n_states, 1)
        found = carry_out(model, rows, of_rows.rows(model, rows, measure))
        labels = torch.stack([token.labels for token in found]).unflatten(0, (n_states, -1))
        agree = (labels == labels[0]).all(0).double()
        agreement = agree.masked_fill((labels == UNDEFINED).any(0), torch.nan).nanmean(-1)  # [batch, layer]
        initial = _spread(torch.stack(states))[:, None].cpu()
        kinds = [type(s).__name__.lower() if isinstance(s, (Tensor, torch.Generator)) else str(s) for s in self.initial_states]
        return PathIndependence(
            initial_spread=Estimate.of(initial, ("state",), {"state": ["initial"]}, "spread"),
            spread=by_layer(spread, "spread"),
            agreement=Estimate.of(agreement, ("layer",), {"layer": list(range(agreement.shape[1]))}, "agreement"),
            n_states=n_states,
            states=", ".join(kinds),
            rule=self.rule,
            stack=self.stack,
        )


def _state_entering(model: Looped, tokens: Int[Tensor, "batch pos"], asked: InitialState) -> Float[Tensor, "batch pos d_model"]:
    """The state entering the first pass."""
    first = model.schedule.passes[0]
    found: list[Tensor] = []
    hooks = {f"{model.schedule.pass_prefix(first)}.{model.entrance}": 0}
    visit(model, tokens, hooks, lambda key, value: found.append(value), stop=first.first, initial_state=asked)
    return found[0]


def _spread(states: Float[Tensor, "state batch pos d_model"]) -> Float[Tensor, " batch"]:
    """Root mean square distance of two states over sqrt(2) times their root mean square norm, mean over the positions."""
    x = wide(states)
    x = x / x.abs().amax((0, -1), keepdim=True)  # 0/0 is NaN; and squares of small entries would round to 0
    n = len(x)
    deviation = (x - x.mean(0)).square().sum(-1).sum(0) / (n - 1)
    power = x.square().sum(-1).mean(0)
    return (deviation / power).sqrt().nanmean(-1)
