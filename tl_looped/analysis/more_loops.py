"""What more loops do to the answers: a sweep of the loop count, and the effect of the injection from a loop on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from .._old_calls import accepts_old
from .._precision import wide
from ..bridge.looped_bridge import LoopedBridge
from ..bridge.run import rehearsal
from ..errors import LoopedError
from ..kinds import plain
from ..model.initial_state import InitialState
from ..panels import Panel, curves
from ..results import Estimate, Result, table
from ..schedule import check_count
from ._directions import relative_distance
from ._prompts import Prompts, at_depth, check_finite, check_model, over_batches
from ._streaming import need_loops
from ._targets import Answers, Targets


@dataclass(frozen=True, eq=False)
class Stability(Result):
    """What `stability` measured; estimates over the examples, axis (n_loops): "3" is the answer after three loops.

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


def stability(
    model: LoopedBridge,
    prompts: Prompts,
    *,
    n_loops: int | None = None,
    trained: int | None = None,
    answers: Answers | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> Stability:
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
        >>> from tl_looped.analysis import stability
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = stability(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), answers=[4, 7], verbose=False)
        >>> found.loss.labels["n_loops"], found.loss.count, found.agreement.values.shape
        ([1, 2, 3, 4, 5, 6], 2, torch.Size([6, 6]))
    """
    check_model(model)
    trained = model.n_loops if trained is None else check_count("trained", trained)
    n_loops = 2 * trained if n_loops is None else check_count("n_loops", n_loops)
    need_loops(n_loops, max(2, trained), "stability", f"a sweep around the trained number of {trained} loops")
    deep = at_depth(model, n_loops)
    targets = Targets(model, answers, "stability")
    counts = list(range(1, n_loops + 1))

    def examples(tokens: Int[Tensor, "batch pos"]) -> Stability:
        wanted = targets.of(tokens)
        read = targets.select
        was_right = torch.zeros_like(wanted, dtype=torch.bool)
        with torch.no_grad():
            trained_logits = deep.forward(tokens, loop=trained - 1, initial_state=rehearsal(initial_state))
            reference = read(trained_logits).log_softmax(-1)
        del trained_logits

        def measure(loop: int, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            check_finite(logits, f"the readout after loop {loop}")
            chosen = read(logits)
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
            best, rows = zip(*deep.readouts(tokens, measure, initial_state=initial_state), strict=True)
        found = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
        found["loss_change"] = found["loss"] - found["loss"][:, trained - 1, None]
        answers_after = torch.stack(best, 1)
        agreement = torch.stack([(a[:, None] == answers_after).double().mean(-1) for a in best], 1).cpu()
        return Stability(
            **{name: Estimate.of(values, ("n_loops",), {"n_loops": counts}, name) for name, values in found.items()},
            agreement=Estimate.of(agreement, ("n_loops", "other"), {"n_loops": counts, "other": counts}, "agreement"),
            trained=trained,
            scored=targets.scored,
        )

    result = over_batches(examples, deep, prompts, verbose=verbose, what="stability")
    targets.check_used()
    return result


@dataclass(frozen=True, eq=False)
class InjectionEffect(Result):
    """What `injection_effect` measured; estimates over the examples, axis (loop).

    Args:
        state_change: distance of the state leaving the loop from that of the untouched run, over the norm of the latter, mean
            over positions where that is not zero; NaN if there are none.
        kl: `KL(untouched || edited)` of the answers after the loop, in nats, mean over positions.
        from_loop: the first edited loop.
        replacement: "zero", "mean", or "tokens" for those of another prompt.
        stack: whose injection was edited.
    """

    state_change: Estimate
    kl: Estimate
    from_loop: int
    replacement: str
    stack: str

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per loop."""
        return table(self.state_change, self.kl)

    def panels(self) -> list[Panel]:
        """Both over the loops."""
        found = [
            replace(self.state_change, name="change of the state, over its norm"),
            replace(self.kl, name="KL from the untouched answers (nats)"),
        ]
        return curves(found, title=f"Injection edited from loop {self.from_loop} on (dotted)", mark=self.from_loop)


@accepts_old("from_loop", "replacement")
def injection_effect(
    model: LoopedBridge,
    prompts: Prompts,
    *,
    from_loop: int,
    replacement: Literal["zero", "mean"] | Int[Tensor, "*batch pos"] = "zero",
    n_loops: int | None = None,
    stack: str | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> InjectionEffect:
    """What happens to states and answers when the injection is dropped, or replaced by that of another prompt, from a loop on.

    The untouched run, the edited one and that of the other prompt go side by side as rows of one batch. The edited run goes on
    from the untouched one's states, so both are exactly 0 in the loops before. The states of a loop that depends on its
    injection move away from the untouched run; those of a loop that has settled on its answer stay. Swapping the injection in
    mid-run is the experiment of Varaksin et al. (2026, code at github.com/Shtirmann/Geometry-of-Reasoning-Trajectories).

    Args:
        model: a model that injects (Huginn, retrofits, Parcae, HRM-Text).
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        from_loop: the first loop whose injection is edited, of the edited stack; negative counts from the end.
        replacement: "zero"; "mean", the mean over the positions; or tokens as long as every prompt, whose own injection at the
            same loop is taken.
        n_loops: loops to run (H cycles for HRM-Text); None for the model's own.
        stack: "L" or "H" for HRM-Text, where each stack is injected the state of the other; not needed elsewhere.
        initial_state: as in `LoopedBridge.forward`, but no generator.
        verbose: show a progress bar.

    Raises:
        LoopedError: a model that injects nothing; no prompts; a replacement of another length; a loop that the run lacks.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, injection="concat")
        >>> model = LoopedBridge.from_config(cfg, seed=0)
        >>> prompt, other = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
        >>> found = injection_effect(model, prompt, from_loop=1, replacement=other, verbose=False)
        >>> found.state_change.values.tolist()[0], bool(found.state_change.values[1] > 0)
        (0.0, True)
    """
    check_model(model)
    if model.looped_cfg.injection == "none":
        raise LoopedError(
            f"injection_effect was asked of a {model.looped_cfg.family} model, which injects nothing; pass initial_state to a "
            "run to change what its loops start from."
        )
    if not isinstance(replacement, Tensor) and replacement not in ("zero", "mean"):
        raise LoopedError(f'replacement={replacement!r} was asked; choose "zero", "mean" or the tokens of another prompt.')
    if isinstance(initial_state, torch.Generator):
        raise LoopedError("initial_state is a generator, which would give the compared rows different states; pass a seed.")
    deep = at_depth(model, n_loops)
    schedule, stack = deep.schedule, deep.schedule.looped_stack(stack)
    if not isinstance(from_loop := plain(from_loop), int):
        raise LoopedError(f"from_loop={from_loop!r} was asked; pass one loop, an int.")
    (first,) = schedule.select_loops(from_loop, stack)
    edited = [f"{schedule.pass_prefix(p)}.hook_injection" for p in schedule.passes_of(slice(first, None), stack)]
    onwards = schedule.passes[schedule.passes_of(first, stack)[0].index :]
    entrances = [
        f"{schedule.pass_prefix(p)}.{model.plain.loop.entrance}" for p in {p.stack: p for p in reversed(onwards)}.values()
    ]
    untouched = {t for t in range(schedule.n_loops) if schedule.pass_of_loop(t).index < onwards[0].index}
    ends = {f"{schedule.pass_prefix(schedule.pass_of_loop(t))}.hook_out": t for t in range(schedule.n_loops)}
    labels = {"loop": list(range(schedule.n_loops))}

    def examples(tokens: Int[Tensor, "batch pos"]) -> InjectionEffect:
        n, rows = len(tokens), [tokens, tokens]
        if isinstance(replacement, Tensor):
            if replacement.ndim > 2 or replacement.shape[-1] != tokens.shape[1] or replacement.shape[:-1].numel() not in (1, n):
                raise LoopedError(
                    f"a replacement of shape {tuple(replacement.shape)} was given for prompts {tuple(tokens.shape)}; "
                    "pass tokens [pos] or [batch, pos] of the same length."
                )
            rows.append(replacement.to(tokens.device).expand_as(tokens))
        changes, kls = (torch.zeros(n, schedule.n_loops, dtype=torch.float64, device="cpu") for _ in range(2))

        def fork(state: Tensor, hook: object) -> Tensor:
            # Until here the edited rows computed what the untouched ones did, in other rows of the batch: equal up to rounding.
            return torch.cat((state[:n], state[:n], state[2 * n :]))

        def edit(injection: Tensor, hook: object) -> Tensor:
            if isinstance(replacement, Tensor):
                new = injection[2 * n :]
            else:
                own = injection[n : 2 * n]
                new = torch.zeros_like(own) if replacement == "zero" else own.mean(1, keepdim=True).expand_as(own)
            return torch.cat((injection[:n], new, injection[2 * n :]))

        def read(state: Tensor, hook: Any) -> None:
            loop = ends[schedule.loop_name(hook.name)]
            check_finite(state, hook.name)
            if loop not in untouched:
                clean, other = wide(state[:n]), wide(state[n : 2 * n])
                changes[:, loop] = relative_distance(other, clean).nanmean(-1)

        def compare(loop: int, logits: Tensor) -> None:
            check_finite(logits, f"the readout after loop {loop}")
            if loop not in untouched:
                clean, other = (wide(part).log_softmax(-1) for part in (logits[:n], logits[n : 2 * n]))
                kls[:, loop] = (clean.exp() * (clean - other)).sum(-1).mean(-1)

        state = initial_state.repeat(len(rows), 1, 1) if isinstance(initial_state, Tensor) else initial_state
        with torch.no_grad():
            hooks = [
                *((name, fork) for name in entrances),
                *((name, edit) for name in edited),
                *((name, read) for name in ends),
            ]
            deep.readouts(torch.cat(rows), compare, hooks, initial_state=state)
        return InjectionEffect(
            state_change=Estimate.of(changes, ("loop",), labels, "state_change"),
            kl=Estimate.of(kls, ("loop",), labels, "kl"),
            from_loop=first,
            replacement=replacement if isinstance(replacement, str) else "tokens",
            stack=stack,
        )

    return over_batches(examples, deep, prompts, verbose=verbose, what="injection_effect")
