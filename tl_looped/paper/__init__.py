"""Every figure of arXiv 2604.11791 on one model: measured over many prompts, on a page and as tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .._words import counted
from .._writing import write_first, write_text
from ..errors import LoopedError
from ..looped import Hooked, Looped, check_model
from ..results.saving import save_result, versions
from ..runs import Run
from ..runs.analyze import asked_of, listed
from ..runs.folder import PAPER as ASKED
from ..runs.folder import Folder, refuse_others
from ..runs.job import Job, carry_out
from ..runs.shares import Share
from ..schedule import check_count
from .drawn import About
from .findings import Findings, in_order
from .measures import INIT_LAYERS, INITIALS, N_INIT, PATH, OfInitial, OfPath, OfPrompt, OfTwin, followed
from .pages import Row, html, numbers, rows_and_sections
from .writing import check_directory, check_tables, tables_of, write_json, write_parquet

__all__ = ["Findings", "Paper", "Row", "finish", "paper"]

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


@dataclass(frozen=True)
class Asked:
    """What the page says of the model and the prompts, which a later process finds in the directory.

    Args:
        model: its name.
        described: what runs in it.
        stacks: its looped stacks.
        n_loops: how far it is looped.
        has_words: whether it has a tokenizer.
        beside: whether a feed-forward model is measured too.
        prompt: the first prompt.
        notes: what a reader has to know.
    """

    model: str
    described: str
    stacks: list[str]
    n_loops: int
    has_words: bool
    beside: bool
    prompt: str
    notes: list[str]


def paper(
    model: Looped,
    prompts: Iterable[Any],
    *,
    out: str | Path,
    n_loops: int = 128,
    feed_forward: Hooked | None = None,
    shard: str | None = None,
    batch_size: int = 1,
    verbose: bool = True,
) -> Paper | None:
    """Repeat every figure and table of arXiv 2604.11791 that a model and prompts allow.

    Measures share their runs of the model: two with `n_loops` loops for each prompt, and a few with 8, with 32 and with the
    model's own number. No cache is held: one loop of the residual streams and patterns, and for all pairs of layers as much as
    `attention_distances` and `state_similarity` say; of more than 200 executed layers, pairs are of every second, third, ...
    layer of the block. The work is shared and kept as `analyze` does: the same call, in one process or many, goes on with what
    is missing, and the numbers are those of one process.

    Args:
        model: the model.
        prompts: texts or tokens, one by one; the paper takes 256 of GSM8K's test set.
        out: a directory, for `index.html`, a table (`.parquet`) and a result (`.safetensors`, for `load_result`) of every
            measure, and `paper.json` with what the paper says and what was found.
        n_loops: how far to loop, and where X* is taken from.
        feed_forward: a feed-forward model to compare the stages with, such as the one that this model was made from.
        shard: the share of this process, such as "3/8"; None for what torchrun, accelerate or Slurm say, or else all.
        batch_size: measure so many prompts of equally many tokens together.
        verbose: show a line with the minutes that are left.

    Returns:
        What was made; None while parts of other shares are missing. Who finishes last makes the page, as `finish(out)` does.

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
    n_loops, given, place = check_count("n_loops", n_loops, 2), listed(prompts, "paper"), Path(out)
    check_directory(place)
    n_loops, notes = _depth(model, n_loops)
    asked = _asked(model, given, n_loops, feed_forward is not None, notes)
    _claim(place, asked)

    size, share = check_count("batch_size", batch_size), Share.read(shard)

    def job(name: str, measure: Any, of: Hooked, items: list[Any], size: int = 1) -> Job:
        return Job(asked_of({name: measure}), of, items, place / "parts" / name, share, size)

    jobs = [job("prompts", OfPrompt(n_loops), model, given, size)]
    jobs.append(job("paths", OfPath(min(PATH, n_loops)), model, followed(model, given)))
    if n_loops >= N_INIT:
        jobs.append(job("layouts", OfInitial(n_loops), model, INITIALS))
    if feed_forward is not None:
        jobs.append(job("feed_forward", OfTwin(), feed_forward, given, size))
    found = carry_out(jobs, "paper", verbose=verbose)
    _claim(place, asked)  # again, if somebody removed it meanwhile
    try:
        return finish(place)
    except _Unfinished as error:
        if verbose and None not in found:  # of a feed-forward model that others were asked for
            print(error, file=sys.stderr)
        return None


class _Unfinished(LoopedError):
    """Parts of other shares are missing."""


def finish(out: str | Path) -> Paper:
    """Write the page, the tables and the results of what the processes of `paper` have found.

    Args:
        out: the directory.

    Raises:
        LoopedError: it is no directory of `paper`; a part is not done; no prompt could be measured.
    """
    place = Path(out)
    asked = _begun(place)
    check_tables()
    runs: dict[str, Run] = {}
    parts = {"prompts": True, "paths": True, "layouts": asked.n_loops >= N_INIT, "feed_forward": asked.beside}
    for name in (name for name, is_asked in parts.items() if is_asked):
        try:
            runs |= Folder(place / "parts" / name).results([name])
        except LoopedError as error:
            raise _Unfinished(str(error)) from error
    failed = runs["prompts"].failed
    if runs["prompts"].result is None:
        why = f"prompt {failed[0][0]}: {failed[0][1]}"
        raise LoopedError(f"none of {counted(runs['prompts'].n_prompts, 'prompt')} could be measured; {why}")
    findings: Any = sum(run.result for run in runs.values() if run.result is not None)
    findings, order = in_order(findings, runs["prompts"].order)
    twin = runs.get("feed_forward")
    if twin is not None and twin.result is None:
        findings.refused["stages_feed_forward"] = {
            f"the feed-forward model: prompt {twin.failed[0][0]}: {twin.failed[0][1]}": 1
        }
    return _written(place, findings, asked, failed, order)


def _begun(place: Path) -> Asked:
    """What was asked in a directory."""
    try:
        return Asked(**json.loads((place / ASKED).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise LoopedError(
            f"{str(place)!r} is no directory of tl-looped paper: it has no {ASKED}. If it was removed, the command that made "
            "the directory writes it again, and measures nothing twice."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise LoopedError(
            f"{str(place / ASKED)!r} is damaged ({error}). Remove it and run the same command again, which measures nothing "
            "twice."
        ) from error


def _claim(place: Path, asked: Asked) -> None:
    """Say what is asked, the same from every process, or refuse a directory in which something else was."""
    refuse_others(place, "paper")
    write_first(place / ASKED, json.dumps(asdict(asked), indent=1))
    before = _begun(place)
    for name in ("described", "n_loops", "prompt"):
        if getattr(before, name) != getattr(asked, name):
            was, now = getattr(before, name), getattr(asked, name)
            raise LoopedError(
                f"{str(place)!r} is of a run with {name}={was}, not {now}; choose another directory, or remove this one to "
                "begin anew."
            )
    if asked.beside and not before.beside:  # once asked for, it stays
        write_json(place / ASKED, asdict(asked))


def _written(
    place: Path, findings: Findings, asked: Asked, failed: tuple[tuple[int, str], ...], order: tuple[int, ...]
) -> Paper:
    rows, sections = rows_and_sections(_about(findings, asked))
    weights = Folder(place / "parts" / "prompts").weights()
    for name, part in findings.parts.items():
        save_result(part, place / f"{name}.safetensors", weights)
    for name, frame in tables_of(findings).items():
        write_parquet(place / f"{name}.parquet", frame)
    import pandas as pd

    write_parquet(place / "figures.parquet", pd.DataFrame(numbers(rows)))
    settings = asdict(asked) | {"n_prompts": findings.n_prompts, "versions": versions()}
    found = {"figures": numbers(rows), "failed": failed, "refused": findings.refused, "examples": order}
    write_json(place / "paper.json", settings | found)
    title = f"arXiv 2604.11791 on {Path(asked.model).name if Path(asked.model).is_dir() else asked.model}"
    lead = f"{asked.described}, looped {asked.n_loops} times over {counted(findings.n_prompts, 'prompt')}."
    notes = list(asked.notes)
    if failed:
        notes.append(f"{counted(len(failed), 'prompt')} left out; prompt {failed[0][0]}: {failed[0][1]}")
    page = write_text(place / "index.html", html(title, lead, asked.prompt, rows, sections, notes))
    return Paper(findings, rows, page, failed)


def _depth(model: Looped, n_loops: int) -> tuple[int, list[str]]:
    """How far a model can be looped, and why no farther."""
    if n_loops <= model.n_loops:
        return n_loops, []
    try:
        model.unroll(model.n_loops + 1)  # what one loop more is refused for, all are
    except LoopedError as error:
        return model.n_loops, [f"Looped {model.n_loops} times and not {n_loops}: {error}"]
    return n_loops, []


def _asked(model: Looped, prompts: list[Any], n_loops: int, beside: bool, notes: list[str]) -> Asked:
    first = prompts[0]
    text = ", ".join(map(str, first.flatten().tolist())) if isinstance(first, Tensor) else str(first)
    if (why := model.lacks("equal loops")) is not None:
        notes.append(f"Fixed points are those of one map applied again, but {why}")
    return Asked(
        str(model.cfg.model_name),
        model.schedule.describe(),
        list(model.schedule.core_stacks),
        n_loops,
        model.tokenizer is not None,
        beside,
        text if len(text) <= LONGEST else f"{text[:LONGEST]}…",
        notes,
    )


def _about(findings: Findings, asked: Asked) -> About:
    alone = findings.why_not("stages_feed_forward") or "pass --feed-forward MODEL for one"
    missing = {"stages_feed_forward": f"; {alone.removesuffix('.')}"}
    if asked.n_loops < N_INIT:
        why = f"layouts show what they do in {N_INIT} loops or more, and {asked.n_loops} were asked; pass --loops 128"
        missing |= {f"init_{n}": why for n in INIT_LAYERS}
    if not asked.has_words:
        missing["texts"] = "no tokenizer"
    return About(findings, asked.n_loops, tuple(asked.stacks), missing)
