"""Writing a file in one step: it is the old one or the new one, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from .errors import LoopedError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota
Put = Callable[[Path, Path], object]  # a finished file, and its place


def write_text(file: str | Path, text: str) -> Path:
    """Write a text file in one step; as `write_bytes`."""
    return write_bytes(file, text.encode("utf-8", "backslashreplace"))  # half of a character, as JSON and Python write it


def write_first(file: str | Path, text: str) -> None:
    """Write a text file in one step unless there is one, of this or of another process; as `write_bytes`."""
    write_bytes(file, text.encode("utf-8"), put=link_first)


def link_first(draft: Path, place: Path) -> None:
    """Put a draft in a place unless there is a file, of this or of another process."""
    try:
        os.link(draft, place)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(draft, place)


def write_bytes(file: str | Path, content: bytes, *, put: Put | None = None) -> Path:
    """Write a file in one step, so that a reader never meets half of it; a LoopedError where that cannot be.

    An earlier file is replaced and its permissions are kept; a symbolic link stays, and what it points to is replaced.
    """
    place = checked_place(file)
    draft = draft_of(place)
    try:
        remove_drafts(place)
        mode = stat.S_IMODE(place.stat().st_mode) if place.exists() else None
        try:
            with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else 0o600), "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            if mode is not None:
                draft.chmod(mode)
            (put or os.replace)(draft, place)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        remedy = "Make room there, or choose another place" if error.errno in FULL else "Choose another place"
        raise LoopedError(f"{str(file)!r} cannot be written: {error.strerror or error}. {remedy}.") from error
    return Path(file)


def remove_drafts(file: str | Path) -> None:
    """Remove what processes of this machine left of a file when they were killed while they wrote it."""
    place = Path(file).resolve()
    begin = _beginning(place)
    for draft in place.parent.glob(f"{escape(begin)}*") if os.name == "posix" else ():
        pid = draft.name.removeprefix(begin).partition(".")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            with suppress(OSError):  # another may clean up too
                draft.unlink()


def remove_all_drafts(directory: Path) -> None:
    """Remove what processes of this machine left of any file of a directory when they were killed."""
    for file in {draft.name[1:].rsplit(".", 3)[0] for draft in directory.glob(".*.*.*.*")}:
        remove_drafts(directory / file)


def draft_of(place: Path) -> Path:
    """A new name for a file while it is written, beside its place; `remove_drafts` knows it."""
    return place.with_name(f"{_beginning(place)}{os.getpid()}.{uuid4().hex[:8]}")


def _beginning(place: Path) -> str:
    """How the names of drafts begin: with the machine, whose processes alone can be asked for."""
    return f".{place.name}.{sha256(socket.gethostname().encode()).hexdigest()[:6]}."


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def checked_place(file: str | Path) -> Path:
    """Where a file would be written, links followed; a LoopedError for what is no regular file."""
    place = Path(file)
    try:
        if place.is_symlink():
            place = place.resolve(strict=True)
        if place.exists() and not place.is_file():
            what = "a directory. Name a file in it" if place.is_dir() else "no regular file. Name another, and copy it there"
            raise LoopedError(f"{str(file)!r} cannot be written: it is {what}.")
    except (OSError, RuntimeError) as error:  # a link to nowhere, or to itself
        reason = getattr(error, "strerror", None) or error
        raise LoopedError(f"{str(file)!r} cannot be written: it is a link that leads nowhere ({reason}). Remove it.") from error
    return place
