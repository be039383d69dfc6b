"""Exit policies: after how many loops a token is read out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._precision import wide
from .errors import LoopedError


@dataclass
class LoopHistory:
    """What a policy may look at after a loop, for rows of tokens that are decided independently.

    All of it is what hooks leave: the state before the first loop is `loops.0.hook_state`, the one leaving loop `t`
    `loops.{t}.hook_out`, its exit logit `loops.{t}.hook_exit_logit` (in HRM-Text, of the H stack).

    Args:
        states: the state before the first loop, then the one leaving every loop so far. One that was forgotten raises.
        exit_logits: of every loop so far, in models with an exit gate.
        readout: loop -> what the model would answer if it stopped there.

    Example:
        >>> from tl_looped import LoopedBridge
        >>> def is_sure(history):  # a policy of one's own: most of the probability is on one token
        ...     return history.log_probs(history.loop).exp().amax(-1) > 0.9
        >>> model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
        >>> model.exit_policy = is_sure
        >>> _ = model.generate("A b B c C a ? A", max_new_tokens=1, verbose=False)
        >>> model.generation_report.loops_per_token.tolist()
        [[1]]
    """

    states: list[Float[Tensor, "*rows d_model"]]
    exit_logits: list[Float[Tensor, "*rows"]]
    readout: Callable[[int], Float[Tensor, "*rows d_vocab"]]
    _log_probs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = _States(self.states)

    @property
    def loop(self) -> int:
        """The loop that has just run."""
        return len(self.states) - 2

    def log_probs(self, loop: int) -> Float[Tensor, "*rows d_vocab"]:
        """Log-probabilities of the readout after a loop, in fp32 or wider."""
        if loop not in self._log_probs:
            logits = self.readout(loop)
            self._log_probs[loop] = wide(logits).log_softmax(-1)
        return self._log_probs[loop]

    def forget(self, loop: int, n_states: int) -> None:
        """Drop the log-probabilities of the loops before `loop`, and all states but the first and the last ones.

        Args:
            loop: the first loop whose log-probabilities are kept.
            n_states: how many of the last states are kept.
        """
        self._log_probs = {t: kept for t, kept in self._log_probs.items() if t >= loop}
        states: list[Any] = self.states
        for t in range(1, len(states) - n_states):
            states[t] = _Forgotten(t - 1, n_states)


class _Forgotten:
    """In place of a state that is not kept; also what does not ask `_States` for it, such as `torch.stack`, is refused."""

    def __init__(self, loop: int, n_states: int):
        self.loop, self.n_states = loop, n_states

    def refuse(self) -> NoReturn:
        raise LoopedError(
            f"a policy asked for the state leaving loop {self.loop}, which is no longer kept: exit_steps keeps the first state "
            f"and the last {self.n_states}. Let the policy keep what it needs while it is there; generate keeps all states."
        )

    def __torch_function__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.refuse()


class _States(list[Any]):
    """States in the order of the run."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        for state in found if isinstance(index, slice) else [found]:
            if isinstance(state, _Forgotten):
                state.refuse()
        return found

    def __iter__(self) -> Iterator[Any]:
        return (self[k] for k in range(len(self)))

    def __reversed__(self) -> Iterator[Any]:
        return (self[k] for k in reversed(range(len(self))))


@runtime_checkable
class ExitPolicy(Protocol):
    """Says after every loop which rows need no further one; after the last loop it is not asked."""

    def __call__(self, history: LoopHistory) -> Bool[Tensor, "*rows"]:
        """Which rows need no further loop."""
        ...


@dataclass(frozen=True)
class Gate:
    """Exit as soon as the exit gate's cumulative probability reaches a threshold (Ouro, arXiv 2510.25741).

    `lambda_t = sigmoid(exit logit)`, `p_t = lambda_t * prod_{s<t} (1 - lambda_s)`, exit at the first `t` with
    `p_0 + ... + p_t >= threshold`. The sum is taken in the model's dtype, as the published code does. A threshold of 1.0
    therefore does not mean "never": the sum may round to 1.0 before the last loop, the earlier the narrower the dtype. For
    every loop, set `exit_policy = None`.

    Args:
        threshold: cumulative exit probability, from 0 to 1.

    Example:
        >>> history = LoopHistory([], exit_logits=[torch.zeros(1), torch.zeros(1)], readout=lambda loop: None)
        >>> Gate(0.7)(history).tolist(), Gate(0.8)(history).tolist()  # 0.5 + 0.25
        ([True], [False])

    Raises:
        LoopedError: a threshold outside 0 to 1; when it is asked, a model without an exit gate.
    """

    threshold: float

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, high=1.0)

    def __call__(self, history: LoopHistory) -> Bool[Tensor, "*rows"]:
        """Which rows need no further loop."""
        if not history.exit_logits:
            raise LoopedError("the exit policy Gate reads exit gates, which this model does not have; use another policy.")
        survival, pdf = torch.ones_like(history.exit_logits[0]), []
        for logit in history.exit_logits:
            leave = torch.sigmoid(logit)
            pdf.append(leave * survival)
            survival = survival * (1 - leave)
        return torch.stack(pdf, -1).cumsum(-1)[..., -1] >= self.threshold


@dataclass(frozen=True)
class KL:
    """Exit when `KL(p_t || p_{t-1})` of two successive readouts is below a threshold (Huginn, arXiv 2502.05171).

    Args:
        threshold: in nats; the default is the paper's.

    Example:
        >>> states = [torch.zeros(1, 2)] * 3
        >>> KL()(LoopHistory(states, [], readout=lambda loop: torch.tensor([[1.0, 2.0]]))).tolist()  # nothing changed
        [True]
    """

    threshold: float = 5e-4

    def __post_init__(self) -> None:
        _check("threshold", self.threshold)

    def __call__(self, history: LoopHistory) -> Bool[Tensor, "*rows"]:
        """Which rows need no further loop."""
        if history.loop < 1:
            return _nobody(history)
        now, before = history.log_probs(history.loop), history.log_probs(history.loop - 1)
        # A token that neither readout can say has log-probability -inf in both, and adds nothing.
        return torch.where(now.exp() > 0, now.exp() * (now - before), 0.0).sum(-1) < self.threshold


@dataclass(frozen=True)
class StateChange:
    """Exit when the last loop changed the state little, `|s_t - s_{t-1}| / |s_t| < threshold` (Huginn's latent-diff).

    `s_t` is `loops.{t}.hook_out`; before the first loop it is the state that enters it.

    Args:
        threshold: relative L2 distance; the default is that of the published code. It is computed in fp32 or wider.

    Example:
        >>> history = LoopHistory([torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.1]])], [], readout=lambda loop: None)
        >>> StateChange(0.2)(history).tolist(), StateChange(0.03)(history).tolist()
        ([True], [False])
    """

    threshold: float = 0.03

    def __post_init__(self) -> None:
        _check("threshold", self.threshold)

    def __call__(self, history: LoopHistory) -> Bool[Tensor, "*rows"]:
        """Which rows need no further loop."""
        before, now = map(wide, history.states[-2:])  # squares of half-precision states overflow
        return (now - before).norm(dim=-1) < self.threshold * now.norm(dim=-1)


@dataclass(frozen=True)
class TwoHitAcceleration:
    """Exit when the steps of the state have changed little two times in a row (arXiv 2509.23314).

    `a_t = |D_t - D_{t-1}|` with `D_t = s_t - s_{t-1}`, states as in `StateChange`; exit when `a_{t-1}` and `a_t` are both
    below the threshold. That takes three steps, so the earliest exit is after the third loop.

    Args:
        threshold: L2 distance in the units of the state; the paper gives none.

    Example:
        >>> steady = [torch.tensor([[float(t), 0.0]]) for t in range(4)]
        >>> TwoHitAcceleration(0.1)(LoopHistory(steady, [], readout=lambda loop: None)).tolist()
        [True]
    """

    threshold: float

    def __post_init__(self) -> None:
        _check("threshold", self.threshold)

    def __call__(self, history: LoopHistory) -> Bool[Tensor, "*rows"]:
        """Which rows need no further loop."""
        if len(history.states) < 4:
            return _nobody(history)
        steps = [after - before for before, after in pairwise(map(wide, history.states[-4:]))]
        first, second = ((b - a).norm(dim=-1) < self.threshold for a, b in pairwise(steps))
        return first & second


@dataclass(frozen=True)
class GenerationReport:
    """How many loops a generation spent.

    Args:
        loops_per_token: loops after which every new token was read, 1 to `n_loops`; 0 where a row had already ended.
        n_loops: loops of the model.
        computed_fraction: share of the layer passes that were executed, of those that the same call without a policy executes.
            More than `1 - saved_fraction` when a token that loops longer has to catch up the positions before it, when rows
            wait for others, and because of the prompt; codas and readouts are not counted.
    """

    loops_per_token: Int[Tensor, "batch new_pos"]
    n_loops: int
    computed_fraction: float

    @property
    def passes_per_token(self) -> Int[Tensor, "batch new_pos"]:
        """The former name of `loops_per_token`."""
        warnings.warn("GenerationReport.passes_per_token is now .loops_per_token.", FutureWarning, stacklevel=2)
        return self.loops_per_token

    @property
    def mean_passes(self) -> float:
        """Loops per new token."""
        return float(self.loops_per_token[self.loops_per_token > 0].double().mean())

    @property
    def saved_fraction(self) -> float:
        """Share of the loops of the new tokens that were not needed to read them, from 0 to 1."""
        return 1 - self.mean_passes / self.n_loops

    def __str__(self) -> str:
        tokens = int((self.loops_per_token > 0).sum())
        return (
            f"{tokens} tokens read after {self.mean_passes:.2f} of {self.n_loops} loops on average "
            f"({self.saved_fraction:.0%} saved); {self.computed_fraction:.0%} of the layer passes were computed"
        )


def _nobody(history: LoopHistory) -> Bool[Tensor, "*rows"]:
    return torch.zeros(history.states[-1].shape[:-1], dtype=torch.bool, device=history.states[-1].device)


def _check(name: str, value: object, high: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
        raise LoopedError(f"{name}={value!r} was asked, but {name} must be a number from 0 to {high:g}.")
