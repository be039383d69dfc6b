"""Offline, seeded tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time, on small matrices: more threads only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # which commands that a test starts inherit

import hypothesis
import jaxtyping
import pytest
import torch
from zoo import changed_bridges

hypothesis.settings.register_profile("any machine", deadline=None)  # by default, 200 ms an example
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_bridges_stay():
    yield
    assert changed_bridges() == []


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def unchecked():
    """Switch the type checker off where it is on (`make test` runs some tests so): bad input meets the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
