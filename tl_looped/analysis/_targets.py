"""The right tokens of every example of a stream of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._precision import wide
from ..bridge.looped_bridge import LoopedBridge
from ..errors import LoopedError
from ..lenses.logit_lens import _target_id

Answers = Sequence[str | int] | Int[Tensor, " example"]


class Targets:
    """The right tokens of every example: the given answers after its last position, or its own next tokens.

    Args:
        model: whose tokenizer reads answers that are text, each one token.
        answers: one per example in the order of the prompts; None for next tokens.
        what: the name of the analysis, for errors.
    """

    def __init__(self, model: LoopedBridge, answers: Answers | None, what: str):
        if isinstance(answers, str) or not isinstance(answers, (Sequence, Tensor, type(None))):
            raise LoopedError(f"answers={answers!r} was given; pass one token per example, in their order.")
        listed = answers.tolist() if isinstance(answers, Tensor) else answers
        self.ids = None if listed is None else [_target_id(model, answer) for answer in listed]
        if wrong := [i for i in self.ids or () if not 0 <= i < model.cfg.d_vocab]:
            raise LoopedError(f"answer {wrong[0]} was given, but the vocabulary of this model is 0..{model.cfg.d_vocab - 1}.")
        self.scored = "next tokens" if answers is None else "answers"
        self.left: Iterator[int] = iter(self.ids or ())
        self.n_used, self.what = 0, what

    def of(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch target"]:
        """The targets of the next batch.

        Args:
            tokens: the batch, [batch, pos].

        Raises:
            LoopedError: prompts of one token, which have no next one; fewer answers than examples.
        """
        self.n_used += len(tokens)
        if self.ids is None:
            if tokens.shape[1] < 2:
                raise LoopedError(f"{self.what} of a prompt of one token was asked, which has no next token; pass answers=.")
            return tokens[:, 1:]
        self.check_used(at_least=True)
        return torch.tensor([[next(self.left)] for _ in tokens], device=tokens.device)

    def select(self, values: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch target *rest"]:
        """The positions that the targets follow, in fp32 or wider.

        Args:
            values: [batch, pos, ...].
        """
        return wide(values[:, :-1] if self.ids is None else values[:, -1:])

    def check_used(self, at_least: bool = False) -> None:
        """Refuse answers that are not one for every example.

        Args:
            at_least: more answers may be left, as before the last batch.

        Raises:
            LoopedError: their numbers differ.
        """
        n = self.n_used if self.ids is None else len(self.ids)
        if n < self.n_used or (n > self.n_used and not at_least):
            raise LoopedError(
                f"{n} answers were given for {'at least ' * at_least}{self.n_used} examples; pass one for each, in their order."
            )
