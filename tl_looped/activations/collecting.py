"""`collect`: activations of a data set, streamed into shards; a later call goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._writing import remove_drafts
from ..errors import LoopedError
from ..looped import Looped, at_depth, check_model
from ..results.saving import versions
from ..runs.asked import described, hooks_of
from ..runs.driver import MISTAKES, n_batches
from ..runs.prompts import Prompts
from ..runs.shares import Share
from ..runs.store import OnError
from ..schedule import Indices, LoopSelector, check_count, select_indices
from .places import Sites, chosen_names, where
from .record import RECORD, Collection, check_same
from .shard_index import Ended, finished, index_names
from .shards import DTYPES, DiskError, Draft, Shard
from .store import ActivationStore, load_activations, shard_path
from .taking import Put, Rows, Taking, generate, run
from .texts import Text, batches, blocks, texts_of
from .writing import Behind

MOST_ROWS = 2**17  # of a shard, so that a kill does not cost hours
BEHIND = 2**26  # bytes that wait to be written


def collect(
    model: Looped,
    prompts: Prompts,
    sites: Sites,
    *,
    out: str | Path,
    loops: LoopSelector = "all",
    layers: Indices = None,
    stack: str | None = None,
    positions: Indices = None,
    n_loops: int | None = None,
    initial_state: Any = None,
    dtype: torch.dtype | None = None,
    max_new_tokens: int = 0,
    shard: str | None = None,
    batch_tokens: int = 2048,
    shard_bytes: int = 2**28,
    on_error: OnError = "raise",
    verbose: bool = True,
    **generation: Any,
) -> ActivationStore:
    """Write chosen activations of chosen loops over a data set into a directory, to be read by `load_activations`.

    Activations go to disk as they are computed; memory holds one batch and what waits for the disk. The run ends with the last
    layer that is asked for. However often the work was stopped, the same call goes on with the shard that was not finished, and
    nothing is in the store twice or missing. Given more prompts after the same ones, a later call adds them.

    Args:
        model: the model; hooks on it act, and what they leave is collected.
        prompts: texts or tokens, read one by one; each row of a batch of tokens is a prompt.
        sites: kinds of activations such as "resid_post", or names and patterns such as "loops.*.hook_out"; one or several.
        out: the directory. One of another collection is refused.
        loops: which loops; of a name with a pattern, those that it means.
        layers: which layers inside the loop, for kinds of layers.
        stack: as in sweeps; "prelude" or "coda" for layers that run once.
        positions: which positions of every prompt; negative ones count from its end. None for all.
        n_loops: run at another number of loops; None for the model's own.
        initial_state: "zero" or an int seed; None for the model's own.
        dtype: in which they are kept, each number rounded once; None for the dtype of the model.
        max_new_tokens: write on after every prompt, greedily unless `generation` says otherwise, and collect what each step of
            that generation computed. The last new token is read by no step, and has no activations. Under `exit_policy`, loops
            that a token did not run are not in the store.
        shard: the share of this process, such as "3/8" for the third of eight; None for what torchrun, accelerate or Slurm say,
            or all.
        batch_tokens: how many tokens run at once.
        shard_bytes: how large a shard becomes.
        on_error: "raise" stops at a prompt that fails and names it; "skip" notes it in the store's `failed` and goes on.
        verbose: show a progress bar.
        **generation: what `generate` takes, such as `do_sample=True, temperature=0.7`; `seed` makes sampling repeatable.

    Raises:
        LoopedError: a site, loops, layers or positions that do not exist; a directory of another collection or other prompts; a
            prompt that fails; a disk that is full: the shards that are finished stay.

    Example:
        >>> import tempfile, torch
        >>> from tl_looped import LoopedBridge, LoopedConfig, collect
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> prompts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = collect(model, prompts, "resid_post", layers=-1, loops=[0, 2], out=folder, verbose=False)
        ...     found = store.of_prompt("loops.2.blocks.1.hook_resid_post", 0)
        >>> store.names, found.shape
        (('loops.0.blocks.1.hook_resid_post', 'loops.2.blocks.1.hook_resid_post'), torch.Size([3, 8]))
    """
    check_model(model)
    model = at_depth(model, n_loops)
    names = tuple(chosen_names(model, sites, loops, layers, stack))
    _check(model, names, initial_state, dtype, max_new_tokens, generation, on_error)
    skip = on_error == "skip"
    share = Share.read(shard)
    asked = {
        "positions": described(positions),
        "initial_state": described(initial_state),
        "max_new_tokens": str(check_count("max_new_tokens", max_new_tokens, 0)),
        **{name: described(value) for name, value in generation.items()},
        "exit_policy": described(model.exit_policy) if max_new_tokens else "None",
        "shard_bytes": str(check_count("shard_bytes", shard_bytes)),
        "hooks": hooks_of(model),
    }
    wanted = Collection(names, {}, dtype or model.cfg.dtype, model.schedule, 0, None, asked)
    place = Path(out)
    _make(place)
    found = check_same(place, wanted, model)
    inputs = {} if initial_state is None else {"initial_state": initial_state}
    texts = texts_of(model, prompts, skip)
    if found is None:
        seen, shapes, stop = _tried(model, texts, names, inputs, max_new_tokens, skip)
        texts = chain(seen, texts)
        size = sum(_row_bytes(shape, wanted.dtype) for shape in shapes.values())
        most = max(1, min(MOST_ROWS, shard_bytes // size))
        found = replace(wanted, shapes=shapes, rows_per_shard=most, stop=stop)
        found.save(place / RECORD, model)
    collector = Collector(model, found, place, positions, max_new_tokens, batch_tokens, inputs | generation, skip)
    bar = tqdm(total=n_batches(prompts), desc="collect", disable=not verbose)
    number = -1
    try:
        with bar, Behind(BEHIND) as behind, collector.taking.hooked():
            for number, block in enumerate(blocks(texts, collector.n_rows, found.rows_per_shard)):
                if number % share.of == share.index and not collector.is_done(number, block):
                    collector.write(number, block, behind, bar.update)
                else:
                    bar.update(len(block))
    finally:
        collector.abandon()
    if more := [path for path in place.glob("shard-*.safetensors") if int(path.stem[6:]) > number]:
        raise LoopedError(
            f"{str(place)!r} holds more prompts than were given, in {more[0].name}; pass all of them, or read the store with "
            "load_activations."
        )
    return load_activations(place)


def _check(
    model: Looped,
    names: Sequence[str],
    initial_state: Any,
    dtype: Any,
    max_new_tokens: int,
    generation: dict[str, Any],
    on_error: str,
) -> None:
    """Refuse settings that do not go together."""
    if on_error not in ("raise", "skip"):
        raise LoopedError(f'on_error={on_error!r} was given; choose "raise" or "skip".')
    kept = [known for known in DTYPES if known.is_floating_point]
    if (dtype or model.cfg.dtype) not in kept:
        raise LoopedError(f"dtype={dtype!r} was asked; choose one of {', '.join(map(str, kept))}.")
    if not isinstance(initial_state, (int, str, type(None))):
        raise LoopedError(
            f"initial_state was given as a {type(initial_state).__name__}, which belongs to one prompt; pass an int seed or "
            '"zero".'
        )
    if not max_new_tokens:
        if generation:
            raise LoopedError(f"collect got {', '.join(generation)}, which generate takes; pass max_new_tokens= too.")
        return
    if not (hasattr(model, "generate") and hasattr(model, "generation_report")):
        raise LoopedError(
            f"max_new_tokens={max_new_tokens} was asked, but this {type(model).__name__} does not generate; generate the texts "
            "and collect over them."
        )
    later = [name for name in names if (at := where(model.schedule, name)).stop is None or at.stack == "coda"]
    if model.exit_policy is not None and later:
        raise LoopedError(
            f"{later[0]} was asked of a generation under an exit policy, which runs what follows the loops once for every loop "
            "that may be the last; choose activations of prelude and loops, or set exit_policy to None."
        )


def _make(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoopedError(f"{str(place)!r} cannot be made a directory: {error.strerror or error}.") from error


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _tried(
    model: Looped, texts: Iterator[Text], names: Sequence[str], inputs: dict[str, Any], max_new_tokens: int, skip: bool
) -> tuple[list[Text], dict[str, tuple[int, ...]], int | None]:
    """The first texts up to one that runs, the shapes of its activations, and after how many layers it has all of them."""
    stops = [where(model.schedule, name).stop for name in names]
    stop = None if max_new_tokens else max((s for s in stops if s is not None), default=None) if None not in stops else None
    seen, why = list[Text](), ""
    for text in texts:
        seen.append(text)
        if text.failed:
            continue
        try:
            shapes = _shapes(model, text, names, stop, inputs)
            if stop is not None and len(shapes) < len(names):
                stop, shapes = None, _shapes(model, text, names, None, inputs)
            if missing := [name for name in names if name not in shapes]:
                raise LoopedError(f"{missing[0]} was asked, which did not run.")
            return seen, {name: shapes[name] for name in names}, stop
        except MISTAKES:
            raise
        except Exception as error:
            if not skip:
                raise LoopedError(f"prompt {text.number} failed: {error}") from error
            why = str(error)
    raise LoopedError(f"all {len(seen)} prompts failed; prompt {seen[-1].number}: {why or seen[-1].failed}")


def _shapes(
    model: Looped, text: Text, names: Sequence[str], stop: int | None, inputs: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shape of a token's part of every activation, in one run of a text."""
    found: dict[str, tuple[int, ...]] = {}
    taking = Taking(model, names, None, lambda name, row, values: found.update({name: tuple(values.shape[1:])}))
    rows = Rows([text], 0, None, 0, pads_left=False)
    with taking.hooked():
        taking.begin(rows)
        given: dict[str, Any] = inputs if stop is None else {**inputs, "stop_at_layer": stop}
        model(text.tokens[None].to(model.cfg.device), return_type=None, **given)
    for name, n in taking.n_columns.items():
        if name in found and n != len(text.tokens):
            raise LoopedError(f"{name} was asked, which holds {n} rows for {len(text.tokens)} tokens.")
    return found


def _nowhere(name: str, row: int, values: Tensor) -> None:
    """Takes nothing, between batches."""


class Collector:
    """Runs the texts of a block, and writes a shard of what is taken from them.

    Args:
        model: the model.
        collection: what is collected.
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
        out: Path,
        positions: Indices,
        max_new_tokens: int,
        batch_tokens: int,
        settings: dict[str, Any],
        skip: bool,
    ):
        self.model, self.collection, self.out, self.positions, self.skip = model, collection, out, positions, skip
        self.n_new, self.batch_tokens = max_new_tokens, check_count("batch_tokens", batch_tokens)
        self.settings = settings
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
            shard = Shard(path)
        except LoopedError:  # damaged: it is collected again
            return False
        if shard.metadata.get("collection") != self.collection.mark:
            raise LoopedError(f"{str(path)!r} is of another collection; choose another directory, or remove it.")
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
        return len(before) == len(now)

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
        remove_drafts(place)
        todo = sorted((text for text in block if not text.failed), key=lambda text: (len(text.tokens), text.number))
        update(len(block) - len(todo))
        self._rows = dict(zip(todo, accumulate(map(self.n_rows, todo), initial=0), strict=False))
        capacity = sum(map(self.n_rows, todo))
        metadata = {"collection": self.collection.mark, "block": str(number), **versions()}
        draft = Draft(
            place, self.collection.shapes, self.collection.dtype, capacity, index_names(self.collection), metadata
        )  # fmt: skip
        self._open.append(draft)
        self.taking.begin_shard(capacity)
        ends = list[Ended]()
        while todo:
            most = 1 if self.one_by_one else self.batch_tokens
            batch = next(batches(todo, most, lambda text: len(text.tokens) + self.n_new, self.alike))
            try:
                ends += self._run(batch, lambda name, row, values: self._put(behind, draft, name, row, values))
            except _TakesNoPadding:
                self.alike = True
                continue
            todo = todo[len(batch) :]
            update(len(batch))
        kept, index = finished(self.collection, block, ends, self.taking.active, capacity, self.model.tokenizer)
        behind.do(lambda: self._commit(draft, kept, index))

    def abandon(self) -> None:
        """Leave nothing of what was not finished."""
        for draft in self._open:
            draft.abandon()

    def _commit(self, draft: Draft, kept: dict[str, Tensor | None], index: dict[str, Tensor]) -> None:
        draft.commit(kept, index)
        self._open.remove(draft)

    def _put(self, behind: Behind, draft: Draft, name: str, row: int, values: Tensor) -> None:
        behind.do(lambda: draft.write(name, row, values), values.numel() * values.dtype.itemsize)

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
            f"prompt {text.number} failed: {error} The shards before it are in {str(self.out)!r}. Mend the cause and call "
            'again, which goes on there, or leave such prompts out with on_error="skip".'
        ) from error


class _TakesNoPadding(Exception):
    """The model runs texts of one length only."""
