"""`collect`: activations of a data set, streamed into shards; a later call goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .._words import counted
from .._writing import remove_all_drafts
from ..errors import LoopedError
from ..looped import Looped, at_depth, check_model
from ..runs.asked import described, hooks_of
from ..runs.driver import MISTAKES, n_batches
from ..runs.folder import Weights
from ..runs.prompts import Prompts
from ..runs.shares import Share
from ..runs.store import OnError
from ..schedule import Indices, LoopSelector, check_count
from ..sites import KINDS
from .collector import Collector
from .extent import keep_extent
from .places import Sites, chosen_names, where
from .record import Collection, check_same, record_first, weights_mark
from .shards import DTYPES
from .store import ActivationStore, load_activations, shard_path
from .taking import Rows, Taking
from .texts import Text, blocks, failure, texts_of
from .writing import Behind

MOST_ROWS = 2**17  # of a shard, so that a kill does not cost hours
BEHIND = 2**26  # bytes that wait to be written, beside those of `Written`


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
    weights = Weights(model.fingerprint())
    found = check_same(place, wanted, weights)
    remove_all_drafts(place)
    inputs = {} if initial_state is None else {"initial_state": initial_state}
    texts = texts_of(model, prompts, skip)
    if found is None:
        seen, shapes, stop = _tried(model, texts, names, inputs, max_new_tokens, skip)
        texts = chain(seen, texts)
        size = sum(_row_bytes(shape, wanted.dtype) for shape in shapes.values())
        most = max(1, min(MOST_ROWS, shard_bytes // size))
        found = replace(wanted, shapes=shapes, rows_per_shard=most, stop=stop)
        found = record_first(place, found, weights)
    mark = weights_mark(found, weights)
    collector = Collector(model, found, mark, place, positions, max_new_tokens, batch_tokens, inputs | generation, skip)
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
        remove_all_drafts(place)
    if more := [path for path in place.glob("shard-*.safetensors") if int(path.stem[6:]) > number]:
        raise LoopedError(
            f"{str(place)!r} holds more prompts than were given, in {more[0].name}; pass all of them, or read the store with "
            "load_activations."
        )
    _make(place)
    record_first(place, found, weights)  # again, where somebody removed it meanwhile
    keep_extent(place, number + 1)
    mine = [shard_path(place, block) for block in range(share.index, number + 1, share.of)]
    if gone := [path.name for path in mine if not path.exists()]:
        raise LoopedError(
            f"{str(place)!r} lost {counted(len(gone), 'shard')} while collect ran, such as {gone[0]}; call it again, which "
            "writes what is missing."
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
            f"max_new_tokens={max_new_tokens} was asked of a {type(model).__name__}, which writes without a cache of keys and "
            f"values: every new token is a run of the whole text. Write first, as model.generate(tokens, {max_new_tokens}), "
            "and collect over what that returns, without max_new_tokens."
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
            why = f"prompt {text.number} failed: {text.failed}"
            continue
        try:
            shapes = _shapes(model, text, names, stop, inputs)
            if stop is not None and len(shapes) < len(names):
                stop, shapes = None, _shapes(model, text, names, None, inputs)
            if missing := [name for name in names if name not in shapes]:
                raise LoopedError(f"{missing[0]} was asked, which did not run.")
            _check_rows(model, text, [name for name in names if where(model.schedule, name).site not in KINDS], shapes, inputs)
            return seen, {name: shapes[name] for name in names}, stop
        except MISTAKES:
            raise
        except Exception as error:
            if not skip:
                raise LoopedError(failure(text.number, error)) from error
            why = failure(text.number, error)
    raise LoopedError(f"all {len(seen)} prompts failed; {why}")


def _check_rows(
    model: Looped, text: Text, names: Sequence[str], shapes: dict[str, tuple[int, ...]], inputs: dict[str, Any]
) -> None:
    """Refuse what has a row for something else than a token, of which a text may have as many: its tokens are others then."""
    if names:
        more = len(text.tokens) < model.cfg.n_ctx
        tokens = torch.cat([text.tokens, text.tokens[-1:]]) if more else text.tokens[:-1]
        found = _shapes(model, Text(text.number, tokens, len(tokens)), names, None, inputs)
        if wrong := [name for name in names if found.get(name) != shapes[name]]:
            raise LoopedError(f"{wrong[0]} was asked, whose rows are as long as their prompt; a store keeps rows of one width.")


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
