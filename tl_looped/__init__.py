"""Looped language models as first-class TransformerLens models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._old_names import accept, moved

if TYPE_CHECKING:
    from . import (
        activations,
        analysis,
        attribution,
        checkpoints,
        exits,
        explorer,
        families,
        figures,
        interventions,
        lenses,
        metrics,
        patching,
        report,
        results,
        toys,
    )
    from .activations import collect, load_activations
    from .analysis.side_by_side import compare
    from .bridge.cache import LoopedCache
    from .bridge.looped_bridge import LoopedBridge
    from .errors import LoopedError
    from .explorer import explore
    from .model.config import LoopedConfig
    from .results import load_result
    from .runs import analyze, run
    from .schedule import Schedule

    __version__: str

__all__ = [
    "LoopedBridge",
    "LoopedCache",
    "LoopedConfig",
    "LoopedError",
    "Schedule",
    "activations",
    "analysis",
    "analyze",
    "attribution",
    "checkpoints",
    "collect",
    "compare",
    "exits",
    "explore",
    "explorer",
    "families",
    "figures",
    "interventions",
    "lenses",
    "load_activations",
    "load_result",
    "metrics",
    "patching",
    "report",
    "results",
    "run",
    "toys",
]
# Where the names above that are no modules stand. Everything is imported when it is first asked for: torch and
# TransformerLens take seconds, which `tl-looped --help` has no use for.
_HOMES = {
    "LoopedBridge": "bridge.looped_bridge",
    "LoopedCache": "bridge.cache",
    "LoopedConfig": "model.config",
    "LoopedError": "errors",
    "collect": "activations",
    "explore": "explorer",
    "load_activations": "activations",
    "load_result": "results",
    "analyze": "runs",
    "run": "runs",
    "Schedule": "schedule",
    "compare": "analysis.side_by_side",
}


def __getattr__(name: str) -> object:
    from importlib import import_module, metadata

    if name == "__version__":
        try:
            found: object = metadata.version("tl-looped")
        except metadata.PackageNotFoundError:  # a directory on the path, as on machines where nothing can be installed
            found = "0+uninstalled"
    elif name in _HOMES:
        found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in __all__:
        found = import_module(f".{name}", __name__)
    else:
        return moved(__name__, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


accept()
