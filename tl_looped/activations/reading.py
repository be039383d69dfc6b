"""Activations as a data set: selected, side by side, shuffled, in batches, read from memory-mapped shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import count, groupby
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import LoopedError
from ..kinds import plain
from ..names import stack_prefix
from ..schedule import Indices, check_count, check_index, select_indices
from ..sites import KINDS
from .parts import Part
from .places import where
from .record import Collection
from .shards import Shard
from .windows import BLOCK, Mixed, Range, Window, take, windows


class Batch(NamedTuple):
    """Activations, and where each is from.

    Args:
        values: [sample, ...]; where activations are side by side, [sample, side, ...].
        prompt: which prompt.
        position: which position of it.
        token: the token there.
        loop: the loop, of the first side; -1 outside the loops.
        layer: the layer in its stack, of the first side; -1 for what belongs to a pass or to the run.
        activation: which of the `names` of the data set.
    """

    values: Float[Tensor, ...]
    prompt: Int[Tensor, ...]
    position: Int[Tensor, ...]
    token: Int[Tensor, ...]
    loop: Int[Tensor, ...]
    layer: Int[Tensor, ...]
    activation: Int[Tensor, ...]


class Activations(Dataset[Batch]):
    """Samples of a store: each an activation at a token, or several of them at the same token, side by side.

    `len` counts samples, and an index reads one; a `DataLoader` takes it. `batches` is faster, as it reads a batch at once.

    Args:
        shards: the files.
        collection: what they hold.
        sides: for every kind of sample, the names of what stands side by side.
        prompts: which prompts.
        positions: which positions.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        collection: Collection,
        sides: Sequence[tuple[str, ...]],
        prompts: Indices,
        positions: Indices,
    ):
        self.shards: list[Shard] = list(shards)
        self.collection: Collection = collection
        self.prompts: Indices = prompts
        self.positions: Indices = positions
        self.sides: list[tuple[str, ...]] = list(sides)
        shapes = {name: collection.shapes[name] for side in sides for name in side}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:3])
            raise LoopedError(f"activations of different shapes were asked as one data set: {found}; select them one by one.")
        self.shape: tuple[int, ...] = next(iter(shapes.values()))

    @property
    def _sample_bytes(self) -> int:
        """How large a sample is."""
        return max(1, len(self.sides[0]) * prod(self.shape) * self.collection.dtype.itemsize)

    @property
    def names(self) -> list[str]:
        """Of every kind of sample, what it is called; of several side by side, the first."""
        return [side[0] for side in self.sides]

    def next_loop(self, by: int = 1) -> Activations:
        """With the same activation of a later loop beside each: `values` are [sample, 2, ...], loop t and loop t + by.

        Args:
            by: how many loops later.

        Raises:
            LoopedError: no loop has a later one in the store.
        """
        by = check_count("by", by)
        schedule = self.collection.schedule
        found = list[tuple[str, ...]]()
        for side in self.sides:
            at = where(schedule, side[0])
            if at.loop is not None:
                prefix = f"{stack_prefix(at.stack)}loops."
                later = f"{prefix}{at.loop + by}.{side[0].removeprefix(f'{prefix}{at.loop}.')}"
                if later in self.collection.shapes:
                    found.append((*side, later))
        return self._beside(found, f"a loop {by} later")

    def beside(self, site: str) -> Activations:
        """With another activation of the same layer or pass beside each, such as `select("resid_mid").beside("mlp_out")`.

        Args:
            site: its kind.

        Raises:
            LoopedError: the store has it beside none.
        """
        hook = KINDS[site].hook if site in KINDS else site
        found = list[tuple[str, ...]]()
        for side in self.sides:
            own = where(self.collection.schedule, side[0]).site
            own_hook = KINDS[own].hook if own in KINDS else own
            if (other := side[0].removesuffix(own_hook) + hook) in self.collection.shapes:
                found.append((*side, other))
        return self._beside(found, repr(site))

    def _beside(self, sides: list[tuple[str, ...]], what: str) -> Activations:
        if not sides:
            raise LoopedError(f"{what} was asked beside {self.names[0]} and others, which the store has for none of them.")
        return Activations(self.shards, self.collection, sides, self.prompts, self.positions)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Batch:
        at = torch.tensor([check_index(index, len(self), "sample")])
        return Batch(*(column[0] for column in self.read(at)))

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Several samples at once, as a `DataLoader` asks for them."""
        batch = self.read(torch.tensor(indices))
        return [Batch(*row) for row in zip(*batch, strict=True)]

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = 1,
        drop_last: bool = False,
        buffer_bytes: int = 2**28,
    ) -> Batches:
        """The samples in batches, once each; an iterator, and a data set for `DataLoader(..., batch_size=None, num_workers=n)`.

        Shuffled, blocks of half a megabyte are read from all of the files in random order into one half of a buffer, and the
        batches drawn from the other half in random order: across shards, prompts, loops and layers alike, and otherwise in
        every epoch. The order of samples that fit into half of the buffer is drawn uniformly from all orders. Not shuffled is
        the order of the files: shard by shard, activation by activation, token by token.

        Args:
            batch_size: how many samples.
            shuffle: read them in random order.
            seed: of the order.
            epochs: how often; None for ever.
            drop_last: leave out a last batch that is smaller.
            buffer_bytes: of every process that reads, for samples that are shuffled; it holds two batches at least.
        """
        size = check_count("batch_size", batch_size)
        return Batches(self, size, shuffle, seed, epochs, drop_last, check_count("buffer_bytes", buffer_bytes))

    def tensors(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[Float[Tensor, "sample ..."]]:
        """The values of `batches` alone, [batch, d_in], without end: what the trainers of SAELens and dictionary_learning take.

        Args:
            batch_size: how many samples; no batch is smaller.
            shuffle: as in `batches`.
            seed: as in `batches`.
            epochs: as in `batches`.
            dtype: of the tensors; None for that of the store.
        """
        for batch in self.batches(batch_size, shuffle=shuffle, seed=seed, epochs=epochs, drop_last=True):
            yield batch.values if dtype is None else batch.values.to(dtype)

    @cached_property
    def _parts(self) -> list[Part]:
        """What every shard has of it."""
        prompts = plain(self.prompts)
        if prompts is not None:
            last = max((int(shard.index("prompt.number").max()) for shard in self.shards), default=-1)
            prompts = torch.tensor(select_indices(prompts, last + 1, "prompts"))
        return [Part(shard, self.collection, self.sides, prompts, self.positions) for shard in self.shards]

    @cached_property
    def _counts(self) -> Tensor:
        """How many samples there are of every shard and kind, in the order of the files."""
        return torch.tensor([n for part in self._parts for n in part.counts], dtype=torch.long)

    @cached_property
    def _ends(self) -> Tensor:
        return self._counts.cumsum(0)

    @cached_property
    def _end_list(self) -> list[int]:
        return self._ends.tolist()

    @cached_property
    def _places(self) -> Tensor:
        """Loop and layer of every kind of sample."""
        at = [where(self.collection.schedule, name) for name in self.names]
        return torch.tensor([[-1 if x.loop is None else x.loop, -1 if x.layer is None else x.layer] for x in at])

    def read(self, samples: Int[Tensor, " sample"]) -> Batch:
        """Some samples, in the order asked.

        Args:
            samples: which ones.
        """
        ordered, order = samples.sort()  # the files are read from their beginnings to their ends
        there = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
        return Batch(*(column.index_select(0, there) for column in self._read(ordered)))

    def read_range(self, start: int, stop: int) -> Batch:
        """Samples that follow each other.

        Args:
            start: the first.
            stop: the one after the last.
        """
        stop = min(stop, len(self))
        window = self._window(stop - start)
        self._fill(window, [(start, stop)])
        return self._batch(window.values, window.columns)

    def _read(self, samples: Tensor) -> Batch:
        """Some samples, in ascending order."""
        cells = torch.searchsorted(self._ends, samples, right=True)
        at, kind = samples - (self._ends - self._counts)[cells], self._kinds[cells]
        n, n_sides, width = len(samples), len(self.sides[0]), prod(self.shape)
        values = torch.empty(n, n_sides, width, dtype=self.collection.dtype)
        columns = torch.empty(n, 4, dtype=torch.int32)
        cuts = torch.searchsorted(samples, self._ends[len(self.sides) - 1 :: len(self.sides)].contiguous()).tolist()
        for part, first, last in zip(self._parts, [0, *cuts], cuts, strict=False):
            if first < last:
                mine, rows = kind[first:last], part.rows(kind[first:last], at[first:last])
                columns[first:last] = take(part.columns, rows)
                for side in range(n_sides):
                    part.gather(side, mine, rows, values[first:last, side])
        columns[:, 3] = kind
        return self._batch(values, columns)

    def _batch(self, values: Tensor, columns: Tensor) -> Batch:
        """A batch of [sample, side, width], and prompt, position, token and kind of each."""
        shape = self.shape if values.shape[1] == 1 else (values.shape[1], *self.shape)
        prompt, position, token, kind = columns.unbind(1)
        loop, layer = take(self._places, kind).unbind(1)
        return Batch(values.view(len(values), *shape), prompt, position, token, loop, layer, kind.long())

    def _window(self, n_samples: int) -> Window:
        """Room for samples."""
        return Window(n_samples, len(self.sides[0]), prod(self.shape), self.collection.dtype)

    def _fill(self, window: Window, ranges: Sequence[Range]) -> None:
        """Read samples into a window.

        Args:
            window: where they are written, one after the other.
            ranges: which ones, ascending.
        """
        done = 0
        for number, pieces in groupby(self._pieces(ranges), lambda piece: piece[0] // len(self.sides)):
            part = self._parts[number]
            with part.shard.path.open("rb", buffering=0) as file:
                for cell, first, n in pieces:
                    part.read(file, cell % len(self.sides), first, window, slice(done, done + n))
                    done += n

    def _pieces(self, ranges: Sequence[Range]) -> Iterator[tuple[int, int, int]]:
        """Samples of one shard and kind: which of those, the first sample of it, and how many."""
        ends = self._end_list
        for start, stop in ranges:
            cell = bisect_right(ends, start)
            while start < stop:
                n = min(stop, ends[cell]) - start
                if n:
                    yield cell, start - (ends[cell - 1] if cell else 0), n
                cell, start = cell + 1, start + n

    @cached_property
    def _kinds(self) -> Tensor:
        return torch.arange(len(self.sides)).repeat(len(self.shards))

    def __getstate__(self) -> dict[str, object]:
        known = ("_parts", "_counts", "_ends", "_end_list", "_places", "_kinds")
        return {name: value for name, value in self.__dict__.items() if name not in known}  # another process reads its own


class Batches(IterableDataset[Batch]):
    """Samples in batches; every iteration begins anew, and the workers of a `DataLoader` share one.

    Args:
        samples: the samples.
        batch_size: how many in a batch.
        shuffle: in random order.
        seed: of the order.
        epochs: how often; None for ever.
        drop_last: leave out a last batch that is smaller.
        buffer_bytes: for samples that are shuffled.
    """

    def __init__(
        self,
        samples: Activations,
        batch_size: int,
        shuffle: bool,
        seed: int,
        epochs: int | None,
        drop_last: bool,
        buffer_bytes: int,
    ):
        self.samples: Activations = samples
        self.batch_size: int = batch_size
        self.shuffle: bool = shuffle
        self.seed: int = seed
        self.epochs: int | None = epochs
        self.drop_last: bool = drop_last
        self.buffer_bytes: int = buffer_bytes
        if drop_last and epochs is None and len(samples) < batch_size:
            raise LoopedError(f"batches of {batch_size} were asked without end, but there are {len(samples)} samples.")
        self._going: Iterator[Batch] | None = None

    def __len__(self) -> int:
        if self.epochs is None:
            raise TypeError("batches without end have no length")
        n = len(self.samples)
        return self.epochs * (n // self.batch_size if self.drop_last else -(-n // self.batch_size))

    def __next__(self) -> Batch:
        if self._going is None:
            self._going = iter(self)
        return next(self._going)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_going": None}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        n = len(self.samples)
        last = n - n % self.batch_size if self.drop_last else n
        if self.shuffle:
            share = -(-last // (step * self.batch_size)) * self.batch_size
            yield from self._mixed(first * share, min((first + 1) * share, last))
            return
        for _ in self._epochs():
            for at in range(first * self.batch_size, last, step * self.batch_size):
                yield self.samples.read_range(at, min(at + self.batch_size, last))

    def _epochs(self) -> Iterable[int]:
        return count() if self.epochs is None else range(self.epochs)

    def _mixed(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of samples from one place of the order of every epoch to another."""
        samples, of_sample = self.samples, self.samples._sample_bytes
        size = max(1, self.buffer_bytes // (2 * of_sample * self.batch_size)) * self.batch_size

        def asked() -> Iterator[tuple[Mixed, int, int]]:
            for epoch in self._epochs() if start < stop else ():
                order = Mixed(len(samples), BLOCK // of_sample, self.seed, epoch)
                yield from ((order, at, min(at + size, stop)) for at in range(start, stop, size))

        rooms = [samples._window(min(size, stop - start)) for _ in range(2 if start < stop else 0)]
        for window, order in windows(rooms, asked(), samples._fill):
            for at in order.split(self.batch_size):
                yield samples._batch(*window.picked(at))
