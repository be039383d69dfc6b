"""Activation patching and ablation, loop by loop: many cells of a grid in one batch."""

from __future__ import annotations

from .ablation import AblationSweep, ablation_sweep
from .between_loops import patch_between_loops
from .sweep import PatchSweep, patch_sweep

__all__ = ["AblationSweep", "PatchSweep", "ablation_sweep", "patch_between_loops", "patch_sweep"]
