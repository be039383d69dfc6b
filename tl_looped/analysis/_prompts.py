"""What analyses over many prompts share: reading prompts one batch at a time, and the model at another depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..bridge.structure import AnyBridge
from ..errors import LoopedError
from ..looped import at_depth, check_model
from ..running import first_hooked
from ..tokens import check_tokens, refuse_unmarked_padding

__all__ = [
    "Prompt",
    "Prompts",
    "at_depth",
    "check_bridge",
    "check_finite",
    "check_model",
    "first_hooked",
    "over_batches",
    "token_batches",
]

Prompt = str | Int[Tensor, "..."]  # [pos] or [batch, pos]; lengths may differ from prompt to prompt
Prompts = Prompt | Iterable[Prompt]
R = TypeVar("R")


def token_batches(model: AnyBridge, prompts: Prompts, *, verbose: bool, what: str) -> Iterator[Int[Tensor, "batch pos"]]:
    """The prompts as token batches, one after the other; nothing of a batch is kept.

    Args:
        model: whose tokenizer, vocabulary and device count.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; rows of a batch are examples of their own.
            Texts are not padded: each is a batch of one. Every token of a tensor is real.
        verbose: show a progress bar.
        what: the name of the analysis, for the progress bar and errors.

    Raises:
        LoopedError: no prompts; an empty prompt; text without a tokenizer; tokens outside the vocabulary; rows that look
            padded.
    """
    one = isinstance(prompts, (str, Tensor))
    if not one and not isinstance(prompts, Iterable):
        raise LoopedError(f"{what} was asked of a {type(prompts).__name__}; pass texts or tensors of token ids.")
    n_prompts = -1
    for n_prompts, prompt in enumerate(tqdm([prompts] if one else prompts, desc=what, disable=not verbose)):
        if isinstance(prompt, str):
            tokens = model.to_tokens(prompt) if prompt else torch.empty(1, 0, dtype=torch.long, device="cpu")
        elif isinstance(prompt, Tensor):
            tokens = prompt[None] if prompt.ndim == 1 else prompt
        else:
            raise LoopedError(f"prompt {n_prompts} of {what} is a {type(prompt).__name__}; pass texts or tensors of token ids.")
        if not tokens.numel():
            raise LoopedError(f"prompt {n_prompts} of {what} is empty; leave it out.")
        check_tokens(tokens, model.cfg.d_vocab)
        refuse_unmarked_padding(model.tokenizer, tokens, what)
        yield tokens.to(model.cfg.device)
    if n_prompts < 0:
        raise LoopedError(f"{what} was asked of no prompts; pass at least one.")


def over_batches(
    measure: Callable[[Int[Tensor, "batch pos"]], R], model: AnyBridge, prompts: Prompts, *, verbose: bool, what: str
) -> R:
    """What a measure makes of the batches of `token_batches`, added up in their order.

    Args:
        measure: from tokens [batch, pos] to a result that can be added.
        model: as in `token_batches`.
        prompts: as there.
        verbose: as there.
        what: as there.
    """
    of_batch: Any = measure  # results add up, which their types do not say in one word
    return reduce(add, map(of_batch, token_batches(model, prompts, verbose=verbose, what=what)))


def check_bridge(model: object) -> None:
    """Refuse what is neither a looped model nor a plain `TransformerBridge`.

    Args:
        model: what was given.

    Raises:
        LoopedError: it is none.
    """
    if not isinstance(model, AnyBridge):
        check_model(model)


def check_finite(values: Float[Tensor, ...], name: str) -> None:
    """Refuse an activation that is not finite; called in the order of the run, it names the first place where one is.

    Args:
        values: the activation.
        name: its hook.

    Raises:
        LoopedError: the activation holds NaN or an infinite value.
    """
    if bool(torch.isfinite(values.sum())):  # never of values that are not finite, and it needs no memory
        return
    if not bool(torch.isfinite(values).all()):
        bad = "NaN" if bool(torch.isnan(values).any()) else "an infinite value"
        raise LoopedError(f"{name} holds {bad}, the first activation looked at that does; see it with run_with_cache.")
