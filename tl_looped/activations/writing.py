"""Work that is done on a thread, in order, a bounded number of bytes behind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from .shards import Draft

_AT_ONCE = 2**22  # bytes that change threads together: a switch takes as long as writing a hundred rows


class Behind(AbstractContextManager["Behind"]):
    """Does jobs one after the other while whoever gives them goes on.

    Args:
        most: how many bytes may wait; who brings more waits too.
    """

    def __init__(self, most: int):
        self.most = most
        self._jobs: deque[tuple[Callable[[], object], int]] = deque()
        self._waiting: int = 0
        self._changed: threading.Condition = threading.Condition()
        self._ends: bool = False
        self._error: BaseException | None = None
        self._thread: threading.Thread = threading.Thread(target=self._work, name="tl_looped writing", daemon=True)

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.wait()
        with self._changed:
            self._ends = True
            self._jobs.clear()
            self._changed.notify_all()
        self._thread.join()

    def do(self, job: Callable[[], object], n_bytes: int = 0) -> None:
        """Have a job done; what an earlier one raised is raised here.

        Args:
            job: called on the thread.
            n_bytes: what it holds in memory until it is done.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._waiting or self._waiting + n_bytes <= self.most)
            self._raise()
            self._jobs.append((job, n_bytes))
            self._waiting += n_bytes
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when all jobs are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._jobs)
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._ends)
                if self._ends:
                    return
                job, n_bytes = self._jobs[0]
            try:
                job()
            except BaseException as error:  # raised where the next job is given
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if self._jobs:
                    self._jobs.popleft()
                self._waiting -= n_bytes
                self._changed.notify_all()


class Written:
    """Has activations written behind, many at once.

    Args:
        behind: what writes.
        draft: where to.
    """

    def __init__(self, behind: Behind, draft: Draft):
        self._behind = behind
        self._draft = draft
        self._waiting: list[tuple[str, int, Tensor]] = []
        self._n_bytes: int = 0

    def put(self, name: str, row: int, values: Tensor) -> None:
        """Have rows written, as `Draft.write` does, sooner or later."""
        self._waiting.append((name, row, values))
        self._n_bytes += values.numel() * values.dtype.itemsize
        if self._n_bytes >= _AT_ONCE:
            self.hand_over()

    def hand_over(self) -> None:
        """Have all written that is not yet."""
        rows, n_bytes = self._waiting, self._n_bytes
        self._waiting, self._n_bytes = [], 0
        self._behind.do(lambda: self._draft.write(rows), n_bytes)
