"""Analyses over many prompts that may be interrupted: one file keeps what is done, and running again goes on there."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._writing import remove_drafts
from .bridge.looped_bridge import LoopedBridge
from .errors import LoopedError
from .looped import check_model
from .results import Grid, Result, load_result
from .schedule import check_count

__all__ = ["Run", "run"]

OnError = Literal["raise", "skip"]
MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)  # of who wrote the call, not of a prompt
FIXED = (str, int, float, tuple, slice, Tensor, FunctionType)  # what a function may hold that makes it another one
N_ALIKE = 3  # first prompts that fail by the same mistake: the others would too


@dataclass(frozen=True, eq=False)
class Run(Result):
    """What `run` has done so far.

    Args:
        result: the sum of the results of all prompts that are done; None before the first.
        failed: the prompts that failed, as (index, reason).
        done: how many prompts were tried, from the first on.
        n_prompts: how many there are.
        asked: what was asked: the analysis, its settings and a digest of the prompts.
    """

    result: Any
    failed: tuple[tuple[int, str], ...]
    done: int
    n_prompts: int
    asked: dict[str, str]

    def to_dataframe(self) -> Any:
        """The table of the result."""
        return self._there().to_dataframe()

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """The figure of the result, with its arguments.

        Args:
            *args: as for the result.
            **kwargs: as for the result.
        """
        return self._there().plot(*args, **kwargs)

    def _there(self) -> Any:
        if self.result is None:
            first = f"; prompt {self.failed[0][0]}: {self.failed[0][1]}" if self.failed else ""
            raise LoopedError(f"none of {self.done} prompts has a result{first}")
        return self.result


def run(
    analysis: Callable[..., Any],
    model: LoopedBridge,
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
        >>> from tl_looped import LoopedBridge, LoopedConfig
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
    if not isinstance(prompts, Iterable):
        raise LoopedError(f"run was asked of a {type(prompts).__name__}; pass a list of prompts.")
    if isinstance(prompts, (str, Tensor)):
        raise LoopedError("run was asked of one prompt; call the analysis itself, or pass a list of prompts.")
    every, asked_for = check_count("every", every), list(prompts)
    if not asked_for:
        raise LoopedError("run was asked of no prompts; pass at least one.")
    quiet = {"verbose": False} if "verbose" in inspect.signature(analysis).parameters else {}
    asked = {"analysis": _described(analysis), **{k: _described(v) for k, v in settings.items()}, "prompts": _digest(asked_for)}
    asked |= {"loops of the model": str(model.n_loops), "hooks": _hooks(model)}
    try:
        inspect.signature(analysis).bind(model, asked_for[0], **quiet, **settings)
    except TypeError as error:
        raise LoopedError(f"{asked['analysis']} was asked with {', '.join(settings) or 'no settings'}: {error}.") from error
    state = Run(None, (), 0, len(asked_for), asked)
    remove_drafts(out)
    if Path(out).exists():
        state = _begun(out, state, model)
    bar = tqdm(total=len(asked_for), initial=state.done, desc=getattr(analysis, "__name__", "run"), disable=not verbose)
    written = state.done if Path(out).exists() else -1
    try:
        for index in range(state.done, len(asked_for)):
            try:
                found = analysis(model, asked_for[index], **quiet, **settings)
                total = found if state.result is None else state.result + found
                state = replace(state, result=total, done=index + 1)
            except Exception as error:
                if on_error == "raise":
                    raise LoopedError(
                        f"prompt {index} of {len(asked_for)} failed: {error} The {index} before it are in {str(out)!r}. Mend "
                        'the cause and run again, which goes on there, or leave such prompts out with on_error="skip".'
                    ) from error
                reason = f"{type(error).__name__}: {error}"
                state = replace(state, failed=(*state.failed, (index, reason)), done=index + 1)
                if isinstance(error, MISTAKES) and _all_alike(state):
                    state = replace(state, failed=(), done=0)  # no prompt is to blame, and none is left out when it is mended
                    raise LoopedError(
                        f"the first {index + 1} of {len(asked_for)} prompts failed alike: {reason}. This is no matter of a "
                        "prompt; mend the call and run again."
                    ) from error
                bar.set_postfix(failed=len(state.failed))
            bar.update()
            if state.done - max(written, 0) >= every:
                state.save(out, model)
                written = state.done
    except KeyboardInterrupt:
        state.save(out, model)
        written = state.done
        print(
            f"{state.done} of {len(asked_for)} prompts are in {str(out)!r}; the same call goes on with the next.",
            file=sys.stderr,
        )
        raise
    finally:
        bar.close()
        if state.done != written:
            state.save(out, model)
    return state


def _begun(out: str | Path, wanted: Run, model: LoopedBridge) -> Run:
    """What a file has of a run, if it is this one."""
    found = load_result(out, model)
    if not isinstance(found, Run):
        raise LoopedError(f"{str(out)!r} is a {type(found).__name__} and no unfinished run; choose another file.")
    for name in {**found.asked, **wanted.asked}:
        before, now = found.asked.get(name), wanted.asked.get(name)
        if before != now:
            what = "of other prompts" if name == "prompts" else f"with {name}={before}, not {now}"
            raise LoopedError(f"{str(out)!r} is a run {what}; choose another file, or remove this one to begin anew.")
    return found


def _all_alike(state: Run) -> bool:
    """Whether all prompts so far failed, for one reason, and they are enough to tell of the others."""
    reasons = [reason for _, reason in state.failed]
    return len(reasons) == state.done == min(N_ALIKE, state.n_prompts) and len(set(reasons)) == 1


def _hooks(model: LoopedBridge) -> str:
    """Every hooked point of a model and what its hooks are; "None" without hooks."""
    points = {id(point): (name, point) for name, point in reversed(model.hook_dict.items())}  # an alias is no other point
    hooks = [
        f"{name} {_described(getattr(handle, 'user_hook', None))}"
        for name, point in reversed(points.values())
        for handle in (*point.fwd_hooks, *point.bwd_hooks)
    ]
    return ", ".join(hooks) or "None"


def _described(value: Any) -> str:
    """The same text for the same value, in every process."""
    if isinstance(value, functools.partial):
        held = [value.func, *value.args, *(part for pair in sorted(value.keywords.items()) for part in pair)]
        return f"partial({', '.join(map(_described, held))})"
    if isinstance(value, (Tensor, list, tuple)):
        return f"{type(value).__name__} {_digest(value)}"
    if isinstance(value, dict):
        return f"dict {_digest(list(value.items()))}"
    if isinstance(value, Grid):
        return f"{type(value).__name__} {_digest([value.values, *value.axes])}"
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        code = getattr(value, "__code__", None)
        held = [] if code is None else [code.co_code.hex(), repr([c for c in code.co_consts if not isinstance(c, CodeType)])]
        held += [_described(c) for c in _enclosed(value) if isinstance(c, FIXED)]
        tells = "<lambda>" in value.__qualname__ or "<locals>" in value.__qualname__  # what the name leaves open
        return f"{value.__module__}.{value.__qualname__}" + (f" {_digest(held)}" if tells else "")
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is another in every process


def _enclosed(function: Any) -> list[Any]:
    """What a function holds from around it; what may change while it runs is no part of what was asked."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def _digest(value: Any) -> str:
    """Of nested lists of texts and tensors."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            whole = part.detach().cpu().clone(memory_format=torch.contiguous_format)  # a row shares the storage of its batch
            found.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
            found.update(bytes(whole.untyped_storage()))
        elif isinstance(part, (list, tuple)):
            found.update(f"[{len(part)}".encode())
            for one in part:
                add(one)
        else:
            text = _described(part) if not isinstance(part, str) else part
            found.update(f"{type(part).__name__}{len(text)}:{text}".encode())

    add(value)
    return found.hexdigest()[:16]
