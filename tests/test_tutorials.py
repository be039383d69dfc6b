"""The notebooks of `tutorials/`: executed, in step with their scripts, and with outputs that may be published."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tutorials"
sys.path.insert(0, str(FOLDER))

from build import execute, from_script  # noqa: E402

NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MOST_BYTES = 1_500_000  # of which images of figures are about half
TRAINS = {"06_train_your_own"}  # many steps amplify rounding; its hidden cells bound what its text claims
ELSEWHERE = r"/(?:home|root|Users|tmp|opt|usr|var|private)/|[A-Z]:\\\\|site-packages"  # paths of the machine that ran them


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_every_script_has_its_notebook() -> None:
    assert NAMES == [path.stem for path in sorted(FOLDER.glob("[0-9][0-9]_*.py"))] != []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_and_script_have_the_same_cells(path: Path) -> None:
    """If not: `python tutorials/build.py NAME`."""
    ours, theirs = (
        [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]
        for notebook in (read(path), from_script(path.with_suffix(".py")))
    )
    assert ours == theirs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs_are_committed_whole_and_small(path: Path) -> None:
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    figures = [output.data for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert figures and all("image/png" in figure for figure in figures)  # what viewers without scripts show
    assert not any("<s>" in str(figure["application/vnd.plotly.v1+json"]) for figure in figures)  # a tag to plotly
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert "circuitsvis" not in str(outputs) and str(ROOT) not in text
    assert (found := re.search(ELSEWHERE, str(outputs))) is None, found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_begins_as_expected_and_checks_itself(path: Path) -> None:
    """A badge that opens this notebook, the installation on Colab, one constant for the model; hidden cells with assertions."""
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and f"/blob/main/tutorials/{path.name}" in cells[0].source
    assert "colab-badge.svg" in cells[0].source.splitlines()[0]
    assert "import google.colab" in cells[1].source and re.search(r"^ +%pip install", cells[1].source, re.MULTILINE)
    assert any(re.search(r"^MODEL = ", cell.source, re.MULTILINE) for cell in cells[:4])
    hidden = [cell for cell in cells if "remove-cell" in cell.metadata.get("tags", [])]
    assert any("assert " in cell.source for cell in hidden)
    assert any("<details>" in cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.tutorials
@pytest.mark.filterwarnings("ignore")  # of the kernel's client
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the matrices are small, and two notebooks run at a time
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    committed, fresh = read(path), read(path)
    execute(fresh, tmp_path)
    if path.stem not in TRAINS:
        for before, after in zip(committed.cells, fresh.cells, strict=True):
            assert_same_figures(printed(before), printed(after))


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell has printed."""
    return "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")


def assert_same_figures(before: str, after: str) -> None:
    """The same text, and numbers as near as other kernels of torch bring them.

    Numbers are printed with three digits or so: 2 % covers the last of them, 0.02 differences of nearly equal ones.
    """
    number = r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?"
    assert re.sub(number, "#", before).split() == re.sub(number, "#", after).split()
    found = [[float(n) for n in re.findall(number, text)] for text in (before, after)]
    assert found[1] == pytest.approx(found[0], rel=0.02, abs=0.02)


def test_a_figure_that_has_drifted_is_noticed() -> None:
    assert_same_figures("loss 3.461 ± 0.02", "loss 3.462 ±  0.03")
    for drifted in ("loss 3.661 ± 0.02", "gain 3.461 ± 0.02", "loss 3.461"):
        with pytest.raises(AssertionError):
            assert_same_figures("loss 3.461 ± 0.02", drifted)
