"""Work that many processes share: measures of a model's prompts, in a directory."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

from .._words import counted
from ..errors import LoopedError
from ..looped import Hooked, Looped, unrolls_kept
from ..results.saving import versions
from .asked import described, digest, hooks_of, weights_of
from .driver import MISTAKES, WANTS_MEMORY, measured
from .folder import Folder
from .progress import Progress
from .shares import Share
from .store import Asked, Run
from .units import Batch, Unit, cut, share_of

Key = tuple[str, int]  # a measure and a unit


class Job:
    """What one process measures of a model's prompts; its directory is claimed.

    Args:
        measures: what is measured, by name.
        model: the model.
        prompts: all of them.
        out: the directory.
        share: what this process does.
        batch_size: measure at most so many prompts of equally many tokens together.
        skip: leave prompts that fail out.

    Raises:
        LoopedError: the directory is of another run, or cannot be written.
    """

    def __init__(
        self,
        measures: Mapping[str, Asked],
        model: Hooked,
        prompts: Sequence[Any],
        out: str | Path,
        share: Share,
        batch_size: int = 1,
        skip: bool = True,
    ):
        self.share: Share = share
        self._measures, self._model, self._folder, self._skip = measures, model, Folder(out), skip
        units = cut(model, prompts, batch_size)
        self._units: dict[int, Unit] = {unit.index: unit for unit in share_of(units, share)}
        self._every: list[Key] = [(name, unit.index) for name in measures for unit in units]
        shared = {"model": str(getattr(model.cfg, "model_name", "")), "loops of the model": str(getattr(model, "n_loops", 1))}
        shared |= {"weights": weights_of(model), "hooks": hooks_of(cast(Looped, model)), "prompts": digest(prompts)}
        shared |= {"n_prompts": str(len(prompts)), "batch_size": str(batch_size), "units": str(len(units)), **versions()}
        self._shared: dict[str, str] = shared
        self._settings: dict[str, dict[str, str]] = {name: _settings(measure) for name, measure in measures.items()}
        self.claim()
        self._folder.forget_short_of_memory(self.weights)

    def claim(self) -> None:
        """Say in the directory what is asked and of which model, or refuse it."""
        self._folder.claim(self._shared, self._settings)
        if isinstance(self._model, Looped):
            self._folder.keep_weights(self._model.fingerprint())

    @property
    def weights(self) -> dict[Key, int]:
        """The units of this process with all measures of each in turn, and how much work they are."""
        return {(name, index): unit.weight for index, unit in self._units.items() for name in self._measures}

    def left(self, keys: Sequence[Key] | None = None) -> list[Key]:
        """The units that are not there.

        Args:
            keys: those that are looked for; None for all of this process.
        """
        return self._folder.left(list(self.weights) if keys is None else keys)

    def measure(self, key: Key, verbose: bool) -> None:
        """Measure a unit and keep what is found.

        Args:
            key: which.
            verbose: say which prompts fail.
        """
        name, index = key
        self._folder.keep(name, index, _found(name, self._measures[name], self._model, self._units[index], self._skip, verbose))

    def missing(self) -> list[Key]:
        """The units of all processes that are not there."""
        return self.left(self._every)

    def results(self) -> dict[str, Run] | None:
        """The sum over the units of all processes; None while some are missing."""
        return None if self.missing() else self._folder.results(self._measures)


def carry_out(jobs: Sequence[Job], what: str, *, verbose: bool) -> list[dict[str, Run] | None]:
    """Do the share of this process in several jobs, a unit of every measure first, which tells what the rest takes.

    Args:
        jobs: what is to be done; no two measures have one name.
        what: the beginning of the progress line.
        verbose: show that line, and what fails.

    Returns:
        The results of every job; None of one that waits for other processes.
    """
    share = jobs[0].share
    what += f" ({share}, told by {share.told_by})" if share.of > 1 else ""
    weights = {key: weight for job in jobs for key, weight in job.weights.items()}
    while any(job.left() for job in jobs):  # again what somebody removed meanwhile
        left = [(key, job) for job in jobs for key in job.left()]
        firsts = {key[0]: key for key, _ in reversed(left)}.values()
        left.sort(key=lambda one: one[0] not in firsts)
        progress = Progress(weights, [key for key, _ in left], what, verbose=verbose)
        for job, keys in groupby(left, key=itemgetter(1)):
            with unrolls_kept():  # those of one job do not lie beside the next one's
                for key, _ in keys:
                    if not job.left([key]):
                        progress.drop(key)
                        continue
                    progress.begin()
                    job.measure(key, verbose)
                    progress.done(key)
        for job in jobs:
            job.claim()
    found = [job.results() for job in jobs]
    if verbose and None in found:
        missing = sum(len(job.missing()) for job in jobs)
        print(
            f"{share} is done. {counted(missing, 'part')} of other shares are not there yet; who finishes last writes the "
            "results, as tl-looped merge does.",
            file=sys.stderr,
        )
    return found


def _settings(measure: Asked) -> dict[str, str]:
    """The settings of an analysis as text, with those that were left as they are."""
    parameters = inspect.signature(measure.analysis).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "verbose"} | measure.settings
    return {"analysis": described(measure.analysis), **{name: described(value) for name, value in settings.items()}}


def _found(name: str, measure: Asked, model: Hooked, unit: Unit, skip: bool, verbose: bool) -> Run:
    """What an analysis finds in a unit."""
    result: Any = None
    order: list[int] = []
    failed: list[tuple[int, str]] = []
    todo = [*unit.batches]
    while todo:
        batch = todo.pop(0)
        try:
            found = measured(measure, model, batch.value)
        except MISTAKES as error:
            raise LoopedError(
                f"{name} failed: {type(error).__name__}: {error}. This is no matter of a prompt; mend the call and run again."
            ) from error
        except Exception as error:
            if len(batch.prompts) > 1:  # one of them may be to blame
                rows = zip(batch.prompts, batch.value.split(1), strict=True)
                todo[:0] = [Batch((index,), row, row.numel()) for index, row in rows]
                continue
            index = min(batch.prompts)
            if not skip:
                raise LoopedError(
                    f"{name} of prompt {index} failed: {error} What is done is kept. Mend the cause and run again, which goes "
                    'on there, or leave such prompts out with on_error="skip" (--on-error skip).'
                ) from error
            why = f"{type(error).__name__}: {error}"
            if verbose:
                again = " The same command tries it again." * why.startswith(WANTS_MEMORY)
                print(f"{name}: prompt {index} is left out: {error}{again}", file=sys.stderr)
            failed.append((index, why))
        else:
            result = found if result is None else result + found
            order += batch.prompts
    return Run(result, tuple(failed), len(unit.prompts), len(unit.prompts), {}, tuple(order))
