"""Path patching across loops: what a component tells a later one directly, through the residual stream alone.

A direct path leads through everything that is no component. What other heads and MLPs write is held at its value in the
corrupted run; norms of the stream, of a branch and between passes, injections, anchored mixing, the two states of HRM-Text, and
the receiver's own norm are computed anew on the changed stream, as in any run. So it is right where the stream is no running
sum, and on an ordinary model it is the path patching of the papers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .._old_calls import accepts_old
from .._precision import wide
from ..errors import LoopedError, UnknownNameError
from ..looped import Cache, DirectPaths, Looped
from ..patching.clean_run import Comparison, Metric, clean_at
from ..results import Grid

Names = str | Sequence[str]
FINAL = "ln_final.hook_in"
CHUNK = 2**27  # numbers of carried changes that are held at once


class Source(NamedTuple):
    """What writes to the residual stream: the hook that holds it; its head, of an attention."""

    hook: str
    layer: int = -1
    head: int | None = None


class Receiver(NamedTuple):
    """What reads the residual stream.

    Args:
        stream: the hook of the stream.
        reads: the hook of what it reads, after its norm.
        hook: the hook that a change enters by.
        layer: its virtual layer; None for the logits.
        norm: the name of its norm in the layer.
        letter: of its projection: q, k or v.
        head: of that.
    """

    stream: str
    reads: str
    hook: str
    layer: int | None = None
    norm: str = ""
    letter: str = ""
    head: int | None = None


@accepts_old("sources", "receivers")
def edge_sweep(
    model: Looped,
    corrupted_tokens: str | list[str] | Int[Tensor, "*batch pos"],
    clean_cache: Cache,
    metric: Metric,
    *,
    sources: Names | None = None,
    receivers: Names | None = None,
    at_loop: int | None = None,
    n_loops: int | None = None,
    **run: Any,
) -> Grid:
    """Estimate the effect of every direct path between two components of a run, from one forward and one backward.

    A score is the first-order term of `path_patch`: the change (clean - corrupted) of what the source writes, multiplied with
    the gradient of the metric along the path, which goes through the receiver's own norm and all that lies between (edge
    attribution patching, Syed et al., arXiv 2310.10348). A source that runs after the receiver has a score of exactly 0. Scores
    of several sources add up, to first order. What a source sends through the gates of attention (HRM-Text) and of value
    embeddings (Parcae) has no receiver.

    Args:
        model: the model.
        corrupted_tokens: the prompt to patch, as long as the clean one.
        clean_cache: from `run_with_cache` of the clean prompt; `hook_embed`, and `attn.hook_z` and `hook_mlp_out` of the
            sources, suffice.
        metric: from logits [batch, pos, d_vocab] to a number, or to one per row of the batch, [batch].
        sources: names or patterns of "embed", "loops.0.blocks.1.head.2" and "loops.0.blocks.1.mlp_out", in either spelling;
            head and letter may be `*`. None for all.
        receivers: as above, of "loops.2.blocks.1.head.0.q" (or `k`, `v`, whose heads are key-value heads),
            "loops.2.blocks.1.mlp_in" and "logits" (by the unembedding). None for all.
        at_loop: measure the answer after this loop, as `model.unroll(at_loop + 1)` gives it; the clean run is then made again
            at that depth. None for the last.
        n_loops: of runs of this many loops; None for the model's own number.
        **run: what `model.forward` takes for the corrupted run, such as `attention_mask`.

    Returns:
        A `Grid` [source, receiver] in the unit of the metric; a last axis "example" if the metric has one number per row.

    Raises:
        LoopedError: as `attribution_sweep`; a hook edits the stream or a norm, so that a path is not what the weights say.
        UnknownNameError: no such source or receiver; the cache lacks activations.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
        >>> _, cache = model.run_with_cache(clean)
        >>> difference = lambda logits: logits[0, -1, 5] - logits[0, -1, 6]
        >>> nodes = {"sources": "loops.0.blocks.*.head.*", "receivers": "loops.2.blocks.0.head.*.q"}
        >>> edges = edge_sweep(model, corrupted, cache, difference, **nodes)
        >>> edges.labels["source"][0], edges.labels["receiver"], tuple(edges.values.shape)
        ('loops.0.blocks.0.head.0', ['loops.2.blocks.0.head.0.q', 'loops.2.blocks.0.head.1.q'], (4, 2))
    """
    model, clean_cache = clean_at(model, clean_cache, at_loop, n_loops)
    paths = Paths(model, corrupted_tokens, clean_cache, metric, sources, receivers, run, estimate=True)
    values = paths.zeros()
    for at in paths.carried():
        scores = torch.einsum("sbpd,rbpd->srb", at.changes, paths.directions(at))
        columns = [i for i, receiver in enumerate(paths.receivers.values()) if receiver.stream == at.stream]
        values[at.rows.start : at.rows.stop, columns] = scores if paths.pair.per_example else scores.sum(-1, keepdim=True)
    return paths.grid(values, "edge attribution")


@accepts_old("sources", "receivers")
def path_patch(
    model: Looped,
    corrupted_tokens: str | list[str] | Int[Tensor, "*batch pos"],
    clean_cache: Cache,
    metric: Metric,
    *,
    sources: Names,
    receivers: Names,
    at_loop: int | None = None,
    n_loops: int | None = None,
    **run: Any,
) -> Grid:
    """Patch direct paths one by one: change what a receiver reads by what one source's change is there, and run on.

    The result is the metric of that run minus the metric of the corrupted one (path patching, Wang et al., arXiv 2211.00593,
    and Goldowsky-Dill et al., 2304.05969, along the residual stream only). Until the receiver, all other heads and MLPs write
    what they wrote in the corrupted run; norms, also the receiver's own, and injections are computed anew. A head is changed
    before the norm of its branch, where it has one, beside which the other heads stay. So effects of several sources need not
    add up. One run per pair; use `edge_sweep` for many.

    Args:
        model: the model.
        corrupted_tokens: the prompt to patch, as long as the clean one.
        clean_cache: from `run_with_cache` of the clean prompt, with what `edge_sweep` needs.
        metric: from logits [batch, pos, d_vocab] to a number, or to one per row of the batch, [batch]; no gradient is needed.
        sources: names or patterns, as in `edge_sweep`.
        receivers: names or patterns, as in `edge_sweep`.
        at_loop: measure the answer after this loop; None for the last.
        n_loops: of runs of this many loops; None for the model's own number.
        **run: what `model.forward` takes for the corrupted run, such as `attention_mask`.

    Returns:
        A `Grid` [source, receiver] of differences of the metric; 0 where the source runs after the receiver.

    Raises:
        LoopedError: as `edge_sweep`; or every source runs after every receiver.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
        >>> _, cache = model.run_with_cache(clean)
        >>> edge = {"sources": "loops.0.blocks.1.head.0", "receivers": "loops.2.blocks.0.head.1.q"}
        >>> effect = path_patch(model, corrupted, cache, lambda logits: logits[0, -1, 5], **edge)
        >>> effect.axes, tuple(effect.values.shape)
        (('source', 'receiver'), (1, 1))
    """
    model, clean_cache = clean_at(model, clean_cache, at_loop, n_loops)
    paths = Paths(model, corrupted_tokens, clean_cache, metric, sources, receivers, run)
    values, baseline, found = paths.zeros(), paths.pair.value(), False
    for at in paths.carried():
        for j, receiver in enumerate(paths.receivers.values()):
            if receiver.stream == at.stream:
                for row, change in zip(at.rows, at.changes, strict=True):
                    if row in at.written:
                        found = True
                        values[row, j] = paths.pair.value([paths.patch(receiver, at, change)]) - baseline
    if not found:
        raise LoopedError(
            f"a path from {next(iter(paths.labels(paths.sources)))} to {next(iter(paths.labels(paths.receivers)))} was asked, "
            "but the source runs after the receiver; exchange them, or choose a later pass."
        )
    return paths.grid(values, "path effect")


class Carried(NamedTuple):
    """The changes of some sources where a stream is read.

    Args:
        rows: which sources.
        stream: the hook of the stream.
        changes: of the stream, before the norm of the reader, [source, batch, pos, d_model].
        of_run: the stream itself, [batch, pos, d_model].
        written: the sources that have written by then.
    """

    rows: range
    stream: str
    changes: Tensor
    of_run: Tensor
    written: set[int]


class Paths:
    """The direct paths from some components of a corrupted run to others."""

    def __init__(
        self,
        model: Looped,
        corrupted_tokens: Any,
        clean_cache: Cache,
        metric: Metric,
        sources: Names | None,
        receivers: Names | None,
        run: dict[str, Any],
        estimate: bool = False,
    ):
        self.model: Looped = model
        self.sources: dict[str, Any] = _chosen(model, "source", _sources(model), sources)
        self.receivers: dict[str, Any] = _chosen(model, "receiver", _receivers(model), receivers)
        pair = Comparison(model, corrupted_tokens, clean_cache, metric, run)
        self.pair: Comparison = pair
        self.reads: dict[str, str] = {s.hook: _read(s) for s in self.sources.values()}
        pair.require(self.reads.values())
        kept = model.paths_need(
            {s.layer for s in self.sources.values() if s.head is not None},
            {(r.layer, r.norm) for r in self.receivers.values()},
        )
        kept += [r.reads for r in self.receivers.values()]
        entered = list(dict.fromkeys(r.hook for r in self.receivers.values()))
        if estimate:
            seen, gradients = pair.gradients(entered, also=kept)
        else:
            seen, gradients = pair.activations(kept), {}
        self.gradients: dict[str, Tensor] = gradients
        self.way: DirectPaths = model.direct_paths({name: seen[name] for name in kept}, estimate)
        self.like: Tensor = self.way.like

    def _changes(self, hook: str, rows: range) -> Iterator[tuple[int, Tensor]]:
        """The rows written at a hook, and what the clean run would change there."""
        chosen = [(row, s) for row, s in enumerate(self.sources.values()) if row in rows and s.hook == hook]
        if not chosen:
            return
        name, of_heads = self.reads[hook], chosen[0][1].head is not None
        corrupted = self.way.value(name, -3 if of_heads else -2)
        change = self.pair.clean(name, corrupted) - corrupted
        if of_heads:
            vectors = self.way.heads(chosen[0][1].layer, [s.head for _, s in chosen], change)
            yield from zip((row for row, _ in chosen), vectors, strict=True)
        else:
            yield from ((row, change) for row, _ in chosen)

    @torch.no_grad()
    def carried(self) -> Iterator[Carried]:
        """The change of every source at every stream that a receiver reads.

        Raises:
            LoopedError: what a receiver reads is no sum of what components wrote.
        """
        size = max(1, CHUNK // self.like.numel())
        for start in range(0, len(self.sources), size):
            rows = range(start, min(start + size, len(self.sources)))
            written: set[int] = set()

            def changes(hook: str, rows: range = rows, written: set[int] = written) -> Iterator[tuple[int, Tensor]]:
                for row, change in self._changes(hook, rows):
                    written.add(row)
                    yield row - rows.start, change

            for stream, x, of_run in self.way.carried(len(rows), changes):
                if readers := [r for r in self.receivers.values() if r.stream == stream]:
                    for name, reader in {r.reads: r for r in readers}.items():
                        self.way.check(name, self._norm(reader, of_run).out)
                    yield Carried(rows, stream, x, of_run, written)

    def _norm(self, receiver: Receiver, stream: Tensor) -> Any:
        """The norm before a receiver, where it stands in the run."""
        return self.way.norm(receiver.layer, receiver.norm, stream)

    def _weight(self, receiver: Receiver) -> Tensor:
        """The projection of one head, [d_head, d_model]."""
        assert receiver.layer is not None and receiver.head is not None
        return self.way.projection(receiver.layer, receiver.letter, receiver.head)

    def directions(self, at: Carried) -> Tensor:
        """The gradient of the metric by a stream, through each receiver that reads it, [receiver, batch, pos, d_model]."""
        rows = []
        for receiver in [r for r in self.receivers.values() if r.stream == at.stream]:
            gradient = self.gradients[receiver.hook].to(self.like.device)
            if receiver.head is not None:
                gradient = gradient[..., receiver.head, :] @ self._weight(receiver)
            rows.append(self._norm(receiver, at.of_run).pull_back(gradient))
        return torch.stack(rows)

    def patch(self, receiver: Receiver, at: Carried, change: Tensor) -> tuple[str, Any]:
        """The hook that adds a change of the stream to what a receiver reads."""
        change = self._norm(receiver, at.of_run).exactly(change)
        if receiver.head is None:
            return receiver.hook, lambda x, hook: (wide(x) + change.to(x.device)).to(x.dtype)
        change = change @ self._weight(receiver).T

        def add(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[..., receiver.head, :] = (wide(x[..., receiver.head, :]) + change.to(x.device)).to(x.dtype)
            return x

        return receiver.hook, add

    def zeros(self) -> Tensor:
        """A result to fill, [source, receiver, example or 1]."""
        n_examples = len(self.like) if self.pair.per_example else 1
        return self.like.new_zeros(len(self.sources), len(self.receivers), n_examples)

    def labels(self, nodes: dict[str, Any]) -> list[str]:
        """Loop-indexed names."""
        return [self.model.schedule.loop_name(key) for key in nodes]

    def grid(self, values: Tensor, name: str) -> Grid:
        """The result."""
        labels = {"source": self.labels(self.sources), "receiver": self.labels(self.receivers)}
        if not self.pair.per_example:
            return Grid(values[..., 0], ("source", "receiver"), labels, name)
        examples = list(range(values.shape[-1]))
        return Grid(values, ("source", "receiver", "example"), {**labels, "example": examples}, name)


def _read(source: Source) -> str:
    return source.hook if source.head is None else f"blocks.{source.layer}.attn.hook_z"


def _sources(model: Looped) -> dict[str, Source]:
    """Everything that can send, by name, in the order of the run."""
    sources = {"embed": Source("hook_embed")}
    for i in range(model.cfg.n_layers):
        heads = {f"blocks.{i}.head.{h}": Source(f"blocks.{i}.hook_attn_out", i, h) for h in range(model.cfg.n_heads)}
        sources |= heads | {f"blocks.{i}.mlp_out": Source(f"blocks.{i}.hook_mlp_out", i)}
    return sources


def _receivers(model: Looped) -> dict[str, Receiver]:
    """Everything that can receive, by name, in the order of the run."""
    receivers: dict[str, Receiver] = {}
    for i in range(model.cfg.n_layers):
        stream, reads = f"blocks.{i}.hook_resid_pre", f"blocks.{i}.attn.hook_in"
        for letter in "qkv":
            n_heads = model.cfg.n_heads if letter == "q" else model.cfg.n_key_value_heads
            node = Receiver(stream, reads, f"blocks.{i}.attn.hook_{letter}", i, "ln1", letter)
            receivers |= {f"blocks.{i}.head.{h}.{letter}": node._replace(head=h) for h in range(n_heads)}
        reads = f"blocks.{i}.mlp.hook_in"
        receivers[f"blocks.{i}.mlp_in"] = Receiver(f"blocks.{i}.hook_resid_mid", reads, reads, i, "ln2")
    return receivers | {"logits": Receiver(FINAL, "unembed.hook_in", "unembed.hook_in")}


def _chosen(model: Looped, what: str, nodes: dict[str, Any], asked: Names | None) -> dict[str, Any]:
    """The nodes that names or patterns stand for, in the order of the run."""
    if asked is None:
        return nodes
    keys: set[str] = set()
    for name in [asked] if isinstance(asked, str) else asked:
        patterns = model.schedule.names.expand(name)
        if not (found := [key for key in nodes if any(fnmatchcase(key, pattern) for pattern in patterns)]):
            examples = ", ".join(model.schedule.loop_name(key) for key in [*list(nodes)[1:4], list(nodes)[-1]])
            raise UnknownNameError(f"{what} {name!r} was asked, but this model has no such {what}; some are {examples}.")
        keys |= set(found)
    return {key: node for key, node in nodes.items() if key in keys}
