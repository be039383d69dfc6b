"""Tables of a report, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from .question import Question
from .section import share


class Bar(NamedTuple):
    """A cell with a bar: what it says, and a share of the whole."""

    text: str
    share: float


def table(head: Sequence[str], rows: Iterable[Sequence[str | Bar]]) -> str:
    """An HTML table; the first cell of a row is its heading.

    Args:
        head: the headings of the columns; none for a table without.
        rows: texts, and cells with bars behind them.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body, kind = "", ""
    for first, *rest in rows:
        body += f'<tr><th scope="row">{escape(str(first))}</th>'
        for cell in rest:
            if isinstance(cell, Bar):
                kind = ' class="bars"'
                body += (
                    f'<td><span class="bar" style="width:{100 * cell.share:.1f}%"></span>'
                    f'<span class="said">{escape(cell.text)}</span><span class="p">{share(cell.share)}</span></td>'
                )
            else:
                body += f"<td>{escape(cell)}</td>"
        body += "</tr>"
    return f"<table{kind}>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def prompts(asked: Question) -> str:
    """The prompts in full: the clean above the corrupted one, token by token, with the differences marked.

    Args:
        asked: the prompts.
    """
    clean = asked.words(asked.shown[0])
    if asked.pair is None:
        return '<p class="prompts">' + "".join(f'<span class="token"><b>{escape(word)}</b></span>' for word in clean) + "</p>"
    other = asked.words(asked.pair[1][0])
    same = (asked.pair[0] == asked.pair[1])[0].tolist()
    head = '<span class="token names"><b>clean</b><b>corrupted</b></span>'
    tokens = "".join(
        f'<span class="token{"" if alike else " differs"}"><b>{escape(a)}</b><b>{escape(b)}</b></span>'
        for a, b, alike in zip(clean, other, same, strict=True)
    )
    return f'<p class="prompts">{head}{tokens}</p>'
