"""What `check_family` found, as a table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from html import escape
from typing import Literal

from ..results.showing import html_table

_WIDTH = 100


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Args:
        check: its name.
        asks: what it asks.
        status: "passed"; "refused" by the model, which cannot do what is checked; or "failed".
        detail: what was compared, or the reason.
    """

    check: str
    asks: str
    status: Literal["passed", "refused", "failed"]
    detail: str


@dataclass(frozen=True, repr=False)
class FamilyReport:
    """What came of all checks; printed, or the last line of a notebook's cell, it is a table.

    Args:
        model: what was checked.
        outcomes: in the order in which they were asked.
    """

    model: str
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> list[Outcome]:
        """The checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    def __getitem__(self, check: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.check == check)

    def __repr__(self) -> str:
        lines = [self._summary()]
        for outcome in self.outcomes:
            text = textwrap.wrap(f"{outcome.asks}: {outcome.detail}", _WIDTH - 24) or [""]
            lines.append(f"{outcome.status:9}{outcome.check:15}{text[0]}")
            lines += [" " * 24 + line for line in text[1:]]
        return "\n".join(lines)

    def _summary(self) -> str:
        counts = {kind: sum(o.status == kind for o in self.outcomes) for kind in ("passed", "refused", "failed")}
        return f"{self.model}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)

    def _repr_html_(self) -> str:
        colours = {"passed": "seagreen", "refused": "grey", "failed": "crimson"}
        rows = [
            [f'<b style="color: {colours[o.status]}">{o.status}</b>', o.check, escape(o.asks), escape(o.detail)]
            for o in self.outcomes
        ]
        return html_table(self._summary(), ["", "check", "asks", "found"], rows, "")


class FamilyError(AssertionError):
    """Checks failed; the message lists them all, `report` has the others too."""

    def __init__(self, report: FamilyReport):
        self.report: FamilyReport = report
        failed = "\n".join(f"  {outcome.check}: {outcome.detail}" for outcome in report.failed)
        super().__init__(f"{report._summary()}\n{failed}\n\n{report!r}")
