"""Every figure of arXiv 2604.11791 on one model: measured over many prompts, on a page and as tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._words import counted
from .._writing import write_text
from ..errors import LoopedError
from ..looped import Looped, check_model
from ..results.saving import versions
from ..runs import run
from ..schedule import check_count
from .drawn import About
from .findings import Findings
from .measures import N_INIT, OfPrompt, OfTwin, Once, once
from .pages import Row, html, numbers, rows_and_sections
from .writing import check_directory, tables_of, write_json, write_parquet

__all__ = ["Findings", "Paper", "Row", "paper"]

LONGEST = 400  # letters of the first prompt on the page


@dataclass(frozen=True)
class Paper:
    """What `paper` made.

    Args:
        findings: the results, by name.
        rows: every figure of the paper: what it says, and what was found or why not.
        page: the page.
        failed: the prompts that failed, as (index, reason).
    """

    findings: Findings
    rows: list[Row]
    page: Path
    failed: tuple[tuple[int, str], ...]


def paper(
    model: Looped,
    prompts: Iterable[Any],
    *,
    out: str | Path,
    n_loops: int = 128,
    feed_forward: Any = None,
    verbose: bool = True,
) -> Paper:
    """Repeat every figure and table of arXiv 2604.11791 that a model and prompts allow.

    Measures share their runs of the model: two with `n_loops` loops for each prompt, and a few with 8, with 32 and with the
    model's own number. No cache is held: one loop of the residual streams and patterns, and for all pairs of layers as much as
    `attention_distances` and `state_similarity` say. Prompts that are done are kept in the directory, and the same call goes on
    with the next.

    Args:
        model: the model.
        prompts: texts or tokens, one by one; the paper takes 256 of GSM8K's test set.
        out: a directory, for `index.html`, a table (`.parquet`) and a result (`.safetensors`, for `load_result`) of every
            measure, and `paper.json` with what the paper says and what was found.
        n_loops: how far to loop, and where X* is taken from.
        feed_forward: a feed-forward model to compare the stages with, such as the one that this model was made from.
        verbose: show progress bars.

    Raises:
        LoopedError: no prompts; a directory that cannot be written, or holds a run over other prompts, of another model or with
            other settings; pyarrow is not installed; no prompt could be measured.

    Example:
        >>> import tempfile, torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.paper import paper
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = paper(model, [torch.tensor([1, 2, 3])], out=folder, n_loops=4, verbose=False)
        >>> [row.figure for row in found.rows if row.here][:3]
        ['Figure 3', 'Figure 4', 'Figure 22']
    """
    check_model(model)
    n_loops, asked, place = check_count("n_loops", n_loops, 2), list(prompts), Path(out)
    if not asked:
        raise LoopedError("paper was asked of no prompts; pass at least one.")
    check_directory(place)
    kept = place / "unfinished"
    kept.mkdir(exist_ok=True)

    def over(measure: Any, of: Any, items: list[Any], name: str) -> Any:
        return run(measure, of, items, out=kept / f"{name}.safetensors", on_error="skip", verbose=verbose)

    done = over(OfPrompt(n_loops), model, asked, "prompts")
    if done.result is None:
        raise LoopedError(
            f"none of {counted(len(asked), 'prompt')} could be measured; prompt {done.failed[0][0]}: {done.failed[0][1]}"
        )
    findings = done.result + over(Once(n_loops), model, once(model, asked, n_loops), "once").result
    if feed_forward is not None:
        findings += over(OfTwin(), feed_forward, asked, "feed_forward").result
    return written(place, model, findings, n_loops, asked, done.failed)


def written(
    place: Path, model: Looped, findings: Findings, n_loops: int, prompts: list[Any], failed: tuple[tuple[int, str], ...]
) -> Paper:
    """Write what was found, and return it.

    Args:
        place: the directory.
        model: the model.
        findings: what was measured.
        n_loops: how far it was looped.
        prompts: all prompts.
        failed: those that failed.
    """
    about = _about(model, findings, n_loops)
    rows, sections = rows_and_sections(about)
    for name, part in findings.parts.items():
        part.save(place / f"{name}.safetensors", model)
    for name, frame in tables_of(findings).items():
        write_parquet(place / f"{name}.parquet", frame)
    import pandas as pd

    write_parquet(place / "figures.parquet", pd.DataFrame(numbers(rows)))
    name = str(model.cfg.model_name)
    settings = {"model": name, "n_loops": n_loops, "n_prompts": findings.n_prompts, "versions": versions()}
    write_json(place / "paper.json", {**settings, "figures": numbers(rows), "failed": failed, "refused": findings.refused})
    title = f"arXiv 2604.11791 on {Path(name).name if Path(name).is_dir() else name}"
    lead = f"{model.schedule.describe()}, looped {n_loops} times over {counted(findings.n_prompts, 'prompt')}."
    page = write_text(place / "index.html", html(title, lead, _shown(prompts[0]), rows, sections, _notes(model, failed)))
    return Paper(findings, rows, page, failed)


def _about(model: Looped, findings: Findings, n_loops: int) -> About:
    missing = {"stages_feed_forward": "; pass --feed-forward MODEL for one"}
    if n_loops < N_INIT:
        why = f"layouts show what they do in {N_INIT} loops or more, and {n_loops} were asked; pass --loops 128"
        missing |= {f"init_{n}": why for n in (12, 4, 16)}
    if model.tokenizer is None:
        missing["texts"] = "no tokenizer"
    return About(findings, model.schedule, n_loops, tuple(model.schedule.core_stacks), missing)


def _notes(model: Looped, failed: tuple[tuple[int, str], ...]) -> list[str]:
    """What a reader has to know before the figures."""
    notes = list[str]()
    if (why := model.lacks("equal loops")) is not None:
        notes.append(f"Fixed points are those of one map applied again, but {why}")
    if failed:
        notes.append(f"{counted(len(failed), 'prompt')} left out; prompt {failed[0][0]}: {failed[0][1]}")
    return notes


def _shown(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else ", ".join(map(str, prompt.flatten().tolist()))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
