"""`Grid`: numbers over named axes; `Estimate`: the mean of such numbers over examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import sub, truediv
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..panels import Panel, heat_map, json_ready
from .showing import Shown, html_table, matrix

Label = str | int  # an int where it counts something (loop, layer, head, example), which "prelude" and "coda" may stand beside
Selection = Label | slice | Sequence[Label]


@dataclass(frozen=True, eq=False)
class Grid(Shown):
    """Numbers over named axes.

    `grid[2, :, -1]` selects by place, `sel` by label. `a - b` and `a / b` are grids too: entry by entry, of grids over the same
    axes, or by a number. Estimates give plain grids too: they keep no examples, which the standard error of a paired difference
    needs; `tl_looped.compare` has it.

    Args:
        values: one dimension per axis; they are detached.
        axes: the names of the axes, such as ("loop", "layer", "pos").
        labels: for every axis, what its entries are called: ints where they are counted.
        name: what the numbers are, with their unit if they have one.

    Example:
        >>> grid = Grid(torch.tensor([[1.0, 2.0]]), ("loop", "layer"), {"loop": [0], "layer": [0, 1]}, "metric")
        >>> grid.to_dataframe().to_dict("records")
        [{'loop': 0, 'layer': 0, 'metric': 1.0}, {'loop': 0, 'layer': 1, 'metric': 2.0}]
        >>> grid.sel(loop=0, layer=1).item(), grid.shape
        (2.0, (1, 2))
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: dict[str, list[Any]]
    name: str = "value"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values.detach())
        shape = tuple(len(self.labels[axis]) for axis in self.axes)
        if tuple(self.values.shape) != shape:
            raise LoopedError(
                f"values of shape {tuple(self.values.shape)} do not fit the axes {dict(zip(self.axes, shape, strict=True))}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """How many entries every axis has."""
        return tuple(self.values.shape)

    def item(self) -> float:
        """The number of a grid without axes, or with one entry.

        Raises:
            LoopedError: it has more.
        """
        if self.values.numel() != 1:
            raise LoopedError(f"item() of {self.values.numel()} numbers was asked; select one with sel() or [...] first.")
        return float(self.values)

    __float__ = item

    def sel(self, **labels: Selection) -> Grid:
        """Select by label.

        Args:
            **labels: for some axes, a label (the axis goes), several of them, or a slice: `layer=slice(0, 3)` is 0, 1 and 2.
                Negative numbers count from the end.

        Raises:
            LoopedError: no such axis or label.

        Example:
            >>> labels = {"loop": [1, 2, 3], "layer": [0, 1]}
            >>> grid = Grid(torch.arange(6.0).view(3, 2), ("loop", "layer"), labels)
            >>> grid.sel(loop=slice(2, None), layer=0).values.tolist()
            [2.0, 4.0]
        """
        for axis in labels:
            if axis not in self.axes:
                raise LoopedError(f"sel({axis}=) was asked; this grid has the axes {', '.join(self.axes) or 'none'}.")
        places = {axis: self._places(axis, asked) for axis, asked in labels.items()}
        return self._take([places.get(axis, slice(None)) for axis in self.axes])

    def __getitem__(self, index: Any) -> Grid:
        """Select by place, as in a tensor: ints, slices, `...` and lists, one per axis.

        Raises:
            LoopedError: more indices than axes, or one that is out of range.
        """
        given = list(index) if isinstance(index, tuple) else [index]
        if sum(one is Ellipsis for one in given) == 1:
            k = next(k for k, one in enumerate(given) if one is Ellipsis)
            given[k : k + 1] = [slice(None)] * (len(self.axes) - len(given) + 1)
        if len(given) > len(self.axes):
            raise LoopedError(f"[...] with {len(given)} indices was asked of a grid with the axes {', '.join(self.axes)}.")
        places: list[Any] = []
        for axis, one in zip(self.axes, given, strict=False):
            one = one.tolist() if isinstance(one, Tensor) or hasattr(one, "tolist") else one
            n, asked = len(self.labels[axis]), [one] if isinstance(one, int) else one
            if not isinstance(one, (int, slice, list, tuple, range)) or isinstance(one, bool):
                raise LoopedError(
                    f"[{one!r}] was asked of the axis {axis!r}; select by place with numbers, by label with sel()."
                )
            if not isinstance(asked, slice) and (wrong := [k for k in asked if not -n <= k < n]):
                raise LoopedError(f"[{wrong[0]}] was asked of the axis {axis!r}, which has {n} entries; see sel() for labels.")
            places.append(one if isinstance(one, (int, slice)) else [k % n for k in one])
        return self._take(places)

    def _places(self, axis: str, asked: Selection) -> Any:
        """Where the labels of an axis stand."""
        labels = self.labels[axis]
        counted = [label for label in labels if isinstance(label, int)]

        def from_end(label: Any) -> Any:
            n = len(counted)
            return counted[label] if isinstance(label, int) and label < 0 and label not in counted and -label <= n else label

        if isinstance(asked, slice):
            start, stop = (None if at is None else from_end(at) for at in (asked.start, asked.stop))
            ends = [at for at in (start, stop) if at is not None]
            if not counted or any(not isinstance(at, int) for at in ends):
                raise LoopedError(f"sel({axis}={asked!r}) was asked; slices are of numbers, and this axis has {_some(labels)}.")
            chosen = [n for n in counted if (start is None or n >= start) and (stop is None or n < stop)][:: asked.step or 1]
            return [labels.index(label) for label in chosen]
        if isinstance(asked, (str, int)) or hasattr(asked, "item"):
            return self._place(axis, from_end(asked.item() if hasattr(asked, "item") else asked))  # pyright: ignore
        return [self._place(axis, from_end(label)) for label in asked]

    def _place(self, axis: str, label: Any) -> int:
        if isinstance(label, bool) or label not in self.labels[axis]:
            raise LoopedError(f"sel({axis}={label!r}) was asked; this axis has {_some(self.labels[axis])}.")
        return self.labels[axis].index(label)

    def _take(self, places: list[Any]) -> Grid:
        """The entries at some places of the leading axes."""
        places = [*places, *[slice(None)] * (len(self.axes) - len(places))]
        values, axes, labels = self._tensors(), [], {}
        for axis, at in reversed(list(zip(self.axes, places, strict=True))):
            k = self.axes.index(axis)
            if isinstance(at, int):
                values = [v.select(k, at) for v in values]
                continue
            at = list(range(len(self.labels[axis])))[at] if isinstance(at, slice) else at
            values = [v.index_select(k, torch.tensor(at, device=v.device, dtype=torch.long)) for v in values]
            axes.insert(0, axis)
            labels[axis] = [self.labels[axis][i] for i in at]
        return self._with(values, tuple(axes), {axis: labels[axis] for axis in axes})

    def _tensors(self) -> list[Tensor]:
        """What is selected together."""
        return [self.values]

    def _with(self, values: list[Tensor], axes: tuple[str, ...], labels: dict[str, list[Any]]) -> Grid:
        return Grid(values[0], axes, labels, self.name)

    def top(self, k: int = 5) -> Any:
        """The entries of the largest magnitude, as a pandas DataFrame with the largest first; NaN are left out.

        Args:
            k: how many.
        """
        size = self._weight().double().abs()[self._there()].nan_to_num(-1.0)
        order = [int(i) for i in size.argsort(descending=True, stable=True)[:k] if size[i] >= 0]
        return self.to_dataframe().iloc[order].reset_index(drop=True)

    def _weight(self) -> Tensor:
        """By what `top` orders."""
        return self.values

    def __sub__(self, other: Grid | float) -> Grid:
        """The difference, entry by entry.

        Raises:
            LoopedError: grids over other axes or labels.
        """
        return self._with_other(other, sub, "−", "difference", "subtracted from")

    def __truediv__(self, other: Grid | float) -> Grid:
        """The ratio, entry by entry.

        Raises:
            LoopedError: grids over other axes or labels.
        """
        return self._with_other(other, truediv, "/", "ratio", "divided into")

    def _with_other(self, other: Grid | float, done: Callable[[Any, Any], Tensor], sign: str, noun: str, verb: str) -> Grid:
        if not isinstance(other, Grid):
            return Grid(done(self.values, other), self.axes, self.labels, self.name)
        name = f"{self.name} {sign} {other.name}" if self.name != other.name else f"{noun} of {self.name}"
        return Grid(done(self.values, self._same(other, verb).values.to(self.values.device)), self.axes, self.labels, name)

    def _same(self, other: Grid, done: str) -> Grid:
        """Another grid, if it is over the same axes."""
        if self.axes != other.axes:
            raise LoopedError(
                f"{other.name} over {other.axes} was {done} {self.name} over {self.axes}; the axes must be the same."
            )
        for axis in self.axes:
            if self.labels[axis] != other.labels[axis]:
                raise LoopedError(
                    f"{other.name} with {axis} {_some(other.labels[axis])} was {done} {self.name} with {axis} "
                    f"{_some(self.labels[axis])}; select the same entries of both with sel()."
                )
        return other

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per number and one column per axis (needs pandas, which TransformerLens installs).

        Layers that a stack lacks beside others (prelude, coda) have no rows.
        """
        import pandas as pd

        there = self._there()
        index = there.nonzero()
        columns: dict[str, Any] = {a: [self.labels[a][i] for i in index[:, k].tolist()] for k, a in enumerate(self.axes)}
        return pd.DataFrame({**columns, self.name: self.values[there].cpu().tolist()})

    def _there(self) -> Tensor:
        """Which entries exist: where stacks of different depth share the axis "loop", not all do, and those are NaN."""
        if {"prelude", "coda"}.isdisjoint(self.labels.get("loop", ())):
            return torch.ones_like(self.values, dtype=torch.bool)
        return ~self.values.isnan()

    def to_xarray(self) -> Any:
        """An xarray DataArray with the labels as coordinates.

        Raises:
            LoopedError: xarray is not installed.
        """
        try:
            from xarray import DataArray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise LoopedError("to_xarray needs xarray, which is not installed; pip install 'tl-looped[xarray]'.") from error
        return DataArray(self.values.cpu().numpy(), {a: self.labels[a] for a in self.axes}, self.axes, name=self.name)

    @accepts_old("title")
    def panels(self, *, title: str = "") -> list[Panel]:
        """A heat map with the last axis across and the others down, or a line if there is one axis.

        Args:
            title: above the figure; the name of the numbers if empty.

        Raises:
            LoopedError: a single number, without axes.
        """
        return [heat_map(self, title=title)]

    def to_dict(self) -> dict[str, Any]:
        """Name, axes, labels and values as JSON has them."""
        labels = {axis: list(map(str, self.labels[axis])) for axis in self.axes}
        return json_ready({"name": self.name, "axes": self.axes, "labels": labels, "values": self.values})

    def _described(self) -> list[str]:
        known = self.values[self.values.isfinite()] if self.values.is_floating_point() else self.values
        over = ", ".join(f"{axis} {len(self.labels[axis])}" for axis in self.axes)
        low, high = (float(known.min()), float(known.max())) if known.numel() else (float("nan"),) * 2
        numbers = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        return [f"{self.name} [{over}]: {numbers}"] if over else [f"{self.name}: {numbers}"]

    def _repr_html_(self) -> str:
        return matrix(self) if self.axes else html_table(repr(self), [self.name], [[f"{self.item():.4g}"]], "")


def _some(labels: list[Any]) -> str:
    shown = [repr(label) for label in labels]
    return ", ".join(shown) if len(shown) <= 8 else f"{', '.join(shown[:3])}, ..., {shown[-1]}"


@dataclass(frozen=True, eq=False)
class Estimate(Grid):
    """A mean over examples, with what is needed to merge it with the mean over others.

    Args:
        values: the mean, one dimension per axis; in fp64.
        count: how many examples.
        m2: sum over the examples of the squared distance to the mean.

    Example:
        >>> axes, labels = ("loop",), {"loop": [0, 1]}
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
        if self.name != other.name:
            raise LoopedError(
                f"{other.name} cannot be added to {self.name}: an estimate is merged with one of the same quantity."
            )
        self._same(other, "added to")
        count = self.count + other.count
        shift = other.values - self.values
        mean = self.values + shift * (other.count / count)
        m2 = self.m2 + other.m2 + shift.square() * (self.count * other.count / count)
        return type(self)(mean, self.axes, self.labels, self.name, count, m2)

    def __radd__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # where `sum` begins

    def _tensors(self) -> list[Tensor]:
        return [self.values, self.m2.expand_as(self.values)]

    def _with(self, values: list[Tensor], axes: tuple[str, ...], labels: dict[str, list[Any]]) -> Grid:
        return Estimate(values[0], axes, labels, self.name, self.count, values[1])

    def _described(self) -> list[str]:
        return [f"{super()._described()[0]}, mean over {self.count}"]

    @property
    def stderr(self) -> Float[Tensor, ...]:
        """Standard error of the mean, from the sample variance; NaN for a single example."""
        spread = self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.values, torch.nan)
        return (spread / self.count).sqrt()

    def to_dict(self) -> dict[str, Any]:
        """As for a `Grid`, with the standard errors and the number of examples."""
        return super().to_dict() | {"stderr": json_ready(self.stderr), "count": self.count}

    def to_dataframe(self) -> Any:
        """As for a `Grid`, with the columns `{name}_stderr` and `count` beside the mean."""
        frame = super().to_dataframe()
        frame[f"{self.name}_stderr"] = self.stderr[self._there()].cpu().tolist()
        frame["count"] = self.count
        return frame


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
