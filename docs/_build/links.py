"""Every link between pages leads somewhere, also in what mkdocs does not check: notebooks and the API reference."""

from __future__ import annotations

import logging
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

log = logging.getLogger("mkdocs.plugins.links")  # a warning fails a strict build


class _Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, html: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        target = values.get("href") or values.get("src")
        if target and tag == "a":
            self.links.append(target)
        elif target and (tag != "link" or values.get("rel") in ("stylesheet", "icon", "preload")):
            self.loaded.append(target)


@event_priority(-100)  # when all is written
def on_post_build(config: MkDocsConfig) -> None:
    """Warn of targets that do not exist, and of pages that load something from elsewhere."""
    site = Path(config.site_dir).resolve()
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute
            continue
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    log.warning("%s loads %s", path.relative_to(site), link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                log.warning("%s links to %s, which does not exist", path.relative_to(site), link)
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {"__top"}:
                log.warning("%s links to %s, which has no such anchor", path.relative_to(site), link)
