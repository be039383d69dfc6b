"""The errors tl_looped raises; each message says what was asked, what exists and what to do."""

from __future__ import annotations


class LoopedError(ValueError):
    """Something was asked that this model, run or checkpoint cannot answer."""


class UnknownNameError(LoopedError, KeyError):
    """A hook name that this model does not have."""

    def __str__(self) -> str:
        return ValueError.__str__(self)  # KeyError would show the message quoted


class OutOfRangeError(LoopedError, IndexError):
    """A loop or layer that this run does not have."""


class NoPromptsError(LoopedError):
    """No prompts were given to an analysis, whose settings are all right."""


class NoMemoryError(LoopedError):
    """A prompt does not fit into memory; another time, or elsewhere, there may be more."""


class RunningSumError(LoopedError, RuntimeError):
    """A tool takes the residual stream for one running sum where it is not one."""


class NotASumError(LoopedError):
    """The residual stream of a run is no sum of what its components wrote: a hook edited it."""


class CheckpointError(LoopedError):
    """A checkpoint that cannot be read, or that contradicts itself."""


class UnknownFamilyError(CheckpointError):
    """A checkpoint of no family."""
