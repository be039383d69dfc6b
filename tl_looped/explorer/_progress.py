"""How far a task is, and whether it is still wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class Cancelled(Exception):
    """The task is no longer wanted."""


@dataclass(frozen=True)
class Progress:
    """Called with the share that is done and what is being done; raises `Cancelled` where nobody wants it any more.

    Args:
        say: is told the share, from 0 to 1, and the words.
        cancelled: whether to stop.
        start: what share of the whole task was done before this part of it.
        stop: and what share is done after it.
    """

    say: Callable[[float, str], None] | None = None
    cancelled: Callable[[], bool] | None = None
    start: float = 0.0
    stop: float = 1.0

    def __call__(self, share: float | int, what: str) -> None:
        if self.cancelled is not None and self.cancelled():
            raise Cancelled
        if self.say is not None:
            self.say(self.start + share * (self.stop - self.start), what)

    def part(self, start: float | int, stop: float | int) -> Progress:
        """The progress of a part of this task.

        Args:
            start: the share of this task at which the part begins.
            stop: the share at which it ends.
        """
        span = self.stop - self.start
        return Progress(self.say, self.cancelled, self.start + start * span, self.start + stop * span)
