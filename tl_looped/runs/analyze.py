"""`analyze`: several analyses over many prompts, by one process or many."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from ..errors import LoopedError, NoPromptsError
from ..looped import Hooked, check_model, unrolls_kept
from ..schedule import check_count
from .asked import described
from .folder import Folder, refuse_part_of_paper
from .job import Job, carry_out
from .prompts import each_prompt
from .shares import Share
from .store import Asked, OnError, Run

Analyses = str | Sequence[str] | Mapping[str, Mapping[str, Any] | Callable[..., Any] | Asked]


def analyze(
    analyses: Analyses,
    model: Hooked,
    prompts: Iterable[Any],
    *,
    out: str | Path,
    shard: str | None = None,
    batch_size: int = 1,
    on_error: OnError = "skip",
    verbose: bool = True,
) -> dict[str, Run] | None:
    """Run analyses over prompts into a directory, as one process or as one of many that share the work.

    Every process makes the same call. Each measures its share of the prompts, in units that do not depend on how many processes
    there are, and writes a file for every unit. Whoever finds all units there adds them up in their order: the results are
    those of one process, bit for bit where machines and numbers of threads are alike. Whatever was killed, lost or removed, the
    same call measures what is missing, with any number of processes. More analyses may be added to a directory later.

    Args:
        analyses: names of analyses, as a list or as one text with commas (`tl_looped.analysis.by_name.ANALYSES` has them); or a
            dict from the names that the results get to settings of the analysis of that name, to a function, called as
            `function(model, prompt)`, or to `Asked(function, settings)`. What functions return must add up.
        model: the model; hooks on it act.
        prompts: texts, tokens, or whatever the analyses take, one by one.
        out: the directory. One of other prompts, settings, weights or versions is refused, not replaced.
        shard: the share of this process, such as "3/8"; None for what torchrun, accelerate, Slurm or mpirun say, or else all,
            which is "1/1".
        batch_size: measure at most so many prompts of equally many tokens together. Their rows may differ from those of a
            prompt alone in the last bits. What does not fit into memory is measured in halves.
        on_error: "skip" lists a prompt that fails in `failed` and goes on; "raise" stops. Mistakes in the call stop either way.
        verbose: show a line with the minutes that are left, and say which prompts fail.

    Returns:
        By name, the run with its `result`; None while units of other shares are missing. `merge(out)` adds up later.

    Raises:
        LoopedError: an unknown analysis; settings that an analysis refuses; a directory of another run, or one that cannot be
            written (what is done is kept); no prompts.

    Example:
        >>> import tempfile, torch
        >>> from tl_looped import LoopedBridge, LoopedConfig, analyze
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> prompts = list(torch.arange(12).view(4, 3) % 10)
        >>> asked = {"fixed_points": {"n_loops": 4}, "inference_stages": {}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first = analyze(asked, model, prompts, out=folder, shard="1/2", verbose=False)
        ...     both = analyze(asked, model, prompts, out=folder, shard="2/2", verbose=False)
        >>> first, both["fixed_points"].result.norm.count
        (None, 4)
    """
    if on_error not in get_args(OnError):
        raise LoopedError(f'on_error={on_error!r} was given; choose "raise" or "skip".')
    if not isinstance(model, Hooked) or isinstance(model, type):
        check_model(model)
    refuse_part_of_paper(Path(out))
    measures, given, share = asked_of(analyses), listed(prompts, "analyze"), Share.read(shard)
    with unrolls_kept():
        for measure in measures.values():
            _check(measure, model, given[0])
        job = Job(measures, model, given, out, share, check_count("batch_size", batch_size), on_error == "skip")
        return carry_out([job], ", ".join(measures), verbose=verbose)[0]


def merge(out: str | Path) -> dict[str, Run]:
    """Add up what the processes of `analyze` have found, and write the results into its directory.

    Args:
        out: the directory.

    Returns:
        By name, the run with its `result`.

    Raises:
        LoopedError: it is no directory of `analyze`; a part of it is not done.
    """
    folder = Folder(out)
    return folder.results(folder.names())


def listed(prompts: Iterable[Any], what: str) -> list[Any]:
    """The prompts of a run.

    Args:
        prompts: several.
        what: the name of the run, for errors.

    Raises:
        LoopedError: one alone; none.
    """
    if isinstance(prompts, (str, Tensor)):
        raise LoopedError(f"{what} was asked of one {type(prompts).__name__}; pass a list of prompts.")
    if not (given := list(each_prompt(prompts, what))):
        raise LoopedError(f"{what} was asked of no prompts; pass at least one.")
    return given


def asked_of(analyses: Analyses) -> dict[str, Asked]:
    """What is measured, by the names of the results.

    Args:
        analyses: as in `analyze`.

    Raises:
        LoopedError: an unknown analysis; a name that is no name of a file.
    """
    from ..analysis.by_name import analysis_of

    if isinstance(analyses, str):
        analyses = [name.strip() for name in analyses.split(",") if name.strip()]
    if not isinstance(analyses, Mapping):
        analyses = {name: {} for name in analyses}
    if not analyses:
        raise LoopedError("analyze was asked of no analysis; name at least one.")
    found: dict[str, Asked] = {}
    for name, asked in analyses.items():
        if not isinstance(name, str) or not name.replace("_", "a").replace("-", "a").isalnum():
            raise LoopedError(f"the name {name!r} was given; names of results become files, so use letters, digits, _ and -.")
        if isinstance(asked, Asked):
            found[name] = asked
        elif isinstance(asked, Mapping):
            found[name] = Asked(analysis_of(name), dict(asked))
        elif callable(asked):
            found[name] = Asked(asked, {})
        else:
            raise LoopedError(f"{name}={asked!r} was given; pass a dict of settings or a function.")
    return found


def _check(measure: Asked, model: Hooked, prompt: Any) -> None:
    """Refuse a call that fails on every prompt, before the first."""
    name = described(measure.analysis)
    try:
        inspect.signature(measure.analysis).bind(model, prompt, **measure.arguments)
    except TypeError as error:
        raise LoopedError(f"{name} was asked with {', '.join(measure.settings) or 'no settings'}: {error}.") from error
    if not getattr(measure.analysis, "__module__", "").startswith(f"{__name__.partition('.')[0]}.analysis."):
        return
    if measure.settings.get("answers") is not None:
        raise LoopedError(f"{name} was asked with answers, which belong to all prompts together; call it, or use `run`.")
    try:
        measure.analysis(model, [], **measure.arguments)
    except NoPromptsError:  # it looks at its settings first
        pass
