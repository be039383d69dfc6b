"""What every component adds to a logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .._old_calls import accepts_old
from ..panels import Panel
from ..results import Grid, Result


@dataclass(frozen=True, eq=False)
class LogitAttribution(Result):
    """What every component adds to a logit, or to a difference of two.

    Args:
        values: [component, *batch, *pos]; sums to the logit before a soft cap, without a bias of the unembedding. Padding has
            NaN.
        labels: the components, in the order of the run.
        unit: what a component is: "component", "layer" or "head".
        axes: the names of the axes, "component" first.
    """

    values: Float[Tensor, "component ..."]
    labels: tuple[str, ...]
    unit: str
    axes: tuple[str, ...]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The components of the largest magnitude, with their values in logits, averaged over batch and real positions.

        Args:
            k: how many.
        """
        mean = self.values.flatten(1).nanmean(-1) if self.values.ndim > 1 else self.values
        chosen = mean.abs().topk(min(k, len(self.labels))).indices.tolist()
        return [(self.labels[i], mean[i].item()) for i in chosen]

    @property
    def grid(self) -> Grid:
        """The values with their axes, of which `sel` and `[...]` take a part."""
        counted = {axis: list(range(n)) for axis, n in zip(self.axes[1:], self.values.shape[1:], strict=True)}
        return Grid(self.values, self.axes, {"component": list(self.labels), **counted}, "logits")

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row per component (and example, and position)."""
        return self.grid.to_dataframe()

    @accepts_old("title")
    def panels(self, *, title: str = "") -> list[Panel]:
        """Bars, one per component, or a heat map of components by examples or positions.

        Args:
            title: above the figure.
        """
        grid = self.grid[:, 0] if self.values[0].numel() == 1 and self.axes[1:] == ("example",) else self.grid
        return grid.panels(title=title or f"What every {self.unit} adds to the logits")
