"""What changes of the residual stream become on their way through a run in which every component writes what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LoopedError
from ..model import LoopedModel
from ..model.changes import NormAt, changes_after
from ..model.norms import RMSNorm
from .cache import LoopedCache
from .decomposition import Reader, Write, check_sum, has_own_state, walk
from .named_cache import as_slice

Change = Float[Tensor, "row batch pos d_model"]


class DirectPaths:
    """The ways of changes through norms, injections, mixtures of states, and the norm of whatever reads them.

    Args:
        model: a bridge.
        activations: of the run, those that `needs` names among them.
        to_first_order: take the changes for small.
    """

    def __init__(self, model: Any, activations: Mapping[str, Tensor], to_first_order: bool):
        self.model: Any = model
        self.plain: LoopedModel = model.plain
        if self.plain.loop.lag:
            raise LoopedError(
                f"paths between components were asked, but in this {self.plain.cfg.family} model the next loop reads a state a "
                "position further on, which they do not follow; patch activations, or decompose a cache, which does."
            )
        self.dtype: torch.dtype = self.plain.embed.weight.dtype
        self.to_first_order: bool = to_first_order
        self.cache: LoopedCache = LoopedCache(dict(activations), model)
        self.own_state: bool = has_own_state(self.plain, self.cache)
        self.of_run: Reader = Reader(self.cache, as_slice(None))
        self.like: Tensor = self.of_run.get("hook_embed")

    @staticmethod
    def needs(model: Any, layers: Iterable[int], norms: Iterable[tuple[int | None, str]]) -> list[str]:
        """The activations that are needed for heads of these layers, and for these norms, as in `norm`."""
        plain = model.plain
        names = ["hook_embed", *(name for name in model.hook_dict if name.endswith(("hook_attn_out", "hook_mlp_out")))]
        for i in layers:
            names.append(f"blocks.{i}.attn.hook_z")
            post = _plain(plain.blocks[i].ln1_post)
            hooks = [] if post is None else ["hook_in"] if isinstance(post, RMSNorm) else post.HELD
            names += [f"blocks.{i}.ln1_post.{hook}" for hook in hooks]
        beside = [name for layer, norm in norms for name in _beside(plain, layer, norm)]
        prefixes = [plain.cfg.schedule.pass_prefix(p) for p in plain.cfg.schedule.passes]
        beside += [f"{prefix}.{slot}" for prefix in prefixes for slot in plain.loop.held]
        return [*names, *plain.loop.state_before, *beside]

    def _through(self, module: Any, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
        """Changes after a module that lies on the way of the stream, and in the last row what the run has after it."""
        if name.rpartition(".")[2] in self.plain.loop.held:
            return self.value(name)
        return changes_after(module, inputs, self.dtype, self.to_first_order)

    def value(self, name: str, dim: int = -2) -> Tensor:
        """An activation of the run, in fp32 or wider; `dim` is the axis of its positions."""
        return self.of_run.get(name, dim)

    def heads(self, layer: int, heads: Sequence[int], change: Float[Tensor, "batch pos head d_head"]) -> Change:
        """What changes of `hook_z` change in the stream, head by head, each beside the other heads of the run.

        Args:
            layer: the virtual layer.
            heads: which heads.
            change: of all heads.
        """
        weight = self.model.blocks[layer].attn.W_O.detach()[list(heads)].to(change.device, change.dtype)
        vectors = torch.einsum("bphi,hid->hbpd", change[..., list(heads), :], weight)
        post = _plain(self.plain.blocks[layer].ln1_post)
        if post is None:
            return vectors
        if not isinstance(post, RMSNorm):
            return post.frozen(vectors, *(self.value(f"blocks.{layer}.ln1_post.{hook}") for hook in post.HELD))
        out = self.value(f"blocks.{layer}.ln1_post.hook_in")
        return self._through(post, "", (torch.cat((vectors, out[None])),))[:-1]

    @torch.no_grad()
    def carried(
        self, n_rows: int, changes: Callable[[str], Iterable[tuple[int, Tensor]]]
    ) -> Iterator[tuple[str, Change, Float[Tensor, "batch pos d_model"]]]:
        """Every stream that a component reads, in the order of the run.

        Args:
            n_rows: how many changes are carried.
            changes: the rows that are written at a hook, and what changes there.

        Yields:
            The hook of the stream, its changes before the norm of the reader, and the stream itself.
        """

        def write(x: Tensor | None, at: Write) -> Tensor:
            x = self.like.new_zeros(n_rows + 1, *self.like.shape) if x is None else x
            x[-1] += self.value(at.hook)
            for row, change in changes(at.hook):
                x[row] += change
            return x

        for stream, x in walk(self.plain, self._through, write, self.own_state):
            yield stream, x[:-1], x[-1]

    def norm(self, layer: int | None, name: str, stream: Float[Tensor, "batch pos d_model"]) -> NormAt:
        """The norm of that name in a virtual layer (None: before the unembedding), where it stands in the run."""
        norm = self.plain.ln_final if layer is None else getattr(self.plain.blocks[layer], name)
        weight = next((self.value(held) for held in _beside(self.plain, layer, name)), None)
        return NormAt(norm, stream, self.dtype, weight)

    def check(self, hook: str, total: Tensor) -> None:
        """Refuse a run in which the input of a component, after its norm, is no sum of what components wrote."""
        check_sum(total, self.cache[hook].to(total.device), f"the input of {self.model.schedule.loop_name(hook)}")

    def projection(self, layer: int, letter: str, head: int) -> Float[Tensor, "d_head d_model"]:
        """The weights by which one head reads.

        Args:
            layer: the virtual layer.
            letter: q, k or v.
            head: the head; of keys and values, the group.
        """
        linear: Any = getattr(self.model.blocks[layer].attn, letter)
        weight = linear.original_component.weight.detach().unflatten(0, (-1, self.plain.cfg.d_head))[head]
        return weight.to(self.like.device, self.like.dtype)


def _plain(module: Any) -> Any:
    """A module without the component around it."""
    return getattr(module, "_original_component", module)


def _beside(plain: LoopedModel, layer: int | None, name: str) -> list[str]:
    """The hooks of what a norm of a layer reads beside the stream."""
    norm: Any = None if layer is None else getattr(plain.blocks[layer], name)
    return [] if norm is None else [f"blocks.{layer}.{name}.{hook}" for hook in norm.HELD[1:]]
