"""The panels of `tl_looped.panels` drawn in plotly (`pip install 'tl-looped[viz]'`), and attention heads in circuitsvis."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

import torch

from .. import panels as make
from .._html import in_script
from .._old_calls import accepts_old
from ..errors import LoopedError
from ..names import stack_prefix
from ..panels import GroupBy as GroupBy
from ..panels import Panel
from ..schedule import Indices, LoopSelector, Site, check_index, select_indices
from .attention_viewer import Tokens, check_cache, token_texts
from .attention_viewer import attention_viewer as attention_viewer
from .plotly import draw

if TYPE_CHECKING:
    from ..looped import Cache

P = ParamSpec("P")


def drawn(made: Callable[P, Panel | list[Panel]]) -> Callable[P, Any]:
    """The plotly figure of the panels that a function makes, with its arguments and its documentation.

    Args:
        made: one of `tl_looped.panels`.
    """

    @functools.wraps(made)
    def figure(*args: P.args, **kwargs: P.kwargs) -> Any:
        found = made(*args, **kwargs)
        return draw([found] if isinstance(found, Panel) else found)

    figure.__module__ = __name__
    return figure


heat_map: Callable[..., Any] = accepts_old("title")(drawn(make.heat_map))
grouped: Callable[..., Any] = accepts_old("layers", "group_by", "name")(drawn(make.grouped))
rank_trajectories: Callable[..., Any] = accepts_old("layers", "title")(drawn(make.rank_trajectories))
panels: Callable[..., Any] = accepts_old("title", "mark")(drawn(make.curves))
paths: Callable[..., Any] = accepts_old("hover", "axes", "title", "colour_name")(drawn(make.paths))
floorplan: Callable[..., Any] = accepts_old("title")(drawn(make.floorplan))


@accepts_old(layer="layers")
def attention_heads(
    cache: Cache,
    tokens: Tokens,
    *,
    layers: Indices = None,
    loops: LoopSelector = "all",
    stack: str | None = None,
    example: int = 0,
) -> Any:
    """Show attention heads in the view of circuitsvis, under names such as "loop 2, layer 5, head 3".

    Each figure holds 1.7 MB of script, and a notebook shows it with a network only. `attention_viewer` needs neither.

    Args:
        cache: of a run that cached patterns.
        tokens: the tokens as text, such as `model.to_str_tokens(prompt)`, the prompt, or its token ids.
        layers: layers inside the loop; None for all.
        loops: which loops: an int, a slice, several ints, "all" or "last".
        stack: "L" or "H" for HRM-Text; not needed elsewhere.
        example: which row of the batch.

    Raises:
        LoopedError: circuitsvis is not installed; the patterns were not cached; tokens of another number.
    """
    try:
        from circuitsvis.attention import attention_heads as show
    except ImportError as error:
        raise LoopedError("this figure needs circuitsvis, which is not installed; pip install 'tl-looped[viz]'.") from error
    check_cache(cache, "attention_heads")
    schedule = cache.model.schedule
    chosen, looped = schedule.select_loops(loops, stack), schedule.looped_stack(stack)
    sites = [Site(looped, t, j) for t in chosen for j in select_indices(layers, schedule.stacks[looped], "layers")]
    patterns = [cache["pattern", schedule.virtual(site)] for site in sites]  # [batch, head, query, key] each
    example = check_index(example, len(patterns[0]), "example")
    words = token_texts(cache, tokens, example, patterns[0].shape[-1])
    prefix, n_heads = stack_prefix(looped, " "), patterns[0].shape[1]
    names = [f"{prefix}loop {site.loop}, layer {site.layer}, head {h}" for site in sites for h in range(n_heads)]
    heads = [pattern[example] for pattern in patterns]
    shown = show(torch.cat(heads).float().cpu(), words, names)
    shown.local_src, shown.cdn_src = _closed(shown.local_src), _closed(shown.cdn_src)
    return shown


def _closed(html: str) -> str:
    """What circuitsvis made, which leaves its div open and writes tokens into a script as they are."""
    html = html.replace('15px 0;"/>', '15px 0;"></div>', 1)
    name = html.split('"', 2)[1]
    before, call, data = html.partition(f'"{name}",')
    data, end, after = data.rpartition("</script>")
    return before + call + in_script(data) + end + after
