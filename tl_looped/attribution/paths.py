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
from ..bridge.cache import LoopedCache
from ..bridge.decomposition import FINAL, Reader, Write, check_sum, has_own_state, walk
from ..bridge.looped_bridge import LoopedBridge
from ..bridge.named_cache import as_slice
from ..errors import LoopedError, UnknownNameError
from ..model.norms import RMSNorm
from ..patching.clean_run import Comparison, Metric, clean_at
from ..results import Grid
from ._changes import NormAt, changes_after

Names = str | Sequence[str]
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
    model: LoopedBridge,
    corrupted_tokens: str | list[str] | Int[Tensor, "*batch pos"],
    clean_cache: LoopedCache,
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
        >>> from tl_looped import LoopedConfig
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
    model: LoopedBridge,
    corrupted_tokens: str | list[str] | Int[Tensor, "*batch pos"],
    clean_cache: LoopedCache,
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
        model: as in `edge_sweep`, like the following ones.
        corrupted_tokens: as there.
        clean_cache: as there.
        metric: as there; no gradient is needed.
        sources: as there.
        receivers: as there.
        at_loop: as there.
        n_loops: as there.
        **run: as there.

    Returns:
        A `Grid` [source, receiver] of differences of the metric; 0 where the source runs after the receiver.

    Raises:
        LoopedError: as `edge_sweep`; or every source runs after every receiver.

    Example:
        >>> from tl_looped import LoopedConfig
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
        model: LoopedBridge,
        corrupted_tokens: Any,
        clean_cache: LoopedCache,
        metric: Metric,
        sources: Names | None,
        receivers: Names | None,
        run: dict[str, Any],
        estimate: bool = False,
    ):
        self.model = model
        self.estimate = estimate
        self.sources: dict[str, Any] = _chosen(model, "source", _sources(model), sources)
        self.receivers: dict[str, Any] = _chosen(model, "receiver", _receivers(model), receivers)
        pair = Comparison(model, corrupted_tokens, clean_cache, metric, run)
        self.pair: Comparison = pair
        self.reads: dict[str, str] = {s.hook: _read(s) for s in self.sources.values()}
        pair.require(self.reads.values())
        layers = {s.layer for s in self.sources.values() if s.head is not None}
        self.plain: Any = model.plain
        self.dtype: torch.dtype = self.plain.embed.weight.dtype
        kept = ["hook_embed", *(name for name in model.hook_dict if name.endswith(("hook_attn_out", "hook_mlp_out")))]
        kept += [f"blocks.{i}.attn.hook_z" for i in layers]
        for i in layers:
            if (post := self._post(i)) is not None:
                kept += [f"blocks.{i}.ln1_post.{hook}" for hook in (["hook_in"] if isinstance(post, RMSNorm) else post.HELD)]
        kept += [*self.plain.loop.state_before, *(r.reads for r in self.receivers.values())]
        kept += [name for r in self.receivers.values() for name in self._beside(r)]
        entered = list(dict.fromkeys(r.hook for r in self.receivers.values()))
        if estimate:
            seen, gradients = pair.gradients(entered, also=kept)
        else:
            seen, gradients = pair.activations(kept), {}
        self.gradients: dict[str, Tensor] = gradients
        self.cache: LoopedCache = LoopedCache({name: seen[name] for name in kept}, model)
        self.own_state: bool = has_own_state(self.plain, self.cache)
        self.read: Reader = Reader(self.cache, as_slice(None))
        self.like: Tensor = self.read.get("hook_embed")

    def _post(self, layer: int) -> Any:
        """What the output of the attention of a layer goes through; None for nothing."""
        post: Any = self.plain.blocks[layer].ln1_post
        return getattr(post, "_original_component", post)

    def _through(self, module: Any, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
        """Changes after a module that lies on the way of the stream, and in the last row what the run has after it."""
        return changes_after(module, inputs, self.dtype, self.estimate)

    def _changes(self, at: Write, rows: range) -> Iterator[tuple[int, Tensor]]:
        """The rows written at one point, and what the clean run would change there."""
        chosen = [(row, s) for row, s in enumerate(self.sources.values()) if row in rows and s.hook == at.hook]
        if not chosen:
            return
        name = self.reads[at.hook]
        is_heads = chosen[0][1].head is not None
        corrupted = self.read.get(name, -3 if is_heads else -2)
        change = self.pair.clean(name, corrupted) - corrupted
        if not is_heads:
            yield from ((row, change) for row, _ in chosen)
            return
        layer, heads = chosen[0][1].layer, [s.head for _, s in chosen]
        weight = self.model.blocks[layer].attn.W_O.detach()[heads].to(change.device, change.dtype)
        vectors = torch.einsum("bphi,hid->hbpd", change[..., heads, :], weight)
        post = self._post(layer)
        if isinstance(post, RMSNorm):
            out = self.read.get(f"blocks.{layer}.ln1_post.hook_in")
            vectors = self._through(post, "", (torch.cat((vectors, out[None])),))[:-1]
        elif post is not None:
            vectors = post.frozen(vectors, *(self.read.get(f"blocks.{layer}.ln1_post.{hook}") for hook in post.HELD))
        yield from zip((row for row, _ in chosen), vectors, strict=True)

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

            def write(x: Tensor | None, at: Write, rows: range = rows, written: set[int] = written) -> Tensor:
                x = self.like.new_zeros(len(rows) + 1, *self.like.shape) if x is None else x
                x[-1] += self.read.get(at.hook)
                for row, change in self._changes(at, rows):
                    x[row - rows.start] += change
                    written.add(row)
                return x

            for stream, x in walk(self.plain, self._through, write, self.own_state):
                if readers := [r for r in self.receivers.values() if r.stream == stream]:
                    self._check(x[-1], readers)
                    yield Carried(rows, stream, x[:-1], x[-1], written)

    def _check(self, stream: Tensor, readers: list[Receiver]) -> None:
        for name, reader in {r.reads: r for r in readers}.items():
            check_sum(self._norm(reader, stream).out, self.cache[name], f"the input of {self.model.schedule.loop_name(name)}")

    def _norm(self, receiver: Receiver, stream: Tensor) -> NormAt:
        """The norm before a receiver, where it stands in the run."""
        norm = self.plain.ln_final if receiver.layer is None else getattr(self.plain.blocks[receiver.layer], receiver.norm)
        weight = next((self.read.get(name) for name in self._beside(receiver)), None)
        return NormAt(norm, stream, self.dtype, weight)

    def _beside(self, receiver: Receiver) -> list[str]:
        """The hooks of what the norm before a receiver reads beside the stream."""
        norm = None if receiver.layer is None else getattr(self.plain.blocks[receiver.layer], receiver.norm)
        return [] if norm is None else [f"blocks.{receiver.layer}.{receiver.norm}.{hook}" for hook in norm.HELD[1:]]

    def _weight(self, receiver: Receiver) -> Tensor:
        """The projection of one head, [d_head, d_model]."""
        projection: Any = getattr(self.model.blocks[receiver.layer].attn, receiver.letter)
        weight = projection.original_component.weight.detach().unflatten(0, (-1, self.model.looped_cfg.d_head))[receiver.head]
        return weight.to(self.like.device, self.like.dtype)

    def directions(self, at: Carried) -> Tensor:
        """The gradient of the metric by a stream, through each receiver that reads it, [receiver, batch, pos, d_model]."""
        rows = []
        for receiver in [r for r in self.receivers.values() if r.stream == at.stream]:
            gradient = self.gradients[receiver.hook]
            if receiver.head is not None:
                gradient = gradient[..., receiver.head, :] @ self._weight(receiver)
            rows.append(self._norm(receiver, at.of_run).pull_back(gradient))
        return torch.stack(rows)

    def patch(self, receiver: Receiver, at: Carried, change: Tensor) -> tuple[str, Any]:
        """The hook that adds a change of the stream to what a receiver reads."""
        change = self._norm(receiver, at.of_run).exactly(change)
        if receiver.head is None:
            return receiver.hook, lambda x, hook: (wide(x) + change).to(x.dtype)
        change = change @ self._weight(receiver).T

        def add(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[..., receiver.head, :] = (wide(x[..., receiver.head, :]) + change).to(x.dtype)
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


def _sources(model: LoopedBridge) -> dict[str, Source]:
    """Everything that can send, by name, in the order of the run."""
    sources = {"embed": Source("hook_embed")}
    for i in range(model.cfg.n_layers):
        heads = {f"blocks.{i}.head.{h}": Source(f"blocks.{i}.hook_attn_out", i, h) for h in range(model.cfg.n_heads)}
        sources |= heads | {f"blocks.{i}.mlp_out": Source(f"blocks.{i}.hook_mlp_out", i)}
    return sources


def _receivers(model: LoopedBridge) -> dict[str, Receiver]:
    """Everything that can receive, by name, in the order of the run."""
    receivers: dict[str, Receiver] = {}
    for i in range(model.cfg.n_layers):
        stream, reads = f"blocks.{i}.hook_resid_pre", f"blocks.{i}.attn.hook_in"
        for letter in "qkv":
            n_heads = model.looped_cfg.n_heads if letter == "q" else model.looped_cfg.n_kv_heads
            node = Receiver(stream, reads, f"blocks.{i}.attn.hook_{letter}", i, "ln1", letter)
            receivers |= {f"blocks.{i}.head.{h}.{letter}": node._replace(head=h) for h in range(n_heads)}
        reads = f"blocks.{i}.mlp.hook_in"
        receivers[f"blocks.{i}.mlp_in"] = Receiver(f"blocks.{i}.hook_resid_mid", reads, reads, i, "ln2")
    return receivers | {"logits": Receiver(FINAL, "unembed.hook_in", "unembed.hook_in")}


def _chosen(model: LoopedBridge, what: str, nodes: dict[str, Any], asked: Names | None) -> dict[str, Any]:
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
