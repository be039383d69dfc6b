"""The progress line: how much is done, and how many minutes are left."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

Key = tuple[str, int]  # an analysis and a unit


class Progress:
    """Learns what a token costs in every analysis, and tells from what is left how long it takes, once all were seen.

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
        self._shown = 0
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
        if not self._verbose:
            return
        names = {name for name, _ in self.left} | self._measured.keys()
        if not names <= self._measured.keys():
            if len(self._measured[key[0]]) == 1:
                print(f"{self._what}: {len(self._measured)} of {len(names)} measures begun", file=self._stream, flush=True)
            return
        whole, left = self._seconds(self._weights), self.seconds()
        percent = int(100 * (1 - left / whole)) if self.left and whole else 100
        if percent > self._shown:
            self._shown = percent
            end = "\r" if self._stream.isatty() and self.left else "\n"
            print(f"{self._what}: {percent:3d} % done, {self.minutes()} left", end=end, file=self._stream, flush=True)

    def drop(self, key: Key) -> None:
        """Another process has done a unit.

        Args:
            key: which.
        """
        self.left.discard(key)

    def seconds(self) -> float:
        """How long the rest takes."""
        return self._seconds(self.left)

    def _seconds(self, keys: Iterable[Key]) -> float:
        rates = {}
        for name, measured in self._measured.items():
            later = measured[1:] or measured  # the first is slower: memory is claimed, libraries make plans
            rates[name] = sum(seconds for seconds, _ in later) / max(1, sum(tokens for _, tokens in later))
        return sum(self._weights[key] * rates.get(key[0], 0.0) for key in keys)  # what was done before counts for nothing

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
