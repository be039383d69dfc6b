"""How plotly draws panels (`pip install 'tl-looped[viz]'`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import LoopedError
from ..panels import Axis, Mark, Panel
from .tokens_shown import in_figure

LINES: dict[str, dict[str, Any]] = {
    "line": {"width": 1.5, "color": "#444"},
    "bold": {"width": 3, "color": "#222"},
    "dotted": {"width": 1.5, "color": "#d95f0e", "dash": "dot"},
}
MOST_NAMED = 16  # a legend of so many lines is read; colours tell those between
ROW, MOST_ROWS = 22, 160  # pixels of a row of words; of more rows, words are in the hover only
NARROW = 360  # pixels across that a figure may have: a telephone's
TEXT = "#808690"  # readable on white and on black, as nobody knows which a notebook has
PLAIN = {"showgrid": False, "zeroline": False}


def graph_objects() -> Any:
    """The module `plotly.graph_objects`.

    Raises:
        LoopedError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise LoopedError("figures need plotly, which is not installed; pip install 'tl-looped[viz]'.") from error
    return go


def draw(panels: Sequence[Panel]) -> Any:
    """A plotly figure of panels, one below the other.

    Args:
        panels: the panels; the caption of the first is the title.

    Raises:
        LoopedError: plotly is not installed.
    """
    go, n = graph_objects(), len(panels)
    figure: Any = go.Figure()
    if n > 1:
        from plotly.subplots import make_subplots

        figure = make_subplots(rows=n, shared_xaxes=True, vertical_spacing=0.3 / (n + 1))
    for row, panel in enumerate(panels, 1):
        at: dict[str, Any] = {"row": row, "col": 1} if n > 1 else {}
        if panel.kind in ("heat map", "floorplan"):
            _cells(figure, panel)
        else:
            _lines(figure, panel, at)
        x, y = panel.roles["x"], panel.roles["y"]
        across, down = (len(x.labels), MOST_ROWS) if "text" in panel.grids[0] else (24, 48)
        figure.update_xaxes(**_axis(x, [v for line in panel.grids for v in line.get("x", [])], across), **at)
        figure.update_yaxes(**_axis(y, [v for line in panel.numbers for v in line], down), **at)
        if n > 1:  # names stand above the panels: beside them, long ones would run into each other
            corner = {"x": 0, "y": 1, "xref": "x domain", "yref": "y domain", "yanchor": "bottom", "showarrow": False}
            figure.add_annotation(text=in_figure(y.title), **corner, **at)
            figure.update_yaxes(title=None, **at)
            if row < n:
                figure.update_xaxes(title=None, **at)
        for mark in panel.marks:
            _mark(figure, mark, at)
    height = _height(panels[0]) if n == 1 else 140 + 170 * n
    figure.update_layout(title=in_figure(panels[0].caption), template="plotly_white", height=height)
    if "text" in panels[0].grids[0] and panels[0].kind == "heat map":
        _texts(figure, panels[0])
    return figure


def _cells(figure: Any, panel: Panel) -> None:
    (grid,), x, y, shade = panel.grids, panel.roles["x"], panel.roles["y"], panel.roles["colour"]
    z, square = grid["colour"], panel.kind == "floorplan"
    gap = 0 if square or max(len(z), len(z[0])) > 64 else 1
    more: dict[str, Any] = {"hoverongaps": False}
    if "said" in grid:
        said = [["<br>".join(map(in_figure, cell.split("\n"))) for cell in row] for row in grid["said"]]
        more = {"hovertext": said, "hovertemplate": "%{hovertext}<extra></extra>"}
    elif not square:
        more = {
            "customdata": [list(map(in_figure, x.places))] * len(z),
            "hovertext": [[in_figure(place)] * len(z[0]) for place in y.places],
            "hovertemplate": "%{hovertext} · %{customdata}<br>%{z:.4g}<extra></extra>",
        }
    bar = {"title": {"text": in_figure(shade.title), "side": "right"}}
    # Plotly drops repeated category names, so rows and columns have numbers and the labels are ticks.
    places = {"x": list(range(len(z[0]))), "y": list(range(len(z)))}
    figure.add_heatmap(**places, xgap=gap, ygap=gap, colorbar=bar, **_shades(z, shade), **more)
    figure.update_xaxes(**PLAIN, **({"constrain": "domain"} if square else {}))
    figure.update_yaxes(autorange="reversed", **PLAIN, **({"scaleanchor": "x"} if square else {}))


def _shades(z: list[list[float]], shade: Axis) -> dict[str, Any]:
    """The numbers of a heat map and their colours; ranks by the logarithm of the rank plus one."""
    low, high = shade.range or (None, None)
    found: dict[str, Any] = {"z": z, "zmin": low, "zmax": high, "colorscale": shade.palette or "Blues"}
    if shade.palette == "RdBu":
        found["zmid"] = 0
    if shade.scale == "rank":
        ends = [0, *(n * 10**k for k in range(8) for n in (1, 3) if n * 10**k <= (high or 0))]
        found["colorbar_tickvals"], found["colorbar_ticktext"] = [math.log10(e + 1) for e in ends], list(map(str, ends))
        found |= {"z": [[math.log10(v + 1) for v in row] for row in z], "zmin": 0, "zmax": math.log10(max(high or 0, 1) + 1)}
    return found


def _texts(figure: Any, panel: Panel) -> None:
    """Words in the cells of a heat map, whose rows are as high as a line, on whatever colour the place has."""
    (grid,), rows, columns = panel.grids, panel.roles["y"].labels, panel.roles["x"].labels
    few, top = len(rows) <= MOST_ROWS, panel.roles["x"].form == "tokens"
    margin = {"t": 130 if top else 70, "b": 80 if top else 120, "r": 12, "l": 24 + 7 * max(map(len, rows), default=0)}
    longest = max((len(text) for row in grid["text"] for text in row), default=0)
    fits = 7 * longest * len(columns) <= NARROW - margin["l"] - margin["r"]
    height = ROW * len(rows) if few else max(ROW * MOST_ROWS, 4 * len(rows))
    bar = {"orientation": "h", "thickness": 10, "len": 180, "lenmode": "pixels", "x": 0, "xanchor": "left", "yanchor": "top"}
    figure.update_traces(
        text=[list(map(in_figure, row)) for row in grid["text"]],
        texttemplate="%{text}" if few else None,
        textfont={"size": 11} if fits else None,  # otherwise as large as the cells of this width allow
        xgap=1,
        ygap=1 if few else 0,
        # Below the grid, so that it has room beside a grid of one row too.
        colorbar={**bar, "y": (-20 if top else -54) / height, "title": {"side": "top", "font": {"size": 12}}},
    )
    figure.update_xaxes(side="top" if top else "bottom", ticks="")
    figure.update_yaxes(ticks="")
    corner = {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
    figure.update_layout(title={"font": {"size": 15}, "pad": {"l": 12, "t": 12}, **corner}, template="none", font_color=TEXT)
    figure.update_shapes(line_color="#c44", selector={"line_width": LINES["bold"]["width"]})
    clear = dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "rgba(0,0,0,0)")
    figure.update_layout(margin=margin, height=margin["t"] + margin["b"] + height, autosize=True, **clear)


def _lines(figure: Any, panel: Panel, at: dict[str, Any]) -> None:
    scale, every = panel.roles["y"].scale, -(-len(panel.grids) // MOST_NAMED)
    named = (len(panel.grids) > 1 or scale == "rank") and panel.kind == "lines"
    for k, line in enumerate(panel.grids):
        y = [_drawn(v, scale) for v in line["y"]]
        name = in_figure(line.get("name", ""))
        if panel.kind == "bars":
            labels = list(map(in_figure, panel.roles["x"].labels))
            figure.add_bar(y=y, hovertext=labels, name=name, marker={"color": line.get("ink")}, **at)
            continue
        look: dict[str, Any] = {"mode": "lines+markers", "line": {"color": line.get("ink"), "dash": line.get("dash")}}
        if "points" in line:
            look = {"mode": "markers", "marker": {"size": 10, "symbol": line["points"]}}
        if "colour" in line:
            shade, bar = panel.roles["colour"], {"showscale": True, "colorbar": {"title": panel.roles["colour"].title}}
            marker = {"color": line["colour"], "size": 7, "colorscale": shade.palette, **(bar if k == 0 else {})}
            look = {"mode": "lines+markers", "line": {"width": 0.7, "color": "#999"}, "marker": marker}
        if "text" in line:
            look["text"] = list(map(in_figure, line["text"]))
        if "band" in line:
            look["error_y"] = {"type": "data", "array": [v if math.isfinite(v) else 0.0 for v in line["band"]]}
        figure.add_scatter(x=line["x"], y=y, name=name, showlegend=bool(name) and named and k % every == 0, **look, **at)


def _drawn(value: float, scale: str) -> float:
    """A logarithm has no place for rank 0, so ranks from 1 are drawn, under ticks that say those from 0."""
    if scale == "rank":
        return value + 1
    return math.nan if scale == "log" and value <= 0 else value


def _axis(axis: Axis, numbers: Sequence[float], most: int) -> dict[str, Any]:
    """What plotly takes for an axis with some numbers on it, of whose labels no more than `most` are said."""
    found: dict[str, Any] = {"title": in_figure(axis.title), "tickformat": ".0%" if axis.form == "%" else None}
    if axis.range is not None:
        found["range"] = list(axis.range)
    if axis.labels:
        named = [(k, label) for k, label in enumerate(axis.labels) if label]
        named = named[:: max(1, -(-len(named) // max(1, most)))]
        found |= {"tickvals": [k for k, _ in named], "ticktext": [in_figure(label) for _, label in named]}
    if axis.form == "count" and numbers and max(numbers) - min(numbers) <= 12:
        found["dtick"] = 1  # there is no loop 1.5
    if axis.scale == "rank":
        ends = [0, *(10**k for k in range(8))]
        found |= {"type": "log", "autorange": "reversed", "tickvals": [e + 1 for e in ends], "ticktext": list(map(str, ends))}
    if axis.scale == "log":
        positive = [v for v in numbers if v > 0] or [1.0]
        # Over less than two decades plotly would write single digits between powers of ten.
        narrow = max(positive) < 100 * min(positive)
        found |= {"type": "log"} | ({"tickformat": "~g", "dtick": "D2"} if narrow else {"exponentformat": "power"})
    return found


def _mark(figure: Any, mark: Mark, at: dict[str, Any]) -> None:
    if isinstance(mark.x, tuple) and isinstance(mark.y, tuple):
        (x0, x1), (y0, y1) = mark.x, mark.y
        figure.add_shape(type="rect", x0=x0, x1=x1, y0=y0, y1=y1, line={"color": mark.look, "width": 2}, **at)
        return
    if isinstance(mark.x, tuple):
        above = {"y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False, "font": {"size": 10}}
        figure.add_annotation(text=in_figure(mark.text), x=sum(mark.x) / 2, **above)
        figure.update_xaxes(showgrid=False)
        if mark.look != "none":
            figure.add_vline(x=mark.x[0], line={"width": 1, "color": "#999"})
    elif mark.x is not None:
        figure.add_vline(x=mark.x, line=LINES[mark.look], **at)
    else:
        figure.add_hline(y=mark.y, line=LINES[mark.look], **at)


def _height(panel: Panel) -> int | None:
    """Of a heat map in pixels, so that rows can be read; None for plotly's own."""
    if panel.kind not in ("heat map", "floorplan"):
        return None
    rows = len(panel.roles["y"].labels)
    if panel.kind == "floorplan":
        return min(4000, 120 + 90 * sum(map(bool, panel.roles["y"].labels)))
    return min(1000, max(300, 120 + 18 * rows))
