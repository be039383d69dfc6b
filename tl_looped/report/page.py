"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

from .._html import in_script
from ..explorer._page import PLACE, drawing_parts
from ..panels import Panel, json_ready
from .section import Figure, Section

_HERE = Path(__file__).parent


def page(title: str, lead: str, prompts: str, findings: Sequence[str], sections: Sequence[Section], note: str) -> str:
    """The HTML of a page with scripts, styles and data inside.

    Args:
        title: above the page.
        lead: what the page is about.
        prompts: the prompts that are shown, as HTML.
        findings: the sentences of the first screen.
        sections: what was found.
        note: what is missing and why, or nothing.
    """
    measured = [section for section in sections if not section.is_empty]
    links = "".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in measured)
    cover = next((section.cover for section in measured if section.cover is not None), None)
    body = "".join(_section(section, cover) for section in measured)
    first = _first_screen(prompts, findings, cover)
    grids = drawing_parts() if PLACE in first + body else ""
    warning = f'<p class="refused">{escape(note)}</p>' if note else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_file("page.css")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{first}
{warning}
<p>{escape(lead)}</p>
<nav>{links}</nav>
</header>
<main>
{body}{_unmeasured([section for section in sections if section.is_empty])}
</main>
<footer>Made with tl_looped. The sentences above the figures are computed from the numbers in them.</footer>
<script>{_file("../figures/panels.js")}{_file("page.js")}</script>
{grids}
</body>
</html>
"""


def _first_screen(prompts: str, findings: Sequence[str], cover: Figure | None) -> str:
    """What a reader sees first: the prompts, the findings and one figure."""
    said = f'<ol class="findings">{"".join(f"<li>{escape(one)}</li>" for one in findings)}</ol>' if findings else ""
    return f'{prompts}<div class="first">{said}{_figure(cover) if cover else ""}</div>'


def _section(section: Section, cover: Figure | None) -> str:
    reading = "".join(f'<p class="note">{escape(note)}</p>' for note in section.notes)
    reading += "".join(f'<p class="reading">{escape(sentence)}</p>' for sentence in section.reading)
    reading += f'<p class="basis">{escape(section.basis)}</p>' if section.basis else ""
    refused = "".join(f'<p class="refused">Not measured: {escape(reason)}</p>' for reason in section.refused)
    refused += "".join(f'<p class="refused">Failed: {escape(reason)}</p>' for reason in section.failed)
    figures = "".join(_figure(figure) for figure in section.figures if figure is not cover)
    return (
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{reading}{refused}'
        f'<div class="figures">{figures}</div></section>\n'
    )


def _unmeasured(sections: Sequence[Section]) -> str:
    """One line for every section that could not be, with the command that would fill it."""
    if not sections:
        return ""
    lines = "".join(
        f"<li><b>{escape(section.title)}</b>: {escape(' '.join(section.refused))}"
        + "".join(f" Failed: {escape(reason)}" for reason in section.failed)
        + (f" <code>{escape(section.command)}</code>" if section.command else "")
        + "</li>"
        for section in sections
    )
    return f'<section id="unmeasured"><h2>Not measured</h2><ul class="unmeasured">{lines}</ul></section>\n'


def _figure(figure: Figure) -> str:
    kind = "wide" if figure.is_wide or figure.width > 350 else ""
    content = figure.content if isinstance(figure.content, str) else _drawing(figure.content)
    inside = f'<div style="min-width:{figure.width}px">{content}</div>' if figure.width > 320 else content
    return (
        f'<figure class="{kind}"><figcaption>{escape(figure.caption)}</figcaption><div class="scroll">{inside}</div></figure>'
    )


def _drawing(panels: Sequence[Panel]) -> str:
    """The panels as data, which the page draws."""
    data = in_script(json.dumps(json_ready(panels), allow_nan=False, separators=(",", ":")))
    return f'<div class="drawing"><script type="application/json">{data}</script></div>'


@lru_cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
