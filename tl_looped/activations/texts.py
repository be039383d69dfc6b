"""Prompts one by one, numbered, and in blocks of bounded size: block `b` of a data set becomes shard `b`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import LoopedError, NoPromptsError
from ..runs.driver import lacks_memory
from ..runs.prompts import Prompts, each_prompt, read_prompt

ADVICE = "It ran alone: load the model with a smaller dtype= or on another device=, or shorten the prompt."


@dataclass(eq=False)
class Text:
    """A prompt, and what is generated after it.

    Args:
        number: which prompt.
        tokens: of all that is known of it, on the CPU.
        n_prompt: how many of them are the prompt's.
        failed: why nothing is kept of it; "" where something is.
    """

    number: int
    tokens: Int[Tensor, " pos"]
    n_prompt: int
    failed: str = ""

    @property
    def digest(self) -> int:
        """What tells the prompt from others, in 63 bits."""
        return _digest(self.tokens[: self.n_prompt])


def _digest(tokens: Tensor) -> int:
    return int.from_bytes(hashlib.sha256(tokens.numpy().tobytes()).digest()[:8], "little") >> 1


def failure(number: int, error: Exception) -> str:
    """What is said of a prompt that failed.

    Args:
        number: which.
        error: why.
    """
    said = str(error).strip() or type(error).__name__
    advice = f" {ADVICE}" if lacks_memory(f"{type(error).__name__}: {said}") else ""
    named = said if said.startswith(f"prompt {number} ") else f"prompt {number} failed: {said}"
    return f"{named.rstrip('.')}.{advice}"


def texts_of(model: Any, prompts: Prompts, skip: bool) -> Iterator[Text]:
    """The prompts as texts; rows of a batch of tokens are prompts of their own.

    Args:
        model: whose tokenizer and vocabulary count.
        prompts: as every analysis takes them.
        skip: whether a prompt that cannot be read is a text that failed, or an error.
    """
    number, any_given = 0, False
    for prompt in each_prompt(prompts, "collect"):
        any_given = True
        try:
            rows = read_prompt(model, prompt, number, "collect").cpu()
        except LoopedError as error:
            if not skip:
                raise LoopedError(failure(number, error)) from error
            yield Text(number, torch.empty(0, dtype=torch.long, device="cpu"), 0, str(error))
            number += 1
            continue
        for row in rows:
            yield Text(number, row.long(), len(row))
            number += 1
    if not any_given:
        raise NoPromptsError("collect was asked of no prompts; pass at least one.")


def blocks(texts: Iterable[Text], rows: Callable[[Text], int], most: int) -> Iterator[list[Text]]:
    """Texts that follow each other, as many as have no more rows than fit, but one at least."""
    block, n = list[Text](), 0
    for text in texts:
        if block and n + rows(text) > most:
            yield block
            block, n = [], 0
        block.append(text)
        n += rows(text)
    if block:
        yield block


def batches(texts: list[Text], most: int, length: Callable[[Text], int], alike: bool) -> Iterator[list[Text]]:
    """Texts of similar length, as many as have no more tokens than fit with their padding, but one at least.

    Args:
        texts: in the order of their length.
        most: how many tokens fit.
        length: of a text.
        alike: whether all of a batch must be of one length.
    """
    batch = list[Text]()
    for text in texts:
        if batch and ((len(batch) + 1) * length(text) > most or (alike and length(text) != length(batch[0]))):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
