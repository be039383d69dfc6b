"""What every looped model must pass, whoever wrote it: `check_family` runs it and says what failed."""

from .check import check_family
from .report import FamilyError, FamilyReport, Outcome

__all__ = ["check_family", "FamilyError", "FamilyReport", "Outcome"]
