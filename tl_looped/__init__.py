"""Looped language models as first-class TransformerLens models."""

from __future__ import annotations

from . import attribution, exits, interventions, metrics, patching, path_patching, weight_gradients
from .bridge.cache import LoopedCache
from .bridge.looped_bridge import LoopedBridge
from .config import LoopedConfig
from .errors import LoopedError
from .schedule import Schedule

__all__ = [
    "LoopedBridge",
    "LoopedCache",
    "LoopedConfig",
    "LoopedError",
    "Schedule",
    "attribution",
    "exits",
    "interventions",
    "metrics",
    "patching",
    "path_patching",
    "weight_gradients",
]
