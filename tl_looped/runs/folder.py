"""The directory of a run of many processes: what was asked, a file for every unit that is done, and the results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._words import counted
from .._writing import remove_drafts, write_first
from ..errors import LoopedError
from ..results import load_result
from ..results.saving import SEAL, read_text, read_whole, save_result
from .asked import digest
from .driver import WANTS_MEMORY

if TYPE_CHECKING:
    from .store import Run

ASKED = "asked.json"
MODEL = "model.fingerprint.safetensors"  # no analysis has a point in its name
PAPER = f"paper.{ASKED}"
# By which files the directory of a command is known.
_OF = {ASKED: "analyze", PAPER: "paper", "paper.json": "paper", "collection.safetensors": "collect"}
TOLD = "model"  # by which name the model was loaded; its weights tell whether it is another
Key = tuple[str, int]  # an analysis and a unit


class Folder:
    """A directory of a run.

    `asked.json` has what all analyses share, `NAME/asked.json` the settings of one, `NAME/00012.safetensors` what it found in
    one unit, and `NAME.safetensors` the sum of all. Every file is written in one step, and a unit's says which run it is of: so
    a file is there or not, whatever was killed when, and two processes that measure the same unit write the same file.

    Args:
        path: the directory.
    """

    def __init__(self, path: str | Path):
        self.path: Path = Path(path)
        self._marks: dict[str, str] = {}
        self._whole: dict[Path, tuple[int, ...]] = {}  # files that were looked through, and what tells whether they changed

    def claim(self, shared: dict[str, str], settings: dict[str, dict[str, str]]) -> None:
        """Say what is asked, or refuse a directory in which something else was.

        Args:
            shared: what is true of all analyses.
            settings: of each analysis.

        Raises:
            LoopedError: it is of another run, and the message has the difference; it cannot be written.
        """
        refuse_others(self.path, "analyze")
        for place, asked in (("", shared), *settings.items()):
            file = self.path / place / ASKED
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LoopedError(f"{str(file.parent)!r} cannot be made: {error.strerror or error}.") from error
            remove_drafts(file)
            if not file.exists():
                write_first(file, json.dumps(asked, indent=1))
            before = self._asked(place)
            for name in {**before, **asked}:
                if name != TOLD and before.get(name) != asked.get(name):
                    what = f"with {name}={before.get(name)}, not {asked.get(name)}"
                    if name in ("prompts", "weights"):
                        what = f"of other {name}"
                    raise LoopedError(
                        f"{str(self.path)!r} is of a run {f'of {place!r} ' * bool(place)}{what}; choose another directory, or "
                        "remove this one to begin anew."
                    )
        self._marks = {name: _mark(shared | asked) for name, asked in settings.items()}

    def names(self) -> list[str]:
        """The analyses that were asked.

        Raises:
            LoopedError: it is no directory of a run.
        """
        found = sorted(file.parent.name for file in self.path.glob(f"*/{ASKED}"))
        if not found or not (self.path / ASKED).is_file():
            raise LoopedError(
                f"{str(self.path)!r} is no directory of tl-looped analyze: it has no {ASKED}, or no analysis. If it was "
                "removed, the command that made the directory writes it again, and measures nothing twice."
            )
        return found

    def _asked(self, place: str = "") -> dict[str, str]:
        file = self.path / place / ASKED
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if not place:
                int(found["units"])
            return {str(name): str(value) for name, value in found.items()}
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise LoopedError(
                f"{str(file)!r} cannot be read ({error!r}); remove it and run the same command again, which measures nothing "
                "twice."
            ) from error

    def asked(self, name: str) -> dict[str, str]:
        """All that was asked of one analysis.

        Args:
            name: which.
        """
        return self._asked() | self._asked(name)

    def left(self, keys: Iterable[Key]) -> list[Key]:
        """The units that are not there.

        Args:
            keys: those that are looked for.
        """
        keys = list(keys)
        return [key for key in keys if not self._is_there(*key)]

    def keep(self, name: str, unit: int, found: Run) -> None:
        """Write what was found in a unit.

        Args:
            name: of the analysis.
            unit: which.
            found: in it.
        """
        file = self._file(name, unit)
        with suppress(OSError):  # somebody may have removed it meanwhile; if it cannot be made, writing says so
            file.parent.mkdir(parents=True, exist_ok=True)
        _save(replace(found, asked={"run": self._mark(name, unit)}), file)

    def forget_short_of_memory(self, keys: Iterable[Key]) -> None:
        """Remove units in which a prompt failed for want of memory: another time there may be more.

        Args:
            keys: those that are looked for.
        """
        for key in keys:
            file = self._file(*key)
            with suppress(OSError, LoopedError):
                if WANTS_MEMORY in read_text(file):
                    file.unlink()

    def merge(self, name: str) -> Run:
        """The sum of all units of an analysis, in their order.

        Args:
            name: which.

        Raises:
            LoopedError: not all of them are there.
        """
        asked = self.asked(name)
        keys = [(name, unit) for unit in range(int(asked["units"]))]
        if missing := self.left(keys):
            raise LoopedError(
                f"{len(missing)} of {counted(len(keys), 'part')} of {name} in {str(self.path)!r} are not done, such as "
                f"{self._file(*missing[0]).name}. Run the same command again: it measures what is missing, with any number of "
                "processes."
            )
        return _added(asked, (load_result(self._file(*key)) for key in keys))

    def write(self, name: str, run: Run) -> Path:
        """Write the result of an analysis.

        Args:
            name: which.
            run: its sum.
        """
        return _save(run, self.path / f"{name}.safetensors", self.weights())

    def results(self, names: Iterable[str]) -> dict[str, Run]:
        """The sums of several analyses, which are written.

        Args:
            names: which.

        Raises:
            LoopedError: not all of their units are there.
        """
        found = {name: self.merge(name) for name in names}
        for name, run in found.items():
            self.write(name, run)
        return found

    def keep_weights(self, fingerprint: Any) -> None:
        """Keep what tells the weights of the model from others, for results to be compared with.

        Args:
            fingerprint: of the model.
        """
        try:
            there = self.weights() is not None
        except LoopedError:  # damaged
            there = False
        if not there:
            with suppress(LoopedError):  # of a kind that no file keeps; a full disk is told of by what is written next
                save_result(fingerprint, self.path / MODEL)

    def weights(self) -> Any:
        """What tells the weights of the model from others, in place of a model for `save_result`; None where it has none.

        Raises:
            LoopedError: it is damaged.
        """
        file = self.path / MODEL
        try:
            return Weights(load_result(file)) if file.exists() else None  # a model that does not loop has none
        except LoopedError as error:
            raise LoopedError(f"{error} The same command as before writes it again, and measures nothing twice.") from error

    def _is_there(self, name: str, unit: int) -> bool:
        """Whether a unit's file is whole and of this run; one that is not is as good as none."""
        file = self._file(name, unit)
        try:
            now = file.stat()
            state = (now.st_ino, now.st_size, now.st_mtime_ns)
            if self._whole.get(file) != state:
                text = read_whole(file)[0]
                if not text.startswith(SEAL) or f'"{self._mark(name, unit)}"' not in text:
                    return False
                self._whole[file] = state
        except (OSError, LoopedError):
            return False
        return True

    def _file(self, name: str, unit: int) -> Path:
        return self.path / name / f"{unit:05d}.safetensors"

    def _mark(self, name: str, unit: int) -> str:
        """What the file of a unit says that it is of."""
        if name not in self._marks:
            self._marks[name] = _mark(self.asked(name))
        return f"{self._marks[name]} {unit}"


def refuse_part_of_paper(out: Path) -> None:
    """Refuse a directory in which `tl-looped paper` keeps what is done.

    Args:
        out: the directory.

    Raises:
        LoopedError: it is one; the message has the directory that it is a part of.
    """
    if (whole := out.resolve().parent.parent / PAPER).is_file():
        raise LoopedError(
            f"{str(out)!r} is a part of tl-looped paper; merge {str(whole.parent)!r}, or choose another directory."
        )


def refuse_others(out: Path, own: str) -> None:
    """Refuse a directory that another command writes to.

    Args:
        out: the directory.
        own: the command that asks.

    Raises:
        LoopedError: it is of another command, or cannot be looked at.
    """
    try:
        found = [kind for file, kind in _OF.items() if kind != own and (out / file).exists()]
    except OSError as error:
        raise LoopedError(f"{str(out)!r} cannot be looked at: {error.strerror or error}.") from error
    if found:
        raise LoopedError(
            f"{str(out)!r} is of tl-looped {found[0]}, whose results this would replace; choose another directory."
        )


def _save(run: Run, file: Path, weights: Any = None) -> Path:
    try:
        return save_result(run, file, weights)
    except LoopedError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        reason = error.__cause__.strerror or error.__cause__
        raise LoopedError(
            f"{str(file)!r} cannot be written: {reason}. What is done is kept: mend that, and run the same command again."
        ) from error


def _mark(asked: dict[str, str]) -> str:
    return digest([[key, value] for key, value in sorted(asked.items()) if key != TOLD])


class Weights:
    """A model, as far as saving a result asks.

    Args:
        fingerprint: what was kept of it.
    """

    def __init__(self, fingerprint: Any):
        self._fingerprint: Any = fingerprint

    def fingerprint(self) -> Any:
        """What was kept."""
        return self._fingerprint


def _added(asked: dict[str, str], parts: Iterator[Any]) -> Run:
    from .store import Run

    result, failed, order, done = None, (), (), 0
    for part in parts:
        if part.result is not None:
            result = part.result if result is None else result + part.result
        failed, order, done = failed + part.failed, order + part.order, done + part.done
    return Run(result, tuple(sorted(failed)), done, done, asked, order)
