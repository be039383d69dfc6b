"""`load_activations`: what `collect` wrote, read without loading it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._words import counted
from ..errors import LoopedError, OutOfRangeError, UnknownNameError
from ..looped import Looped
from ..schedule import Indices, LoopSelector, Schedule
from .extent import extent_of
from .places import Sites, group_of, names_of, where
from .reading import Activations
from .record import RECORD, Collection, whole_record
from .shard_index import failures
from .shards import Shard


class Prompt(NamedTuple):
    """A prompt of a store.

    Args:
        tokens: of the prompt, and what was generated after it.
        n_prompt: how many of them are the prompt's.
        text: what they say; "" where the model had no tokenizer.
    """

    tokens: Int[Tensor, " pos"]
    n_prompt: int
    text: str


def shard_path(directory: Path, number: int) -> Path:
    """The file of a shard."""
    return directory / f"shard-{number:06d}.safetensors"


def load_activations(directory: str | Path, model: Looped | None = None) -> ActivationStore:
    """Open a directory that `collect` wrote. Only indices are read; activations stay on the disk until they are asked for.

    Args:
        directory: the directory.
        model: refuse a store of another model.

    Raises:
        LoopedError: no store, a damaged one, or one of another model.

    Example:
        >>> import tempfile, torch
        >>> from tl_looped import LoopedBridge, LoopedConfig, collect, load_activations
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = collect(model, torch.arange(10).view(2, 5), "resid_post", layers=-1, out=folder, verbose=False)
        ...     store = load_activations(folder)
        ...     batch = next(store.select("resid_post", loops=[0, 1]).batches(4, seed=0))
        ...     pairs = next(store.select("resid_post").next_loop().batches(4))
        >>> batch.values.shape, sorted(set(batch.loop.tolist()) - {0, 1}), pairs.values.shape
        (torch.Size([4, 8]), [], torch.Size([4, 2, 8]))
    """
    place = Path(directory)
    paths, found = sorted(place.glob("shard-*.safetensors")), whole_record(place, model)
    if found is None:
        remedy = "call the same collect again, which writes it again" if paths else "write one with collect"
        lacks = "a damaged" if (place / RECORD).exists() else "no"
        raise LoopedError(f"{str(directory)!r} is no store of activations: it has {lacks} {RECORD}; {remedy}.")
    shards = [Shard(path) for path in paths]
    for shard in shards:
        if shard.metadata.get("collection") != found.mark:
            raise LoopedError(f"{str(shard.path)!r} is of another collection than {RECORD} beside it; remove it.")
    return ActivationStore(place, found, shards)


class ActivationStore:
    """Activations on the disk; `load_activations` makes one.

    Args:
        directory: where they are.
        collection: what they are.
        shards: the files.
    """

    def __init__(self, directory: Path, collection: Collection, shards: Sequence[Shard]):
        self.directory: Path = directory
        self.collection: Collection = collection
        self.shards: list[Shard] = list(shards)

    @property
    def names(self) -> tuple[str, ...]:
        """Every activation that it has, by loop-indexed name."""
        return self.collection.names

    @property
    def schedule(self) -> Schedule:
        """Of the model."""
        return self.collection.schedule

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.collection.dtype

    @property
    def settings(self) -> dict[str, str]:
        """What `collect` was asked, and the versions that wrote the first shard."""
        return {**self.collection.asked, **(self.shards[0].metadata if self.shards else {})}

    @cached_property
    def n_rows(self) -> int:
        """How many tokens have activations."""
        return sum(shard.tensors["index.row.prompt"][1][0] for shard in self.shards)

    @cached_property
    def prompts(self) -> list[int]:
        """The numbers of the prompts that it has, those that failed left out."""
        numbers = [n for shard in self.shards for n in shard.index("prompt.number").tolist()]
        return [n for n in numbers if n not in self.failed]

    @cached_property
    def failed(self) -> dict[int, str]:
        """The prompts that were left out, and why."""
        return {number: why for shard in self.shards for number, why in failures(shard).items()}

    @property
    def missing(self) -> list[int]:
        """The numbers of shards that are not there; the same `collect` writes them.

        Where no `collect` has come to the end of the prompts yet, those after the last shard are not known.
        """
        numbers = [int(shard.path.stem[6:]) for shard in self.shards]
        n_shards = max(extent_of(self.directory), *(number + 1 for number in numbers), 0)
        return sorted(set(range(n_shards)) - set(numbers))

    def __repr__(self) -> str:
        gaps = f", {counted(len(self.missing), 'shard')} missing" if self.missing else ""
        names = f"{self.names[0]}" + (f" and {len(self.names) - 1} more" if len(self.names) > 1 else "")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ActivationStore({names}; {len(self.prompts)} prompts, {self.n_rows} tokens, {dtype}{gaps})"

    def select(
        self,
        sites: Sites,
        *,
        loops: LoopSelector = "all",
        layers: Indices = None,
        stack: str | None = None,
        prompts: Indices = None,
        positions: Indices = None,
    ) -> Activations:
        """Some of the activations, of some of the tokens, as a data set.

        Args:
            sites: as in `collect`.
            loops: as in `collect`; of those that are in the store.
            layers: as in `collect`; of those that are in the store.
            stack: as in `collect`.
            prompts: which prompts.
            positions: which positions of each; negative ones count from the end of what has been run of it.

        Raises:
            LoopedError: the store has no such activation, prompt or position.
        """
        names = self._names(sites, loops, layers, stack)
        return Activations(self.shards, self.collection, [(name,) for name in names], prompts, positions)

    def _names(self, sites: Sites, loops: LoopSelector, layers: Indices, stack: str | None) -> list[str]:
        found = list[str]()
        for site in [sites] if isinstance(sites, str) else sites:
            asked = names_of(self.schedule, site, loops, layers, stack)
            kept = [name for name in asked if name in self._known]
            if not kept:
                raise UnknownNameError(f"{site!r} with loops={loops!r}, layers={layers!r} was asked, which is not in {self!r}.")
            if isinstance(loops, (int, list, tuple)):
                there = {where(self.schedule, name).loop for name in kept}
                if lacking := sorted(
                    {t for name in asked if (t := where(self.schedule, name).loop) not in there and t is not None}
                ):
                    raise OutOfRangeError(f"loop {lacking[0]} of {site!r} was asked, which is not in {self!r}.")
            found += kept
        return list(dict.fromkeys(found))

    @cached_property
    def _known(self) -> set[str]:
        return set(self.names)

    def of_prompt(self, name: str, prompt: int) -> Float[Tensor, "pos ..."]:
        """An activation at every position of one prompt that has it.

        Args:
            name: its name.
            prompt: which prompt.

        Raises:
            LoopedError: there is no such activation, or prompt.
        """
        (name,) = self._names(name, "all", None, None)
        shard = self._shard_of(prompt)
        has = shard.index("row.prompt") == prompt
        if (rows := f"rows.{group_of(self.schedule, name)}") and f"index.{rows}" in shard.tensors:
            has = has[shard.index(rows).long()]
        return shard.rows(name)[has].clone()

    def prompt(self, number: int) -> Prompt:
        """The tokens and the text of a prompt.

        Args:
            number: which prompt.

        Raises:
            LoopedError: there is no such prompt.
        """
        shard = self._shard_of(number)
        at = int((shard.index("prompt.number") == number).nonzero())
        tokens = shard.index("tokens").long().split(shard.index("prompt.n_tokens").tolist())[at]
        letters = shard.index("prompt.n_letters").tolist()
        start = sum(letters[:at])
        text = bytes(shard.index("text").numpy())[start : start + letters[at]].decode()
        return Prompt(tokens, int(shard.index("prompt.n_prompt")[at]), text)

    def _shard_of(self, number: int) -> Shard:
        for shard in self.shards:
            if number not in self.failed and bool((shard.index("prompt.number") == number).any()):
                return shard
        why = f"; it failed: {self.failed[number]}" if number in self.failed else ""
        raise OutOfRangeError(f"prompt {number} was asked, which is not in {self!r}{why}.")

    def to_dataframe(self) -> Any:
        """One row for each token: its prompt, its position, its id, and whether it was generated."""
        import pandas as pd

        rows = [row for shard in self.shards for row in _rows(shard)]
        return pd.DataFrame(rows, columns=["prompt", "position", "token", "generated"])


def _rows(shard: Shard) -> Iterator[tuple[int, int, int, bool]]:
    n_prompt = dict(zip(shard.index("prompt.number").tolist(), shard.index("prompt.n_prompt").tolist(), strict=True))
    columns = (shard.index(f"row.{name}").tolist() for name in ("prompt", "position", "token"))
    for prompt, position, token in zip(*columns, strict=True):
        yield prompt, position, token, position >= n_prompt[prompt]
