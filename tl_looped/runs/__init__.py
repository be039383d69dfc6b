"""Analyses over many prompts: driven prompt by prompt, added up, and kept in files that a later call goes on from."""

from __future__ import annotations

from .analyze import analyze, merge
from .reading import read_prompts
from .store import Asked, Run, run

__all__ = ["Asked", "Run", "analyze", "merge", "read_prompts", "run"]
