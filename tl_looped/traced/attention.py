"""Attention inside a module: seen, and given hooks, where it calls PyTorch's attention or a softmax over keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .calls import Call

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
FUSED = F.scaled_dot_product_attention
Q, K, V, SCORES, PATTERN, Z = (f"attn.hook_{name}" for name in ("rot_q", "rot_k", "v", "attn_scores", "pattern", "z"))


@dataclass(eq=False)
class Attention:
    """What one attention computed in the recorded run.

    Args:
        call: in which it was.
        n_heads: heads of the pattern.
        d_head: width of a head.
        q: [batch, head, pos, d_head]; None where only a softmax was seen.
        k: likewise.
        v: likewise.
        z: likewise.
    """

    call: Call | None
    n_heads: int
    d_head: int
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    z: Tensor | None = None

    @property
    def has_z(self) -> bool:
        """Whether hooks can act on everything, and not only on the pattern."""
        return self.z is not None

    @property
    def hooks(self) -> list[str]:
        """The hooks that can act in it."""
        return [Q, K, V, SCORES, PATTERN, Z] if self.has_z else [PATTERN]


class Watching(TorchFunctionMode):
    """Calls back whenever attention is computed.

    Args:
        attend: called with the function and its arguments; returns what it is to return.
    """

    def __init__(self, attend: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]):
        super().__init__()
        self.attend: Callable[..., Any] = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is FUSED or func in SOFTMAX:
            return self.attend(func, args, kwargs)
        return func(*args, **kwargs)


def is_pattern(x: Tensor) -> bool:
    """Whether a softmax is over keys: [batch, head, query, key]."""
    return x.ndim == 4


def fused(args: tuple[Any, ...], kwargs: dict[str, Any], hook: Callable[[str, Tensor], Tensor], is_eager: bool) -> Tensor:
    """PyTorch's attention with hooks.

    Args:
        args: of the call.
        kwargs: of the call.
        hook: called with a hook and its activation, [batch, pos, head, d_head] or [batch, head, query, key].
        is_eager: hooks act on scores or pattern, so that they must be computed.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    q, k, v = (hook(name, given[key].transpose(1, 2)).transpose(1, 2) for name, key in ((Q, "query"), (K, "key"), (V, "value")))
    rest = {name: value for name, value in given.items() if name not in names[:3]}
    z = FUSED(q, k, v, **rest)
    if is_eager:
        eager, is_edited = _eager(q, k, v, rest, hook)
        if is_edited:
            z = eager
        elif eager.requires_grad:  # the numbers of the one, the gradient of the other
            z = z.detach() + (eager - eager.detach())
    return hook(Z, z.transpose(1, 2)).transpose(1, 2)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any], hook: Callable[[str, Tensor], Tensor]
) -> tuple[Tensor, bool]:
    """Attention step by step, and whether hooks changed a step."""
    times = q.shape[1] // k.shape[1] if given.get("enable_gqa") else 1
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    scale = given.get("scale")
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    is_edited = False
    for name in (SCORES, PATTERN):
        before = scores if name == SCORES else scores.softmax(-1)
        version = before._version
        scores = hook(name, before)
        is_edited = is_edited or scores is not before or before._version != version
    return F.dropout(scores, given.get("dropout_p") or 0.0) @ v, is_edited
