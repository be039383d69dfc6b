"""What the figures are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import LoopedError
from ..names import stack_prefix
from ..report.section import Figure
from .findings import Findings


class Missing(LoopedError):
    """Why a figure is not there."""


@dataclass(frozen=True)
class About:
    """What a figure is drawn from.

    Args:
        findings: what was measured.
        n_loops: how far it was looped.
        stacks: the looped stacks.
        missing: why a part is not there, beside what the findings say.
    """

    findings: Findings
    n_loops: int
    stacks: tuple[str, ...]
    missing: dict[str, str]

    def part(self, name: str) -> Any:
        """A result by its name.

        Args:
            name: of the part.

        Raises:
            Missing: it is not there.
        """
        if name not in self.findings.parts:
            raise Missing(self.findings.why_not(name) or self.missing.get(name) or "it was not measured")
        return self.findings.parts[name]

    def by_stack(self, name: str) -> list[tuple[str, Any]]:
        """The result of every looped stack, with what the stack is called before a sentence.

        Args:
            name: of the part.
        """
        several = len(self.stacks) > 1
        return [(stack_prefix(s, ": "), self.part(f"{name}.{s}" if several else name)) for s in self.stacks]


Drawn = tuple[str, list[Figure]]
Draws = Callable[[About], Drawn]
