"""The notebooks of `tutorials/` as pages, which mkdocs would look for under `docs/`."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PLOTLY = "assets/plotly.min.js"


def _title(notebook: Path) -> str:
    """The first heading of a notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the notebooks where the navigation says `Tutorials`."""
    found = sorted(ROOT.glob("tutorials/[0-9]*.ipynb"))
    for entry in config.nav or []:
        if "Tutorials" in entry:
            entry["Tutorials"] = [{_title(path): path.relative_to(ROOT).as_posix()} for path in found]
    config.nav = [entry for entry in config.nav or [] if entry != {"Tutorials": []}]
    return config


@event_priority(100)  # before mkdocs-jupyter, which looks through the files for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks."""
    for path in sorted(ROOT.glob("tutorials/[0-9]*.ipynb")):
        files.append(File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that hold in a checkout hold on the site, and nothing is loaded from elsewhere."""
    if not page.file.src_uri.startswith("tutorials/"):
        return html
    html = re.sub(r'href="(?:\.\./docs/)?([\w/]+)\.(?:md|ipynb)(#[^"]*)?"', _site_link, html)
    html = re.sub(r'<img[^>]*colab-badge\.svg"[^>]*>', "Open in Colab", html)
    html = re.sub(r'<script type="module">import "https://cdn\.plot\.ly/[^<]*</script>', "", html)
    html = re.sub(r'<script[^>]*src="https://[^"]*/mathjax/[^"]*"[^>]*></script>', "", html)
    return re.sub(r'<script[^>]*src="https://cdn\.plot\.ly/[^"]*"[^>]*>', f'<script src="../{PLOTLY}">', html)


def _site_link(match: re.Match[str]) -> str:
    page, anchor = match[1], match[2] or ""
    up = "../" if "../docs/" in match[0] else ""
    return f'href="{up}{page}.html{anchor}"'


def on_post_build(config: MkDocsConfig) -> None:
    """Put the script beside the pages that figures load."""
    plotly = find_spec("plotly")
    if plotly is not None and any(PLOTLY in page.read_text() for page in Path(config.site_dir).glob("tutorials/*.html")):
        shutil.copy(Path(plotly.origin).parent / "package_data" / "plotly.min.js", Path(config.site_dir) / PLOTLY)
