"""What is found of some prompts: results by name, and why others are missing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..analysis.limiting_behaviour import LimitingBehaviour
from ..results import Result


@dataclass(frozen=True, eq=False)
class Findings(Result):
    """Results by name; `a + b` is those over the prompts of both, and has what only one of them holds.

    Args:
        parts: a grid or a result by name.
        refused: for every part that some prompts do not have, how many by the reason.
        n_prompts: how many prompts were looked at.
    """

    parts: dict[str, Any]
    refused: dict[str, dict[str, int]]
    n_prompts: int

    def __add__(self, other: Any) -> Any:
        """Add results of the same name, and the numbers of prompts."""
        if not isinstance(other, Findings):
            return NotImplemented
        parts = dict(self.parts)
        for name, part in other.parts.items():
            parts[name] = parts[name] + part if name in parts else part
        refused = {name: dict(reasons) for name, reasons in self.refused.items()}
        for name, reasons in other.refused.items():
            mine = refused.setdefault(name, {})
            for reason, n in reasons.items():
                mine[reason] = mine.get(reason, 0) + n
        return Findings(parts, refused, self.n_prompts + other.n_prompts)

    def why_not(self, name: str) -> str:
        """Why there is no such part: the reason of most prompts.

        Args:
            name: of the part.
        """
        reasons = self.refused.get(name, {})
        return max(reasons, key=lambda reason: reasons[reason], default="")


def in_order(findings: Findings, order: tuple[int, ...]) -> tuple[Findings, tuple[int, ...]]:
    """The findings with their examples in the order of the prompts, and the prompts in that order.

    Where prompts are measured together that have equally many tokens, they come in another order. A part that some prompts do
    not have keeps it.

    Args:
        findings: the sum over all prompts.
        order: the prompts in the order in which they were added.
    """
    places = sorted(range(len(order)), key=order.__getitem__)
    parts = dict(findings.parts)
    for name, part in parts.items():
        if isinstance(part, LimitingBehaviour) and len(part.examples) == len(order):
            parts[name] = replace(part, examples=tuple(part.examples[k] for k in places))
    return replace(findings, parts=parts), tuple(sorted(order))
