"""The way from the stream to the logits: the last norm and the unembedding of a traced module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoopedError
from .calls import Call, Calls, Held, is_same, likeliest, tensors_in

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Out:
    """A last norm and an unembedding.

    Args:
        norm: the norm; None where there is none, or none was found.
        head: the unembedding; None if none was found.
        names: what they are, for the table.
        why_not: why the two do not give the module's logits from the stream leaving its last layer; None if they do.
    """

    norm: Map | None
    head: Map | None
    names: tuple[str, str]
    why_not: str | None


def way_out(
    module: nn.Module,
    run: Calls,
    last: Call,
    logits: Tensor,
    norm: str | Map | None,
    head: str | Map | None,
) -> Out:
    """Find the last norm and the unembedding, and see whether they give the logits.

    Args:
        module: what was run.
        run: its calls.
        last: the call of its last layer.
        logits: what came out.
        norm: the path of the norm, or a function; None to find it.
        head: likewise.

    Raises:
        LoopedError: a path that is none.
    """
    found, entered = None if head is not None else _head(module, run, logits), None
    if head is not None:
        to_logits, head_name = _given(module, head, "head")
    elif found is not None:
        head_name, to_logits, entered = found
    else:
        return Out(None, None, ("not found", "not found"), "no module returns its logits; name norm= and head=")
    if entered is None and isinstance(head, str):
        calls = [c for c in run.of(head) if c.takes is not None]
        entered = calls[-1].takes if calls else None
    to_norm, norm_name = _given(module, norm, "norm") if norm is not None else (None, "none")
    if norm is None and entered is not None and not is_same(entered, last.gives):
        gave = [c for c in run.calls if is_same(c.gives, entered) and not (c.inner or is_same(c.takes, c.gives))]
        path = gave[-1].path if gave else None  # and not dropout, which returns what it is given
        to_norm, norm_name = (None, "not found") if path is None else (_map(module, path), path)
    x = last.gives
    if x is None or x.shape[:2] != logits.shape[:2]:
        return Out(to_norm, to_logits, (norm_name, head_name), "its last layer returns no stream [batch, pos, width]")
    with torch.no_grad():
        try:
            read = to_logits(x if to_norm is None else to_norm(x))
        except Exception as error:
            return Out(to_norm, to_logits, (norm_name, head_name), f"its norm and unembedding do not take a stream ({error})")
    scale = float(logits.abs().max())
    if read.shape == logits.shape and bool((read.to(logits.dtype) - logits).abs().max() <= 1e-4 * scale + 1e-6):
        return Out(to_norm, to_logits, (norm_name, head_name), None)
    why = "its norm and unembedding do not give its logits from what leaves its last layer; name norm= and head="
    return Out(to_norm, to_logits, (norm_name, head_name), why)


def _head(module: nn.Module, run: Calls, logits: Tensor) -> tuple[str, Map, Tensor] | None:
    """What returned the logits from a stream: a map, what is behind it (a softcap), or the transposed embedding."""
    width = logits.shape[-1]
    behind: list[str] = []
    wanted = logits
    for call in reversed(run.calls):
        gave, took = call.gives, call.takes
        if gave is None or took is None or call.inner or gave.ndim != 3 or gave.shape[:2] != logits.shape[:2]:
            continue
        if gave.shape[-1] < width or not torch.equal(gave[..., :width].to(wanted.dtype), wanted[..., :width]):
            continue
        behind.insert(0, call.path)
        if took.shape == gave.shape and getattr(getattr(module.get_submodule(call.path), "weight", None), "ndim", 0) != 2:
            # of logits, not of a stream
            wanted = took
            continue
        return ", ".join(behind), _cut(_chain(module, behind), width), took
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    streams = [c.gives for c in run.calls[-8:] if c.gives is not None and c.gives.shape[:2] == logits.shape[:2]]
    for table in tables:
        for x in reversed(streams):
            if x.shape[-1] == table.embedding_dim and x.dtype == table.weight.dtype and table.num_embeddings >= width:
                found = F.linear(x, table.weight[:width])
                if torch.allclose(found.to(logits.dtype), logits, rtol=1e-4, atol=1e-5):

                    def unembed(x: Tensor, table: nn.Embedding = table) -> Tensor:
                        return F.linear(x, table.weight[:width])

                    return "the embedding, transposed", unembed, x
    return None


def _given(module: nn.Module, asked: str | Map, what: str) -> tuple[Map, str]:
    if not isinstance(asked, str):
        if not callable(asked):
            raise LoopedError(f"{what}={asked!r} was given; pass the path of a submodule, or a function of the stream.")
        return asked, getattr(asked, "__name__", type(asked).__name__)
    try:
        module.get_submodule(asked)
    except AttributeError as error:
        raise LoopedError(f"{what}={asked!r} was given, but the module has no such submodule.") from error
    return _map(module, asked), asked


def _map(module: nn.Module, path: str) -> Map:
    """A submodule as a function of tensors."""

    def run(x: Tensor) -> Tensor:
        found = likeliest(tensors_in(module.get_submodule(path)(x)))
        return cast(Held, found).tensor

    return run


def _chain(module: nn.Module, paths: list[str]) -> Map:
    """Submodules one after the other as a function of tensors."""

    def run(x: Tensor) -> Tensor:
        for path in paths:
            x = _map(module, path)(x)
        return x

    return run


def _cut(head: Map, width: int) -> Map:
    """An unembedding without what pads the vocabulary."""

    def run(x: Tensor) -> Tensor:
        found: Any = head(x)
        return found[..., :width]

    return run
