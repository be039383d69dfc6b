"""Calls as they were written for the release before."""

from __future__ import annotations

import pytest

from tl_looped._old_calls import accepts_old
from tl_looped.errors import LoopedError


class Reader:
    @accepts_old("scale", "offset", pos="positions")
    def read(self, x: int, *, scale: int = 1, offset: int = 0, positions: int = -1) -> tuple[int, int]:
        """Read."""
        return x * scale + offset, positions


def test_old_spellings_mean_what_they_meant_and_are_named() -> None:
    reader = Reader()
    with pytest.warns(FutureWarning, match=r"^read\(pos=\) is now read\(positions=\)\.$"):
        assert reader.read(2, pos=3) == (2, 3)
    with pytest.warns(FutureWarning, match=r"^read\((scale|offset)=\) is given by name now\.$"):
        assert reader.read(2, 3, 4) == (10, -1)
    assert reader.read(2, scale=3, positions=0) == (6, 0)
    assert Reader.read.__doc__ == "Read."


def test_what_was_never_a_call_is_none_now() -> None:
    with pytest.raises(LoopedError, match="one argument"):
        Reader().read(2, pos=3, positions=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(LoopedError, match="twice"), pytest.warns(FutureWarning):
        Reader().read(2, 3, 4, offset=4)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError), pytest.warns(FutureWarning):
        Reader().read(2, 3, 4, 5)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        Reader().read(2, where=3)  # pyright: ignore[reportCallIssue]
