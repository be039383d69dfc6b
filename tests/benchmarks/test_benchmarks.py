"""The promised costs. Measured in a fresh process: the type checker of the tests would be measured with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark


def measured(script: str) -> dict:
    out = subprocess.run([sys.executable, Path(__file__).with_name(script)], check=True, capture_output=True, text=True).stdout
    print(out)
    return json.loads(out)


def test_overhead_is_within_its_limits() -> None:
    found = measured("overhead.py")
    wide, narrow = found["d_model 1024, 64 positions"], found["d_model 64, 16 positions"]
    assert wide["forward"] <= 1.10
    assert wide["cache residuals"] <= 1.15
    assert narrow["forward"] <= 2.0
    assert found["seconds to build 132 virtual layers"] < 5


def test_sweeps_are_faster_than_one_run_per_cell() -> None:
    narrow, wide, hrm = measured("sweeps.py").values()
    assert narrow["resid_pre: transformer_lens"] >= 8 and narrow["z: transformer_lens"] >= 5
    assert wide["resid_pre: transformer_lens"] >= 2.5 and wide["z: transformer_lens"] >= 2
    assert hrm["resid_post: nnsight (one position timed)"] > 1
