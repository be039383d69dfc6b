"""The canonical looped model in plain PyTorch: one forward for all families, configured by `LoopedConfig`."""

from __future__ import annotations

from .looped_model import LoopedModel, LoopedOutput
from .loops import Repeat, register_loop

__all__ = ["LoopedModel", "LoopedOutput", "Repeat", "register_loop"]
