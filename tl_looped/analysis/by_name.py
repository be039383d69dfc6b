"""The analyses that take prompts, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from .. import analysis
from ..errors import LoopedError


def _takes_prompts(function: Any) -> bool:
    return inspect.isfunction(function) and "prompts" in inspect.signature(function).parameters


ANALYSES: dict[str, Callable[..., Any]] = {
    name: getattr(analysis, name) for name in analysis.__all__ if _takes_prompts(getattr(analysis, name))
}
SHORT = {"stages": "inference_stages"}


def analysis_of(name: str) -> Callable[..., Any]:
    """The analysis of a name.

    Args:
        name: as in `tl_looped.analysis`; "stages" is `inference_stages`.

    Raises:
        LoopedError: there is none, and the message lists them.
    """
    full = SHORT.get(name, name)
    if full not in ANALYSES:
        near = get_close_matches(str(name), [*ANALYSES, *SHORT], n=1)
        raise LoopedError(
            f"the analysis {name!r} was asked{f'; did you mean {near[0]}?' if near else '.'} There are {', '.join(ANALYSES)}."
        )
    return ANALYSES[full]


def settings_of(name: str) -> dict[str, Any]:
    """What an analysis can be asked, with the defaults; `inspect.Parameter.empty` where there is none.

    Args:
        name: of the analysis.
    """
    _, _, *settings = inspect.signature(analysis_of(name)).parameters.values()
    return {setting.name: setting.default for setting in settings if setting.name != "verbose"}
