"""Two models on one scale: their answers after every loop, and the first loop in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._precision import wide
from .._words import aligned, counted
from ..errors import LoopedError
from ..looped import Looped, at_depth, check_model
from ..panels import Axis, Mark, Panel
from ..record import InitialState, rehearsal
from ..results import Estimate, Result, table
from ..runs.driver import n_batches, over
from ..runs.prompts import Prompts, token_batches
from ._streaming import check_finite
from ._targets import Answered, Answers, answer_ids, answered

Models = Looped | Sequence[Looped] | Mapping[str, Looped]
Pair = tuple[Answered, Answered]
Hooks = Sequence[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True, eq=False)
class SideBySide(Result):
    """What `compare` measured; estimates over the examples.

    A side with fewer loops keeps its last answer: at the last loop, the final answers of both are compared.

    Args:
        loss: negative log-probability of the targets, in nats, axes (side, loop).
        probability: of the targets, axes (side, loop).
        loss_difference: second side less first, example by example, so that its standard error is that of pairs; axis (loop).
        probability_difference: the same of the probability.
        kl: `KL(first || second)` of the answers, in nats, axis (loop); None where the vocabularies differ.
        agreement: share of the answers with the same most probable token, axis (loop).
        sides: what the two are called, and how many loops each has.
        scored: what the targets are.
        prompts: every example as text, or as token ids.
        top: for every example and side, the most probable token after the prompt by loop.
        first: for every example, the first loop after which these tokens differ; None if they never do.
    """

    loss: Estimate
    probability: Estimate
    loss_difference: Estimate
    probability_difference: Estimate
    kl: Estimate | None
    agreement: Estimate
    sides: dict[str, int]
    scored: str
    prompts: tuple[str, ...]
    top: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    first: tuple[int | None, ...]

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per side and loop; what compares the two stands beside both."""
        kl = () if self.kl is None else (self.kl,)
        return table(self.loss, self.probability, self.loss_difference, self.probability_difference, *kl, self.agreement)

    def examples(self) -> Any:
        """A pandas DataFrame with one row per example and loop: the most probable token after the prompt, on both sides."""
        import pandas as pd

        rows = [
            {"example": i, "prompt": prompt, "loop": t, **dict(zip(self.sides, pair, strict=True))}
            for i, (prompt, top) in enumerate(zip(self.prompts, self.top, strict=True))
            for t, pair in enumerate(zip(*top, strict=True))
        ]
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """A table as text: loss of both sides and their difference, KL and agreement after every loop; then where they part."""
        one = self.top[0] if len(self.top) == 1 else ()
        rows = [["loop", *(f"top of {side}" for side in self.sides if one), *self.sides, "difference", "KL", "same top token"]]
        for t in range(len(self.agreement.values)):
            losses = [f"{loss:.3f}" for loss in self.loss.values[:, t].tolist()]
            kl = "" if self.kl is None else f"{self.kl.values[t]:.3g}"
            same = f"{self.agreement.values[t]:.0%}"
            rows.append([str(t), *(tokens[t] for tokens in one), *losses, _signed(self.loss_difference, t), kl, same])
        if self.kl is None:
            rows = [[*row[:-2], row[-1]] for row in rows]
        loops = {side: counted(n, "loop") for side, n in self.sides.items()}
        names = " beside ".join(side if n in side else f"{side} ({n})" for side, n in loops.items())
        title = f"{names}, {counted(len(self.prompts), 'prompt')}; loss in nats, of {self.scored}"
        return "\n".join([title, "", *aligned(rows), "", *self._partings()])

    def _partings(self) -> list[str]:
        """Lines that say after which loop the answers to a prompt first differ, of the earliest eight prompts."""
        parted = sorted((t, i) for i, t in enumerate(self.first) if t is not None)
        if not parted:
            return ["The top token after the prompt is the same after every loop."]
        lines = [
            f"The top token after the prompt differs in {len(parted)} of {counted(len(self.first), 'prompt')}, first after:"
        ]
        for t, i in parted[:8]:
            prompt = self.prompts[i] if len(self.prompts[i]) <= 60 else f"... {self.prompts[i][-56:]}"
            lines.append(f"  loop {t}: {self.top[i][0][t]} and {self.top[i][1][t]} after {prompt!r}")
        return lines + ([f"  and {len(parted) - 8} more"] if len(parted) > 8 else [])

    def panels(self) -> list[Panel]:
        """Over the loops: loss of both sides, their difference with two standard errors, KL and agreement."""
        first, second = self.sides
        x, loop = [int(t) for t in self.agreement.labels["loop"]], Axis("loop", form="count")
        sides = [
            {"name": side, "x": x, "y": self.loss.values[k].tolist(), "ink": COLOURS[k], "dash": "dash" if k else "solid"}
            for k, side in enumerate(self.sides)
        ]
        title = f"{first} and {second}, {counted(len(self.prompts), 'prompt')}"
        found = [Panel("lines", sides, {"x": loop, "y": Axis("loss (nats)")}, caption=title)]
        band, zero = (2 * self.loss_difference.stderr).nan_to_num().tolist(), Mark(y=0)
        pairs = {"x": x, "y": self.loss_difference.values.tolist(), "band": band, "ink": "#444"}
        roles = {"x": loop, "y": Axis("loss, second less first, ± 2 standard errors")}
        found.append(Panel("lines", [pairs], roles, [zero]))
        ends = None if self.kl is None else (0.0, 1.05 * max(self.kl.values.tolist(), default=0.0) or 1.0)
        share = Axis("share with the same top token", form="%", range=(-0.05, 1.05))
        for grid, axis in ((self.kl, Axis("KL (nats)", range=ends)), (self.agreement, share)):
            if grid is not None:
                line = {"x": x, "y": grid.values.tolist(), "ink": "#444"}
                found.append(Panel("lines", [line], {"x": loop, "y": axis}))
        return found


COLOURS = ("rgb(33,102,172)", "rgb(217,95,14)")


class _Side(NamedTuple):
    name: str
    model: Looped


class _Answers(NamedTuple):
    """The answers to a batch by loop."""

    log_probs: list[Float[Tensor, "batch target d_vocab"]]
    top: Int[Tensor, "loop batch"]  # after the last position


def compare(
    models: Models,
    prompts: Prompts,
    *,
    corrupted: Prompts | None = None,
    n_loops: int | tuple[int, int] | None = None,
    hooks: Hooks = (),
    answers: str | int | Answers | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> SideBySide:
    """Set two models beside each other, or one with itself: other loops, other prompts, with hooks.

    The answers after every loop are compared on the same examples, and differences are taken example by example. The first
    side's answers to a batch are held while the second runs.

    Models of different vocabularies are compared by text: `answers` is needed, each a text that is one token of both, and top
    tokens are the same if their texts are, spaces around them aside. There is no KL then.

    Args:
        models: two models, or a dict that names them; or one model, for `n_loops=(2, 4)`, `hooks` or `corrupted`.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        corrupted: the prompts of the second side, in the order of the first's; None for the same.
        n_loops: how often to loop, for both sides or each; None for the models' own numbers.
        hooks: act on the second side only, such as what `tl_looped.interventions.steer` returns.
        answers: the right next token as text or id, for all examples or one for each; None to score every next token of the
            prompts, or with `corrupted` what the first side answers after its last loop.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Raises:
        LoopedError: nothing that differs between the sides; different vocabularies without answers that are text; prompts that
            the two read as different tokens, without answers; prompts that are no pairs; logits that are not finite.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig, compare
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = compare(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), n_loops=(2, 4), verbose=False)
        >>> found.sides, [round(kl, 6) for kl in found.kl.values.tolist()][:2]
        ({'2 loops': 2, '4 loops': 4}, [0.0, 0.0])
    """
    sides = _sides(models, n_loops, hooks, corrupted is not None)
    by_text = not _same_vocabulary(*(side.model for side in sides))
    one, listed = ([answers], None) if isinstance(answers, (str, int)) else (None, answers)
    if by_text and (answers is None or not all(isinstance(answer, str) for answer in one or listed or ())):
        raise LoopedError(
            f"{sides[0].name} and {sides[1].name} have different vocabularies, so that losses per token are on different "
            "scales. Pass answers= as texts that are one token of both."
        )
    at_end = answers is not None or corrupted is not None
    scored = "the answers" if answers is not None else f"what {sides[0].name} answers" if at_end else "next tokens"
    measure = SideBySideMeasure((sides[0].name, sides[1].name), tuple(hooks), at_end, by_text, scored, initial_state)
    if isinstance(prompts, Iterable) and not isinstance(prompts, (str, Tensor, Sequence)):
        prompts = list(prompts)
    streams: list[Iterator[Any]] = []
    for side, texts in zip(sides, (prompts, prompts if corrupted is None else corrupted), strict=True):
        batches, ids = token_batches(side.model, texts, what="compare"), answer_ids(side.model, one or listed)
        if answers is None and at_end:  # what is scored is known when the first side has run
            streams.append((tokens, None) for tokens in batches)
        else:
            streams.append(answered(batches, ids[0] if one and ids else ids, "compare"))
    models = (sides[0].model, sides[1].model)
    return over(measure, models, _pairs(*streams), what="compare", verbose=verbose, n_batches=n_batches(prompts))


@dataclass(frozen=True)
class SideBySideMeasure:
    """What `compare` measures of a batch of pairs; without targets of their own, they are what the first side answers."""

    names: tuple[str, str]
    hooks: Hooks
    at_end: bool
    by_text: bool
    scored: str
    initial_state: InitialState

    def __call__(self, models: tuple[Looped, Looped], batch: Pair) -> SideBySide:
        """Measure one batch."""
        tokens, wanted = zip(*batch, strict=True)
        if not self.at_end and not torch.equal(tokens[0], tokens[1].to(tokens[0].device)):
            raise LoopedError(
                f"{self.names[0]} and {self.names[1]} read the same prompt as different tokens, {tokens[0][0].tolist()[:8]} "
                f"and {tokens[1][0].tolist()[:8]}; pass tokens, or answers=."
            )
        both = [self._run(k, models[k], tokens[k]) for k in range(2)]
        if wanted[0] is None:
            wanted = [both[0].top[-1][:, None]] * 2
        n = max(len(answers.log_probs) for answers in both)
        device = both[0].top.device
        loss, probability = (torch.empty(len(tokens[0]), 2, n, dtype=torch.float64, device="cpu") for _ in range(2))
        kl, agreement = (torch.empty(len(tokens[0]), n, dtype=torch.float64, device="cpu") for _ in range(2))
        top = [answers.top[[min(t, len(answers.top) - 1) for t in range(n)]].cpu() for answers in both]
        words = [[[_word(model, int(i)) for i in row] for row in ids.T] for model, ids in zip(models, top, strict=True)]
        if self.by_text:
            same = torch.tensor(
                [[x.strip() == y.strip() for x, y in zip(*rows, strict=True)] for rows in zip(*words, strict=True)]
            )
        else:
            same = (top[0] == top[1]).T
        for t in range(n):
            now = [answers.log_probs[min(t, len(answers.log_probs) - 1)] for answers in both]
            for k, (log_probs, target) in enumerate(zip(now, wanted, strict=True)):
                found = log_probs.gather(-1, target.to(log_probs.device)[..., None])[..., 0].double()
                loss[:, k, t], probability[:, k, t] = -found.mean(-1), found.exp().mean(-1)
            if self.by_text:
                agreement[:, t] = same[:, t]
            else:
                first, second = now[0].double(), now[1].to(device).double()
                kl[:, t] = (first.exp() * (first - second)).sum(-1).mean(-1)
                agreement[:, t] = (first.argmax(-1) == second.argmax(-1)).double().mean(-1)
        loops: dict[str, list[Any]] = {"loop": list(range(n))}
        labels: dict[str, list[Any]] = {"side": list(self.names), **loops}
        return SideBySide(
            loss=Estimate.of(loss, ("side", "loop"), labels, "loss"),
            probability=Estimate.of(probability, ("side", "loop"), labels, "probability"),
            loss_difference=Estimate.of(loss[:, 1] - loss[:, 0], ("loop",), loops, "loss_difference"),
            probability_difference=Estimate.of(
                probability[:, 1] - probability[:, 0], ("loop",), loops, "probability_difference"
            ),
            kl=None if self.by_text else Estimate.of(kl, ("loop",), loops, "kl"),
            agreement=Estimate.of(agreement, ("loop",), loops, "agreement"),
            sides={name: model.n_loops for name, model in zip(self.names, models, strict=True)},
            scored=self.scored,
            prompts=tuple(_text(models[0], row) for row in tokens[0]),
            top=tuple((tuple(map(repr, x)), tuple(map(repr, y))) for x, y in zip(*words, strict=True)),
            first=tuple(next((t for t, equal in enumerate(row) if not equal), None) for row in same.tolist()),
        )

    def _run(self, k: int, model: Looped, tokens: Int[Tensor, "batch pos"]) -> _Answers:
        """The answers of one side after every loop, at the last position or at all but that."""
        log_probs: list[Tensor] = []
        top: list[Tensor] = []

        def keep(loop: int, logits: Tensor) -> None:
            check_finite(logits, f"the readout of {self.names[k]} after loop {loop}")
            log_probs.append(wide(logits[:, -1:] if self.at_end else logits[:, :-1]).log_softmax(-1))
            top.append(logits[:, -1].argmax(-1))

        with torch.no_grad():
            model.readouts(tokens, keep, self.hooks if k else (), initial_state=rehearsal(self.initial_state))
        return _Answers(log_probs, torch.stack(top))


def _sides(models: Models, n_loops: int | tuple[int, int] | None, hooks: Hooks, other_prompts: bool) -> tuple[_Side, _Side]:
    """The two sides, each called by what differs."""
    named = {str(name): model for name, model in models.items()} if isinstance(models, Mapping) else {}
    listed: list[Any] = list(named.values() or models) if isinstance(models, (Mapping, list, tuple)) else [models]
    for model in listed:
        check_model(model)
    if len(listed) not in (1, 2):
        raise LoopedError(f"{len(listed)} models were given to compare; pass one LoopedBridge or two.")
    counts = n_loops if isinstance(n_loops, tuple) else (n_loops, n_loops)
    if len(counts) != 2:
        raise LoopedError(f"n_loops={n_loops!r} was asked of two sides; pass one number, or one for each.")
    first: Looped = listed[0]
    second: Looped = listed[-1]
    parts: list[tuple[str, str]] = []
    if first is not second:
        names = tuple(named) if named else (str(first.cfg.model_name), str(second.cfg.model_name))
        parts.append((names[0], names[1]) if names[0] != names[1] else (f"first {names[0]}", f"second {names[1]}"))
    deep = at_depth(first, counts[0]), at_depth(second, counts[1])
    if isinstance(n_loops, tuple) and deep[0].n_loops != deep[1].n_loops:
        parts.append((counted(deep[0].n_loops, "loop"), counted(deep[1].n_loops, "loop")))
    if hooks:
        parts.append(("without hooks", "with hooks"))
    if other_prompts:
        parts.append(("clean", "corrupted"))
    if not parts:
        raise LoopedError(
            "one model was given, with the same loops, hooks and prompts on both sides; pass a second model, n_loops=(2, 4), "
            "hooks= or corrupted=."
        )
    left, right = (", ".join(names) for names in zip(*parts, strict=True))
    return _Side(left, deep[0]), _Side(right, deep[1])


def _pairs(left: Iterator[Any], right: Iterator[Any]) -> Iterator[Pair]:
    """The batches of both sides."""
    for first, second in zip_longest(left, right):
        n = [0 if batch is None else len(batch[0]) for batch in (first, second)]
        if n[0] != n[1]:
            raise LoopedError(
                f"prompts and corrupted are no pairs: one of them goes on with {n[0]} rows beside {n[1]}. Pass as many of "
                "both, in the same order."
            )
        yield first, second


def _same_vocabulary(first: Looped, second: Looped) -> bool:
    if first is second:
        return True
    if first.cfg.d_vocab != second.cfg.d_vocab:
        return False
    if first.tokenizer is None or second.tokenizer is None:
        return True
    return first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def _word(model: Looped, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])


def _text(model: Looped, tokens: Int[Tensor, " pos"]) -> str:
    return ",".join(map(str, tokens.tolist())) if model.tokenizer is None else model.tokenizer.decode(tokens.tolist())


def _signed(estimate: Estimate, k: int) -> str:
    error = estimate.stderr[k].item()
    return f"{estimate.values[k]:+.3f}" + (f" ± {error:.2g}" if error == error else "")
