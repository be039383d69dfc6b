"""What analyses over many prompts share: reading prompts one batch at a time, and the model at another depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from ..bridge.looped_bridge import LoopedBridge
from ..bridge.tokens import refuse_unmarked_padding
from ..errors import LoopedError
from ..model.looped_model import check_tokens
from ..schedule import check_count

Prompt = str | Int[Tensor, "..."]  # [pos] or [batch, pos]; lengths may differ from prompt to prompt
Prompts = Prompt | Iterable[Prompt]


def token_batches(
    model: TransformerBridge, prompts: Prompts, *, verbose: bool, what: str
) -> Iterator[Int[Tensor, "batch pos"]]:
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


def at_depth(model: LoopedBridge, n_loops: int | None) -> LoopedBridge:
    """The model with `n_loops` loops: itself where that is its own number or None, else an unroll without its hooks.

    Args:
        model: the model.
        n_loops: the number asked for.

    Raises:
        LoopedError: `n_loops` is no positive int; the model has hooks, which would silently not act on the unroll.
    """
    if n_loops is None or check_count("n_loops", n_loops) == model.n_loops:
        return model
    if hooked := first_hooked(model):
        raise LoopedError(
            f"{n_loops} loops were asked of a model of {model.n_loops} that has hooks, such as at {hooked}; they would not act "
            f"on the longer run. Hook deeper = model.unroll({n_loops}) and ask that."
        )
    return model.unroll(n_loops)


def first_hooked(model: LoopedBridge) -> str | None:
    """The name of a hook point of the model that has a hook; None if none has."""
    return next((name for name, point in model.hook_dict.items() if point.has_hooks(including_permanent=True)), None)


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
