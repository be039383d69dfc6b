"""Offline, seeded tests."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time, on small matrices: more threads only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # which commands that a test starts inherit

import hypothesis
import jaxtyping
import pytest
import torch
from zoo import changed_bridges

from tl_looped.runs.shares import ARRAY, RANKS

hypothesis.settings.register_profile("any machine", deadline=None)  # by default, 200 ms an example
hypothesis.settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """What was imported stays. To walk over all of it whenever tests have left some models took a tenth of their time."""
    gc.set_threshold(5000, 10, 20)  # nothing is frozen: with every model that is made, all that is would be counted


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher and no Slurm started this process, whatever started the tests."""
    for name in {*ARRAY, *(name for names in RANKS for name in names)}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _shared_bridges_stay():
    yield
    assert changed_bridges() == []


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the command makes when it is told nothing, with its numbers beside it."""
    from tl_looped.cli import main

    file = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", "--out", str(file), "--json"]) == 0
    return file


@pytest.fixture(scope="session")
def report_numbers(report_page: Path) -> dict[str, Any]:
    """The numbers of every section of `report_page`."""
    found = json.loads(report_page.with_suffix(".json").read_text())
    return {section["name"]: section for section in found["sections"]}


@pytest.fixture
def unchecked():
    """Switch the type checker off where it is on (`make test` runs some tests so): bad input meets the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
