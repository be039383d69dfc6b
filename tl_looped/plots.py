"""Figures, in plotly (`pip install 'tl-looped[viz]'`)."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from .errors import LoopedError

if TYPE_CHECKING:
    from .results import Grid


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
