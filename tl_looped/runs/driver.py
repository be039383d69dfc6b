"""The driver: asks a measure of every prompt, one after the other, and adds up what it finds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import LoopedError, NoMemoryError
from .prompts import Prompts, token_batches

R = TypeVar("R")
Found = TypeVar("Found", covariant=True)
MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)  # of who wrote the call, not of a prompt
WANTS_MEMORY = f"{NoMemoryError.__name__}: "  # how the reason of a prompt begins that may be measured where there is more
N_ALIKE = 3  # first prompts that fail by the same mistake: the others would too


@runtime_checkable
class Measure(Protocol[Found]):
    """What is measured of one batch of prompts: a frozen dataclass of settings, which can be pickled for another process.

    The model is no part of it, as models are not pickled. What it finds adds up, as results and estimates do.
    """

    def __call__(self, model: Any, batch: Any, /) -> Found:
        """Measure one batch.

        Args:
            model: the model, or the models that are compared.
            batch: tokens [batch, pos], or these and what belongs to them.
        """
        ...


@dataclass(frozen=True)
class Total(Generic[R]):
    """What was found so far.

    Args:
        result: the sum over the batches that are done; None before the first.
        failed: the batches that failed, as (index, reason).
        done: how many were tried.
    """

    result: R | None = None
    failed: tuple[tuple[int, str], ...] = ()
    done: int = 0


def totals(
    measure: Measure[R], model: Any, batches: Iterable[Any], begun: Total[R], *, skip: bool = False, n_batches: int = 0
) -> Iterator[Total[R]]:
    """What was found after every batch.

    Args:
        measure: what is asked of a batch.
        model: the model, or the models that are compared.
        batches: those that are left.
        begun: what the batches before them gave.
        skip: list a batch that fails and go on. Where the first of all fail by the same mistake in the code, as a `TypeError`
            is, nothing counts as done, and the error is raised.
        n_batches: how many there are with those before.

    Raises:
        LoopedError: the first batches fail alike.
    """
    result, failed = begun.result, begun.failed
    for index, batch in enumerate(batches, begun.done):
        try:
            found = measured(measure, model, batch)
            either: Any = result  # results add up, which their types do not say in one word
            result = found if result is None else either + found
        except Exception as error:
            if not skip:
                raise
            reason = f"{type(error).__name__}: {error}"
            failed = (*failed, (index, reason))
            alike = len(failed) == index + 1 == min(N_ALIKE, n_batches) and {why for _, why in failed} == {reason}
            if alike and isinstance(error, MISTAKES):
                yield Total()  # no prompt is to blame, and none is left out when it is mended
                raise LoopedError(
                    f"the first {index + 1} of {n_batches} prompts failed alike: {reason}. This is no matter of a prompt; mend "
                    "the call and run again."
                ) from error
        yield Total(result, failed, index + 1)


def measured(measure: Measure[R], model: Any, batch: Any) -> R:
    """What is found in a batch, or where its rows do not fit into memory together, in one half of them and then the other.

    Args:
        measure: what is asked.
        model: the model, or the models that are compared.
        batch: tokens, or these and what belongs to them.

    Raises:
        NoMemoryError: a single row does not fit.
    """
    try:
        return measure(model, batch)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(f"{type(error).__name__}: {error}"):
            raise
        halves = () if _has_rows_of_its_own(measure) else _halves(batch)
        if not halves:
            what = f" of {tuple(batch.shape)} tokens" if isinstance(batch, Tensor) else ""
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NoMemoryError(
                f"one prompt{what} does not fit into memory: {reason}. Shorten it, or run fewer loops."
            ) from error
    if torch.cuda.is_available():  # what the run held is free by now
        torch.cuda.empty_cache()
    first, second = (measured(measure, model, half) for half in halves)
    either: Any = first
    return either + second


def lacks_memory(why: str) -> bool:
    """Whether a run failed for want of memory, which another time, or elsewhere, there may be.

    Args:
        why: the name of the error and what it says, of torch on any device, or of Python.
    """
    says = ("OutOfMemoryError", "MemoryError", "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return any(words in why for words in says)


def _has_rows_of_its_own(measure: object) -> bool:
    """Whether a measure has settings that belong to the rows of one batch, which are not those of its halves."""
    settings = getattr(measure, "settings", None) or vars(measure)
    return any(isinstance(value, (Tensor, torch.Generator)) for value in settings.values())


def _halves(batch: Any) -> tuple[Any, ...]:
    """The first and the second half of the rows of tokens, and of all that belongs to them; nothing of what has one row."""
    if isinstance(batch, Tensor):
        middle = len(batch) // 2 if batch.ndim > 1 else 0
        return (batch[:middle], batch[middle:]) if middle else ()
    if not isinstance(batch, tuple):
        return ()
    parts = [(None, None) if part is None else _halves(part) for part in batch]
    return tuple(zip(*parts, strict=True)) if all(parts) else ()


def over(
    measure: Measure[R], model: Any, batches: Iterable[Any], *, what: str, verbose: bool, n_batches: int | None = None
) -> R:
    """What a measure finds in batches of any kind, added up in their order."""
    found = totals(measure, model, tqdm(batches, what, n_batches, disable=not verbose), Total())
    (last,) = deque(found, maxlen=1)
    result: Any = last.result
    return result


def over_prompts(measure: Measure[R], model: Any, prompts: Prompts, *, what: str, verbose: bool) -> R:
    """What a measure finds in prompts, batch by batch as `token_batches` reads them."""
    batches = token_batches(model, prompts, what=what)
    return over(measure, model, batches, what=what, verbose=verbose, n_batches=n_batches(prompts))


def n_batches(prompts: object) -> int | None:
    """How many batches prompts are read as; None where only reading them tells."""
    if isinstance(prompts, (str, Tensor)):
        return 1
    return len(prompts) if isinstance(prompts, Sized) else None
