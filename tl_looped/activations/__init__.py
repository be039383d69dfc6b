"""Activations of a data set on the disk: chosen sites of chosen loops, written while they are computed, read in any order."""

from __future__ import annotations

from .collecting import collect
from .reading import Activations, Batch, Batches
from .store import ActivationStore, Prompt, load_activations

__all__ = ["ActivationStore", "Activations", "Batch", "Batches", "Prompt", "collect", "load_activations"]
