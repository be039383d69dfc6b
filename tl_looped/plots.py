"""Figures, in plotly (`pip install 'tl-looped[viz]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .errors import LoopedError
from .schedule import LoopSelector, Site

if TYPE_CHECKING:
    from .bridge.cache import LoopedCache
    from .results import Grid

GroupBy = Literal["depth", "recurrence", "layer"]
# The colours of arXiv 2604.11791: first and last line of a figure by recurrence, and by layer.
RECURRENCE_COLOURS = ((26, 152, 80), (254, 224, 60))
LAYER_COLOURS = ((33, 102, 172), (102, 189, 99))


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


def heat_map(grid: Grid, title: str = "") -> Any:
    """Rows for all axes but the last, which runs across; a line where the first axis moves on. One axis gives a line plot."""
    go, values = plotly(), grid.values.detach().float().cpu()
    *down, across = grid.axes
    x = grid.labels[across]
    figure = go.Figure(layout={"title": title or grid.name, "xaxis_title": across, "template": "plotly_white"})
    if not down:
        figure.add_scatter(x=x, y=values.tolist(), mode="lines+markers")
        return figure.update_layout(yaxis_title=grid.name)
    rows = list(product(*(grid.labels[axis] for axis in down)))
    z = values.reshape(len(rows), len(x))
    limit = float(z.abs().max()) or 1.0
    signed = (
        {"zmin": -limit, "zmax": limit, "colorscale": "RdBu", "zmid": 0} if bool((z < 0).any()) else {"colorscale": "Blues"}
    )
    # Plotly drops repeated category names, so rows have numbers and the labels are ticks.
    figure.add_heatmap(x=x, y=list(range(len(rows))), z=z.tolist(), colorbar={"title": grid.name}, xgap=1, ygap=1, **signed)
    figure.update_yaxes(
        title=" · ".join(down),
        tickvals=list(range(len(rows))),
        ticktext=[" · ".join(row) for row in rows],
        autorange="reversed",
    )
    per_first = len(rows) // len(grid.labels[down[0]])
    for boundary in range(per_first, len(rows), per_first) if len(down) > 1 else ():
        figure.add_hline(y=boundary - 0.5, line={"width": 1.5, "color": "#444"})
    return figure.update_layout(height=max(300, 120 + 18 * len(rows)))


def grouped(
    values: Sequence[float],
    sites: Sequence[Site],
    group_by: GroupBy,
    name: str,
    *,
    title: str = "",
    log_y: bool = False,
) -> Any:
    """One number per virtual layer, in one of the three groupings of arXiv 2604.11791.

    "depth" is one line over the layers in the order of the run, with a mark where a new pass begins; "recurrence" one line per
    pass over the depth in the block in percent, green to yellow, prelude and coda in grey; "layer" one line per physical layer
    over the loops, blue to green.

    Args:
        values: one per site; NaN leaves a gap.
        sites: where they were read.
        group_by: "depth", "recurrence" or "layer".
        name: what the numbers are.
        title: above the figure; the name of the numbers if empty.
        log_y: draw logarithms; numbers that are not positive are left out.
    """
    if group_by not in get_args(GroupBy):
        raise LoopedError(f'group_by={group_by!r} was asked; choose "depth", "recurrence" or "layer".')
    go = plotly()
    figure = go.Figure(layout={"title": title or name, "yaxis_title": name, "template": "plotly_white"})
    if log_y:
        values = [v if v > 0 else float("nan") for v in values]
        figure.update_yaxes(type="log", exponentformat="power")
    places = [(site.stack, site.layer) for site in sites]
    physical = list(dict.fromkeys(sorted(places, key=lambda at: (at[0] == "coda") - (at[0] == "prelude"))))
    lines: dict[str, list[tuple[Any, float]]] = {}
    for k, (site, value) in enumerate(zip(sites, values, strict=True)):
        stack = "" if site.stack == "core" else f"{site.stack} "
        if group_by == "depth":
            line, x = name, k
        elif group_by == "recurrence":
            line = stack.strip() if site.loop is None else f"{stack}loop {site.loop}"
            x = 100 * physical.index((site.stack, site.layer)) / max(1, len(physical) - 1)
        else:
            line = f"{stack}layer {site.layer}"
            x = site.loop if site.loop is not None else 0 if site.stack == "prelude" else max(s.loop or 0 for s in sites)
        lines.setdefault(line, []).append((x, value))
    looped = [line for line in lines if line not in ("prelude", "coda")]
    ends = LAYER_COLOURS if group_by == "layer" else RECURRENCE_COLOURS
    colours = {line: _between(*ends, k / max(1, len(looped) - 1)) for k, line in enumerate(looped)}
    for line, points in lines.items():
        x, y = zip(*points, strict=True)
        figure.add_scatter(x=x, y=y, name=line, mode="lines+markers", line={"color": colours.get(line, "grey")})
    across = {"depth": "virtual layer", "recurrence": "depth in the block (%)", "layer": "loop"}
    figure.update_xaxes(title=across[group_by])
    if group_by == "depth":
        for k in range(1, len(sites)):
            if sites[k][:2] != sites[k - 1][:2]:
                figure.add_vline(x=k - 0.5, line={"width": 0.5, "color": "#bbb"})
    return figure


def panels(curves: Sequence[Grid], title: str = "") -> Any:
    """One panel below the other for every grid of one axis, over the labels of that axis."""
    plotly()
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(curves), shared_xaxes=True, vertical_spacing=0.3 / (len(curves) + 1))
    for row, grid in enumerate(curves, 1):
        (axis,) = grid.axes
        x, y = [float(label) for label in grid.labels[axis]], grid.values.cpu().tolist()
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=grid.name, row=row, col=1)
        figure.update_yaxes(title=grid.name, row=row, col=1)
        figure.update_xaxes(title=axis if row == len(curves) else None, row=row, col=1)
    return figure.update_layout(title=title, template="plotly_white", showlegend=False, height=140 + 170 * len(curves))


def paths(
    points: Mapping[str, Sequence[Sequence[float]]],
    colour: Sequence[float],
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


def floorplan(grid: Grid, sites: Sequence[Site], title: str = "") -> Any:
    """Every attention pattern of a run, a row for each pass (the "looped floorplan", figure 63 of arXiv 2604.11791).

    The prelude is on top in a blue box, the coda at the bottom in a red one.

    Args:
        grid: axes (layer, query, key), as from `tl_looped.analysis.looped_floorplan`.
        sites: of its layers; `model.unroll(n_loops).schedule.sites`.
        title: above the figure.
    """
    go = plotly()
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
        stack, loop, _ = sites[row[0]]
        names.append(stack if loop is None else f"loop {loop}" if stack == "core" else f"{stack} loop {loop}")
        for c, i in enumerate(row):
            z[r * size : (r + 1) * size - 1, c * size : (c + 1) * size - 1] = grid.values[i]
        if loop is None:
            ends = {"x0": -1, "x1": len(row) * size - 1, "y0": r * size - 1, "y1": (r + 1) * size - 1}
            boxes.append({"type": "rect", **ends, "line": {"color": "blue" if stack == "prelude" else "red", "width": 2}})
    figure = go.Figure(layout={"title": title or grid.name, "template": "plotly_white", "shapes": boxes})
    figure.add_heatmap(z=z.float().tolist(), colorscale="Viridis", zmin=0, zmax=1, colorbar={"title": grid.name})
    ticks = {"tickvals": [(r + 0.5) * size for r in range(len(rows))], "ticktext": names}
    figure.update_yaxes(autorange="reversed", scaleanchor="x", showgrid=False, **ticks)
    figure.update_xaxes(showgrid=False, showticklabels=False, title="layer, query by key in each pattern")
    return figure.update_layout(height=min(4000, 120 + 90 * len(rows)))


def attention_heads(
    cache: LoopedCache,
    tokens: Sequence[str],
    *,
    layer: int | None = None,
    loops: LoopSelector = "all",
    stack: str | None = None,
    example: int = 0,
) -> Any:
    """circuitsvis's view of attention heads, under names such as "loop 2, layer 5, head 3".

    Args:
        cache: of a run that cached patterns.
        tokens: the tokens as text, such as `model.to_str_tokens(prompt)`.
        layer: one layer of the loop; None for all.
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
    schedule = cache.model.schedule
    chosen, looped = schedule.select_loops(loops, stack), schedule.looped_stack(stack)
    layers = list(range(schedule.stacks[looped])) if layer is None else [range(schedule.stacks[looped])[layer]]
    patterns = [cache.stack_loops("pattern", j, loops, stack) for j in layers]  # [loop, batch, head, query, key] each
    if len(tokens) != patterns[0].shape[-1]:
        raise LoopedError(f"{len(tokens)} tokens were given for patterns over {patterns[0].shape[-1]} positions.")
    prefix = "" if looped == "core" else f"{looped} "
    names = [f"{prefix}loop {t}, layer {j}, head {h}" for t in chosen for j in layers for h in range(patterns[0].shape[2])]
    heads = [pattern[k, example] for k in range(len(chosen)) for pattern in patterns]
    return show(torch.cat(heads).float().cpu(), list(tokens), names)


def _between(first: tuple[int, int, int], last: tuple[int, int, int], share: float) -> str:
    """A colour on the way from one to another."""
    return "rgb({},{},{})".format(*(round(a + (b - a) * share) for a, b in zip(first, last, strict=True)))
