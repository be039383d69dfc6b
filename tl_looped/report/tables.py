"""Tables of a report, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ..bridge.looped_bridge import LoopedBridge
from ..sizes import Sizes, human
from .section import Question


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
            {"pre": "before", "branch": "after", "sandwich": "before and after", "stream": "on the stream"}[cfg.norm],
        ),
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


def top_answers(asked: Question, top: Sequence[Any], trained: int) -> str:
    """The most probable tokens after each loop.

    Args:
        asked: whose tokenizer names them.
        top: for each loop, probabilities and tokens in descending order.
        trained: loops beyond this number are marked.
    """
    head = ("loop", *(f"{k + 1}." for k in range(len(top[0].values))))
    rows = []
    for loop, found in enumerate(top):
        pairs = zip(asked.words(found.indices), found.values.tolist(), strict=True)
        cells = [f"{word} {p:.3f}" if p >= 0.0005 else "" for word, p in pairs]
        rows.append((f"{loop}{' +' if loop >= trained else ''}", *cells))
    return table(head, rows)
