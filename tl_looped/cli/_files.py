"""Files that a command reads prompts from or writes to."""

from __future__ import annotations

from pathlib import Path

from .._writing import checked_place, write_text
from ..errors import LoopedError


def prompts_in(file: str) -> list[str]:
    """The lines of a file that are not empty.

    Args:
        file: the file.

    Raises:
        LoopedError: it cannot be read, or holds none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoopedError(f"--prompts {file!r} cannot be read: {error}.") from error
    if not (found := [line for line in lines if line.strip()]):
        raise LoopedError(f"--prompts {file!r} holds no prompt; write one in every line.")
    return found


def check_writable(place: Path | None) -> None:
    """Refuse before the work begins rather than after it.

    Args:
        place: where a file will be written; None for nowhere.

    Raises:
        LoopedError: it cannot be.
    """
    if place is None:
        return
    if not (place := checked_place(place)).parent.is_dir():
        raise LoopedError(f"{str(place)!r} cannot be written: there is no directory {str(place.parent)!r}.")
    draft = place.with_name(f".{place.name}.try")
    try:
        write_text(draft, "").unlink()
    except LoopedError as error:
        raise LoopedError(str(error).replace(draft.name, place.name)) from error
