"""The promised costs. Measured in a fresh process: the type checker of the tests would be measured with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark


def test_overhead_is_within_its_limits() -> None:
    script = Path(__file__).with_name("overhead.py")
    out = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True).stdout
    print(out)
    measured = json.loads(out)
    wide, narrow = measured["d_model 1024, 64 positions"], measured["d_model 64, 16 positions"]
    assert wide["forward"] <= 1.10
    assert wide["cache residuals"] <= 1.15
    assert narrow["forward"] <= 2.0
    assert measured["seconds to build 132 virtual layers"] < 5
