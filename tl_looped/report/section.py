"""What a report is made of: sections of readings, figures and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import LoopedError
from ..results import Estimate, Grid


class Unmeasured(LoopedError):
    """What a section needs and does not have, with the command that would give it.

    Args:
        reason: why it cannot be measured.
        command: the command, or the call in Python.
    """

    def __init__(self, reason: str, command: str):
        super().__init__(reason)
        self.command: str = command


@dataclass(frozen=True)
class Figure:
    """A figure of a section.

    Args:
        caption: what it shows.
        content: a plotly figure, or HTML.
        width: the least width in pixels at which it can be read; narrower pages scroll it.
        is_wide: it has a row of its own, however narrow it may get.
    """

    caption: str
    content: Any
    width: int = 320
    is_wide: bool = False


@dataclass
class Section:
    """One question and what was found.

    Args:
        name: short, for links and JSON.
        title: above it.
        headline: what was found in one sentence, for the top of the page.
        cover: the figure that stands at the top of the page, if no section before has one.
        notes: what a reader has to know before the readings.
        basis: how many prompts the numbers are from.
        reading: sentences that say in plain words what the figures show, each made from the numbers.
        figures: what is drawn.
        numbers: all numbers that the readings and figures hold.
        refused: what could not be measured here, and why.
        command: what would fill the section.
        failed: errors that no analysis should raise; the rest of the section is there.
    """

    name: str
    title: str
    headline: str = ""
    cover: Figure | None = None
    basis: str = ""
    notes: list[str] = field(default_factory=list)
    reading: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    command: str = ""
    failed: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.reading or self.figures)

    def attempt(self, part: Callable[[], None]) -> None:
        """Run a part of the section; if it refuses or breaks, say so and go on."""
        try:
            part()
        except LoopedError as error:
            self.refused.append(str(error))
            self.command = error.command if isinstance(error, Unmeasured) else self.command
        except Exception as error:  # of a model that no test knows: the other sections may still be right
            self.failed.append(f"{type(error).__name__}: {error}")

    def draw(self, caption: str, content: Any, width: int = 320) -> None:
        """Add a figure, unless it says nothing: no text, fewer than three points, or one number everywhere.

        Args:
            caption: what it shows.
            content: a plotly figure, or HTML.
            width: the least width in pixels at which it can be read.
        """
        if content and (isinstance(content, str) or says_something(content)):
            self.figures.append(Figure(caption, content, width))

    def why_empty(self) -> str:
        """Why nothing was measured, in one line with what would change that."""
        why = " ".join([*self.refused, *self.failed])
        return why + (f" To fill it: {self.command}" if self.command else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the figures, ready for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "headline": self.headline,
            "basis": self.basis,
            "notes": self.notes,
            "reading": self.reading,
            "refused": self.refused,
            "command": self.command,
            "failed": self.failed,
            "numbers": plain(self.numbers),
        }


def says_something(figure: Any) -> bool:
    """Whether a plotly figure has a line of three points or a grid of three cells, and not one number everywhere.

    Args:
        figure: the figure.
    """
    most, drawn = 0, set[float]()
    for trace in figure.data:
        is_grid = getattr(trace, "z", None) is not None
        rows = trace.z if is_grid else [trace.y]
        numbers = [float(v) for row in rows for v in row if v is not None and math.isfinite(v)]
        most = max(most, len(numbers))
        drawn |= {float(f"{v:.3g}") for v in numbers}
    return most > 2 and len(drawn) > 1


def plain(value: Any) -> Any:
    """Grids, tensors and containers of them as JSON-ready values; what is not finite becomes None."""
    if isinstance(value, Grid):
        labels = {axis: list(map(str, value.labels[axis])) for axis in value.axes}
        found = {"name": value.name, "axes": list(value.axes), "labels": labels, "values": plain(value.values)}
        if isinstance(value, Estimate):
            found |= {"stderr": plain(value.stderr), "count": value.count}
        return found
    if isinstance(value, Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def share(x: float | Tensor) -> str:
    """A share in percent, with a digit more where it is small; what is less than all is never rounded to 100 %."""
    x = float(x)
    if 0.995 <= x < 1:
        return f"{math.floor(1e4 * x) / 1e4:.2%}"
    return f"{x:.0%}" if abs(x) >= 0.1 or x == 0 else f"{x:.1%}" if abs(x) >= 0.001 else f"{100 * x:.1g}%"


def number(x: float | Tensor) -> str:
    """A number in three digits."""
    return f"{float(x):.3g}"


def listed(words: list[str]) -> str:
    """Words as an enumeration."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def measured(estimate: Estimate, k: int) -> str:
    """Entry `k` of an estimate with its standard error, if there is one."""
    return number(estimate.values[k]) + (f" ± {number(estimate.stderr[k])}" if estimate.count > 1 else "")
