"""The table of families, against the checkpoints, transformers, and the pages that show it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from zoo import CHECKPOINTS, GOLDEN, with_config

from tl_looped import LoopedBridge, families
from tl_looped.checkpoints import load_model
from tl_looped.cli import main
from tl_looped.errors import CheckpointError
from tl_looped.families import TABLE
from tl_looped.info import ABILITIES, families_text, lacking

ROOT = Path(__file__).parent.parent
PAGES: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "_build" / "families.py"), run_name="pages")
ROWS = {row.name: row for row in TABLE}


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/families.md"])
def test_pages_show_the_table_as_it_is(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- families: overview, written by" in text
    assert PAGES["written"](text) == text, "run: python docs/_build/families.py"


def test_a_page_that_is_behind_is_brought_up_to_date() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    behind = "\n".join(line for line in text.splitlines() if not line.startswith("| Ouro |"))
    assert "Ouro" not in behind and PAGES["written"](behind) == text.rstrip("\n")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_what_is_told_of_a_family_is_true_of_its_checkpoint(checkpoint: str) -> None:
    """What a real model lacks, and which of its options are refused."""
    model = LoopedBridge.from_pretrained(GOLDEN / checkpoint, device="cpu")
    row = ROWS[model.looped_cfg.family]
    assert row.small is not None and row.small.schedule.n_loops > 1
    assert [*lacking(row.small)] == [ability for ability in ABILITIES if model.lacks(ability) is not None]
    for key, value in row.refused.items():
        with pytest.raises(CheckpointError, match=key):
            load_model(with_config(checkpoint, **{key: value}))


def test_every_family_file_is_in_the_table_and_has_a_checkpoint() -> None:
    files = {path.stem for path in Path(families.__file__).parent.glob("[!_]*.py")} - {"table"}
    assert files == {row.module.__name__.rpartition(".")[2] for row in TABLE if row.module is not None}
    known = {LoopedBridge.from_pretrained(GOLDEN / name, device="cpu").looped_cfg.family for name in CHECKPOINTS}
    assert {name for name, row in ROWS.items() if row.module is not None} - known == {"tl_looped", "looped_llama"}


def test_transformers_has_the_architectures_that_it_is_said_to_have() -> None:
    def version(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text)[:2])

    for row in TABLE:
        since = row.transformers and version(row.transformers) <= version(transformers.__version__)
        assert (row.name in CONFIG_MAPPING_NAMES) == bool(since), row.name


@pytest.mark.parametrize("width", [80, 100])
def test_info_fits_a_terminal(width: int) -> None:
    text = families_text(width)
    assert max(map(len, text.splitlines())) <= width
    assert all(row.title in text for row in TABLE) and "`" not in text
    assert re.search(r"lacks\s+equal\s+loops,\s+exit\s+gate,\s+injection,\s+one\s+pattern", text)


def test_info_says_why_a_checkpoint_lacks_something(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["info", str(GOLDEN / "iquestloopcoder")]) == 0
    out = capsys.readouterr().out.partition("it lacks\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+ \w+|\w+)  ", out, flags=re.MULTILINE) == [
        "equal loops",
        "exit gate",
        "injection",
        "one pattern",
    ]
    assert max(map(len, out.splitlines())) <= 90 and "attend to the keys and values of the" in " ".join(out.split())


def test_what_no_family_knows_names_them_all() -> None:
    with pytest.raises(CheckpointError) as raised:
        families.detect({"model_type": "spiral"}, {})
    titles = [row.title for row in TABLE if row.name not in ("tl_looped", "looped_llama") and row.module is not None]
    assert ", ".join(titles) in str(raised.value)


def test_abilities_are_explained() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    explained = page.partition("| ability |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([a-z ]+) \|", explained, flags=re.MULTILINE) == list(ABILITIES)
