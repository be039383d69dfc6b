"""What a report is about: the model, the prompts, and what is asked of them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from .._words import counted
from ..looped import Looped, at_depth
from ..schedule import Indices
from ..toys.hop import HopPrompts
from .section import Unmeasured, number

PAIRS = (
    ("The capital of France is", "The capital of Italy is"),
    ("Return the number of", "Return the name of"),
)
HANDFUL = 10  # prompts; fewer say little about others
DOMINATES = 5  # times the length of the other tokens' states


@dataclass(frozen=True)
class Question:
    """What a report is about.

    Args:
        model: the model, with as many loops as it takes to the answer that is measured.
        prompts: tokens, each a batch of prompts of one length.
        n_loops: how far to loop in the sections that look beyond that answer.
        made_for: how many loops the model was trained for; None if it was not trained to loop, or nobody knows.
        pair: a clean and a corrupted prompt, [1, pos] each, or None.
        hops: for a toy of pointer chasing, mappings with their answers; `prompts` are their tokens, unless others were given.
        answer: the token that is the right answer, if it was told.
        wrong: the token that it is compared with, if it was told.
        skip_first: leave the first token out of norms, distances, PCA and CKA.
    """

    model: Looped
    prompts: list[Int[Tensor, "_ _"]]
    n_loops: int
    made_for: int | None = None
    pair: tuple[Tensor, Tensor] | None = None
    hops: HopPrompts | None = None
    answer: int | None = None
    wrong: int | None = None
    skip_first: bool = False

    @cached_property
    def deep(self) -> Looped:
        """The model with `n_loops` loops."""
        return at_depth(self.model, self.n_loops)

    @property
    def own(self) -> int:
        """The number of loops that the dotted lines of the page mark: what the model was made for, or else is set to."""
        return self.made_for or self.model.n_loops

    @property
    def own_words(self) -> str:
        """What is beyond that number, in words."""
        return f"the {counted(self.own, 'loop')} {'it was made for' if self.made_for else 'it is set to'}"

    @property
    def shown(self) -> Int[Tensor, "1 pos"]:
        """The prompt that is shown: the clean one, or else the first."""
        return self.prompts[0][:1] if self.pair is None else self.pair[0]

    def of_length(self, least: int) -> list[Int[Tensor, "_ _"]]:
        """The prompts of at least so many tokens.

        Raises:
            Unmeasured: there is none.
        """
        found = [batch for batch in self.prompts if batch.shape[1] >= least]
        if not found:
            longer = "5,17,3" if self.model.tokenizer is None else PAIRS[0][0] if self.hops is None else "A b B a ? A"
            raise Unmeasured(f"No prompt has {least} tokens.", self.command(prompt=longer))
        return found

    @property
    def n_examples(self) -> int:
        """Number of prompts."""
        return sum(map(len, self.prompts))

    @property
    def basis(self) -> str:
        """How many prompts the means are over."""
        n = self.n_examples
        return (
            "Measured on one prompt."
            if n == 1
            else f"Means are over {n} prompts" + (", too few to speak for others." if n < HANDFUL else ".")
        )

    @property
    def kept(self) -> Indices:
        """Whose states norms, distances, PCA and CKA are of."""
        return slice(1, None) if self.skip_first else None

    @property
    def last_stack(self) -> str:
        """The stack that a loop ends with."""
        return self.model.schedule.core_stacks[-1]

    @property
    def first_token_said(self) -> str:
        """What is to be said of the first token wherever it dominates, or is left out."""
        if self.skip_first:
            return "The first token is left out."
        if not self.first_token >= DOMINATES:  # NaN where every state is zero
            return ""
        option = "--skip-first-token" if self.is_checkpoint else "skip_first_token=True"
        return (
            f"The first token's state is {number(self.first_token)} times as long as the others' on average, so it dominates "
            f"here; {option} leaves it out."
        )

    @cached_property
    def first_token(self) -> float:
        """How many times as long the first token's state is as the others', at the end of the loops; the mean over prompts."""
        schedule = self.model.schedule
        name = schedule.name(schedule.first_coda_layer - 1, "hook_resid_post")
        ratios: list[Tensor] = []
        for tokens in self.prompts:
            if tokens.shape[1] > 2:
                with torch.no_grad():
                    _, cache = self.model.run_with_cache(tokens, names_filter=name)
                norm = cache[name].float().norm(dim=-1).cpu()
                ratios.append(norm[:, 0] / norm[:, 1:].mean(1))
        return float(torch.cat(ratios).mean()) if ratios else 1.0

    def words(self, tokens: Int[Tensor, " pos"]) -> list[str]:
        """Tokens as a reader sees them."""
        return [self.word(token) for token in tokens.tolist()]

    def word(self, token: int) -> str:
        """A token as a reader sees it; a line break is shown."""
        if self.model.tokenizer is None:
            return str(token)
        text = self.model.tokenizer.decode([token])
        shown = text.replace("\n", "↵").replace("\t", "⇥") or repr(text)
        return shown if shown.strip() else shown.replace(" ", "␣")

    def quoted(self, token: int) -> str:
        """A token in a sentence, without the space before it."""
        return f"“{self.word(token).strip() or self.word(token)}”"

    @property
    def is_checkpoint(self) -> bool:
        """Whether the command can load the model by its name."""
        name = str(self.model.cfg.model_name)
        return name.startswith("toy:") or Path(name).is_dir() or ("/" in name and " " not in name)

    def command(self, **options: object) -> str:
        """The command that makes this report with other options; a call in Python where the model is no checkpoint."""
        if self.is_checkpoint:
            name = str(self.model.cfg.model_name)
            given = " ".join(f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in options.items())
            return f"tl-looped report {shlex.quote(name)} {given}"
        has_ids = self.model.tokenizer is None
        given = ", ".join(
            f"{'prompts' if key == 'prompt' else key}="
            + (f"torch.tensor([{value}])" if has_ids and isinstance(value, str) else repr(value))
            for key, value in options.items()
        )
        return f"report(model, {given})"

    def another_pair(self) -> str:
        """A command that compares two prompts."""
        if self.hops is not None:
            return self.command(clean="A b B c C d D a ? A", corrupted="A c B d C b D a ? A")
        has_text = self.model.tokenizer is not None
        for clean, corrupted in PAIRS if has_text else ():
            if self.model.to_tokens(clean).shape == self.model.to_tokens(corrupted).shape:
                return self.command(clean=clean, corrupted=corrupted)
        tokens = self.prompts[0][0, :12].tolist()
        at = len(tokens) // 2
        other = [*tokens[:at], (tokens[at] + 1) % self.model.cfg.d_vocab, *tokens[at + 1 :]]
        clean, corrupted = (",".join(map(str, one)) for one in (tokens, other))
        return self.command(clean=clean, corrupted=corrupted) + (" --tokens" if has_text and self.is_checkpoint else "")
