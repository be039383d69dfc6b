"""Numbers over named axes such as (loop, layer, pos), as analyses and sweeps return them.

`Grid`, and `Estimate` of a mean; and `Result`, what holds several of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import LoopedError

AnyResult = TypeVar("AnyResult", bound="Result")


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
    labels: dict[str, list[Any]]
    name: str = "value"

    def __post_init__(self) -> None:
        shape = tuple(len(self.labels[axis]) for axis in self.axes)
        if tuple(self.values.shape) != shape:
            raise LoopedError(
                f"values of shape {tuple(self.values.shape)} do not fit the axes {dict(zip(self.axes, shape, strict=True))}."
            )

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per number and one column per axis (needs pandas, which TransformerLens installs).

        Layers that a stack lacks beside others (prelude, coda) have no rows.
        """
        import pandas as pd

        index = self._there().nonzero()
        columns: dict[str, Any] = {a: [self.labels[a][i] for i in index[:, k].tolist()] for k, a in enumerate(self.axes)}
        return pd.DataFrame({**columns, self.name: self.values.detach()[self._there()].cpu().tolist()})

    def _there(self) -> Tensor:
        """Which entries exist: where stacks of different depth share the axis "loop", not all do, and those are NaN."""
        if {"prelude", "coda"}.isdisjoint(self.labels.get("loop", ())):
            return torch.ones_like(self.values, dtype=torch.bool)
        return ~self.values.isnan()

    def plot(self, title: str = "") -> Any:
        """A plotly figure: a heat map with the last axis across and the others down, or a line if there is one axis.

        Args:
            title: above the figure; the name of the numbers if empty.

        Raises:
            LoopedError: plotly is not installed; a single number, without axes.
        """
        from .plots import heat_map

        return heat_map(self, title)


@dataclass(frozen=True, eq=False)
class Estimate(Grid):
    """A mean over examples, with what is needed to merge it with the mean over others.

    Args:
        values: the mean, one dimension per axis; in fp64.
        count: how many examples.
        m2: sum over the examples of the squared distance to the mean.

    Example:
        >>> axes, labels = ("loop",), {"loop": ["0", "1"]}
        >>> a = Estimate.of(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), axes, labels, "norm")
        >>> b = Estimate.of(torch.tensor([[5.0, 2.0]]), axes, labels, "norm")
        >>> (a + b).values.tolist(), (a + b).count
        ([3.0, 2.0], 3)
    """

    count: int = 0
    m2: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64, device="cpu"))

    @classmethod
    def of(
        cls, examples: Float[Tensor, "example ..."], axes: tuple[str, ...], labels: dict[str, list[Any]], name: str = "value"
    ) -> Estimate:
        """The estimate from one number per example and entry.

        Args:
            examples: the examples lead.
            axes: the names of the other axes.
            labels: what the entries of every axis are called.
            name: what the numbers are, with their unit if they have one.

        Raises:
            LoopedError: there is no example.
        """
        if not len(examples):
            raise LoopedError("an estimate over no examples was asked; pass at least one.")
        wide = examples.detach().double()
        mean = wide.mean(0)
        return cls(mean, axes, labels, name, len(examples), (wide - mean).square().sum(0))

    def __add__(self, other: Estimate) -> Estimate:
        """The estimate over the examples of both (Chan et al. 1979), the same whichever way they were split.

        Raises:
            LoopedError: other axes, labels or quantities.
        """
        if (self.axes, self.labels, self.name) != (other.axes, other.labels, other.name):
            raise LoopedError(
                f"{other.name} over {other.axes} cannot be added to {self.name} over {self.axes}: the axes, their labels and "
                "the quantity must be the same."
            )
        count = self.count + other.count
        shift = other.values - self.values
        mean = self.values + shift * (other.count / count)
        m2 = self.m2 + other.m2 + shift.square() * (self.count * other.count / count)
        return type(self)(mean, self.axes, self.labels, self.name, count, m2)

    @property
    def stderr(self) -> Float[Tensor, ...]:
        """Standard error of the mean, from the sample variance; NaN for a single example."""
        spread = self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.values, torch.nan)
        return (spread / self.count).sqrt()

    def to_dataframe(self) -> Any:
        """As for a `Grid`, with the columns `{name}_stderr` and `count` beside the mean."""
        frame = super().to_dataframe()
        frame[f"{self.name}_stderr"] = self.stderr[self._there()].cpu().tolist()
        frame["count"] = self.count
        return frame


class Result:
    """Base of the frozen dataclasses that analyses return: estimates, examples in tuples, and settings.

    `a + b` is the result over the prompts of both: estimates merge, examples follow each other, settings must be the same.
    """

    def __add__(self: AnyResult, other: AnyResult) -> AnyResult:
        if type(self) is not type(other):
            return NotImplemented
        parts: Any = self
        merged = {f.name: _merge(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(parts)}
        return replace(parts, **merged)


def _merge(name: str, a: Any, b: Any) -> Any:
    if isinstance(a, (Estimate, tuple)) and type(a) is type(b):
        return a + b
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {key: _merge(name, a[key], b[key]) for key in a}
    if a != b:
        raise LoopedError(f"results with {name}={a!r} and {name}={b!r} were added; they answer different questions.")
    return a


def table(first: Grid, *others: Grid) -> Any:
    """One pandas DataFrame for several grids: a row per entry of the first, a column for each; missing entries are NaN.

    Args:
        first: whose entries are the rows.
        *others: grids over some or all of its axes.
    """
    frame = first.to_dataframe()
    for grid in others:
        frame = frame.merge(grid.to_dataframe().drop(columns="count", errors="ignore"), how="left", on=list(grid.axes))
    return frame
