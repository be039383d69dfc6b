"""The arguments of `report`, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from .._words import counted
from ..errors import LoopedError
from ..looped import Looped, at_depth
from ..metrics import one_token
from ..runs.prompts import token_batches
from ..schedule import check_count
from . import pointer_chasing
from .question import Question

Prompt = str | Int[Tensor, "..."]
PROMPTS = (
    "Raises an error if the file does not",
    "The square root of 16 is",  # of arXiv 2604.11791, as the next
    "Hello! I've been well. I hope that you're doing well.",
    "Return the number of items in the list.",
    "If the file does not exist, an error is raised.",
)
CLEARLY = 0.8  # of the loss of a uniform guess; a random model comes close to that by luck
UNTRAINED = ("custom", "looped_llama")  # families whose number of loops somebody chose


def ask(
    model: Looped,
    prompts: Prompt | Sequence[Prompt] | None,
    *,
    n_loops: int | None,
    at_loop: int | None,
    clean: Prompt | None,
    corrupted: Prompt | None,
    answer: str | int | None,
    wrong: str | int | None,
    skip_first_token: bool,
) -> Question:
    """The arguments of `report`, checked."""
    own = model.n_loops
    if at_loop is not None:
        check_count("at_loop", at_loop, 0)
    usual = max(16, 2 * own, (at_loop or 0) + 1) if model.lacks("other depths") is None else own
    n_loops = usual if n_loops is None else check_count("n_loops", n_loops, 2)
    at_loop = min(own, n_loops) - 1 if at_loop is None else at_loop
    if at_loop >= n_loops:
        raise LoopedError(f"at_loop={at_loop} was asked of {counted(n_loops, 'loop')}; the last is loop {n_loops - 1}.")
    if (clean is None) != (corrupted is None):
        raise LoopedError("only one of clean and corrupted was given; patching needs both, or neither.")
    answering = at_depth(model, at_loop + 1)
    hops, pair = None, None
    if str(model.cfg.model_name) in pointer_chasing.OTHER:
        hops, example = pointer_chasing.example()
        pair = example if prompts is None else None
    if prompts is None:
        usual = list(PROMPTS) if hops is None else [hops.tokens]
        given = [] if clean is None else [clean]
        prompts = given if given and model.tokenizer is None else [*given, *usual]
    if not isinstance(prompts, Iterable):
        raise LoopedError(f"a {type(prompts).__name__} was given as the prompts; pass texts or tensors of token ids.")
    prompts = [prompts] if isinstance(prompts, (str, Tensor)) else list(prompts)
    if model.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise LoopedError("this model has no tokenizer; pass prompts as tensors of token ids.")
    if any(isinstance(text, str) and not text.strip() for text in (*prompts, clean, corrupted)):
        raise LoopedError("a prompt is empty or holds nothing but whitespace; leave it out.")
    batches = list(token_batches(model, prompts, what="report"))
    longest, n_ctx = max(batch.shape[1] for batch in batches), model.cfg.n_ctx
    if longest > n_ctx:
        raise LoopedError(f"a prompt has {longest} tokens, but the context of this model is n_ctx={n_ctx}; shorten it.")
    if clean is not None and corrupted is not None:
        pair = _pair(model, clean, corrupted)
    if pair is not None:
        pair = (pair[0].to(model.cfg.device), pair[1].to(model.cfg.device))
    right, other = (None if token is None else one_token(model, token) for token in (answer, wrong))
    if right is not None and right == other:
        raise LoopedError(f"answer={answer!r} and wrong={wrong!r} are one token; choose two.")
    if wrong is not None and answer is None:
        raise LoopedError(f"wrong={wrong!r} was given without an answer; say which token is right with answer=.")
    # A model that is hardly better than chance has random weights, whatever its config says it was made for.
    is_trained = model.facts().family not in UNTRAINED and (hops is not None or _beats_chance(model, batches))
    made_for = model.made_for if is_trained else None
    return Question(answering, batches, n_loops, made_for, pair, hops, right, other, skip_first_token)


@torch.no_grad()
def _beats_chance(model: Looped, prompts: list[Int[Tensor, "_ _"]]) -> bool:
    """Whether the model predicts the tokens of some prompts clearly better than a uniform guess, on average."""
    some = [batch[:4] for batch in prompts[:8] if batch.shape[1] > 1]
    losses = [cross_entropy(model(batch)[:, :-1].float().mT, batch[:, 1:], reduction="none").flatten() for batch in some]
    return not losses or bool(torch.cat(losses).mean() < CLEARLY * math.log(model.cfg.d_vocab))


def _pair(model: Looped, clean: Prompt, corrupted: Prompt) -> tuple[Tensor, Tensor]:
    (first,), (second,) = (list(token_batches(model, one, what="report")) for one in (clean, corrupted))
    if first.shape != second.shape or len(first) > 1:
        raise LoopedError(
            f"clean has {tuple(first.shape)} tokens and corrupted {tuple(second.shape)}; patching needs one prompt each, "
            "of the same number of tokens, so that every position has its counterpart."
        )
    return first, second
