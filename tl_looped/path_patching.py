"""Path patching across loops: what a component tells a later one directly, through the residual stream alone.

The way of a change through the residual stream, from where it is written to where it is read, is the frozen-norm map of
`bridge.decomposition`: through the norms between passes, the injections and the two states of HRM-Text, with the scales of the
corrupted run. So it is right where the stream is no running sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.utilities.slice import Slice

from .bridge.cache import LoopedCache
from .bridge.decomposition import FINAL, Decomposition, Write, walk
from .bridge.looped_bridge import LoopedBridge
from .comparison import Comparison, Metric
from .errors import LoopedError, UnknownNameError
from .model.layers import wide
from .results import Grid

Names = str | Sequence[str]
CHUNK = 2**27  # numbers of carried changes that are held at once


class Source(NamedTuple):
    """What writes to the residual stream: the hook that holds it; its head, of an attention."""

    hook: str
    layer: int = -1
    head: int | None = None


class Receiver(NamedTuple):
    """What reads the residual stream: the hook of the stream, the hook that the change enters by, layer, letter, head."""

    stream: str
    hook: str
    layer: int | None = None
    letter: str = ""
    head: int | None = None


def edge_sweep(
    model: LoopedBridge,
    corrupted_tokens: str | Int[Tensor, "*batch pos"],
    clean_cache: LoopedCache,
    metric: Metric,
    sources: Names | None = None,
    receivers: Names | None = None,
    **run: Any,
) -> Grid:
    """Estimate the effect of every direct path between two components of a run, from one forward and one backward.

    A score is the first-order term of `path_patch`: the change (clean - corrupted) of what the source writes, carried to the
    receiver exactly and multiplied with the gradient of the metric at the receiver's input (edge attribution patching, Syed et
    al., arXiv 2310.10348). A source that runs after the receiver has a score of exactly 0. Scores of several sources add up.
    What a source sends through the gates of attention (HRM-Text) and of value embeddings (Parcae) has no receiver.

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
        **run: what `model.forward` takes for the corrupted run, such as `attention_mask`.

    Returns:
        A `Grid` [source, receiver] in the unit of the metric; a last axis "example" if the metric has one number per row.

    Raises:
        LoopedError: as `attribution_sweep`.
        UnknownNameError: no such source or receiver; the cache lacks activations.

    Example:
        >>> from tl_looped import LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
        >>> _, cache = model.run_with_cache(clean)
        >>> difference = lambda logits: logits[0, -1, 5] - logits[0, -1, 6]
        >>> edges = edge_sweep(model, corrupted, cache, difference, "loops.0.blocks.*.head.*", "loops.2.blocks.0.head.*.q")
        >>> edges.labels["source"][0], edges.labels["receiver"], tuple(edges.values.shape)
        ('loops.0.blocks.0.head.0', ['loops.2.blocks.0.head.0.q', 'loops.2.blocks.0.head.1.q'], (4, 2))
    """
    paths = Paths(model, corrupted_tokens, clean_cache, metric, sources, receivers, run)
    values = paths.zeros()
    for rows, stream, change, _ in paths.carried():
        scores = torch.einsum("sbpd,rbpd->srb", change, paths.directions(stream))
        columns = [i for i, receiver in enumerate(paths.receivers.values()) if receiver.stream == stream]
        values[rows.start : rows.stop, columns] = scores if paths.pair.per_example else scores.sum(-1, keepdim=True)
    return paths.grid(values, "edge attribution")


def path_patch(
    model: LoopedBridge,
    corrupted_tokens: str | Int[Tensor, "*batch pos"],
    clean_cache: LoopedCache,
    metric: Metric,
    sources: Names,
    receivers: Names,
    **run: Any,
) -> Grid:
    """Patch direct paths one by one: change what a receiver reads by what one source's change is there, and run on.

    The result is the metric of that run minus the metric of the corrupted one (path patching, Wang et al., arXiv 2211.00593,
    and Goldowsky-Dill et al., 2304.05969, along the residual stream only: until the receiver, no other component sees the
    change). The change of a source is what it writes to the stream, clean minus corrupted; for a head of a branch that is
    normed, with that norm's scale frozen too. One run per pair; use `edge_sweep` for many.

    Args:
        model: as in `edge_sweep`, like the following ones.
        corrupted_tokens: as there.
        clean_cache: as there.
        metric: as there; no gradient is needed.
        sources: as there.
        receivers: as there.
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
        >>> edge = ("loops.0.blocks.1.head.0", "loops.2.blocks.0.head.1.q")
        >>> effect = path_patch(model, corrupted, cache, lambda logits: logits[0, -1, 5], *edge)
        >>> effect.axes, tuple(effect.values.shape)
        (('source', 'receiver'), (1, 1))
    """
    paths = Paths(model, corrupted_tokens, clean_cache, metric, sources, receivers, run, with_gradient=False)
    values, baseline, found = paths.zeros(), paths.pair.value(), False
    for rows, stream, change, written in paths.carried():
        for j, receiver in enumerate(paths.receivers.values()):
            if receiver.stream == stream:
                for row, moved in zip(rows, change, strict=True):
                    if row in written:
                        found = True
                        values[row, j] = paths.pair.value([paths.patch(receiver, moved)]) - baseline
    if not found:
        raise LoopedError(
            f"a path from {next(iter(paths.labels(paths.sources)))} to {next(iter(paths.labels(paths.receivers)))} was asked, "
            "but the source runs after the receiver; exchange them, or choose a later pass."
        )
    return paths.grid(values, "path effect")


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
        with_gradient: bool = True,
    ):
        self.model = model
        self.sources: dict[str, Any] = _chosen(model, "source", _sources(model), sources)
        self.receivers: dict[str, Any] = _chosen(model, "receiver", _receivers(model), receivers)
        pair = Comparison(model, corrupted_tokens, clean_cache, metric, run)
        self.pair: Comparison = pair
        self.reads: dict[str, str] = {s.hook: _read(s) for s in self.sources.values()}
        pair.require(self.reads.values())
        attention = [f"blocks.{s.layer}.attn.hook_z" for s in self.sources.values() if s.head is not None]
        kept = [name for name in model.hook_dict if name.endswith(("hook_scale", "hook_attn_out", "hook_mlp_out"))]
        kept += ["hook_embed", *attention, *self._before_loop()]
        entered = list(dict.fromkeys(r.hook for r in self.receivers.values()))
        if with_gradient:
            seen, gradients = pair.gradients(entered, also=kept)
        else:
            seen, gradients = pair.activations(kept), {}
        self.gradients: dict[str, Tensor] = gradients
        self.cache: LoopedCache = LoopedCache({name: seen[name] for name in kept}, model)
        self.run: Decomposition = Decomposition(self.cache, FINAL, Slice())

    def _before_loop(self) -> list[str]:
        """What shows whether the first pass starts from a state of its own."""
        n_prelude, before = self.model.schedule.n_prelude, ["prelude_norm.hook_out"]
        if not self.model.looped_cfg.prelude_norm:
            before = [f"blocks.{n_prelude - 1}.hook_resid_post"] if n_prelude else []
        return [self.pair.state, *before]

    def _changes(self, at: Write, rows: range) -> Iterator[tuple[int, Tensor]]:
        """The rows written at one point, and clean minus corrupted."""
        chosen = [(row, s) for row, s in enumerate(self.sources.values()) if row in rows and s.hook == at.hook]
        if not chosen:
            return
        name = self.reads[at.hook]
        corrupted = self.run.get(name, -3 if chosen[0][1].head is not None else -2)
        change = self.pair.clean(name, corrupted) - corrupted
        vectors = None
        if chosen[0][1].head is not None:
            vectors = replace(self.run.heads(chosen[0][1].layer), coefficients=change).vectors()
        for row, source in chosen:
            yield row, change if vectors is None else vectors[source.head]

    @torch.no_grad()
    def carried(self) -> Iterator[tuple[range, str, Tensor, set[int]]]:
        """The change of every source at every stream that a receiver reads.

        Yields:
            The sources, the hook of the stream, their changes there, [source, batch, pos, d_model], before the norm of the
            reader, and the sources that have written by then.
        """
        wanted = {r.stream for r in self.receivers.values()}
        size = max(1, CHUNK // self.run.like.numel())
        for start in range(0, len(self.sources), size):
            rows = range(start, min(start + size, len(self.sources)))
            written: set[int] = set()

            def write(x: Tensor | None, at: Write, rows: range = rows, written: set[int] = written) -> Tensor:
                x = self.run.like.new_zeros(len(rows), *self.run.like.shape) if x is None else x
                for row, change in self._changes(at, rows):
                    x[row - rows.start] += change
                    written.add(row)
                return x

            for stream, x in walk(self.run.model, self.run.get, write, self.run.own_state):
                if stream in wanted:
                    yield rows, stream, x, written

    def _normed(self, stack: Tensor, receiver: Receiver) -> Tensor:
        """The frozen norm before a receiver; its own transpose, so good for changes and for gradients."""
        return self.cache.apply_ln_to_stack(stack, receiver.layer, mlp_input=receiver.hook.endswith("mlp.hook_in"))

    def _weight(self, receiver: Receiver) -> Tensor:
        """The projection of one head, [d_head, d_model]."""
        projection: Any = getattr(self.model.blocks[receiver.layer].attn, receiver.letter)
        weight = projection.original_component.weight.detach().unflatten(0, (-1, self.model.looped_cfg.d_head))[receiver.head]
        return weight.to(self.run.like.device, self.run.like.dtype)

    def directions(self, stream: str) -> Tensor:
        """The gradient of the metric by a stream, through each receiver that reads it, [receiver, batch, pos, d_model]."""
        rows = []
        for receiver in [r for r in self.receivers.values() if r.stream == stream]:
            gradient = self.gradients[receiver.hook]
            if receiver.head is not None:
                gradient = gradient[..., receiver.head, :] @ self._weight(receiver)
            rows.append(self._normed(gradient[None], receiver)[0])
        return torch.stack(rows)

    def patch(self, receiver: Receiver, change: Tensor) -> tuple[str, Any]:
        """The hook that adds a change of the stream to what a receiver reads."""
        change = self._normed(change[None], receiver)[0]
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
        n_examples = len(self.run.like) if self.pair.per_example else 1
        return self.run.like.new_zeros(len(self.sources), len(self.receivers), n_examples)

    def labels(self, nodes: dict[str, Any]) -> list[str]:
        """Loop-indexed names."""
        return [self.model.schedule.loop_name(key) for key in nodes]

    def grid(self, values: Tensor, name: str) -> Grid:
        """The result."""
        labels = {"source": self.labels(self.sources), "receiver": self.labels(self.receivers)}
        if not self.pair.per_example:
            return Grid(values[..., 0], ("source", "receiver"), labels, name)
        examples = [str(i) for i in range(values.shape[-1])]
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
        for letter in "qkv":
            n_heads = model.looped_cfg.n_heads if letter == "q" else model.looped_cfg.n_kv_heads
            stream, hook = f"blocks.{i}.hook_resid_pre", f"blocks.{i}.attn.hook_{letter}"
            receivers |= {f"blocks.{i}.head.{h}.{letter}": Receiver(stream, hook, i, letter, h) for h in range(n_heads)}
        receivers[f"blocks.{i}.mlp_in"] = Receiver(f"blocks.{i}.hook_resid_mid", f"blocks.{i}.mlp.hook_in", i)
    return receivers | {"logits": Receiver(FINAL, "unembed.hook_in")}


def _chosen(model: LoopedBridge, what: str, nodes: dict[str, Any], asked: Names | None) -> dict[str, Any]:
    """The nodes that names or patterns stand for, in the order of the run."""
    if asked is None:
        return nodes
    keys: set[str] = set()
    for name in [asked] if isinstance(asked, str) else asked:
        patterns = model.schedule.expand(name)
        if not (found := [key for key in nodes if any(fnmatchcase(key, pattern) for pattern in patterns)]):
            examples = ", ".join(model.schedule.loop_name(key) for key in [*list(nodes)[1:4], list(nodes)[-1]])
            raise UnknownNameError(f"{what} {name!r} was asked, but this model has no such {what}; some are {examples}.")
        keys |= set(found)
    return {key: node for key, node in nodes.items() if key in keys}
