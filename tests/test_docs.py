"""The documentation's code, run as it stands there, and its files against each other."""

from __future__ import annotations

import ast
import doctest
import importlib.metadata
import pkgutil
import re
import runpy
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_lens.patching
import yaml

import tl_looped
from tl_looped.bridge.generation import GeneratingBridge

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def snippets(page: str) -> list[tuple[str | None, str]]:
    """The Python blocks of a page, each with the label of the tab it stands in."""
    found: list[tuple[str | None, str]] = []
    tab, block = None, None
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines(keepends=True):
        if block is None and not line.startswith((" ", "\n")):  # back at the margin
            tab = match[1] if (match := re.fullmatch(r'=== "(.*)"\n', line)) else None
        if block is not None and line.strip() == "```":
            found.append((tab, textwrap.dedent("".join(block))))
            block = None
        elif block is not None:
            block.append(line)
        elif line.strip().startswith("```python"):
            block = []
    return found


def run(page: str, tabs: tuple[str, ...], tmp_path: Path) -> dict[str, Any]:
    """Run the blocks outside tabs and in the given ones, as one file, as nnsight reads its source."""
    code = "\n\n".join(block for tab, block in snippets(page) if tab is None or tab in tabs)
    file = tmp_path / page.replace(".md", ".py")
    file.write_text(code, encoding="utf-8")
    return runpy.run_path(str(file))


@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_tl_looped_and_transformer_lens_do_what_the_page_says(tmp_path: Path) -> None:
    found = run("coming_from.md", ("tl_looped", "TransformerLens"), tmp_path)
    for ours, theirs in (("logits", "their_logits"), ("states", "states_by_hand"), ("patched", "patched_by_hand")):
        torch.testing.assert_close(found[ours], found[theirs], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found["patched"], found["model"](found["corrupted"]), atol=1e-3)
    assert tuple(found["patterns"].shape) == (6, 2, 1, 4, 5, 5)
    assert tuple(found["parts"].shape) == (6, 32, 48)
    with pytest.raises(KeyError):
        transformer_lens.patching.get_act_patch_resid_pre(
            found["bridge"], found["corrupted"], found["their_cache"], found["metric"]
        )
    torch.testing.assert_close(found["seen"][0], found["gradients"]["blocks.13.hook_out"], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_nnsight_agrees_too(tmp_path: Path) -> None:
    pytest.importorskip("nnsight", reason="nnsight is in the extra `bench`")
    found = run("coming_from.md", ("tl_looped", "nnsight"), tmp_path)
    torch.testing.assert_close(found["third_call"], found["third"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.stack([layers[1] for layers in found["calls"]]), found["states"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["patched_logits"], found["patched"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["cell"](2, 1, -1), found["patched"], atol=1e-5, rtol=1e-4)
    for loop, layer, pos in ((0, 1, 4), (2, 0, 4), (5, 1, 2)):
        cell = found["metric"](found["cell"](loop, layer, pos))
        torch.testing.assert_close(cell, found["sweep"].values[loop, layer, pos], atol=1e-5, rtol=1e-4)


PAGES = ["index.md", "concepts.md", "experiments.md", "explorer.md", "datasets.md", "devices.md", "toys.md"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_run(page: str, tmp_path: Path) -> None:
    assert run(page, (), tmp_path)


def test_the_reference_has_every_public_module() -> None:
    named = set(re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), flags=re.MULTILINE))
    inside = {"bridge", "model", "sites", "traced"}  # the reference names what is public in them
    rooms = {"analysis", "attribution", "figures", "lenses", "patching"}
    inside |= {"patching.batches", "patching.clean_run", "figures.token_grid", "figures.tokens_shown"}
    modules = {m.name for m in pkgutil.iter_modules(tl_looped.__path__) if not m.name.startswith("_")} - rooms
    for room in rooms:
        path = import_module(f"tl_looped.{room}").__path__
        modules |= {f"{room}.{m.name}" for m in pkgutil.iter_modules(path) if not m.name.startswith("_")}
    assert {f"tl_looped.{name}" for name in modules - inside} <= named and "tl_looped.LoopedConfig" in named
    public = {f"tl_looped.{name}" for name in tl_looped.__all__ if isinstance(getattr(tl_looped, name), type)}
    assert public - named == {"tl_looped.Schedule"} and "tl_looped.schedule" in named


@pytest.mark.parametrize("name", ["LoopedBridge", "LoopedCache", "interventions"])
def test_what_is_spread_over_several_pages_is_all_there(name: str) -> None:
    text = "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md"))
    named = set(re.findall(rf"^::: tl_looped\.{name}\.(\w+)$", text, flags=re.MULTILINE))
    (listed,) = re.findall(rf"^::: tl_looped\.{name}\n +options: {{members: \[(.*)\]", text, flags=re.MULTILINE)
    whole = getattr(tl_looped, name)
    if isinstance(whole, type):
        own = [part for part in whole.__mro__ if part.__module__.startswith("tl_looped") and part is not GeneratingBridge]
        public = {key for part in own for key, value in vars(part).items() if not key.startswith("_") and _documented(value)}
    else:
        public = {*whole.__all__}
    again = {"boot_native", "boot_tl_legacy"}  # refuse as boot_transformers does
    assert named | {*listed.split(", ")} == public - again


def _documented(value: object) -> bool:
    """Whether an attribute of a class is shown: a method or property with a docstring."""
    return bool(getattr(value, "__doc__", None)) and not isinstance(value, (str, int, tuple, dict, type(None)))


MEASURED = r"\d ?± ?\d|\| x \d|\d [GM]B/s|tokens per second|^!\[.*\.png\)"
DATE = r"(January|February|March|April|May|June|July|August|September|October|November|December) 20\d\d"


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "tutorials").glob("[0-9]*.py")], ids=str)
def test_pages_with_measured_numbers_or_pictures_say_on_which_machine_and_when(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py" or re.search(MEASURED, text, flags=re.MULTILINE):
        assert re.search(DATE, text), f"{page.name} says not when"
        assert re.search(r"\b(server|H100|machine)\b", text), f"{page.name} says not where"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_examples_in_docstrings_are_all_run() -> None:
    missed = []
    for path in sorted((ROOT / "tl_looped").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        docstrings = [ast.get_docstring(node) or "" for node in nodes]
        found = doctest.DocTestFinder().find(importlib.import_module(name))
        if sum(text.count(">>> ") for text in docstrings) != sum(len(test.examples) for test in found):
            missed.append(name)
        assert not any("```" in text for text in docstrings), f"{name}: write code in docstrings as >>> examples"
    assert missed == []


def test_the_citation_file() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["message"] and citation["title"]
    assert citation["authors"] == [{"name": "tl_looped developers"}]
    assert citation["version"] == importlib.metadata.version("tl-looped") and citation["license"] == "MIT"
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference) and all(
            set(author) == {"name"} for author in reference["authors"]
        )
