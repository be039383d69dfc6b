"""`check_family`: every check, asked of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import LoopedError
from ..looped import Looped, check_model
from . import parity
from .case import Case, Fault
from .checks import CHECKS
from .report import FamilyError, FamilyReport, Outcome

Reference = Callable[[Tensor], Tensor]


def check_family(
    model: Looped | str | Path,
    *,
    reference: Reference | None = None,
    tokens: Int[Tensor, "batch pos"] | None = None,
    checks: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> FamilyReport:
    """Ask a looped model all that every family must pass.

    The model is run some hundred times on a few tokens; a random one of small sizes takes seconds. Every check passes, is
    refused by the model with its reason, or fails with a sentence.

    Args:
        model: a `LoopedBridge`, a traced model, or what `LoopedBridge.from_pretrained` takes.
        reference: what the logits [batch, pos, d_vocab] must be, from tokens [batch, pos]: the published code. By default
            transformers' own class, if a checkpoint is given whose architecture it has.
        tokens: two rows or more to run on; by default random ones.
        checks: the names of those that are asked; None for all.
        tolerance: how far numbers may be apart that must be the same, in units of the largest logit; None for 2e-4 in float32,
            1e-9 in float64 and 5e-2 in half precision.

    Returns:
        What came of every check; in a notebook a table.

    Raises:
        FamilyError: checks failed; the message lists them.
        LoopedError: there is no such model or check, or it does not run.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> check_family(model, checks=["names", "own cache", "one pass"])
        custom: 3 passed
        passed   names          every hook has a name, and every name its hook: 343 hooks
        passed   own cache      a run is patched with its own activations: logits of all runs differ by 0
        passed   one pass       a patch of a pass leaves earlier ones as they were: 3 passes patched
    """
    unknown = [name for name in checks or () if name not in (parity.NAME, *CHECKS)]
    if unknown:
        raise LoopedError(f"checks={unknown} were asked; there are {', '.join((parity.NAME, *CHECKS))}.")
    if isinstance(model, (str, Path)):
        reference = reference or parity.of_transformers(model)
        from ..bridge.looped_bridge import LoopedBridge

        model = LoopedBridge.from_pretrained(model)
    check_model(model)
    with torch.no_grad():
        case = Case.of(model, tokens, tolerance)
    asked: dict[str, tuple[str, Callable[[Case], str]]] = {parity.NAME: (parity.ASKS, parity.check(reference)), **CHECKS}
    outcomes = [_outcome(name, *asked[name], case) for name in asked if checks is None or name in checks]
    report = FamilyReport(str(getattr(getattr(model, "looped_cfg", None), "family", type(model).__name__)), tuple(outcomes))
    if report.failed:
        raise FamilyError(report)
    return report


def _outcome(name: str, asks: str, check: Callable[[Case], str], case: Case) -> Outcome:
    """What came of a check: a model refuses with a `LoopedError`, everything else that is raised is a failure."""
    try:
        with torch.no_grad():
            return Outcome(name, asks, "passed", check(case))
    except Fault as fault:
        return Outcome(name, asks, "failed", str(fault))
    except LoopedError as refusal:
        return Outcome(name, asks, "failed" if name in ("names", "own cache", "one pass") else "refused", str(refusal))
    except Exception as error:
        said: Any = str(error).strip() or "no message"
        return Outcome(name, asks, "failed", f"it raised {type(error).__name__}: {said}")
