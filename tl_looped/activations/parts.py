"""What one shard has of a selection: which rows, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import torch
from jaxtyping import Int
from torch import Tensor

from ..kinds import plain
from ..schedule import Indices, select_indices
from .places import group_of
from .record import Collection
from .shards import Shard
from .windows import Window, take


class Part:
    """The samples of one shard.

    Args:
        shard: the file.
        collection: what it holds.
        sides: for every kind of sample, the names of what stands side by side.
        prompts: the numbers of those that are chosen; None for all.
        positions: which positions.
    """

    def __init__(
        self,
        shard: Shard,
        collection: Collection,
        sides: Sequence[tuple[str, ...]],
        prompts: Tensor | None,
        positions: Indices,
    ):
        self.shard: Shard = shard
        columns = [shard.index(f"row.{name}") for name in ("prompt", "position", "token")]
        self.columns: Tensor = torch.stack([*columns, torch.zeros_like(columns[0])], 1)  # of every row, and room for the kind
        chosen = self._chosen(prompts, positions)
        is_partial = {name for name in shard.tensors if name.startswith("index.rows.")}
        passes = [[f"rows.{group_of(collection.schedule, name)}" if is_partial else "" for name in side] for side in sides]
        self._ran: dict[str, Tensor] = {}  # by the passes that not all rows have run: whether each has
        for p in {p for side in passes for p in side if f"index.{p}" in is_partial}:
            self._ran[p] = torch.zeros(len(self.columns), dtype=torch.bool).index_fill(0, shard.index(p).long(), True)
        self._at: dict[str, Tensor] = {p: ran.cumsum(0) - 1 for p, ran in self._ran.items()}  # and where it lies then
        known: dict[tuple[str, ...], int] = {}
        self._kept: list[Tensor] = []
        which = list[int]()
        for side in passes:
            key = tuple(sorted({p for p in side if p in self._ran}))
            if key not in known:
                has = chosen
                for p in key:
                    has = has & self._ran[p]
                known[key] = len(self._kept)
                self._kept.append(has.nonzero().flatten().int())
            which.append(known[key])
        self._which: Tensor = torch.tensor(which)  # for every kind, which of the kept rows are its own
        self.counts: list[int] = [len(self._kept[k]) for k in which]
        self._starts: Tensor = torch.tensor([[shard.first(name) for name in side] for side in sides])
        self._passes: list[list[str]] = passes

    def _chosen(self, prompts: Tensor | None, positions: Indices) -> Tensor:
        owner, position = self.columns[:, 0], self.columns[:, 1]
        chosen = torch.ones(len(owner), dtype=torch.bool)
        if prompts is not None:
            chosen = torch.isin(owner, prompts)
        asked = plain(positions)
        if asked is None:
            return chosen
        numbers, n_tokens, n_prompt = (self.shard.index(f"prompt.{name}").long() for name in ("number", "n_tokens", "n_prompt"))
        n_run = n_tokens - (n_tokens > n_prompt).long()  # no step reads the last new token
        lengths = n_run[torch.searchsorted(numbers, owner.long())]
        found = torch.zeros_like(chosen)
        for n in lengths[chosen].unique().tolist():
            wanted = list(range(n)[asked]) if isinstance(asked, slice) else select_indices(asked, n, "positions")
            found |= (lengths == n) & torch.isin(position, torch.tensor(wanted, dtype=position.dtype))
        return chosen & found

    def rows(self, kind: Int[Tensor, " sample"], at: Int[Tensor, " sample"]) -> Int[Tensor, " sample"]:
        """The rows of samples, in the index of the shard.

        Args:
            kind: which kind of sample each is.
            at: which of its kind.
        """
        if len(self._kept) == 1:
            return self._kept[0].index_select(0, at).long()
        which, found = self._which[kind], torch.empty_like(at)
        for k in which.unique().tolist():
            mine = which == k
            found[mine] = self._kept[k][at[mine]].long()
        return found

    def gather(self, side: int, kind: Int[Tensor, " sample"], rows: Int[Tensor, " sample"], into: Tensor) -> None:
        """Read one side of samples.

        Args:
            side: which one.
            kind: which kind of sample each is.
            rows: as `rows` says.
            into: where it is written, [sample, width].
        """
        at = rows
        if self._ran:
            at = rows.clone()
            for k in kind.unique().tolist():
                if (p := self._passes[k][side]) in self._ran:
                    mine = kind == k
                    at[mine] = self._at[p][rows[mine]]
        self.shard.gather(self._starts[:, side][kind] + at * into.shape[1], into)

    def read(self, file: BinaryIO, kind: int, start: int, window: Window, into: slice) -> None:
        """Read samples of one kind that follow each other.

        Args:
            file: the shard, open without a buffer.
            kind: which kind.
            start: the first of its samples.
            window: where they are written.
            into: which places of it.
        """
        rows = self._kept[int(self._which[kind])][start : start + into.stop - into.start]
        window.columns[into] = take(self.columns, rows)
        window.columns[into, 3] = kind
        for side, p in enumerate(self._passes[kind]):
            at = self._at[p][rows] if p in self._at else rows
            self.shard.read(file, int(self._starts[kind, side]), at, window.values[into, side])
