"""What docstrings of the package spell in another way than griffe and Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rename sections before they are parsed: doctests are `Examples:`, and what a named tuple holds are `Attributes:`.

    The star of a limit such as X* is no emphasis.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        names = {"Example:": "Examples:"}
        if isinstance(obj, griffe.Class) and any(str(base).endswith("NamedTuple") for base in obj.bases):
            names["Args:"] = "Attributes:"
        for ours, theirs in names.items():
            obj.docstring.value = re.sub(rf"^{ours}$", theirs, obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r"\bX\*", r"X\\*", obj.docstring.value)
