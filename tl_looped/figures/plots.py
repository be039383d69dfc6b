"""Figures, in plotly (`pip install 'tl-looped[viz]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .._html import in_script
from .._old_calls import accepts_old
from ..errors import LoopedError
from ..names import stack_prefix
from ..schedule import Indices, LoopSelector, Schedule, Site, check_index, select_indices
from .attention_viewer import Tokens, attention_viewer, check_cache, token_texts

if TYPE_CHECKING:
    from ..bridge.cache import LoopedCache
    from ..results import Grid

__all__ = [
    "GroupBy",
    "attention_heads",
    "attention_viewer",
    "floorplan",
    "grouped",
    "heat_map",
    "panels",
    "paths",
    "rank_trajectories",
]

GroupBy = Literal["depth", "recurrence", "layer"]
# The colours of arXiv 2604.11791: first and last line of a figure by recurrence, and by layer.
RECURRENCE_COLOURS = ((26, 152, 80), (254, 224, 60))
LAYER_COLOURS = ((33, 102, 172), (102, 189, 99))
LINE = "rgb(33,102,172)"
EDGES = {"prelude", "coda"}  # beside the loops on an axis of loops


def plotly() -> Any:
    """The module `plotly.graph_objects`.

    Raises:
        LoopedError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise LoopedError("figures need plotly, which is not installed; pip install 'tl-looped[viz]'.") from error
    return go


@accepts_old("title")
def heat_map(grid: Grid, *, title: str = "") -> Any:
    """Rows for all axes but the last, which runs across; a line where the first axis moves on, a bold one where the stack does.

    One axis gives a line plot, or bars where its labels are no numbers.

    Args:
        grid: what is drawn.
        title: above the figure; the name of the grid if empty.

    Raises:
        LoopedError: plotly is not installed; a single number, without axes.
    """
    go, values = plotly(), grid.values.detach().float().cpu()
    if not grid.axes:
        raise LoopedError(f"a figure of {grid.name} was asked, which is a single number, {float(values):.4g}.")
    *down, across = grid.axes
    x = grid.labels[across]
    figure = go.Figure(layout={"title": title or _words(grid.name), "xaxis_title": _words(across), "template": "plotly_white"})
    if not down:
        figure.update_layout(yaxis_title=_words(grid.name))
        if all(isinstance(label, int) or _is_number(label) for label in x):
            figure.add_scatter(x=[float(label) for label in x], y=values.tolist(), mode="lines+markers", line={"color": LINE})
            return figure.update_xaxes(dtick=1 if len(x) <= 12 else None)
        return figure.add_bar(x=[str(label) for label in x], y=values.tolist(), marker={"color": LINE}).update_xaxes(
            type="category"
        )
    rows = list(product(*(grid.labels[axis] for axis in down)))
    z = values.reshape(len(rows), len(x))
    if not EDGES.isdisjoint(grid.labels[down[0]]):  # a stack with fewer layers than another has no rows for those it lacks
        there = [i for i, row in enumerate(z) if not bool(row.isnan().all())] or list(range(len(rows)))
        rows, z = [rows[i] for i in there], z[there]
    known = z[z.isfinite()]
    limit = (float(known.abs().max()) if len(known) else 1.0) or 1.0
    if bool((z < 0).any()):
        colours = {"zmin": -limit, "zmax": limit, "colorscale": "RdBu", "zmid": 0}
    elif len(known.unique()) > 1:
        colours = {"colorscale": "Blues"}
    else:  # one number everywhere, which plotly would put in the middle of a range that has no meaning
        colours = {"zmin": 0, "zmax": limit, "colorscale": "Blues"}
    gap = 1 if len(rows) <= 64 and len(x) <= 64 else 0
    # Plotly drops repeated category names, so rows and columns have numbers and the labels are ticks.
    figure.add_heatmap(
        x=list(range(len(x))),
        y=list(range(len(rows))),
        z=z.tolist(),
        colorbar={"title": {"text": _words(grid.name), "side": "right"}},
        xgap=gap,
        ygap=gap,
        customdata=[[escape(f"{_words(across)} {label}") for label in x]] * len(rows),
        hovertext=[[" · ".join(f"{_words(a)} {b}" for a, b in zip(down, row, strict=True))] * len(x) for row in rows],
        hovertemplate="%{hovertext} · %{customdata}<br>%{z:.4g}<extra></extra>",
        **colours,
    )
    figure.update_xaxes(**_ticks(x, 24), showgrid=False)
    names = [" · ".join(map(str, row)) for row in rows]
    figure.update_yaxes(title=" · ".join(map(_words, down)), autorange="reversed", showgrid=False, **_ticks(names, 48))
    firsts = [row[0] for row in rows]
    has_groups = len(set(firsts)) < len(rows)
    for boundary, (above, below) in enumerate(pairwise(firsts), 1):
        between_stacks = not EDGES.isdisjoint({above, below})
        if above != below and (has_groups or between_stacks):
            line = {"width": 3, "color": "#222"} if between_stacks else {"width": 1.5, "color": "#444"}
            figure.add_hline(y=boundary - 0.5, line=line)
    return figure.update_layout(height=min(1000, max(300, 120 + 18 * len(rows))))


@accepts_old("layers", "group_by", "name")
def grouped(
    values: Sequence[float],
    schedule: Schedule,
    *,
    layers: Sequence[int],
    group_by: GroupBy,
    name: str,
    title: str = "",
    log_y: bool = False,
) -> Any:
    """One number per virtual layer, in one of the three groupings of arXiv 2604.11791.

    "depth" is one line over the virtual layers, under their own indices, with a mark where a new pass begins; "recurrence" one
    line per pass over the depth in the block in percent, green to yellow, prelude and coda in grey; "layer" one line per
    physical layer over the loops, blue to green.

    Args:
        values: one per layer; NaN leaves a gap.
        schedule: what ran.
        layers: the virtual layers that the values were read at, in ascending order.
        group_by: "depth", "recurrence" or "layer".
        name: what the numbers are.
        title: above the figure; the name of the numbers if empty.
        log_y: draw logarithms; numbers that are not positive are left out.

    Raises:
        LoopedError: another grouping; plotly is not installed.
    """
    if group_by not in get_args(GroupBy):
        raise LoopedError(f'group_by={group_by!r} was asked; choose "depth", "recurrence" or "layer".')
    go = plotly()
    figure = go.Figure(layout={"title": title or name, "yaxis_title": name, "template": "plotly_white"})
    if log_y:
        values = [v if v > 0 else float("nan") for v in values]
        figure.update_yaxes(type="log", **log_ticks(values))
    sites = [schedule.site(i) for i in layers]
    places = [(site.stack, site.layer) for site in sites]
    physical = list(dict.fromkeys(sorted(places, key=lambda at: (at[0] == "coda") - (at[0] == "prelude"))))
    lines: dict[str, list[tuple[Any, float]]] = {}
    for i, site, value in zip(layers, sites, values, strict=True):
        if group_by == "depth":
            line, x = name, i
        elif group_by == "recurrence":
            line = site.where
            x = 100 * physical.index((site.stack, site.layer)) / max(1, len(physical) - 1)
        else:
            line = f"{stack_prefix(site.stack, ' ')}layer {site.layer}"
            x = site.loop if site.loop is not None else 0 if site.stack == "prelude" else max(s.loop or 0 for s in sites)
        lines.setdefault(line, []).append((x, value))
    looped = [line for line in lines if line not in ("prelude", "coda")]
    ends = LAYER_COLOURS if group_by == "layer" else RECURRENCE_COLOURS
    colours = {line: _between(*ends, k / max(1, len(looped) - 1)) for k, line in enumerate(looped)}
    every = -(-len(lines) // 16)  # a legend of so many is read; colours tell those between
    for k, (line, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        colour = {"color": colours.get(line, "grey")}
        figure.add_scatter(x=x, y=y, name=line, mode="lines+markers", line=colour, showlegend=len(lines) > 1 and k % every == 0)
    across = {"depth": "virtual layer", "recurrence": "depth in the block (%)", "layer": "loop"}
    figure.update_xaxes(title=across[group_by])
    if group_by == "depth":
        _mark_passes(figure, schedule, layers)
    if group_by == "layer" and len({site.loop for site in sites}) <= 12:
        figure.update_xaxes(dtick=1)  # there is no loop 1.5
    return figure


@accepts_old("layers", "title")
def rank_trajectories(
    ranks: Mapping[str, Sequence[float]], schedule: Schedule, *, layers: Sequence[int], title: str = ""
) -> Any:
    """Ranks of tokens over the virtual layers, under their own indices, with a mark where a new pass begins.

    Args:
        ranks: 0-based ranks, one per layer, for every token by its name.
        schedule: what ran.
        layers: the virtual layers that the ranks were read at, in ascending order.
        title: above the figure.
    """
    figure = plotly().Figure(layout={"title": title, "yaxis_title": "rank (0 is the top)", "template": "plotly_white"})
    for token, values in ranks.items():
        # A logarithm has no place for rank 0, so ranks from 1 are drawn, under ticks that say those from 0.
        y = [value + 1 for value in values]
        text = [f"rank {value:g}" for value in values]
        figure.add_scatter(x=list(layers), y=y, name=token, text=text, mode="lines+markers", showlegend=True)
    ends = [0, *(10**k for k in range(8))]
    figure.update_yaxes(type="log", autorange="reversed", tickvals=[e + 1 for e in ends], ticktext=[str(e) for e in ends])
    figure.update_xaxes(title="virtual layer")
    _mark_passes(figure, schedule, layers)
    return figure


@accepts_old("title", "mark")
def panels(curves: Sequence[Grid], *, title: str = "", mark: int | None = None) -> Any:
    """One panel below the other for every grid of one axis, over the labels of that axis.

    Args:
        curves: grids of one axis each, with numbers as labels.
        title: above the figure.
        mark: where to draw a line through all panels.
    """
    plotly()
    from plotly.subplots import make_subplots

    figure: Any = make_subplots(rows=len(curves), shared_xaxes=True, vertical_spacing=0.3 / (len(curves) + 1))
    for row, grid in enumerate(curves, 1):
        (axis,) = grid.axes
        x, y = [float(label) for label in grid.labels[axis]], grid.values.cpu().tolist()
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=grid.name, line={"color": LINE}, row=row, col=1)
        # Names stand above the panels: beside them, long ones would run into each other.
        figure.add_annotation(
            text=_words(grid.name),
            x=0,
            y=1,
            xref="x domain",
            yref="y domain",
            yanchor="bottom",
            showarrow=False,
            row=row,
            col=1,
        )
        figure.update_xaxes(title=_words(axis) if row == len(curves) else None, row=row, col=1)
        if mark is not None:
            figure.add_vline(x=mark, line={"width": 1, "color": "#444", "dash": "dot"}, row=row, col=1)
    return figure.update_layout(title=title, template="plotly_white", showlegend=False, height=140 + 170 * len(curves))


@accepts_old("hover", "axes", "title", "colour_name")
def paths(
    points: Mapping[str, Sequence[Sequence[float]]],
    colour: Sequence[float],
    *,
    hover: Sequence[str],
    axes: tuple[str, str],
    title: str = "",
    colour_name: str = "loop",
) -> Any:
    """Paths in a plane, one per name: its points in order, coloured by the place along the path.

    Args:
        points: (x, y) of every point.
        colour: one number per point of a path.
        hover: one text per point of a path.
        axes: titles of x and y.
        title: above the figure.
        colour_name: what the colours stand for.
    """
    go = plotly()
    figure = go.Figure(layout={"title": title, "xaxis_title": axes[0], "yaxis_title": axes[1], "template": "plotly_white"})
    marker = {"color": list(colour), "colorscale": "Viridis", "size": 7}
    for k, (name, path) in enumerate(points.items()):
        x, y = zip(*path, strict=True)
        bar = {"showscale": True, "colorbar": {"title": colour_name}} if k == 0 else {}
        figure.add_scatter(
            x=x,
            y=y,
            name=name,
            text=list(hover),
            mode="lines+markers",
            line={"width": 0.7, "color": "#999"},
            marker={**marker, **bar},
        )
    return figure.update_layout(showlegend=False)


@accepts_old("title")
def floorplan(grid: Grid, sites: Sequence[Site], *, title: str = "") -> Any:
    """Every attention pattern of a run, a row for each pass (the "looped floorplan", figure 63 of arXiv 2604.11791).

    The prelude is on top in a blue box, the coda at the bottom in a red one.

    Args:
        grid: axes (layer, query, key), as from `tl_looped.analysis.looped_floorplan`.
        sites: of its layers; `model.unroll(n_loops).schedule.sites`.
        title: above the figure.

    Raises:
        LoopedError: plotly is not installed; the sites are not those of the grid.
    """
    go = plotly()
    if len(sites) != len(grid.values):
        raise LoopedError(
            f"floorplan was asked of {len(grid.values)} layers and {len(sites)} sites; pass the sites of the run that the grid "
            "is of, such as model.unroll(n_loops).schedule.sites."
        )
    rows: list[list[int]] = []
    for i, site in enumerate(sites):
        if i and sites[i - 1][:2] == site[:2]:
            rows[-1].append(i)
        else:
            rows.append([i])
    size = grid.values.shape[-1] + 1  # one empty line between patterns
    z = grid.values.new_full((len(rows) * size, max(map(len, rows)) * size), float("nan"))
    names, boxes = [], []
    for r, row in enumerate(rows):
        names.append(sites[row[0]].where)
        for c, i in enumerate(row):
            z[r * size : (r + 1) * size - 1, c * size : (c + 1) * size - 1] = grid.values[i]
        if (edge := sites[row[0]]).loop is None:
            ends = {"x0": -1, "x1": len(row) * size - 1, "y0": r * size - 1, "y1": (r + 1) * size - 1}
            boxes.append({"type": "rect", **ends, "line": {"color": "blue" if edge.stack == "prelude" else "red", "width": 2}})
    figure = go.Figure(layout={"title": title or _words(grid.name), "template": "plotly_white", "shapes": boxes})
    bar = {"title": {"text": "share of attention", "side": "right"}}
    figure.add_heatmap(z=z.float().tolist(), colorscale="Viridis", zmin=0, zmax=1, colorbar=bar, hoverongaps=False)
    plain = {"showgrid": False, "zeroline": False}
    ticks = {"tickvals": [(r + 0.5) * size for r in range(len(rows))], "ticktext": names}
    figure.update_yaxes(autorange="reversed", scaleanchor="x", **plain, **ticks)
    widest = range(max(map(len, rows)))
    ticks = {"tickvals": [(c + 0.5) * size for c in widest], "ticktext": [f"layer {c}" for c in widest]}
    figure.update_xaxes(title="in each pattern, queries run down and keys across", constrain="domain", **plain, **ticks)
    return figure.update_layout(height=min(4000, 120 + 90 * len(rows)))


@accepts_old(layer="layers")
def attention_heads(
    cache: LoopedCache,
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
    which = select_indices(layers, schedule.stacks[looped], "layers")
    patterns = [
        cache.stack_loops("pattern", j, loops=loops, stack=stack) for j in which
    ]  # [loop, batch, head, query, key] each
    example = check_index(example, patterns[0].shape[1], "example")
    words = token_texts(cache, tokens, example, patterns[0].shape[-1])
    prefix = stack_prefix(looped, " ")
    names = [f"{prefix}loop {t}, layer {j}, head {h}" for t in chosen for j in which for h in range(patterns[0].shape[2])]
    heads = [pattern[k, example] for k in range(len(chosen)) for pattern in patterns]
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


def log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Ticks for a logarithmic axis; over less than two decades plotly would write single digits between powers of ten.

    Args:
        values: what is drawn along the axis.
    """
    positive = [v for v in values if v > 0 and v != float("inf")] or [1.0]
    return {"tickformat": "~g", "dtick": "D2"} if max(positive) < 100 * min(positive) else {"exponentformat": "power"}


def _mark_passes(figure: Any, schedule: Schedule, layers: Sequence[int]) -> None:
    """Draw a line where a new pass begins, and say which; of many passes only some."""
    sites = [schedule.site(i) for i in layers]
    starts = [k for k in range(len(sites)) if k == 0 or sites[k][:2] != sites[k - 1][:2]]
    stops = [*starts[1:], len(sites)]
    middles = [(layers[k] + layers[stop - 1]) / 2 for k, stop in zip(starts, stops, strict=True)]
    every, word = -(-len(starts) // 16), "loop "
    for k, middle in list(zip(starts, middles, strict=True))[::every]:
        stack, loop, _ = sites[k]
        name = stack if loop is None else f"{'' if stack == 'core' else stack + ' '}{word}{loop}"
        word = word if loop is None else ""  # once is enough
        figure.add_annotation(text=name, x=middle, y=1, yref="paper", yanchor="bottom", showarrow=False, font={"size": 10})
        if k:
            figure.add_vline(x=layers[k] - 0.5, line={"width": 1, "color": "#999"})
    figure.update_xaxes(showgrid=False)


def _ticks(labels: Sequence[str | int], most: int) -> dict[str, Any]:
    """Ticks at evenly spaced labels, no more than `most` of them, in which plotly finds no tags: a token may be `<s>`."""
    every = -(-len(labels) // most)
    return {"tickvals": list(range(0, len(labels), every)), "ticktext": [escape(str(label)) for label in labels[::every]]}


def _words(name: str) -> str:
    return "number of loops" if name == "n_loops" else name.replace("_", " ")


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _between(first: tuple[int, int, int], last: tuple[int, int, int], share: float) -> str:
    """A colour on the way from one to another."""
    return "rgb({},{},{})".format(*(round(a + (b - a) * share) for a, b in zip(first, last, strict=True)))
