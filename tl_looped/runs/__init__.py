"""Analyses over many prompts: driven prompt by prompt, added up, and kept in files that a later call goes on from."""

from __future__ import annotations

from .reading import read_prompts
from .store import Run, run

__all__ = ["Run", "read_prompts", "run"]
