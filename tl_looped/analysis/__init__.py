"""Analyses of looped models, indexed by (loop, layer)."""

from __future__ import annotations

from .logit_lens import LogitLensResult, Readout, logit_lens

__all__ = ["LogitLensResult", "Readout", "logit_lens"]
