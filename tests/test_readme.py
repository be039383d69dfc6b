"""The README's code and commands, run as they stand there."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from tl_looped.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_print_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """A block of text after Python is what that prints."""
    namespace: dict[str, object] = {}
    for block, shown in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
        assert capsys.readouterr().out == shown
    pattern, patched = namespace["pattern"], namespace["patched"]
    assert isinstance(pattern, torch.Tensor) and tuple(pattern.shape) == (1, 4, 11, 11)
    assert isinstance(patched, torch.Tensor) and not torch.allclose(patched, namespace["model"]("A c B d C b D a ? A"))


def test_the_readme_is_short() -> None:
    outside = re.sub(r"<!-- families.*?<!-- end -->", "", README, flags=re.DOTALL)  # a row for every family is no prose
    assert len(outside.splitlines()) < 135
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 12


def test_the_start_page_shows_the_same() -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert all(f"```python\n{block}```" in page for block in blocks("python"))


def test_commands_print_what_the_readme_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks("console"):
        command, expected = block.removeprefix("$ ").split("\n", 1)
        assert main(shlex.split(command)[1:]) == 0
        assert capsys.readouterr().out.strip() == expected.strip()


EXAMPLES = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in sorted((ROOT / "tl_looped").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_docstring_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), extraglobs={"torch": torch})
    assert found.attempted > 0 and found.failed == 0
