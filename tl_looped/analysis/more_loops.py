"""What more loops do to the answers: a sweep of the loop count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._old_names import moved
from ..errors import LoopedError
from ..looped import Looped, at_depth, check_model
from ..panels import Panel, curves
from ..record import InitialState, rehearsal
from ..results import Estimate, Result, table
from ..runs.prompts import Prompts
from ..schedule import check_count
from ._streaming import check_finite, need_loops
from ._targets import Answered, Answers, answer_ids, at_targets, over_answered


@dataclass(frozen=True, eq=False)
class MoreLoops(Result):
    """What `more_loops` measured; estimates over the examples, axis (n_loops): "3" is the answer after three loops.

    Args:
        loss: negative log-probability of the targets, in nats.
        accuracy: share of the targets that are the most probable token.
        margin: logit of the target less the highest other logit.
        kl: `KL(after the trained number of loops || after n_loops)`, in nats; 0 at the trained number by construction.
        overthinking: share of the targets that were most probable after some smaller number of loops and are not now.
        loss_change: loss less the loss after the trained number of loops, example by example.
        agreement: share of the positions with the same most probable token after two numbers of loops, axes (n_loops, other).
        trained: the trained number of loops.
        scored: "next tokens" or "answers".
    """

    loss: Estimate
    accuracy: Estimate
    margin: Estimate
    kl: Estimate
    overthinking: Estimate
    loss_change: Estimate
    agreement: Estimate
    trained: int
    scored: str

    @property
    def overthinks(self) -> bool:
        """Whether looping beyond the trained number hurts.

        It does if the mean loss after the last loop is higher than after the trained number by more than two standard errors of
        the difference (our choice).

        Raises:
            LoopedError: nothing was measured beyond the trained number, or on one example only.
        """
        if len(self.loss_change.values) <= self.trained or self.loss_change.count < 2:
            raise LoopedError(
                f"overthinks compares {self.trained} loops with more over several examples; this sweep has "
                f"{len(self.loss_change.values)} loops and {self.loss_change.count} example(s). Pass more prompts and n_loops=."
            )
        return bool(self.loss_change.values[-1] > 2 * self.loss_change.stderr[-1])

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per number of loops; `.agreement.to_dataframe()` is that of the agreement matrix."""
        return table(self.loss, self.accuracy, self.margin, self.kl, self.overthinking, self.loss_change)

    def panels(self) -> list[Panel]:
        """Everything over the number of loops; `.agreement.plot()` is the agreement matrix."""
        found = [
            replace(self.loss, name="loss (nats)"),
            self.accuracy,
            replace(self.margin, name="margin (logits)"),
            replace(self.kl, name=f"KL from {self.trained} loops (nats)"),
            replace(self.overthinking, name="overthinking (share that was right before and is wrong now)"),
        ]
        title = f"Answers after every number of loops; dotted: the trained {self.trained}"
        return curves(found, title=title, mark=self.trained)


def more_loops(
    model: Looped,
    prompts: Prompts,
    *,
    n_loops: int | None = None,
    trained: int | None = None,
    answers: Answers | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> MoreLoops:
    """How good the answers are after every number of loops, within and beyond the trained number (arXiv 2510.25741, table 10).

    One run gives them all: reading out after loop `t` is what the model with `t + 1` loops computes, in every family. A second,
    shorter run comes before it for the answer after the trained number of loops. One readout of a batch is held beside that.

    Args:
        model: the model.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        n_loops: the largest number of loops; None for twice the trained number, as in the paper's table.
        trained: the number of loops to compare with; None for the model's own.
        answers: the right next token after every example, in their order; None to predict every next token of the prompts.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; no more than one loop; fewer loops than the trained number; prompts and answers of different
            number; prompts too short to have a next token; logits that are not finite.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.analysis import more_loops
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = more_loops(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), answers=[4, 7], verbose=False)
        >>> found.loss.labels["n_loops"], found.loss.count, found.agreement.values.shape
        ([1, 2, 3, 4, 5, 6], 2, torch.Size([6, 6]))
    """
    check_model(model)
    trained = model.n_loops if trained is None else check_count("trained", trained)
    n_loops = 2 * trained if n_loops is None else check_count("n_loops", n_loops)
    need_loops(n_loops, max(2, trained), "more_loops", f"a sweep around the trained number of {trained} loops")
    deep, ids = at_depth(model, n_loops), answer_ids(model, answers)
    measure = MoreLoopsMeasure(trained, ids is not None, initial_state)
    return over_answered(measure, deep, prompts, ids, what="more_loops", verbose=verbose)


@dataclass(frozen=True)
class MoreLoopsMeasure:
    """What `more_loops` measures of a batch, at the end of every prompt or for all next tokens."""

    trained: int
    at_end: bool
    initial_state: InitialState

    def __call__(self, model: Looped, batch: Answered) -> MoreLoops:
        """Measure one batch."""
        tokens, wanted = batch
        was_right = torch.zeros_like(wanted, dtype=torch.bool)
        with torch.no_grad():
            trained_logits = model(tokens, loop=self.trained - 1, initial_state=rehearsal(self.initial_state))
            reference = at_targets(trained_logits, self.at_end).log_softmax(-1)
        del trained_logits

        def measure(loop: int, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            check_finite(logits, f"the readout after loop {loop}")
            chosen = at_targets(logits, self.at_end)
            log_probs = chosen.log_softmax(-1)
            target = chosen.gather(-1, wanted[..., None])
            others = chosen.scatter(-1, wanted[..., None], -torch.inf).amax(-1)
            answer = chosen.argmax(-1)
            right = answer == wanted
            was_right.logical_or_(right)
            found = {
                "loss": -log_probs.gather(-1, wanted[..., None])[..., 0],
                "accuracy": right,
                "margin": target[..., 0] - others,
                "kl": (reference.exp() * (reference - log_probs)).sum(-1),
                "overthinking": was_right & ~right,
            }
            return answer.int(), {name: value.double().mean(-1).cpu() for name, value in found.items()}

        with torch.no_grad():
            best, rows = zip(*model.readouts(tokens, measure, initial_state=self.initial_state), strict=True)
        found = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
        found["loss_change"] = found["loss"] - found["loss"][:, self.trained - 1, None]
        answers_after, counts = torch.stack(best, 1), list(range(1, len(best) + 1))
        agreement = torch.stack([(a[:, None] == answers_after).double().mean(-1) for a in best], 1).cpu()
        return MoreLoops(
            **{name: Estimate.of(values, ("n_loops",), {"n_loops": counts}, name) for name, values in found.items()},
            agreement=Estimate.of(agreement, ("n_loops", "other"), {"n_loops": counts, "other": counts}, "agreement"),
            trained=self.trained,
            scored="answers" if self.at_end else "next tokens",
        )


def __getattr__(name: str) -> object:
    return moved(__name__, name)
