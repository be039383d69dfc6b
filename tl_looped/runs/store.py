"""`run`: one file keeps what is done of many prompts, and running again goes on there."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor
from tqdm.auto import tqdm

from .._old_names import NAMES
from .._writing import remove_drafts
from ..errors import LoopedError
from ..looped import Looped, check_model
from ..panels import Panel
from ..results import Result, load_result
from ..schedule import check_count
from .asked import described, digest, hooks_of
from .driver import Total, totals
from .prompts import each_prompt

OnError = Literal["raise", "skip"]


@dataclass(frozen=True, eq=False)
class Run(Result):
    """What `run` has done so far.

    Args:
        result: the sum of the results of all prompts that are done; None before the first.
        failed: the prompts that failed, as (index, reason).
        done: how many prompts were tried, from the first on.
        n_prompts: how many there are.
        asked: what was asked: the analysis, its settings and a digest of the prompts.
        order: the prompts in the order in which they were added; empty for their own order.
    """

    result: Any
    failed: tuple[tuple[int, str], ...]
    done: int
    n_prompts: int
    asked: dict[str, str]
    order: tuple[int, ...] = ()

    def to_dataframe(self) -> Any:
        """The table of the result."""
        return self._there().to_dataframe()

    def panels(self, *args: Any, **kwargs: Any) -> list[Panel]:
        """The panels of the result, with its arguments.

        Args:
            *args: as for the result.
            **kwargs: as for the result.
        """
        return self._there().panels(*args, **kwargs)

    def _there(self) -> Any:
        if self.result is None:
            first = f"; prompt {self.failed[0][0]}: {self.failed[0][1]}" if self.failed else ""
            raise LoopedError(f"none of {self.done} prompts has a result{first}")
        return self.result


def run(
    analysis: Callable[..., Any],
    model: Looped,
    prompts: Iterable[Any],
    *,
    out: str | Path,
    every: int = 20,
    on_error: OnError = "raise",
    verbose: bool = True,
    **settings: Any,
) -> Run:
    """Run an analysis prompt by prompt, add the results up, and keep them in a file that a later call goes on from.

    However often the work was stopped, by Ctrl-C, an error, a kill or a power cut, the sum is that of one run, bit for bit on
    one machine: prompts are added one by one, in their order, and the file holds the sum in full precision.

    Args:
        analysis: called as `analysis(model, prompt, **settings)`; what it returns must add up, as the results of
            `tl_looped.analysis` do. A function of your own may take more than a text as its prompt, such as a pair.
        model: the model.
        prompts: texts, tokens, or whatever the analysis takes, one by one.
        out: the file. One of other prompts, settings, weights or another analysis is refused, not replaced.
        every: how many prompts between two writes.
        on_error: "raise" stops at a prompt that fails and names it; "skip" lists it in `failed` and goes on, but stops where
            the first prompts all fail by the same mistake in the code, as a `TypeError` is.
        verbose: show a progress bar.
        **settings: of the analysis.

    Raises:
        LoopedError: a prompt failed; the file is that of another run, or cannot be written; no prompts.

    Example:
        >>> import tempfile, torch
        >>> from tl_looped import LoopedBridge, LoopedConfig, run
        >>> from tl_looped.analysis import fixed_points
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> prompts = list(torch.arange(12).view(4, 3) % 10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     settings = {"out": f"{folder}/run.safetensors", "n_loops": 4, "verbose": False}
        ...     half = run(fixed_points, model, [*prompts[:3], torch.tensor([99])], on_error="skip", **settings)
        >>> half.result.norm.count, half.failed[0][0]
        (3, 3)
    """
    if on_error not in get_args(OnError):
        raise LoopedError(f'on_error={on_error!r} was given; choose "raise" or "skip".')
    check_model(model)
    if isinstance(prompts, (str, Tensor)):
        raise LoopedError("run was asked of one prompt; call the analysis itself, or pass a list of prompts.")
    every, asked_for = check_count("every", every), list(each_prompt(prompts, "run"))
    if not asked_for:
        raise LoopedError("run was asked of no prompts; pass at least one.")
    measure = Asked(analysis, settings)
    asked = {"analysis": described(analysis), **{k: described(v) for k, v in settings.items()}, "prompts": digest(asked_for)}
    asked |= {"loops of the model": str(model.n_loops), "hooks": hooks_of(model)}
    try:
        inspect.signature(analysis).bind(model, asked_for[0], **measure.arguments)
    except TypeError as error:
        raise LoopedError(f"{asked['analysis']} was asked with {', '.join(settings) or 'no settings'}: {error}.") from error
    n = len(asked_for)
    state = Run(None, (), 0, n, asked)
    remove_drafts(out)
    if Path(out).exists():
        state = _begun(out, state, model)
    bar = tqdm(total=n, initial=state.done, desc=getattr(analysis, "__name__", "run"), disable=not verbose)
    written = state.done if Path(out).exists() else -1
    begun = Total(state.result, state.failed, state.done)
    found = totals(measure, model, asked_for[state.done :], begun, skip=on_error == "skip", n_batches=n)
    try:
        for total in found if on_error == "skip" else _naming(found, state, out):
            state = replace(state, result=total.result, failed=total.failed, done=total.done)
            bar.update()
            if state.failed:
                bar.set_postfix(failed=len(state.failed))
            if state.done - max(written, 0) >= every:
                state.save(out, model)
                written = state.done
    except KeyboardInterrupt:
        state.save(out, model)
        written = state.done
        print(f"{state.done} of {n} prompts are in {str(out)!r}; the same call goes on with the next.", file=sys.stderr)
        raise
    finally:
        bar.close()
        if state.done != written:
            state.save(out, model)
    return state


@dataclass(frozen=True)
class Asked:
    """An analysis and its settings, as a measure of one prompt.

    Args:
        analysis: called as `analysis(model, prompt, **settings)`.
        settings: of the analysis.
    """

    analysis: Callable[..., Any]
    settings: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings, and no bar of its own for an analysis that has one."""
        has_bar = "verbose" in inspect.signature(self.analysis).parameters
        return self.settings | ({"verbose": False} if has_bar else {})

    def __call__(self, model: Looped, prompt: Any) -> Any:
        """What the analysis finds in one prompt."""
        return self.analysis(model, prompt, **self.arguments)


def _naming(found: Iterator[Total[Any]], state: Run, out: str | Path) -> Iterator[Total[Any]]:
    """The same, with an error that says which prompt failed, and where those before it are."""
    done = state.done
    try:
        for total in found:
            done = total.done
            yield total
    except Exception as error:
        raise LoopedError(
            f"prompt {done} of {state.n_prompts} failed: {error} The {done} before it are in {str(out)!r}. Mend the cause and "
            'run again, which goes on there, or leave such prompts out with on_error="skip".'
        ) from error


def _begun(out: str | Path, wanted: Run, model: Looped) -> Run:
    """What a file has of a run, if it is this one."""
    found = load_result(out, model)
    if not isinstance(found, Run):
        raise LoopedError(f"{str(out)!r} is a {type(found).__name__} and no unfinished run; choose another file.")
    for name in {**found.asked, **wanted.asked}:
        before, now = found.asked.get(name), wanted.asked.get(name)
        if before != now and not (name == "analysis" and _same_analysis(before, now)):
            what = "of other prompts" if name == "prompts" else f"with {name}={before}, not {now}"
            raise LoopedError(f"{str(out)!r} is a run {what}; choose another file, or remove this one to begin anew.")
    return found


def _same_analysis(before: str | None, now: str | None) -> bool:
    """Whether two names are of one function of this package, which once lay in another file of it."""
    parts = [str(name).split(".") for name in (before, now)]
    if not all(part[0] == __name__.partition(".")[0] for part in parts):
        return False
    old, new = (f"analysis.{part[-1]}" for part in parts)
    return NAMES.get(old, old) == NAMES.get(new, new)
