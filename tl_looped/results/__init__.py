"""Numbers over named axes such as (loop, layer, pos), as analyses and sweeps return them: shown, selected, added, saved."""

from __future__ import annotations

from .grid import Estimate, Grid, Label, table
from .result import Result
from .saving import load_result

__all__ = ["Estimate", "Grid", "Label", "Result", "load_result", "table"]
