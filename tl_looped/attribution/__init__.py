"""Where an answer comes from: estimates of patches, edges between components, weights and training examples."""

from __future__ import annotations

from .paths import Paths, Receiver, Source, edge_sweep, path_patch
from .sweep import attribution_sweep
from .weights import influence, weight_gradients_by_pass

__all__ = [
    "Paths",
    "Receiver",
    "Source",
    "attribution_sweep",
    "edge_sweep",
    "influence",
    "path_patch",
    "weight_gradients_by_pass",
]
