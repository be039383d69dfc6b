"""Running the texts of a block, and writing a shard of what is taken from them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoopedError
from ..looped import Looped
from ..results.saving import versions
from ..runs.driver import MISTAKES, lacks_memory
from ..schedule import Indices, check_count, select_indices
from .record import Collection
from .shard_index import Ended, failures, finished, index_names
from .shards import DamagedError, DiskError, Draft, Shard
from .store import shard_path
from .taking import Put, Rows, Taking, generate, run
from .texts import Text, batches, failure
from .writing import Behind, Written


def _nowhere(name: str, row: int, values: Tensor) -> None:
    """Takes nothing, between batches."""


class Collector:
    """Runs the texts of a block, and writes a shard of what is taken from them.

    Args:
        model: the model.
        collection: what is collected.
        weights: the mark of those of the model.
        out: the directory.
        positions: as in `collect`.
        max_new_tokens: as in `collect`.
        batch_tokens: as in `collect`.
        settings: of the run, or of the generation.
        skip: whether a text that fails is noted, or an error.
    """

    def __init__(
        self,
        model: Looped,
        collection: Collection,
        weights: str,
        out: Path,
        positions: Indices,
        max_new_tokens: int,
        batch_tokens: int,
        settings: dict[str, Any],
        skip: bool,
    ):
        self.model: Looped = model
        self.collection: Collection = collection
        self.weights: str = weights
        self.out: Path = out
        self.positions: Indices = positions
        self.skip: bool = skip
        self.n_new: int = max_new_tokens
        self.batch_tokens: int = check_count("batch_tokens", batch_tokens)
        self.settings: dict[str, Any] = settings
        self.one_by_one: bool = bool(max_new_tokens) and model.exit_policy is not None
        self.alike: bool = False  # whether the model takes no padding
        self.taking: Taking = Taking(model, collection.names, collection.dtype, _nowhere)
        self._rows: dict[Text, int] = {}  # the first row of every text of the block
        self._open: list[Draft] = []

    @property
    def _extra(self) -> int:
        """Positions after a prompt that may be run."""
        return max(0, self.n_new - 1)

    def n_rows(self, text: Text) -> int:
        """How many rows a text can have.

        Args:
            text: the text.

        Raises:
            LoopedError: it lacks a position that is asked for.
        """
        n = text.n_prompt + self._extra
        if text.failed or self.n_new or self.positions is None:
            return 0 if text.failed else n
        try:
            return len(select_indices(self.positions, n, "positions"))
        except LoopedError as error:
            text.failed = self._failed(text, error)
            return 0

    def is_done(self, number: int, block: list[Text]) -> bool:
        """Whether the directory has the whole shard of a block.

        Args:
            number: of the block.
            block: its texts.

        Raises:
            LoopedError: it has a shard of other prompts.
        """
        path = shard_path(self.out, number)
        if not path.exists():
            return False
        try:
            return self._is_whole(Shard(path), block)
        except DamagedError:
            return False

    def _is_whole(self, shard: Shard, block: list[Text]) -> bool:
        """Whether a shard has all of a block, bit for bit as it was written, and no prompt is to be tried again."""
        if shard.metadata.get("collection") != self.collection.mark:
            raise LoopedError(f"{str(shard.path)!r} is of another collection; choose another directory, or remove it.")
        before, now = shard.index("prompt.digest").tolist(), [text.digest for text in block]
        for text, was, is_now in zip(block, before, now, strict=False):
            if was != is_now:
                raise LoopedError(
                    f"{str(self.out)!r} is a collection of other prompts: prompt {text.number} differs; choose another "
                    "directory, or remove this one."
                )
        if len(before) > len(now):
            raise LoopedError(
                f"{str(self.out)!r} holds more prompts than were given, such as prompt {block[-1].number + 1}; pass all of "
                "them, or read the store with load_activations."
            )
        failed = failures(shard).values()
        if len(before) < len(now) or any(not self.skip or lacks_memory(why) for why in failed):
            return False
        shard.check()
        return True

    def write(self, number: int, block: list[Text], behind: Behind, update: Callable[[int], object]) -> None:
        """Run the texts of a block and write its shard.

        Args:
            number: of the block.
            block: its texts.
            behind: what writes.
            update: told how many texts are done.

        Raises:
            LoopedError: a text fails; the disk is full.
        """
        place = shard_path(self.out, number)
        todo = sorted((text for text in block if not text.failed), key=lambda text: (len(text.tokens), text.number))
        update(len(block) - len(todo))
        self._rows = dict(zip(todo, accumulate(map(self.n_rows, todo), initial=0), strict=False))
        capacity = sum(map(self.n_rows, todo))
        metadata = {"collection": self.collection.mark, "weights": self.weights, "block": str(number), **versions()}
        draft = Draft(
            place, self.collection.shapes, self.collection.dtype, capacity, index_names(self.collection), metadata
        )  # fmt: skip
        self._open.append(draft)
        self.taking.begin_shard(capacity)
        ends, writing = list[Ended](), Written(behind, draft)
        while todo:
            most = 1 if self.one_by_one else self.batch_tokens
            batch = next(batches(todo, most, lambda text: len(text.tokens) + self.n_new, self.alike))
            try:
                ends += self._run(batch, writing.put)
            except _TakesNoPadding:
                self.alike = True
                continue
            todo = todo[len(batch) :]
            update(len(batch))
        writing.hand_over()
        kept, index = finished(self.collection, block, ends, self.taking.active, capacity, self.model.tokenizer)
        behind.do(lambda: self._commit(draft, kept, index))

    def abandon(self) -> None:
        """Leave nothing of what was not finished."""
        for draft in self._open:
            draft.abandon()

    def _commit(self, draft: Draft, kept: dict[str, Tensor | None], index: dict[str, Tensor]) -> None:
        draft.commit(kept, index)
        self._open.remove(draft)

    def _run(self, batch: list[Text], put: Put) -> list[Ended]:
        """Run a batch; one that fails is halved, down to the texts that fail alone."""
        self.taking.put = put
        rows = Rows(
            batch, self._rows[batch[0]], None if self.n_new else self.positions, self._extra, pads_left=bool(self.n_new)
        )
        try:
            if not self.n_new:
                run(self.taking, rows, self.collection.stop, self.settings)
                return [
                    Ended(text, row, self._selected(text, len(text.tokens)))
                    for text, row in zip(batch, rows.starts, strict=True)
                ]
            return self._generated(batch, rows)
        except (DiskError, *MISTAKES):
            raise
        except Exception as error:
            if len(batch) == 1:
                batch[0].failed = self._failed(batch[0], error)
                return []
            if rows.is_padded and isinstance(error, LoopedError) and "pad" in str(error):
                raise _TakesNoPadding from error
        finally:
            self.taking.rows = None
        half = len(batch) // 2
        return [*self._run(batch[:half], put), *self._run(batch[half:], put)]

    def _generated(self, batch: list[Text], rows: Rows) -> list[Ended]:
        """Write on after a batch of prompts; what is known of every text then."""
        settings = dict(self.settings)
        seed = settings.pop("seed", None)
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed + batch[0].number)
            tokens, n_new = generate(self.taking, rows, self.n_new, settings)
        ends = list[Ended]()
        for text, line, new, row in zip(batch, tokens, n_new.tolist(), rows.starts, strict=True):
            pads = rows.width - len(text.tokens)
            text.tokens = line[pads : rows.width + new].clone()
            filled = {name: max(0, n - pads) for name, n in self.taking.n_columns.items()}
            chosen = self._selected(text, len(text.tokens) - 1)
            ends.append(Ended(text, row, chosen, filled))
        return ends

    def _selected(self, text: Text, n: int) -> list[int]:
        return select_indices(self.positions, n, "positions")

    def _failed(self, text: Text, error: Exception) -> str:
        """Why a text is left out, or the error that says so."""
        if self.skip:
            return f"{type(error).__name__}: {error}"
        raise LoopedError(
            f"{failure(text.number, error)} The shards before it are in {str(self.out)!r}. Mend the cause and call "
            'again, which goes on there, or leave such prompts out with on_error="skip" (--on-error skip).'
        ) from error


class _TakesNoPadding(Exception):
    """The model runs texts of one length only."""
