"""The pictures of the explorer in README, docs and tutorials: `python experiments/explorer_pictures.py`.

It needs Chromium on the path.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from playwright.sync_api import sync_playwright

from tl_looped import LoopedBridge
from tl_looped.explorer import Session
from tl_looped.explorer.server import Serving, listening

DOCS = Path(__file__).parents[1] / "docs"
FIRST: dict[str, Any] = {"prompt": "A b B c C d D a ? A", "other": "A c B d C b D a ? A", "pins": [11, 12, 13, 10], "at": 10}
# What each shows, which panels are open, how wide, and the part of the page that is cut out.
PICTURES: dict[str, tuple[dict[str, Any], list[str], int, str]] = {
    "explorer.png": (FIRST, [], 1260, ".tlx-beside"),
    "explorer_edits.png": (
        FIRST
        | {"edits": [{"kind": "freeze_attention", "from_loop": 2, "layers": "all", "heads": "all"}], "show": "difference"},
        ["Interventions"],
        1260,
        ".tlx-beside",
    ),
    "explorer_sweep.png": (FIRST, ["Patch from a second prompt"], 1260, ".tlx-left"),
    "explorer_attention.png": (FIRST, ["Attention of one head, in all loops"], 1260, "details[open]"),
}


def main() -> None:
    """Make them all."""
    model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    with listening(0) as listener, sync_playwright() as driver:
        listener.listen()
        serving = Serving(Session(model), listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(serving.app(), log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for name, (state, panels, width, part) in PICTURES.items():
            page = browser.new_page(viewport={"width": width, "height": 1200}, device_scale_factor=1.5)
            page.goto(f"{serving.address}#{quote(json.dumps(state))}")
            page.wait_for_selector(".tlx-cell h3")
            for panel in panels:
                page.locator(f"summary:text-is('{panel}')").click()
            if name == "explorer_sweep.png":
                page.get_by_role("button", name="Sweep every cell").click()
                page.wait_for_selector(".tlx-facts th:text-is('effect of a patch here')")
            page.wait_for_timeout(700)
            page.locator(part).first.screenshot(path=DOCS / name)
        browser.close()
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
