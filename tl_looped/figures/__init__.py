"""How results are drawn."""

from __future__ import annotations

from ..panels import Panel
from .attention_viewer import attention_viewer
from .plotly import draw
from .plots import GroupBy, attention_heads, floorplan, grouped, heat_map, panels, paths, rank_trajectories

__all__ = [
    "GroupBy",
    "Panel",
    "attention_heads",
    "attention_viewer",
    "draw",
    "floorplan",
    "grouped",
    "heat_map",
    "panels",
    "paths",
    "rank_trajectories",
]
