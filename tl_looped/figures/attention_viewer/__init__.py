"""A viewer of attention patterns: a row for every loop, a column for every head, in about 20 kB of HTML."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..._html import in_script
from ..._words import counted
from ..._writing import write_text
from ...errors import LoopedError
from ...looped import Cache, Looped
from ...schedule import Indices, LoopSelector, Schedule, Site, check_count, check_index, select_indices

__all__ = ["AttentionViewer", "Tokens", "attention_viewer"]

Tokens = str | Sequence[str] | Sequence[Sequence[str]] | Int[Tensor, "..."] | None
_HERE = Path(__file__).parent
_UPPER = 1e-6  # more attention than this to a later position than one's own is no rounding


class _Shown(NamedTuple):
    """One stack of the figure: its name, which loops of it (None where it runs once), and which layers."""

    stack: str
    loops: list[int | None]
    layers: list[int]


@dataclass(frozen=True)
class AttentionViewer:
    """A figure of attention patterns. A notebook shows it, without a network; `save` makes a page of it.

    Args:
        html: a div and its script, for any page.
        sites: the layers that are shown.
        shown: one sentence: what is in it.
        left_out: one sentence: what is not, and how to see it; empty where all is there.
    """

    html: str
    sites: tuple[Site, ...]
    shown: str
    left_out: str = ""

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"AttentionViewer({self.shown}; {len(self.html) / 1000:.0f} kB)"

    def save(self, path: str | Path) -> Path:
        """Write the figure as a page of its own.

        Args:
            path: where to, such as "attention.html".

        Raises:
            LoopedError: the place cannot be written.
        """
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        style = ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:16px}"
        page = f"<!doctype html><html><head>{head}<title>Attention</title><style>{style}</style></head>"
        return write_text(path, f"{page}<body>{self.html}</body></html>\n")


def attention_viewer(
    cache: Cache | Looped,
    tokens: Tokens = None,
    *,
    layers: Indices = None,
    loops: LoopSelector = "all",
    heads: Indices = None,
    stack: str | None = None,
    example: int = 0,
    max_bytes: int = 1_500_000,
) -> AttentionViewer:
    """Show attention patterns: rows are loops, columns heads, with a menu of layers.

    Point at a head to see it large, click to keep it. Point at a cell to read which query attends to which key, and how much.
    "minus the loop before" shows what a loop changes. Values are rounded to 1/255. Padding is left out.

    Args:
        cache: of a run that cached patterns; or a model, which is run on the prompt.
        tokens: the prompt as text, token ids, or the tokens as text; None for those of the run.
        layers: which layers of the loop; None for all, and those of prelude and coda too.
        loops: which loops.
        heads: which heads.
        stack: "core", "L", "H", "prelude" or "coda"; None for all.
        example: which row of the batch.
        max_bytes: how many attention weights at most, a byte each. Beyond it prelude and coda are left out, then layers, loops
            and queries, and the figure says so.

    Raises:
        LoopedError: the patterns were not cached, or not of all positions; tokens of another number; no such layer, loop, head,
            stack or example.

    Example:
        >>> from tl_looped import LoopedBridge
        >>> model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
        >>> attention_viewer(model, "A b B c C d D a ? A", loops=[0, 5]).shown
        'stack core: 2 loops of 2 layers; 4 heads, 11 positions'
    """
    if isinstance(cache, Looped):
        cache, tokens = _run(cache, tokens), None
    check_cache(cache, "attention_viewer")
    schedule = cache.model.schedule
    stacks = _stacks(schedule, layers, loops, stack)
    real = _real(cache, example)
    words = token_texts(cache, tokens, example, _pattern(cache, stacks[0], 0, 0, example).shape[-1], real)
    which_heads = select_indices(heads, cache.model.cfg.n_heads, "heads")
    stacks, n_queries, left_out = _within(stacks, len(which_heads), len(words), max_bytes)

    def read(shown: _Shown, loop: int, layer: int) -> Tensor:
        pattern = _pattern(cache, shown, loop, layer, example)
        return pattern[which_heads] if real is None else pattern[which_heads][:, real][:, :, real]

    patterns = [read(s, t, j) for s in stacks for j in range(len(s.layers)) for t in range(len(s.loops))]
    quantised = torch.stack([_quantised(pattern[:, -n_queries:]) for pattern in patterns])
    causal = not any(bool((pattern.triu(1) > _UPPER).any()) for pattern in patterns)
    data = {
        "tokens": words,
        "heads": which_heads,
        "stacks": [[s.stack, ["" if t is None else t for t in s.loops], s.layers] for s in stacks],
        "first": len(words) - n_queries,
        "causal": causal,
        "note": left_out,
        "values": base64.b64encode(_packed(quantised, causal)).decode("ascii"),
    }
    what = "; ".join(_describe(shown) for shown in stacks)
    shown = f"{what}; {counted(len(which_heads), 'head')}, {counted(len(words), 'position')}"
    sites = [Site(s.stack, t, j) for s in stacks for t in s.loops for j in s.layers]
    return AttentionViewer(_html(data), tuple(sites), shown, left_out)


def check_cache(cache: object, what: str) -> None:
    """Refuse what is no cache.

    Args:
        cache: what was given for one.
        what: what was asked.

    Raises:
        LoopedError: it is something else.
    """
    if not isinstance(cache, Cache):
        raise LoopedError(
            f"{what} was asked of a {type(cache).__name__}; pass the cache of model.run_with_cache(prompt), or ask "
            "tl_looped.figures.attention_viewer(model, prompt)."
        )


def token_texts(cache: Cache, tokens: Tokens, example: int, n_pos: int, real: Tensor | None = None) -> list[str]:
    """The tokens of a row as text, without its padding.

    Args:
        cache: of the run.
        tokens: what was given: a text, ids, texts of tokens (of all rows or of this one), or None for those of the run.
        example: which row.
        n_pos: number of positions of the run.
        real: the positions that are no padding; None where all are real.

    Raises:
        LoopedError: tokens of another number than the run has positions; they are not known.
    """
    if tokens is None:
        found: Any = None if cache.run is None else cache.run.input
        if found is None or (isinstance(found, Tensor) and found.is_floating_point()):
            raise LoopedError("the tokens of this run are not known; pass tokens=, such as model.to_str_tokens(prompt).")
        tokens = _one_of(found, example)
    words = _texts(cache.model, tokens, example)
    n_real = n_pos if real is None else len(real)
    if len(words) == n_pos and real is not None:
        words = [words[i] for i in real.tolist()]
    if len(words) != n_real:
        raise LoopedError(f"{counted(len(words), 'token')} were given for patterns over {counted(n_real, 'position')}.")
    return words


def _texts(model: Any, tokens: Any, example: int) -> list[str]:
    """One row of tokens as text."""
    many = isinstance(tokens, (list, tuple)) and len(tokens) > 0
    if isinstance(tokens, Tensor) and tokens.ndim in (1, 2) and not tokens.is_floating_point():
        row = tokens if tokens.ndim == 1 else tokens[check_index(example, len(tokens), "example")]
        return list(map(str, row.tolist())) if model.tokenizer is None else [model.tokenizer.decode([t]) for t in row.tolist()]
    if isinstance(tokens, str):
        return [str(token) for token in model.to_str_tokens(tokens)]
    if many and all(isinstance(token, str) for token in tokens):
        return [str(token) for token in tokens]
    if many and all(isinstance(row, (list, tuple)) for row in tokens):
        return _texts(model, tokens[check_index(example, len(tokens), "example")], example)
    raise LoopedError(f"tokens={tokens!r:.80} was given; pass the prompt, its token ids, or model.to_str_tokens(prompt).")


def _one_of(prompts: Any, example: int) -> Any:
    """The prompt of a row, where several texts were run."""
    return prompts[check_index(example, len(prompts), "example")] if isinstance(prompts, (list, tuple)) else prompts


def _run(model: Looped, prompt: Tokens) -> Cache:
    """The patterns of a prompt; several texts are padded, as the model pads them."""
    if prompt is None:
        raise LoopedError("attention_viewer was asked of a model without a prompt; pass one: attention_viewer(model, prompt).")
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt, names_filter=lambda name: name.endswith("attn.hook_pattern"))
    return cache


def _real(cache: Cache, example: int) -> Tensor | None:
    """The positions of a row that are no padding; None where all rows are whole."""
    mask = cache.padding()
    return None if mask is None else mask[check_index(example, len(mask), "example")].nonzero().flatten().cpu()


def _stacks(schedule: Schedule, layers: Indices, loops: LoopSelector, stack: str | None) -> list[_Shown]:
    """Which stacks are shown, in the order of the model."""
    edges = [name for name in ("prelude", "coda") if schedule.stacks[name]]
    if stack is not None and stack not in (known := [*schedule.core_stacks, *edges]):
        raise LoopedError(f"stack={stack!r} was asked; this model has {', '.join(map(repr, known))}.")
    all_loops = isinstance(loops, str) and loops == "all"
    named = [stack] if stack else [s for s in schedule.stacks if s in schedule.core_stacks or (layers is None and all_loops)]
    found: list[_Shown] = []
    for name in named:
        if name in edges and not all_loops:
            raise LoopedError(f"loops={loops!r} was asked of the {name}, which runs once; leave loops= out.")
        if n := schedule.stacks[name]:
            chosen: list[Any] = [None] if name in edges else sorted(set(schedule.select_loops(loops, name)))
            found.append(_Shown(name, chosen, select_indices(layers, n, "layers")))
    return found


def _pattern(cache: Cache, shown: _Shown, loop: int, layer: int, example: int) -> Float[Tensor, "head query key"]:
    """One pattern, of all heads; `loop` and `layer` count what is shown."""
    index = cache.model.schedule.virtual(Site(shown.stack, shown.loops[loop], shown.layers[layer]))
    pattern = cache["pattern", index]
    if cache.has_batch_dim:
        pattern = pattern[check_index(example, len(pattern), "example")]
    else:
        check_index(example, 1, "example")
    if pattern.shape[-2] != pattern.shape[-1]:
        raise LoopedError(
            f"the cached patterns are of {pattern.shape[-2]} queries and {pattern.shape[-1]} keys; cache a whole run and all "
            "its positions."
        )
    return pattern.detach()


def _within(stacks: list[_Shown], n_heads: int, n_pos: int, max_bytes: int) -> tuple[list[_Shown], int, str]:
    """What fits into `max_bytes`, how many queries, and a sentence on what does not."""
    budget = check_count("max_bytes", max_bytes)
    n_queries = n_pos

    def size(chosen: list[_Shown], queries: int) -> int:
        # A query sees itself and what is before it, so that the last ones see nearly all.
        return sum(len(s.loops) * len(s.layers) for s in chosen) * n_heads * queries * (2 * n_pos - queries + 1) // 2

    full = size(stacks, n_pos)
    if full <= budget:
        return stacks, n_pos, ""
    looped = kept = [s for s in stacks if s.loops != [None]] or stacks  # what a loop does is the first question
    most = max(len(s.layers) for s in kept)
    while most > 1 and size(kept, n_pos) > budget:
        most -= 1
        kept = [s._replace(layers=_spread(s.layers, most)) for s in looped]
    fewer = kept
    most = max(len(s.loops) for s in kept)
    while most > 2 and size(kept, n_pos) > budget:
        most -= 1
        kept = [s._replace(loops=_spread(s.loops, most)) for s in fewer]
    while n_queries > 1 and size(kept, n_queries) > budget:
        n_queries -= 1
    parts = [_describe(s) for s in kept]
    parts += [f"the last {n_queries} of {n_pos} queries"] if n_queries < n_pos else []
    said = (
        f"Only a part is shown, since all patterns take {full / 1e6:.1f} MB: {'; '.join(parts)}. Choose with stack=, layers=, "
        f"loops=, heads= or a shorter prompt, or allow more with max_bytes={full}."
    )
    return kept, n_queries, said


def _spread(entries: list[Any], most: int) -> list[Any]:
    """At most so many of the entries, evenly spaced, the first and the last among them."""
    if len(entries) <= most:
        return entries
    return [entries[round(k * (len(entries) - 1) / max(1, most - 1))] for k in range(most)]


def _describe(shown: _Shown) -> str:
    layers = counted(len(shown.layers), "layer")
    if shown.loops == [None]:
        return f"{shown.stack}: {layers}"
    return f"stack {shown.stack}: {counted(len(shown.loops), 'loop')} of {layers}"


def _quantised(pattern: Float[Tensor, "head query key"]) -> UInt8[Tensor, "head query key"]:
    """Attention weights in 255ths."""
    if not bool(pattern.isfinite().all()):
        raise LoopedError("a cached pattern holds NaN or an infinite value; a figure of it would show something else.")
    return (pattern.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _packed(values: UInt8[Tensor, "pattern head query key"], causal: bool) -> bytes:
    """Every query's row of every head of every pattern; without the keys after the query where it attends to none."""
    n_queries, n_keys = values.shape[-2:]
    if not causal:
        return values.numpy().tobytes()
    at = torch.arange(n_queries)[:, None] + n_keys - n_queries >= torch.arange(n_keys)
    return values[..., at].numpy().tobytes()


def _html(data: dict[str, Any]) -> str:
    """The data with the script that draws them, which looks for the div of this very figure.

    JupyterLab leaves the keys alone that are pressed in a div marked as this one is.
    """
    call = in_script(json.dumps({**data, "style": _file("viewer.css")}, separators=(",", ":")))
    name = "tl-looped-" + sha1(call.encode()).hexdigest()[:12]
    fallback = "Attention patterns: run this cell, or trust the notebook, to see them."
    div = f'<div class="{name}" data-lm-suppress-shortcuts="true">{fallback}</div>'
    return f'{div}\n<script>({_file("viewer.js")})("{name}", {call});</script>'


@lru_cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8").strip()
