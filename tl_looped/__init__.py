"""Looped language models as first-class TransformerLens models."""

from __future__ import annotations

from .config import LoopedConfig
from .errors import LoopedError
from .schedule import Schedule

__all__ = ["LoopedConfig", "LoopedError", "Schedule"]
