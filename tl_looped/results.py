"""`Grid`: numbers over named axes such as (loop, layer, pos), as analyses and sweeps return them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import LoopedError


@dataclass(frozen=True, eq=False)
class Grid:
    """Numbers over named axes.

    Args:
        values: one dimension per axis.
        axes: the names of the axes, such as ("loop", "layer", "pos").
        labels: for every axis, what its entries are called.
        name: what the numbers are, with their unit if they have one.

    Example:
        >>> grid = Grid(torch.tensor([[1.0, 2.0]]), ("loop", "layer"), {"loop": ["0"], "layer": ["0", "1"]}, "metric")
        >>> grid.to_dataframe().to_dict("records")
        [{'loop': '0', 'layer': '0', 'metric': 1.0}, {'loop': '0', 'layer': '1', 'metric': 2.0}]
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: dict[str, list[str]]
    name: str = "value"

    def __post_init__(self) -> None:
        shape = tuple(len(self.labels[axis]) for axis in self.axes)
        if tuple(self.values.shape) != shape:
            raise LoopedError(
                f"values of shape {tuple(self.values.shape)} do not fit the axes {dict(zip(self.axes, shape, strict=True))}."
            )

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per number and one column per axis."""
        import pandas as pd

        index = torch.cartesian_prod(*(torch.arange(n) for n in self.values.shape)).reshape(-1, len(self.axes))
        columns: dict[str, Any] = {a: [self.labels[a][i] for i in index[:, k].tolist()] for k, a in enumerate(self.axes)}
        return pd.DataFrame({**columns, self.name: self.values.detach().cpu().flatten().tolist()})

    def plot(self, title: str = "") -> Any:
        """A plotly figure: a heat map with the last axis across and the others down, or a line if there is one axis.

        Args:
            title: above the figure; None for the name of the numbers.

        Raises:
            LoopedError: plotly is not installed.
        """
        from .plots import heat_map

        return heat_map(self, title)
