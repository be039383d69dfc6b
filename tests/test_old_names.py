"""Names of the release before import once more, and say where they are now."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch

import tl_looped
from tl_looped import _old_names, analysis
from tl_looped.exits import GenerationReport


@pytest.mark.parametrize(("old", "new"), sorted(_old_names.MODULES.items()))
def test_a_module_that_moved_imports_under_its_former_name(old: str, new: str) -> None:
    sys.modules.pop(f"tl_looped.{old}", None)
    with pytest.warns(FutureWarning, match=rf"tl_looped\.{old} is now tl_looped\.{new}\."):
        module = import_module(f"tl_looped.{old}")
    held = vars(import_module(f"tl_looped.{new}"))
    public = [name for name in held if not name.startswith("_") and getattr(held[name], "__module__", "") == f"tl_looped.{new}"]
    assert public and all(getattr(module, name) is held[name] for name in public)


@pytest.mark.parametrize(
    ("statement", "home"),
    [
        ("from tl_looped.analysis import logit_lens", "tl_looped.lenses.logit_lens"),
        ("from tl_looped.analysis import LogitLensResult as logit_lens", "tl_looped.lenses.lens_result"),
        ("from tl_looped.analysis.more_loops import stability as logit_lens", "tl_looped.analysis.more_loops"),
        ("from tl_looped.analysis.more_loops import injection_effect as logit_lens", "tl_looped.analysis.injection_effect"),
        ("from tl_looped.analysis.inference_stages import output_neurons as logit_lens", "tl_looped.analysis.output_neurons"),
        ("from tl_looped import plots; logit_lens = plots.heat_map", "tl_looped.figures.plots"),
        ("from tl_looped.path_patching import path_patch as logit_lens", "tl_looped.attribution.paths"),
        ("from tl_looped.toys.stages import repetition as logit_lens", "tl_looped.analysis.stage_order"),
        ("from tl_looped.toys.stages import untrained as logit_lens", "tl_looped.toys.text"),
    ],
)
def test_statements_of_the_release_before(statement: str, home: str) -> None:
    found: dict[str, object] = {}
    for old in _old_names.MODULES:
        sys.modules.pop(f"tl_looped.{old}", None)
        vars(tl_looped).pop(old, None)
    with pytest.warns(FutureWarning, match="is now") as seen:
        exec(compile(statement, "a notebook", "exec"), found)
    assert {warning.filename for warning in seen} == {"a notebook"}
    assert found["logit_lens"].__module__ == home


def test_a_name_that_never_was_is_still_an_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("tl_looped.nothing")
    with pytest.raises(ImportError):
        exec("from tl_looped.analysis import nothing")


def test_the_analysis_of_more_loops_was_called_stability() -> None:
    found: dict[str, object] = {}
    with pytest.warns(FutureWarning, match=r"analysis\.\w+ is now tl_looped\.analysis\.(more_loops|MoreLoops)\."):
        exec("from tl_looped.analysis import Stability, stability", found)
    assert found["Stability"] is analysis.MoreLoops and found["stability"] is analysis.more_loops


def test_what_was_removed_says_why() -> None:
    with pytest.raises(ImportError, match=r"attention_bound is no more: .* proposition 4\.2 by hand\."):
        exec("from tl_looped.analysis import attention_bound")


def test_passes_per_token_are_loops() -> None:
    report = GenerationReport(torch.tensor([[2, 3]]), 4, 1.0)
    with pytest.warns(FutureWarning, match="loops_per_token"):
        assert report.passes_per_token is report.loops_per_token
