"""A screen on which a looped model is asked, loop by loop: in a notebook, and as a page of this machine."""

from __future__ import annotations

from ._packing import unpacked
from .session import Session
from .widget import explore

__all__ = ["Session", "explore", "unpacked"]
