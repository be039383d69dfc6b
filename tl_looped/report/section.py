"""What a report is made of: sections of readings, figures and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ..analysis._prompts import at_depth
from ..bridge.looped_bridge import LoopedBridge
from ..errors import LoopedError
from ..results import Estimate, Grid
from ..toys.hop import HopPrompts


@dataclass(frozen=True)
class Question:
    """What a report is about.

    Args:
        model: the model, with its own number of loops.
        prompts: tokens, each a batch of prompts of one length; the very first prompt is the one that is shown.
        n_loops: how far to loop in the sections that look beyond the model's own number.
        pair: a clean and a corrupted prompt, [1, pos] each, or None.
        hops: for a toy of pointer chasing, mappings with their answers; `prompts` are their tokens, unless others were given.
    """

    model: LoopedBridge
    prompts: list[Int[Tensor, "_ _"]]
    n_loops: int
    pair: tuple[Tensor, Tensor] | None = None
    hops: HopPrompts | None = None

    @cached_property
    def deep(self) -> LoopedBridge:
        """The model with `n_loops` loops."""
        return at_depth(self.model, self.n_loops)

    @property
    def shown(self) -> Int[Tensor, "1 pos"]:
        """The prompt that is shown."""
        return self.prompts[0][:1]

    def of_length(self, least: int) -> list[Int[Tensor, "_ _"]]:
        """The prompts of at least so many tokens; all where there is none, so that an analysis says what it needs."""
        return [batch for batch in self.prompts if batch.shape[1] >= least] or self.prompts

    @property
    def n_examples(self) -> int:
        """Number of prompts."""
        return sum(len(batch) for batch in self.prompts)

    def words(self, tokens: Int[Tensor, " pos"]) -> list[str]:
        """Tokens as a reader sees them."""
        if self.model.tokenizer is None:
            return [str(token) for token in tokens.tolist()]
        return [self.word(token) for token in tokens.tolist()]

    def word(self, token: int) -> str:
        """A token as a reader sees it; a space and a line break are shown."""
        if self.model.tokenizer is None:
            return str(token)
        text = self.model.tokenizer.decode([token])
        return text.replace("\n", "↵").replace("\t", "⇥") or repr(text)


@dataclass(frozen=True)
class Figure:
    """A figure of a section.

    Args:
        caption: what it shows.
        content: a plotly figure, or HTML.
        width: the least width in pixels at which it can be read; narrower pages scroll it.
        is_light: it is drawn for a light page, and stands on one in the dark too.
    """

    caption: str
    content: Any
    width: int = 320
    is_light: bool = False


@dataclass
class Section:
    """One question and what was found.

    Args:
        name: short, for links and JSON.
        title: above it.
        reading: sentences that say in plain words what the figures show, each made from the numbers.
        figures: what is drawn.
        numbers: all numbers that the readings and figures hold.
        refused: what could not be measured here, and why.
        failed: errors that no analysis should raise; the rest of the section is there.
    """

    name: str
    title: str
    reading: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def attempt(self, part: Callable[[], None]) -> None:
        """Run a part of the section; if it refuses or breaks, say so and go on."""
        try:
            part()
        except LoopedError as error:
            self.refused.append(str(error))
        except Exception as error:  # of a model that no test knows: the other sections may still be right
            self.failed.append(f"{type(error).__name__}: {error}")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the figures, ready for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "reading": self.reading,
            "refused": self.refused,
            "failed": self.failed,
            "numbers": plain(self.numbers),
        }


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
