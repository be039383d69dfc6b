"""Reading prompts from a file or a data set."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoopedError
from ..schedule import check_count

COLUMNS = ("prompt", "question", "text")  # which of several holds the prompts, if nobody says
SPLITS = ("test", "validation", "train")


def read_prompts(source: str | Path, *, n: int | None = None, seed: int | None = None) -> list[str | Tensor]:
    r"""Read prompts from a file or a data set; empty ones are left out.

    Args:
        source: a text file with a prompt in every line; `FILE.jsonl` or `FILE.jsonl:column` with an object, a text or a list of
            token ids in every line; or a data set, a directory or a Hub id, as `ID`, `ID:split`, `ID:split:column` or
            `ID:config:split:column`, read by the package `datasets`. Where no column is named, it is the only one with texts,
            or "prompt", "question" or "text"; where no split is, the only one, or "test".
        n: at most so many, the first ones; None for all.
        seed: draw the `n` at random instead, in the order of the source.

    Returns:
        Texts, and tensors [pos] where the source holds token ids. The place in this list, from 0, is the number of a prompt in
        messages of the command line, which reads prompts by the same call.

    Raises:
        LoopedError: the source cannot be read or holds no prompts; columns or splits among which only the user can choose.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "prompts.jsonl"
        ...     _ = file.write_text('{"question": "How many?", "answer": "4"}\n{"question": "When?", "answer": "now"}\n')
        ...     read_prompts(file), read_prompts(f"{file}:answer", n=1)
        (['How many?', 'When?'], ['4'])
    """
    if n is not None:
        check_count("n", n)
    there = (prompt for prompt in _prompts(str(source)) if not _is_empty(prompt))
    found = list(there if seed is not None else islice(there, n))
    if not found:
        raise LoopedError(f"{str(source)!r} holds no prompt; write one in every line, or name another split or column.")
    if seed is None or n is None or n >= len(found):
        return found
    return [found[k] for k in sorted(random.Random(seed).sample(range(len(found)), n))]


def _prompts(source: str) -> Iterator[str | Tensor]:
    file, _, column = source.rpartition(":")
    if Path(source).is_file():
        file, column = source, ""
    if not Path(file).is_file():
        path = Path(source)
        is_path = path.is_absolute() or len(path.parts) > 2 or source.startswith(".") or path.suffix in (".txt", ".jsonl")
        if is_path and not Path(source.partition(":")[0]).is_dir():
            raise LoopedError(f"{source!r} cannot be read: there is no such file.")
        return _of_data_set(source)
    if file.endswith(".jsonl"):
        return _of_records(_records(file), column or None, file)
    if column:
        raise LoopedError(f"{source!r} names a column, but only .jsonl files have columns.")
    return iter(_lines(file))


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 too, inside of a text
    except (OSError, UnicodeDecodeError) as error:
        raise LoopedError(f"{file!r} cannot be read: {error}.") from error


def _records(file: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LoopedError(f"{file!r} cannot be read: line {number} is no JSON ({error}).") from error


def _of_data_set(source: str) -> Iterator[str | Tensor]:
    try:
        import datasets
    except ImportError as error:
        raise LoopedError(
            f"{source!r} is no file, and reading data sets needs the package datasets; pip install 'tl-looped[datasets]'."
        ) from error
    name, *parts = source.split(":")
    if len(parts) > 3:
        raise LoopedError(f"{source!r} was given; a data set is ID, ID:split, ID:split:column or ID:config:split:column.")
    config = parts.pop(0) if len(parts) == 3 else None
    split, column = [*parts, "", ""][:2]
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            held: Any = datasets.load_from_disk(name)
        else:
            held = datasets.load_dataset(name, config)
    except Exception as error:  # of a dozen kinds
        cause = error
        while isinstance(cause.__cause__, Exception):  # what datasets says last is only that it failed
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise LoopedError(
            f"{source!r} is no file, and cannot be read as a data set: {reason}. Check the spelling, go online once, or pass a "
            "file."
        ) from error
    if isinstance(held, dict):
        split = split or _only(source, "split", [*held], SPLITS)
        if split not in held:
            raise LoopedError(f"{source!r} was given; {name} has the splits {', '.join(held)}.")
        held = held[split]
    return _of_records(((f"row {k}", row) for k, row in enumerate(held)), column or None, source)


def _of_records(records: Iterator[tuple[str, Any]], column: str | None, source: str) -> Iterator[str | Tensor]:
    """The prompt of every record, whose place is told in errors."""
    asked = column
    for where, record in records:
        value: Any = record
        if isinstance(record, dict):
            if column is None:
                texts = [name for name, held in record.items() if isinstance(held, str) or _are_ids(held)]
                column = _only(source, "column", texts, COLUMNS)
            if column not in record:
                raise LoopedError(f"{where} of {source!r} has no {column!r}; it has {', '.join(record) or 'nothing'}.")
            value = record[column]
        elif asked is not None:
            raise LoopedError(f"{where} of {source!r} is a {type(record).__name__} without columns; leave out :{asked}.")
        if _are_ids(value):
            if (largest := max(value, key=abs, default=0)).bit_length() > 63:
                raise LoopedError(f"{where} of {source!r} has the token id {largest}, which is in no vocabulary; mend it.")
            yield torch.tensor(value, dtype=torch.long, device="cpu")
        elif isinstance(value, str):
            yield value
        else:
            what = f"its {column!r} is" if isinstance(record, dict) else "it is"
            raise LoopedError(f"{where} of {source!r} is no prompt: {what} a {type(value).__name__}, no text or token ids.")


def _only(source: str, what: str, names: Sequence[str], usual: Sequence[str]) -> str:
    """The only name, or the most usual one."""
    found = next((name for name in usual if name in names), None)
    if len(names) == 1:
        return names[0]
    if found is None:
        there = f"has {what}s {', '.join(names)}" if names else f"has no {what} of texts"
        raise LoopedError(f"{source!r} {there}; name one of them after a colon.")
    return found


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(id, int) and not isinstance(id, bool) for id in value)


def _is_empty(prompt: str | Tensor) -> bool:
    return not prompt.strip() if isinstance(prompt, str) else not prompt.numel()
