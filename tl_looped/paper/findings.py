"""What is found of some prompts: results by name, and why others are missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
