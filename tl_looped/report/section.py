"""What a report is made of: sections, each of parts that measure, read and draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..errors import LoopedError
from ..panels import Panel, json_ready
from ..results import Estimate

if TYPE_CHECKING:
    from .question import Question

Numbers = dict[str, Any]


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
        content: panels, one below the other, or HTML.
        width: the least width in pixels at which it can be read; narrower pages scroll it.
        is_wide: it has a row of its own, however narrow it may get.
        is_cover: it stands at the top of the page, if no section before has such a figure.
    """

    caption: str
    content: Sequence[Panel] | str
    width: int = 320
    is_wide: bool = False
    is_cover: bool = False

    @property
    def says_something(self) -> bool:
        """Whether there is text, or a panel with more than one number and more than two points."""
        return bool(self.content if isinstance(self.content, str) else any(panel.says_something for panel in self.content))


@dataclass(frozen=True)
class Reading:
    """What the numbers of a part say.

    Args:
        sentences: in plain words what the figures show, each made from the numbers.
        headline: the finding in one sentence, for the top of the page.
        notes: what a reader has to know before.
    """

    sentences: Sequence[str] = ()
    headline: str = ""
    notes: Sequence[str] = ()


class Part(NamedTuple):
    """A part of a section in three steps; the result that the numbers were taken from is handed on with them.

    Args:
        measure: numbers, and the result they are from; None where there is nothing to measure.
        read: what they say.
        panels: what is drawn.
    """

    measure: Callable[[Question], tuple[Numbers, Any] | None]
    read: Callable[[Question, Numbers, Any], Reading] = lambda *_: Reading()
    panels: Callable[[Question, Numbers, Any], list[Figure]] = lambda *_: []


@dataclass
class Section:
    """One question and what was found.

    Args:
        name: short, for links and JSON.
        title: above it.
        headline: what was found in one sentence, for the top of the page.
        notes: what a reader has to know before the readings.
        basis: how many prompts the numbers are from.
        reading: sentences that say in plain words what the figures show, each made from the numbers.
        figures: what is drawn.
        refused: what could not be measured here, and why.
        command: what would fill the section.
        failed: errors that no analysis should raise; the rest of the section is there.
        numbers: all numbers that the readings and figures hold.
    """

    name: str
    title: str
    headline: str = ""
    basis: str = ""
    notes: list[str] = field(default_factory=list)
    reading: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    command: str = ""
    failed: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.reading or self.figures)

    @property
    def cover(self) -> Figure | None:
        """The figure for the top of the page, if it has one."""
        return next((figure for figure in self.figures if figure.is_cover), None)

    def attempt(self, part: Part, asked: Question) -> None:
        """Run a part of the section; if it refuses or breaks, say so and go on."""
        try:
            if (measured := part.measure(asked)) is None:
                return
            self.numbers |= measured[0]
            said = part.read(asked, *measured)
            self.reading += said.sentences
            self.notes += said.notes
            self.headline = said.headline or self.headline
            self.figures += [figure for figure in part.panels(asked, *measured) if figure.says_something]
        except LoopedError as error:
            self.refused += [] if str(error) in self.refused else [str(error)]
            self.command = error.command if isinstance(error, Unmeasured) else self.command
        except Exception as error:  # of a model that no test knows: the other sections may still be right
            self.failed.append(f"{type(error).__name__}: {error}")

    def why_empty(self) -> str:
        """Why nothing was measured, in one line with what would change that."""
        why = " ".join([*self.refused, *self.failed])
        return why + (f" To fill it: {self.command}" if self.command else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the figures, ready for JSON."""
        return {name: json_ready(value) for name, value in vars(self).items() if name != "figures"}


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
