"""A report on a looped model: what happens in its loops, on one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from .. import plots
from .._writing import write_text
from ..analysis._prompts import token_batches
from ..bridge.looped_bridge import LoopedBridge
from ..errors import LoopedError
from ..schedule import check_count
from . import pointer_chasing
from .page import page
from .section import Figure, Question, Section
from .sections import SECTIONS

__all__ = ["Figure", "Report", "Section", "report"]

Prompt = str | Int[Tensor, "..."]
PROMPTS = (
    "Hello! I've been well. I hope that you're doing well.",  # of arXiv 2604.11791, as the next
    "The square root of 16 is",
    "Return the number of items in the list.",
    "If the file does not exist, an error is raised.",
)


@dataclass
class Report:
    """What `report` found; `save` writes the page, `to_dict` has the numbers.

    Args:
        title: above the page.
        lead: one line about the model and the prompts.
        prompt: the prompt that is shown.
        sections: what was found so far.
        missing: titles of the sections that an interruption left out.
    """

    title: str
    lead: str
    prompt: str
    sections: list[Section] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def html(self) -> str:
        """The page; it holds its scripts, styles and data."""
        note = f"Interrupted: {', '.join(self.missing)} not done." if self.missing else ""
        return page(self.title, self.lead, self.prompt, self.sections, note)

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
            "missing": self.missing,
            "sections": [section.to_dict() for section in self.sections],
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def report(
    model: LoopedBridge,
    prompts: Prompt | Sequence[Prompt] | None = None,
    *,
    n_loops: int | None = None,
    clean: Prompt | None = None,
    corrupted: Prompt | None = None,
    on_section: Callable[[Report], None] | None = None,
    verbose: bool = True,
) -> Report:
    """Look at a model from all sides: answers after each loop, patches, fixed points, attention, stages, stability, exits.

    A section that this model or these prompts do not allow says why, and so does one that breaks. Ctrl-C ends the work
    and keeps what is done.

    Args:
        model: the model.
        prompts: a text, tokens [pos] or [batch, pos], or a list of these; the first is shown. None for `clean` and a few
            short sentences, or for a toy of pointer chasing `clean` and 32 mappings.
        n_loops: how far to loop where the report looks beyond the model's own number; None for twice that, at least 16.
        clean: a prompt whose activations are patched into that of `corrupted`, of the same number of tokens.
        corrupted: see `clean`. A toy of pointer chasing has both where `prompts` is None; without them there is no patching.
        on_section: called after each section, with what there is.
        verbose: show a progress bar.

    Raises:
        LoopedError: plotly is not installed; no prompt, one that is empty or too long, or text that the tokenizer cannot read;
            only one of `clean` and `corrupted`, or two of different length; fewer loops than the model has.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.report import report
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=2), seed=0)
        >>> found = report(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), n_loops=4, verbose=False)
        >>> [section.name for section in found.sections][:3]
        ['model', 'answers', 'fixed_points']
    """
    plots.plotly()
    asked = _question(model, prompts, n_loops, clean, corrupted)
    title = f"Inside {model.cfg.model_name}"
    n = asked.n_examples
    lead = f"{model.schedule.describe()}. Measured on " + (
        "the prompt shown here" if n == 1 else f"{n} prompts, the first of which is shown here"
    )
    lead += f"; up to {asked.n_loops} loops."
    found = Report(title, lead, " ".join(asked.words(asked.shown[0])))
    names = [name for name in SECTIONS if name != "patching" or asked.pair is not None]
    bar = tqdm(names, desc="report", disable=not verbose)
    try:
        for name in bar:
            title, part = SECTIONS[name]
            bar.set_postfix_str(title)
            section = Section(name, title)
            with torch.no_grad():
                section.attempt(lambda part=part, section=section: part(asked, section))
            found.sections.append(section)
            if on_section is not None:
                on_section(found)
    except KeyboardInterrupt:
        done = {section.name for section in found.sections}
        found.missing = [SECTIONS[name][0] for name in names if name not in done]
    return found


def _question(
    model: LoopedBridge,
    prompts: Prompt | Sequence[Prompt] | None,
    n_loops: int | None,
    clean: Prompt | None,
    corrupted: Prompt | None,
) -> Question:
    """The arguments of `report`, checked."""
    least = model.n_loops
    n_loops = max(16, 2 * least) if n_loops is None else check_count("n_loops", n_loops, 2)
    if n_loops < least:
        raise LoopedError(f"n_loops={n_loops} was asked, but the model has {least}; ask for as many or more.")
    if (clean is None) != (corrupted is None):
        raise LoopedError("only one of clean and corrupted was given; patching needs both, or neither.")
    hops, pair = None, None
    if str(model.cfg.model_name) in pointer_chasing.OTHER:
        hops, example = pointer_chasing.example()
        pair = example if prompts is None else None
    if prompts is None:
        usual = list(PROMPTS) if hops is None else [hops.tokens]
        given = [] if clean is None else [clean]
        prompts = given if given and model.tokenizer is None else [*given, *usual]
    prompts = [prompts] if isinstance(prompts, (str, Tensor)) else list(prompts)
    if model.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise LoopedError("this model has no tokenizer; pass prompts as tensors of token ids.")
    if any(isinstance(text, str) and not text.strip() for text in (*prompts, clean, corrupted)):
        raise LoopedError("a prompt is empty or holds nothing but whitespace; leave it out.")
    batches = list(token_batches(model, prompts, verbose=False, what="report"))
    longest, n_ctx = max(batch.shape[1] for batch in batches), model.looped_cfg.n_ctx
    if longest > n_ctx:
        raise LoopedError(f"a prompt has {longest} tokens, but the context of this model is n_ctx={n_ctx}; shorten it.")
    if clean is not None and corrupted is not None:
        (first,), (second,) = (list(token_batches(model, one, verbose=False, what="report")) for one in (clean, corrupted))
        if first.shape != second.shape or len(first) > 1:
            raise LoopedError(
                f"clean has {tuple(first.shape)} tokens and corrupted {tuple(second.shape)}; patching needs one prompt each, "
                "of the same number of tokens, so that every position has its counterpart."
            )
        pair = (first, second)
    if pair is not None:
        pair = (pair[0].to(model.cfg.device), pair[1].to(model.cfg.device))
    return Question(model, batches, n_loops, pair, hops)
