"""When every token would leave the loop under exit policies, what that saves, and what it costs in accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._old_calls import accepts_old
from .._precision import wide
from .._words import counted
from ..errors import LoopedError
from ..exits import ExitPolicy, LoopHistory
from ..looped import Looped, at_depth, check_model
from ..panels import Axis, Panel
from ..record import InitialState
from ..results import Estimate, Result, table
from ..runs.prompts import Prompts
from ._streaming import check_finite
from ._targets import Answered, Answers, answer_ids, at_targets, over_answered

Policies = ExitPolicy | Sequence[ExitPolicy] | Mapping[str, ExitPolicy]


@dataclass(frozen=True, eq=False)
class ExitSteps(Result):
    """What `exit_steps` found; estimates over the examples, axis (policy). `a + b` merges.

    The axis holds the policies asked for, then, as a baseline, a fixed number of loops for every token ("1 loop", ...).

    Args:
        cost: loops spent per scored token.
        accuracy: share of the scored tokens whose target is the most probable token when they leave.
        loss: negative log-probability of the target then, in nats.
        passes: for every batch of prompts, after how many loops every token leaves under every policy, 1 to `n_loops`,
            [policy, batch, pos].
        pdf: for every batch, the exit gate's probability of leaving after each loop, [loop, batch, pos]; empty without a gate.
        n_loops: loops that a token can spend.
        policies: the names of the policies asked for, and what they are.
        scored: "next tokens" or "answers".
    """

    cost: Estimate
    accuracy: Estimate
    loss: Estimate
    passes: tuple[Int[Tensor, "policy _ _"], ...]
    pdf: tuple[Float[Tensor, "loop _ _"], ...]
    n_loops: int
    policies: str
    scored: str

    @property
    def cdf(self) -> tuple[Float[Tensor, "loop batch pos"], ...]:
        """For every batch, the probability of having left by the end of each loop; 1 after the last."""
        return tuple(pdf.cumsum(0) for pdf in self.pdf)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per policy."""
        return table(self.cost, self.accuracy, self.loss)

    def panels(self) -> list[Panel]:
        """Accuracy over cost, the policies against the curve of fixed numbers of loops."""
        x, y, names = self.cost.values.tolist(), self.accuracy.values.tolist(), self.cost.labels["policy"]
        n = len(x) - self.n_loops
        lines = [{"x": x[n:], "y": y[n:], "text": names[n:], "name": "fixed number of loops", "ink": "#999"}]
        # A name in the legend does not run into its neighbour's.
        lines += [{"x": x[k : k + 1], "y": y[k : k + 1], "name": names[k], "points": "circle"} for k in range(n)]
        roles = {"x": Axis("loops per token"), "y": Axis("accuracy")}
        return [Panel("lines", lines, roles, caption="What exit policies cost and keep")]


def gate_pdf(exit_logits: Float[Tensor, "loop ..."]) -> Float[Tensor, "loop ..."]:
    """The probability of leaving after each loop (arXiv 2510.25741).

    It is `p_t = lambda_t prod_{s<t} (1 - lambda_s)` with `lambda = sigmoid(exit logit)`; the last loop gets all that is left.

    Args:
        exit_logits: the gate's logits, such as `cache.stack_loops("hook_exit_logit")`, [loop, ...].

    Raises:
        LoopedError: no tensor, or one without an axis of loops.

    Example:
        >>> gate_pdf(torch.zeros(3)).tolist()  # a gate that always says 0.5
        [0.5, 0.25, 0.25]
    """
    if not isinstance(exit_logits, Tensor) or not exit_logits.ndim:
        raise LoopedError(f"exit logits of type {type(exit_logits).__name__} were given; pass a tensor [loop, ...].")
    leave = torch.sigmoid(wide(exit_logits))
    stay = torch.cat((torch.ones_like(leave[:1]), (1 - leave[:-1]).cumprod(0)))
    return torch.cat((leave[:-1] * stay[:-1], stay[-1:]))


@accepts_old("policies")
def exit_steps(
    model: Looped,
    prompts: Prompts,
    *,
    policies: Policies = (),
    n_loops: int | None = None,
    answers: Answers | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> ExitSteps:
    """After how many loops every token leaves under each policy, and with what accuracy (arXiv 2510.25741, 2502.05171).

    Every loop is run for every token, and each policy is asked after each loop, as `generate` does with `model.exit_policy`; a
    token leaves at the first yes, or after the last loop. Earlier tokens have looped as far as the token that leaves. A
    policy sees what it sees in `generate`, but of states only the first and the last four, and of readouts the last two, which
    is all that those of `tl_looped.exits` look at; asking for others raises.

    Args:
        model: the model.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        policies: one exit policy or several, or a dict of names for them; without names they are called what they are, as in
            "Gate(threshold=0.5)".
        n_loops: loops that a token can spend (H cycles for HRM-Text); None for the model's own.
        answers: the right next token after every example, in their order, and only the last position is scored; None to score
            every next token of the prompts.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; a policy that needs a gate on a model without; two policies of one name; prompts and answers
            of different number; prompts too short to have a next token; readouts that are not finite.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig, exits
        >>> from tl_looped.analysis import exit_steps
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, exit_gate=True)
        >>> model = LoopedBridge.from_config(cfg, seed=0)
        >>> found = exit_steps(model, torch.tensor([[1, 2, 3]]), policies=[exits.Gate(0.6)], verbose=False)
        >>> found.passes[0].tolist(), found.pdf[0].shape  # the gates of a random model say about 0.5 every time
        ([[[2, 2, 2]]], torch.Size([3, 1, 3]))
        >>> found.cost.labels["policy"]
        ['Gate(threshold=0.6)', '1 loop', '2 loops', '3 loops']
    """
    check_model(model)
    given = [policies] if isinstance(policies, ExitPolicy) else policies
    each = given.values() if isinstance(given, Mapping) else given
    if isinstance(given, str) or not isinstance(each, Iterable) or not all(isinstance(policy, ExitPolicy) for policy in each):
        raise LoopedError(f"policies={policies!r} was given; pass exit policies, such as [tl_looped.exits.KL(0.1)].")
    named = dict(given) if isinstance(given, Mapping) else {repr(policy): policy for policy in given}
    if len(named) < len(given):
        raise LoopedError(f"policies of the same name were given: {[repr(p) for p in given]}; pass a dict of names.")
    deep, ids = at_depth(model, n_loops), answer_ids(model, answers)
    if clash := set(_fixed(deep.n_loops)) & set(named):
        raise LoopedError(f"a policy is called {clash.pop()!r}, which is the name of a baseline; choose another.")
    measure = ExitStepsMeasure(named, ids is not None, initial_state)
    return over_answered(measure, deep, prompts, ids, what="exit_steps", verbose=verbose)


def _fixed(n_loops: int) -> list[str]:
    """The names of the baselines."""
    return [counted(t + 1, "loop") for t in range(n_loops)]


@dataclass(frozen=True)
class ExitStepsMeasure:
    """What `exit_steps` measures of a batch, at the end of every prompt or for all next tokens."""

    policies: dict[str, ExitPolicy]
    at_end: bool
    initial_state: InitialState

    def __call__(self, model: Looped, batch: Answered) -> ExitSteps:
        """Measure one batch."""
        tokens, wanted = batch
        schedule, n_loops = model.schedule, model.n_loops
        readouts: dict[int, Tensor] = {}

        def readout(loop: int) -> Tensor:
            if loop not in readouts:
                raise LoopedError(
                    f"a policy asked for the readout of loop {loop}; exit_steps keeps those of {list(readouts)}. Let the "
                    "policy keep what it needs while it is there; generate keeps all readouts."
                )
            return readouts[loop]

        history = LoopHistory([], [], readout)
        passes = torch.zeros(len(self.policies), *tokens.shape, dtype=torch.long, device=tokens.device)
        place = slice(-1, None) if self.at_end else slice(None, -1)  # of the scored tokens
        names = ("loops", "accuracy", "loss")
        at_exit = {name: torch.zeros(len(self.policies), *wanted.shape, device=tokens.device).double() for name in names}

        def keep_state(state: Tensor, hook: object) -> None:
            history.states.append(state)

        def keep_gate(logit: Tensor, hook: object) -> None:
            history.exit_logits.append(logit)

        def score(loop: int, logits: Tensor) -> Tensor:
            check_finite(logits, f"the readout after loop {loop}")
            readouts[loop] = logits
            history.forget(loop - 1, n_states=4)
            readouts.pop(loop - 2, None)
            log_probs = at_targets(logits, self.at_end).log_softmax(-1)
            found = {
                "loops": torch.full(wanted.shape, loop + 1.0, device=tokens.device).double(),
                "accuracy": (log_probs.argmax(-1) == wanted).double(),
                "loss": -log_probs.gather(-1, wanted[..., None])[..., 0].double(),
            }
            for k, policy in enumerate(self.policies.values()):
                leaves = torch.ones_like(tokens, dtype=torch.bool) if loop == n_loops - 1 else policy(history).to(passes.device)
                leaves = leaves & (passes[k] == 0)
                passes[k] = passes[k].masked_fill(leaves, loop + 1)
                for name in names:
                    at_exit[name][k] = torch.where(leaves[:, place], found[name], at_exit[name][k])
            return torch.stack([found[name].mean(-1) for name in names])  # of everybody who stops here

        ends = [schedule.pass_prefix(schedule.pass_of_loop(t)) for t in range(n_loops)]
        first = f"{ends[0]}.hook_state"
        first = first if first in model.hook_dict else f"{ends[0]}.{model.entrance}"
        hooks: list[Any] = [(first, keep_state), *((f"{end}.hook_out", keep_state) for end in ends)]
        if model.lacks("exit gate") is None:
            hooks += [(f"{end}.hook_exit_logit", keep_gate) for end in ends]
        with torch.no_grad():
            fixed = torch.stack(model.readouts(tokens, score, hooks, initial_state=self.initial_state), 2)
        labels = {"policy": [*self.policies, *_fixed(n_loops)]}
        cost, accuracy, loss = (
            Estimate.of(torch.cat([at_exit[name].mean(-1).T, at_end], 1).cpu(), ("policy",), labels, name)
            for name, at_end in zip(names, fixed, strict=True)
        )
        pdf = (gate_pdf(torch.stack(history.exit_logits)).cpu(),) if history.exit_logits else ()
        # A function says of itself where in memory it is, which would be another policy in every process.
        asked = ", ".join(f"{name}: {policy!r}" if is_dataclass(policy) else name for name, policy in self.policies.items())
        scored = "answers" if self.at_end else "next tokens"
        return ExitSteps(cost, accuracy, loss, (passes.cpu(),), pdf, n_loops, asked, scored)
