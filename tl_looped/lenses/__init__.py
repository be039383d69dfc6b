"""What every layer of every loop would answer."""

from __future__ import annotations

from .answers import Answers
from .lens_result import LogitLensResult, Readout
from .logit_lens import logit_lens

__all__ = ["Answers", "LogitLensResult", "Readout", "logit_lens"]
