"""The commands of the release before, `python -m tl_looped.toys.train` and `.stages`: the scripts are in experiments/ now."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

_EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def run(name: str) -> None:
    """Run a script of a checkout with the arguments of this process."""
    script = _EXPERIMENTS / name
    if not script.is_file():
        sys.exit(f"experiments/{name} is not installed with the package; run it in a checkout of the source.")
    runpy.run_path(str(script), run_name="__main__")
