"""How results are drawn."""

from __future__ import annotations

from .attention_viewer import attention_viewer
from .plots import GroupBy, attention_heads, floorplan, grouped, heat_map, panels, paths, rank_trajectories

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
