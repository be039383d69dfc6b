"""The files of a directory: results, tables, and the page."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._writing import write_bytes, write_text
from ..errors import LoopedError
from ..panels import json_ready
from .findings import Findings


def check_directory(out: Path) -> None:
    """Refuse a place before the work begins rather than after it, and make it.

    Args:
        out: the directory.

    Raises:
        LoopedError: no directory can be there; as `check_tables`.
    """
    check_tables()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ".try", "").unlink(missing_ok=True)  # another process may try at the same time
    except (OSError, LoopedError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise LoopedError(f"{str(out)!r} cannot be a directory to write to: {reason}.") from error


def check_tables() -> None:
    """Refuse work whose tables could not be written.

    Raises:
        LoopedError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise LoopedError("tables are written as parquet, which needs pyarrow; pip install 'tl-looped[all]'.")


def tables_of(findings: Findings) -> dict[str, Any]:
    """A pandas DataFrame for every part, by the name of its file.

    Args:
        findings: what was measured.
    """
    found: dict[str, Any] = {}
    for name, part in findings.parts.items():
        found[name] = part.to_dataframe()
        if name.startswith("behaviour"):
            found[f"{name}.counts"] = part.counts.to_dataframe()
            found[f"{name}.co_occurrence"] = part.co_occurrence.to_dataframe()
        if name.startswith("fixed_points"):
            found[f"{name}.between_layers"] = part.layer_cosine.to_dataframe()
    return found


def write_parquet(place: Path, frame: Any) -> Path:
    """Write one table in one step.

    Args:
        place: the file.
        frame: a pandas DataFrame.
    """
    import io

    mixed = [column for column, kind in frame.dtypes.items() if str(kind) == "object"]  # as the labels of an axis may be
    frame = frame.assign(**{column: frame[column].astype(str) for column in mixed})
    buffer = io.BytesIO()
    frame.to_parquet(buffer, engine="pyarrow", index=False)
    return write_bytes(place, buffer.getvalue())


def write_json(place: Path, content: Any) -> Path:
    """Write JSON in one step; what is not finite is null.

    Args:
        place: the file.
        content: dicts, lists, numbers and texts.
    """
    return write_text(place, json.dumps(json_ready(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
