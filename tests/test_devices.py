"""A model on another device than the prompts, on a machine that has one device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_model_on_a_device_answers_prompts_of_the_cpu() -> None:
    script = Path(__file__).with_name("on_pretended_device.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
