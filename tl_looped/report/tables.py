"""Tables of a report, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from ..bridge.looped_bridge import LoopedBridge
from ..model.sizes import Sizes, human
from .question import Question
from .section import share

SHOWN = 0.0005  # probability


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first cell of a row is its heading.

    Args:
        head: the headings of the columns; none for a table without.
        rows: texts.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def facts(model: LoopedBridge, found: Sizes) -> str:
    """What a reader wants to know of a model at a glance.

    Args:
        model: the model.
        found: its sizes.
    """
    cfg = model.looped_cfg
    parts = [f"{part} {human(n)}" for part, n in found.parameters.items()]
    rows = [
        ("checkpoint", str(model.cfg.model_name)),
        ("family", cfg.family),
        ("loops", str(cfg.n_loops)),
        ("layers run", f"{cfg.schedule.n_layers} executions of {cfg.n_physical}"),
        ("parameters", f"{human(found.n_parameters)}: {', '.join(parts)}"),
        (
            "width, heads",
            f"{cfg.d_model}, {cfg.n_heads} of {cfg.d_head}"
            + (f" ({cfg.n_kv_heads} keys)" if cfg.n_kv_heads != cfg.n_heads else ""),
        ),
        (
            "norms of a block",
            {"pre": "before", "branch": "after", "sandwich": "before and after", "stream": "on the stream"}[cfg.norm]
            + (", of length 1" if cfg.norm_kind == "l2" else ""),
        ),
        *([("residual", "steps towards every branch, at learned rates")] if cfg.residual == "interpolate" else []),
        ("injection", cfg.injection),
        ("vocabulary", f"{cfg.d_vocab:,}"),
        (
            "cost of a token",
            f"{human(found.flops(cfg.n_loops), 'FLOP')}, of which {human(found.flops_per_loop, 'FLOP')} per loop",
        ),
        ("keys and values", f"{human(found.cache_per_loop * model.cfg.dtype.itemsize, 'B')} per token and loop"),
        ("dtype, device", f"{str(model.cfg.dtype).removeprefix('torch.')}, {model.cfg.device}"),
    ]
    return table((), rows)


def top_answers(asked: Question, top: Sequence[Any], own: int) -> str:
    """The most probable tokens after each loop; columns in which nothing is probable are left out, and a table of one is "".

    Args:
        asked: whose tokenizer names them.
        top: for each loop, probabilities and tokens in descending order.
        own: loops beyond this number are marked.
    """
    shown = [k for k in range(len(top[0].values)) if any(float(found.values[k]) >= SHOWN for found in top)]
    if len(shown) < 2:
        return ""
    rows = []
    for loop, found in enumerate(top):
        pairs = list(zip(asked.words(found.indices), found.values.tolist(), strict=True))
        cells = [f"{word} {p:.3f}" if p >= SHOWN else "" for word, p in (pairs[k] for k in shown)]
        rows.append((f"{loop}{' +' if loop >= own else ''}", *cells))
    return table(("loop", *(f"{k + 1}." for k in shown)), rows)


class Bar(NamedTuple):
    """A cell with a bar: what it says, and a share of the whole."""

    text: str
    share: float


def bars(head: Sequence[str], rows: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """An HTML table whose cells have bars behind them.

    Args:
        head: the headings of the columns.
        rows: the heading of every row and its cells.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(
            f'<td><span class="bar" style="width:{100 * cell.share:.1f}%"></span><span class="said">{escape(cell.text)}</span>'
            f'<span class="p">{share(cell.share)}</span></td>'
            for cell in rest
        )
        + "</tr>"
        for first, rest in rows
    )
    return f'<table class="bars"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


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
