"""Checkpoints: a directory or Hub repository of tensors becomes a `LoopedModel`, and back."""

from .load import load_model, stored_dtype
from .open import Checkpoint, MemoryCheckpoint, open_checkpoint
from .placement import DeviceMap, MaxMemory
from .plan import Plan, make_plan
from .save import save_model
from .tokenizer import load_tokenizer

__all__ = [
    "Checkpoint",
    "MemoryCheckpoint",
    "open_checkpoint",
    "DeviceMap",
    "MaxMemory",
    "Plan",
    "make_plan",
    "load_model",
    "stored_dtype",
    "save_model",
    "load_tokenizer",
]
