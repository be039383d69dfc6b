"""A browser for the tests that look at pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
a_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium on the path, such as Debian's package chromium"
)


@contextmanager
def browsing(*options: str) -> Iterator[Any]:
    """Chromium without a window; fails in CI, which installs it (see .ci/run), where there is none."""
    assert CHROMIUM is not None
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright, of the extra dev")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *options])
        yield launched
        launched.close()
