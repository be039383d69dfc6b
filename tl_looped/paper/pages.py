"""The page: a table of what the paper says beside what was found, and the figures, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from ..errors import LoopedError
from ..report.page import page
from ..report.section import Figure, Section
from .drawn import DRAWN, About, Missing
from .published import PUBLISHED, SECTIONS

ABOUT = (
    "What the paper says is of the models that it names: a fact to read beside the numbers here, and no mark to reach, unless "
    "this is that model. The means are over prompts."
)


@dataclass(frozen=True)
class Row:
    """A figure of the paper here.

    Args:
        figure: its name in the paper.
        shows: what is measured.
        models: those of the paper.
        published: what the paper finds on them.
        source: where that was read, if not in the paper's text.
        here: what was found, or nothing.
        not_done: why there is nothing, or nothing.
    """

    figure: str
    shows: str
    models: str
    published: str
    source: str
    here: str
    not_done: str


def rows_and_sections(about: About) -> tuple[list[Row], list[Section]]:
    """Every figure of the paper, and the parts of the page.

    Args:
        about: what was measured.
    """
    rows, sections = list[Row](), list[Section]()
    for name, (title, keys) in SECTIONS.items():
        section, own = Section(name, title), list[Row]()
        figures = list[Figure]()
        for key in keys:
            said, not_done = "", ""
            try:
                said, drawn = DRAWN[key](about)
                shown = [figure for figure in drawn if figure.says_something]
                figures += shown
                said += " Not drawn: one number everywhere." if drawn and not shown else ""
            except LoopedError as error:
                not_done = str(error).removesuffix(".")
            what = PUBLISHED[key]
            own.append(Row(what.name, what.shows, what.models, what.says, what.source, said, not_done))
        section.figures = [Figure("What the paper says, and what is found here.", _table(own), is_wide=True), *figures]
        section.numbers = {"rows": [asdict(row) for row in own]}
        rows += own
        sections.append(section)
    return rows, sections


def _table(rows: list[Row]) -> str:
    """Four columns, which a narrow page puts below each other, each under its heading."""
    names = ("", "Measured", "In the paper", "Here")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = ""
    for row in rows:
        source = f" ({row.source})" if row.source else ""
        here = row.here if row.here else f"Not done: {row.not_done}."
        cells = zip(names[1:], (row.shows, f"{row.models}: {row.published}{source}", here), strict=True)
        data = "".join(f'<td data-head="{name}">{escape(cell)}</td>' for name, cell in cells)
        body += f'<tr><th scope="row">{escape(row.figure)}</th>{data}</tr>'
    return f'<table class="beside"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def html(title: str, lead: str, prompts: str, rows: list[Row], sections: list[Section], notes: list[str]) -> str:
    """The page as HTML.

    Args:
        title: above it.
        lead: about the model, the prompts and the loops.
        prompts: those that are shown.
        rows: every figure.
        sections: the parts.
        notes: what a reader has to know.
    """
    done = [row.figure for row in rows if row.here]
    first = [row.here for row in rows if row.figure in ("Figure 4", "Figure 2", "Limiting behaviour") and row.here]
    findings = [
        f"{len(done)} of {len(rows)} figures, tables and claims are repeated; where one is not, its row says why.",
        *first,
    ]
    shown = f'<p class="prompts">First prompt: {escape(prompts)}</p>'
    return page(title, f"{lead} {ABOUT}", shown, findings, sections, " ".join(notes))


def numbers(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as JSON and tables have them.

    Args:
        rows: every figure.
    """
    return [asdict(row) for row in rows]


__all__ = ["Missing", "Row", "html", "numbers", "rows_and_sections"]
