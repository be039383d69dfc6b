"""How plotly draws panels (`pip install 'tl-looped[viz]'`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import LoopedError
from ..panels import Axis, Mark, Panel
from .tokens_shown import in_figure

LINES = {
    "line": {"width": 1.5, "color": "#444"},
    "bold": {"width": 3, "color": "#222"},
    "dotted": {"width": 1.5, "color": "#d95f0e", "dash": "dot"},
}
MOST_NAMED = 16  # a legend of so many lines is read; colours tell those between
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
        figure.update_xaxes(**_axis(x, [v for line in panel.grids for v in line.get("x", [])], 24), **at)
        figure.update_yaxes(**_axis(y, [v for line in panel.numbers for v in line], 48), **at)
        if n > 1:  # names stand above the panels: beside them, long ones would run into each other
            corner = {"x": 0, "y": 1, "xref": "x domain", "yref": "y domain", "yanchor": "bottom", "showarrow": False}
            figure.add_annotation(text=in_figure(y.title), **corner, **at)
            figure.update_yaxes(title=None, **at)
            if row < n:
                figure.update_xaxes(title=None, **at)
        for mark in panel.marks:
            _mark(figure, mark, at)
    height = _height(panels[0]) if n == 1 else 140 + 170 * n
    return figure.update_layout(title=in_figure(panels[0].caption), template="plotly_white", height=height)


def _cells(figure: Any, panel: Panel) -> None:
    (grid,), x, y, shade = panel.grids, panel.roles["x"], panel.roles["y"], panel.roles["colour"]
    z = grid["colour"]
    gap = 1 if panel.kind == "heat map" and max(len(z), len(z[0])) <= 64 else 0
    more: dict[str, Any] = {"hoverongaps": False}
    if "text" in grid:
        more |= {"text": [list(map(in_figure, row)) for row in grid["text"]], "texttemplate": "%{text}"}
    if panel.kind == "heat map":
        more |= {
            "customdata": [list(map(in_figure, x.places))] * len(z),
            "hovertext": [[in_figure(place)] * len(z[0]) for place in y.places],
            "hovertemplate": "%{hovertext} · %{customdata}<br>%{z:.4g}<extra></extra>",
        }
    figure.add_heatmap(
        # Plotly drops repeated category names, so rows and columns have numbers and the labels are ticks.
        x=list(range(len(z[0]))),
        y=list(range(len(z))),
        z=z,
        xgap=gap,
        ygap=gap,
        colorbar={"title": {"text": in_figure(shade.title), "side": "right"}},
        **_shades(shade, "z"),
        **more,
    )
    square = panel.kind == "floorplan"
    figure.update_xaxes(**PLAIN, **({"constrain": "domain"} if square else {}))
    figure.update_yaxes(autorange="reversed", **PLAIN, **({"scaleanchor": "x"} if square else {}))


def _shades(axis: Axis, letter: str) -> dict[str, Any]:
    ends = {} if axis.range is None else {f"{letter}min": axis.range[0], f"{letter}max": axis.range[1]}
    return {"colorscale": axis.palette or "Blues", **ends, **({"zmid": 0} if axis.palette == "RdBu" else {})}


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
            marker = {"color": line["colour"], "size": 7, **_shades(shade, "c"), **(bar if k == 0 else {})}
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
        named = named[:: -(-len(named) // most) or 1]
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
