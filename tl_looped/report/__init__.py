"""A report on a looped model: what happens in its loops, on one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .._old_calls import accepts_old
from .._words import counted
from .._writing import write_text
from ..errors import LoopedError
from ..looped import Looped, check_model
from .arguments import Prompt, ask
from .page import page
from .question import Question
from .section import Figure, Section
from .sections import SECTIONS
from .tables import prompts as prompts_table

__all__ = ["Figure", "Report", "Section", "report"]

RANKED = ("answers", "patching", "stability", "fixed_points", "exits", "attention")  # whose headlines come first
N_FINDINGS = 3
AVERAGED = {"fixed_points", "attention", "stages", "stability", "exits"}  # means over all prompts


@dataclass
class Report:
    """What `report` found; `save` writes the page, `to_dict` has the numbers.

    Args:
        title: above the page.
        lead: one line about the model and the prompts.
        prompt: the prompt that is shown.
        sections: what was found so far.
        missing: titles of the sections that an interruption left out.
        tokens: the prompt token by token, beside the corrupted one if there is one, as HTML; "" for `prompt` as it is.
    """

    title: str
    lead: str
    prompt: str
    sections: list[Section] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    tokens: str = ""

    @property
    def findings(self) -> list[str]:
        """What matters most, in up to three sentences computed from the numbers."""
        said = {section.name: section.headline for section in self.sections if section.headline}
        return [said[name] for name in RANKED if name in said][:N_FINDINGS]

    @property
    def unmeasured(self) -> list[Section]:
        """The sections that could not be, with the reason and the command that would fill each."""
        return [section for section in self.sections if section.is_empty]

    @property
    def html(self) -> str:
        """The page; it holds its scripts, styles and data."""
        note = f"Interrupted: {', '.join(self.missing)} not done." if self.missing else ""
        tokens = self.tokens or f'<p class="prompts">{escape(self.prompt)}</p>'
        return page(self.title, self.lead, tokens, self.findings, self.sections, note)

    def save(self, file: str | Path) -> Path:
        """Write the page; an earlier one is replaced in one step, its permissions are kept.

        Args:
            file: where to.

        Raises:
            LoopedError: the place cannot be written, or holds something else than a regular file.
        """
        return write_text(file, self.html)

    def to_dict(self) -> dict[str, Any]:
        """Every number on the page with its name and axes, ready for JSON, and the sentences."""
        return {
            "title": self.title,
            "lead": self.lead,
            "prompt": self.prompt,
            "findings": self.findings,
            "missing": self.missing,
            "sections": [section.to_dict() for section in self.sections],
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@accepts_old(corrupt="corrupted", loops="n_loops")
def report(
    model: Looped,
    prompts: Prompt | Sequence[Prompt] | None = None,
    *,
    clean: Prompt | None = None,
    corrupted: Prompt | None = None,
    answer: str | int | None = None,
    wrong: str | int | None = None,
    at_loop: int | None = None,
    n_loops: int | None = None,
    sections: str | Sequence[str] | None = None,
    skip_first_token: bool = False,
    on_section: Callable[[Report], None] | None = None,
    verbose: bool = True,
) -> Report:
    """Look at a model from all sides: answers after each loop, patches, fixed points, attention, stages, more loops, exits.

    The page begins with three findings and one figure. A section that this model or these prompts do not allow is one line with
    the command that would fill it; one that breaks says so. Ctrl-C ends the work and keeps what is done.

    Args:
        model: the model.
        prompts: a text, tokens [pos] or [batch, pos], or a list of these; the first is shown where there is no `clean`. None
            for `clean` and a few short sentences, or for a toy of pointer chasing `clean` and 32 mappings.
        clean: a prompt whose activations are patched into that of `corrupted`, of the same number of tokens.
        corrupted: see `clean`. A toy of pointer chasing has both where `prompts` is None; without them there is no patching.
        answer: the right answer to the clean prompt, one token as text or its number; None for what the model says. Where it
            says the same to both prompts, the tokens are compared whose probabilities differ most.
        wrong: the answer it is compared with; None for what the model says to the corrupted prompt.
        at_loop: measure the answer after this loop, as if the model had `at_loop + 1` loops; None for the model's own last.
        n_loops: how far to loop where the report looks beyond that; None for twice the model's own number, at least 16. Fewer
            than the model has make a model of so many loops.
        sections: names of sections; None for all: model, answers, patching, fixed_points, trajectories, attention, stages,
            stability, exits.
        skip_first_token: leave the first token out of norms, distances, PCA and CKA, where its state can be so large that it
            decides them alone.
        on_section: called after each section, with what there is.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompt, one that is empty or too long, or text that the tokenizer cannot read;
            only one of `clean` and `corrupted`, or two of different length; an answer of several tokens; a loop or a section
            that does not exist.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.report import report
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=2), seed=0)
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> found = report(model, tokens, n_loops=4, sections=["answers", "stability", "patching"], verbose=False)
        >>> [section.name for section in found.sections], [section.name for section in found.unmeasured]
        (['answers', 'patching', 'stability'], ['patching'])
        >>> len(found.findings)
        2
    """
    check_model(model)
    names = _chosen(sections)
    asked = ask(
        model,
        prompts,
        n_loops=n_loops,
        at_loop=at_loop,
        clean=clean,
        corrupted=corrupted,
        answer=answer,
        wrong=wrong,
        skip_first_token=skip_first_token,
    )
    name = str(model.cfg.model_name)
    title = f"Inside {Path(name).name if Path(name).is_dir() else name}"
    found = Report(title, _lead(asked, names), " ".join(asked.words(asked.shown[0])), tokens=prompts_table(asked))
    bar = tqdm(names, desc="report", disable=not verbose)
    try:
        for name in bar:
            title, parts = SECTIONS[name]
            bar.set_postfix_str(title)
            section = Section(name, title)
            for part in parts:
                with torch.no_grad():
                    section.attempt(part, asked)
            if name in AVERAGED:
                section.basis = asked.basis
            found.sections.append(section)
            if on_section is not None:
                on_section(found)
    except KeyboardInterrupt:
        done = {section.name for section in found.sections}
        found.missing = [SECTIONS[name][0] for name in names if name not in done]
    return found


def _chosen(sections: str | Sequence[str] | None) -> list[str]:
    """The sections that were asked for, in the order of the page."""
    if sections is None:
        return list(SECTIONS)
    names = [sections] if isinstance(sections, str) else list(sections)
    if unknown := [name for name in names if name not in SECTIONS]:
        raise LoopedError(f"sections={unknown[0]!r} was asked; there are {', '.join(SECTIONS)}.")
    if not names:
        raise LoopedError(f"sections is empty; choose from {', '.join(SECTIONS)}.")
    return [name for name in SECTIONS if name in names]


def _lead(asked: Question, names: list[str]) -> str:
    """One line about the model and what was measured."""
    basis = f" {asked.basis}" if AVERAGED & {*names} else ""
    return (
        f"{asked.model.schedule.describe()}. Loops are numbered from 0: the answer measured is that after loop "
        f"{asked.model.n_loops - 1}, and the page looks at up to {counted(asked.n_loops, 'loop')}.{basis}"
    )
