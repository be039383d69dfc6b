"""Public names of the release before: what moved can be imported once more, with a warning that says where it is now."""

from __future__ import annotations

import inspect
import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Not those of `analysis` that are called as what they hold: `from tl_looped.analysis import logit_lens` is the function.
MODULES = {
    "ablation": "patching.ablation",
    "answers": "lenses.answers",
    "attention_viewer": "figures.attention_viewer",
    "comparison": "patching.clean_run",
    "config": "model.config",
    "path_patching": "attribution.paths",
    "plots": "figures.plots",
    "side_by_side": "analysis.side_by_side",
    "sizes": "model.sizes",
    "weight_gradients": "attribution.weights",
}
NAMES = {
    **{f"analysis.{name}": f"lenses.{name}" for name in ("LogitLensResult", "Readout", "logit_lens")},
    **{f"toys.stages.{name}": f"analysis.stage_order.{name}" for name in "repetition resemblance as_one_pass spread".split()},
    **{f"toys.stages.{name}": f"toys.text.{name}" for name in ("held_out_windows", "untrained")},
    "analysis.Stability": "analysis.MoreLoops",
    "analysis.stability": "analysis.more_loops",
    "analysis.more_loops.Stability": "analysis.MoreLoops",
    "analysis.more_loops.stability": "analysis.more_loops",
    **{f"analysis.more_loops.{name}": f"analysis.{name}" for name in ("InjectionEffect", "injection_effect")},
    **{f"analysis.attention_stability.{name}": f"analysis.{name}" for name in ("attention_distances", "looped_floorplan")},
    "analysis.inference_stages.output_neurons": "analysis.output_neurons",
}
GONE = {
    "analysis.attention_bound": "it refused every rotary model; the fourth tutorial computes proposition 4.2 by hand",
}
PACKAGE = __name__.partition(".")[0]


class _Moved(MetaPathFinder, Loader):
    """Finds modules that moved; asked when no other finder knows a name."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a module under its former name."""
        package, _, old = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and old in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill it with what the new one holds."""
        new = MODULES[module.__name__.partition(".")[2]]
        _warn(module.__name__, f"{PACKAGE}.{new}")
        held = vars(import_module(f".{new}", PACKAGE))
        vars(module).update({name: value for name, value in held.items() if not name.startswith("__") or name == "__all__"})


def accept() -> None:
    """Let modules that moved be imported under their former names."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def moved(package: str, name: str) -> Any:
    """What a package once held under a name; an AttributeError if it never did."""
    old = f"{package}.{name}".partition(".")[2]
    if old in NAMES:
        home, _, new = NAMES[old].rpartition(".")
        _warn(f"{package}.{name}", f"{PACKAGE}.{NAMES[old]}")
        return getattr(import_module(f".{home}", PACKAGE), new)
    if old in MODULES and not name.startswith("_"):
        return import_module(f".{old}", PACKAGE)
    if old in GONE:
        raise ImportError(f"{package}.{name} is no more: {GONE[old]}.")  # of an AttributeError `from` keeps no word
    raise AttributeError(f"module {package!r} has no attribute {name!r}")  # Python adds name and module


def _warn(old: str, new: str) -> None:
    """Warn at the line that asked for the former name, through whatever imports it went."""
    frame = inspect.currentframe()
    while frame and frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (PACKAGE, "importlib"):
        frame = frame.f_back
    if frame:
        registry = frame.f_globals.setdefault("__warningregistry__", {})
        warnings.warn_explicit(
            f"{old} is now {new}.", FutureWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry
        )
