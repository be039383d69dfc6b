"""What the injection does: the effect of dropping or replacing it from a loop on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from .._old_calls import accepts_old
from .._precision import wide
from ..errors import LoopedError
from ..kinds import plain
from ..looped import Looped, at_depth, check_model, require
from ..panels import Panel, curves
from ..record import InitialState
from ..results import Estimate, Result, table
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ._directions import relative_distance
from ._streaming import check_finite


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
    model: Looped,
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
    require(model, "injection", "injection_effect")
    if not isinstance(replacement, Tensor) and replacement not in ("zero", "mean"):
        raise LoopedError(f'replacement={replacement!r} was asked; choose "zero", "mean" or the tokens of another prompt.')
    if isinstance(initial_state, torch.Generator):
        raise LoopedError("initial_state is a generator, which would give the compared rows different states; pass a seed.")
    deep = at_depth(model, n_loops)
    schedule, stack = deep.schedule, deep.schedule.looped_stack(stack)
    if not isinstance(from_loop := plain(from_loop), int):
        raise LoopedError(f"from_loop={from_loop!r} was asked; pass one loop, an int.")
    (first,) = schedule.select_loops(from_loop, stack)
    measure = InjectionEffectMeasure(first, replacement, stack, initial_state)
    return over_prompts(measure, deep, prompts, what="injection_effect", verbose=verbose)


@dataclass(frozen=True)
class InjectionEffectMeasure:
    """What `injection_effect` measures of a batch: rows of the untouched run, of the edited one, and of the other prompt."""

    from_loop: int
    replacement: Literal["zero", "mean"] | Int[Tensor, "*batch pos"]
    stack: str
    initial_state: InitialState

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> InjectionEffect:
        """Measure one batch."""
        schedule, replacement = model.schedule, self.replacement
        n, rows = len(tokens), [tokens, tokens]
        if isinstance(replacement, Tensor):
            if replacement.ndim > 2 or replacement.shape[-1] != tokens.shape[1] or replacement.shape[:-1].numel() not in (1, n):
                raise LoopedError(
                    f"a replacement of shape {tuple(replacement.shape)} was given for prompts {tuple(tokens.shape)}; "
                    "pass tokens [pos] or [batch, pos] of the same length."
                )
            rows.append(replacement.to(tokens.device).expand_as(tokens))
        edited = schedule.passes_of(slice(self.from_loop, None), self.stack)
        onwards = schedule.passes[edited[0].index :]
        forks = {p.stack: p for p in reversed(onwards)}.values()  # the first pass of every stack from there on
        ends = [schedule.pass_of_loop(t) for t in range(schedule.n_loops)]
        untouched = {t for t, end in enumerate(ends) if end.index < onwards[0].index}
        loops = {f"{schedule.pass_prefix(end)}.hook_out": t for t, end in enumerate(ends)}
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
            loop = loops[schedule.loop_name(hook.name)]
            check_finite(state, hook.name)
            if loop not in untouched:
                clean, other = wide(state[:n]), wide(state[n : 2 * n])
                changes[:, loop] = relative_distance(other, clean).nanmean(-1)

        def compare(loop: int, logits: Tensor) -> None:
            check_finite(logits, f"the readout after loop {loop}")
            if loop not in untouched:
                clean, other = (wide(part).log_softmax(-1) for part in (logits[:n], logits[n : 2 * n]))
                kls[:, loop] = (clean.exp() * (clean - other)).sum(-1).mean(-1)

        state = self.initial_state
        state = state.repeat(len(rows), 1, 1) if isinstance(state, Tensor) else state
        hooks = [
            *((f"{schedule.pass_prefix(p)}.{model.entrance}", fork) for p in forks),
            *((f"{schedule.pass_prefix(p)}.hook_injection", edit) for p in edited),
            *((name, read) for name in loops),
        ]
        with torch.no_grad():
            model.readouts(torch.cat(rows), compare, hooks, initial_state=state)
        labels = {"loop": list(range(schedule.n_loops))}
        return InjectionEffect(
            state_change=Estimate.of(changes, ("loop",), labels, "state_change"),
            kl=Estimate.of(kls, ("loop",), labels, "kl"),
            from_loop=self.from_loop,
            replacement=replacement if isinstance(replacement, str) else "tokens",
            stack=self.stack,
        )
