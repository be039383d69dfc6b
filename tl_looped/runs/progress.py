"""The progress line: how much is done, and how many minutes are left."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

Key = tuple[str, int]  # an analysis and a unit


class Progress:
    """Learns what a token costs in every analysis, and tells from what is left how long it takes.

    Args:
        weights: of all units, in tokens.
        left: those that are to be done.
        what: what is done, at the beginning of the line.
        verbose: whether it is shown.
        clock: seconds.
    """

    def __init__(
        self,
        weights: Mapping[Key, int],
        left: Iterable[Key],
        what: str,
        *,
        verbose: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.left: set[Key] = set(left)
        self._weights, self._what, self._verbose, self._clock = weights, what, verbose, clock
        self._measured: dict[str, list[tuple[float, int]]] = defaultdict(list)  # seconds and tokens
        self._begun = clock()
        self._shown = -1
        self._stream: TextIO = sys.stderr

    def begin(self) -> None:
        """A unit begins."""
        self._begun = self._clock()

    def done(self, key: Key) -> None:
        """A unit is done.

        Args:
            key: which.
        """
        self._measured[key[0]].append((self._clock() - self._begun, self._weights[key]))
        self.left.discard(key)
        whole, left = sum(self._weights.values()), sum(self._weights[key] for key in self.left)
        percent = 100 * (whole - left) // whole
        if self._verbose and (percent > self._shown or not self.left):
            self._shown = percent
            end = "\r" if self._stream.isatty() and self.left else "\n"
            print(f"{self._what}: {percent:3d} % done, {self.minutes()} left", end=end, file=self._stream, flush=True)

    def seconds(self) -> float:
        """How long the rest takes."""
        rates = {}
        for name, measured in self._measured.items():
            later = measured[1:] or measured  # the first is slower: memory is claimed, libraries make plans
            rates[name] = sum(seconds for seconds, _ in later) / max(1, sum(tokens for _, tokens in later))
        usual = sum(rates.values()) / max(1, len(rates))
        return sum(self._weights[key] * rates.get(key[0], usual) for key in self.left)

    def minutes(self) -> str:
        """The same in words."""
        minutes = self.seconds() / 60
        return (
            f"{minutes:.0f} minutes"
            if minutes >= 20
            else f"{minutes:.1f} minutes"
            if minutes >= 1
            else f"{minutes:.2f} minutes"
        )
