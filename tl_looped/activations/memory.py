"""Prompts that did not fit into memory: another time, or on another machine, they may."""

from __future__ import annotations

_SAYS = ("OutOfMemoryError", "MemoryError", "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
ADVICE = "It ran alone: load the model with a smaller dtype= or on another device=, or shorten the prompt."


def lacks_memory(why: str) -> bool:
    """Whether a prompt failed for want of memory.

    Args:
        why: the name of the error and what it says, of torch on any device, or of Python.
    """
    return any(words in why for words in _SAYS)
