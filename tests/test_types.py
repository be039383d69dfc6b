"""Every public name of the package has a declared type, as pyright counts for an installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tl_looped"


@pytest.mark.slow
def test_every_public_name_has_a_type_that_all_type_checkers_agree_on(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").rglob("site-packages")
    shutil.copytree(PACKAGE, site / "tl_looped")  # pyright asks this of an installed package only, and not of an editable one
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    command = ["pyright", "--verifytypes", "tl_looped", "--ignoreexternal", "--outputjson"]
    path = f"{tmp_path / 'venv/bin'}{os.pathsep}{os.environ['PATH']}"  # for this question pyright takes its Python from here
    environment = {**os.environ, "PATH": path}
    run = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.startswith("{"), run.stdout + run.stderr
    found = json.loads(run.stdout)["typeCompleteness"]
    said = [f"{symbol['name']}: {said['message']}" for symbol in found["symbols"] for said in symbol["diagnostics"]]
    wrong = [line for line in said if "docstring" not in line]
    assert not wrong, "\n".join(wrong)
    assert found["completenessScore"] == 1
    assert found["exportedSymbolCounts"]["withKnownType"] > 1000  # it has looked at this package
