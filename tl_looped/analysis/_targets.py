"""The right tokens of every example of a stream of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._precision import wide
from ..errors import LoopedError
from ..lenses.logit_lens import _target_id
from ..looped import Looped
from ..runs.driver import Measure, n_batches, over
from ..runs.prompts import Prompts, token_batches

R = TypeVar("R")
Answers = Sequence[str | int] | Int[Tensor, " example"]
Answered = tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch target"]]  # tokens, and what should follow some of them


def over_answered(
    measure: Measure[R], model: Looped, prompts: Prompts, ids: list[int] | None, *, what: str, verbose: bool
) -> R:
    """What a measure finds in prompts and their targets."""
    batches = answered(token_batches(model, prompts, what=what), ids, what)
    return over(measure, model, batches, what=what, verbose=verbose, n_batches=n_batches(prompts))


def answer_ids(model: Looped, answers: Answers | None) -> list[int] | None:
    """The answers as token ids; None for none."""
    if answers is None:
        return None
    if isinstance(answers, str) or not isinstance(answers, (Sequence, Tensor)):
        raise LoopedError(f"answers={answers!r} was given; pass one token per example, in their order.")
    listed: Any = answers.tolist() if isinstance(answers, Tensor) else answers
    ids = [_target_id(model, answer) for answer in listed]
    if wrong := [i for i in ids if not 0 <= i < model.cfg.d_vocab]:
        raise LoopedError(f"answer {wrong[0]} was given, but the vocabulary of this model is 0..{model.cfg.d_vocab - 1}.")
    return ids


def answered(batches: Iterator[Int[Tensor, "batch pos"]], ids: list[int] | int | None, what: str) -> Iterator[Answered]:
    """Every batch with the answers to its examples after their last position, or with their own next tokens."""
    used = 0
    for tokens in batches:
        start, used = used, used + len(tokens)
        if ids is None and tokens.shape[1] < 2:
            raise LoopedError(f"{what} of a prompt of one token was asked, which has no next token; pass answers=.")
        if isinstance(ids, list) and len(ids) < used:
            raise LoopedError(f"{len(ids)} answers were given for at least {used} examples; pass one for each, in their order.")
        if ids is None:
            yield tokens, tokens[:, 1:]
        else:
            own = ids[start:used] if isinstance(ids, list) else [ids] * len(tokens)
            yield tokens, torch.tensor(own, device=tokens.device)[:, None]
    if isinstance(ids, list) and len(ids) > used:
        raise LoopedError(f"{len(ids)} answers were given for {used} examples; pass one for each, in their order.")


def at_targets(values: Float[Tensor, "batch pos *rest"], at_end: bool) -> Float[Tensor, "batch target *rest"]:
    """The positions that the targets follow, in fp32 or wider."""
    return wide(values[:, -1:] if at_end else values[:, :-1])
