"""Looped language models as first-class TransformerLens models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import (
        ablation,
        analysis,
        attribution,
        checkpoints,
        exits,
        families,
        interventions,
        metrics,
        patching,
        path_patching,
        plots,
        report,
        results,
        toys,
        weight_gradients,
    )
    from .bridge.cache import LoopedCache
    from .bridge.looped_bridge import LoopedBridge
    from .config import LoopedConfig
    from .errors import LoopedError
    from .results import load_result
    from .runs import run
    from .schedule import Schedule
    from .side_by_side import compare

    __version__: str

__all__ = [
    "LoopedBridge",
    "LoopedCache",
    "LoopedConfig",
    "LoopedError",
    "Schedule",
    "ablation",
    "analysis",
    "attribution",
    "checkpoints",
    "compare",
    "exits",
    "families",
    "interventions",
    "load_result",
    "metrics",
    "patching",
    "path_patching",
    "plots",
    "report",
    "results",
    "run",
    "toys",
    "weight_gradients",
]
# Where the names above that are no modules stand. Everything is imported when it is first asked for: torch and
# TransformerLens take seconds, which `tl-looped --help` has no use for.
_HOMES = {
    "LoopedBridge": "bridge.looped_bridge",
    "LoopedCache": "bridge.cache",
    "LoopedConfig": "config",
    "LoopedError": "errors",
    "load_result": "results",
    "run": "runs",
    "Schedule": "schedule",
    "compare": "side_by_side",
}


def __getattr__(name: str) -> object:
    from importlib import import_module, metadata

    if name == "__version__":
        found: object = metadata.version("tl-looped")
    elif name in _HOMES:
        found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in __all__:
        found = import_module(f".{name}", __name__)
    else:
        import sys

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
