"""Reading prompts, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import LoopedError, NoPromptsError
from ..tokens import check_tokens, refuse_unmarked_padding

Prompt = str | Int[Tensor, "..."]  # [pos] or [batch, pos]; lengths may differ from prompt to prompt
Prompts = Prompt | Iterable[Prompt]


def token_batches(model: Any, prompts: Prompts, *, what: str) -> Iterator[Int[Tensor, "batch pos"]]:
    """The prompts as token batches, one after the other; nothing of a batch is kept.

    Args:
        model: whose tokenizer, vocabulary and device count.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; rows of a batch are examples of their own.
            Texts are not padded: each is a batch of one. Every token of a tensor is real.
        what: the name of the analysis, for errors.

    Raises:
        NoPromptsError: no prompts.
        LoopedError: an empty prompt; text without a tokenizer; tokens outside the vocabulary; rows that look padded.
    """
    if isinstance(prompts, (str, Tensor)):
        yield read_prompt(model, prompts, None, what)
        return
    n_prompts = -1
    for n_prompts, prompt in enumerate(each_prompt(prompts, what)):
        yield read_prompt(model, prompt, n_prompts, what)
    if n_prompts < 0:
        raise NoPromptsError(f"{what} was asked of no prompts; pass at least one.")


def each_prompt(prompts: object, what: str) -> Iterable[Any]:
    """The prompts one by one; one alone is one of them.

    Args:
        prompts: one, or several.
        what: the name of the analysis, for errors.

    Raises:
        LoopedError: what is no prompt and holds none; a dict, of which only the keys would be read.
    """
    if isinstance(prompts, (str, Tensor)):
        return [prompts]
    if isinstance(prompts, Mapping):
        keys = ", ".join(repr(key) for key in list(prompts)[:3])
        raise LoopedError(
            f"{what} was asked of a dict with {keys or 'nothing'}; pass a list of texts, or of tensors of token ids."
        )
    if not isinstance(prompts, Iterable):
        raise LoopedError(f"{what} was asked of a {type(prompts).__name__}; pass texts or tensors of token ids.")
    return prompts


def read_prompt(model: Any, prompt: Any, number: int | None, what: str) -> Int[Tensor, "batch pos"]:
    """The tokens of one prompt, where the model is.

    Args:
        model: whose tokenizer, vocabulary and device count.
        prompt: a text, or tokens [pos] or [batch, pos].
        number: which prompt it is, for errors; None for one alone, which may be any of those that others count.
        what: the name of the analysis, for errors.

    Raises:
        LoopedError: as in `token_batches`.
    """
    which = "the prompt" if number is None else f"prompt {number}"
    if isinstance(prompt, str):
        tokens = model.to_tokens(prompt) if prompt else torch.empty(1, 0, dtype=torch.long, device="cpu")
    elif isinstance(prompt, Tensor):
        tokens = prompt[None] if prompt.ndim == 1 else prompt
    else:
        raise LoopedError(f"{which} of {what} is a {type(prompt).__name__}; pass texts or tensors of token ids.")
    if not tokens.numel():
        raise LoopedError(f"{which} of {what} is empty; leave it out.")
    check_tokens(tokens, model.cfg.d_vocab)
    refuse_unmarked_padding(model.tokenizer, tokens, what)
    return tokens.to(model.cfg.device)
