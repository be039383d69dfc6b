"""Attention without rotations (Inkling): clipped queries and keys, a learned bias by distance, a sink, short convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .depth_mix import wide
from .layers import Inputs, causal
from .lean import Lean, Linear
from .norms import RMSNorm
from .short_conv import DynamicConv, ShortConv
from .slots import observe


@dataclass(frozen=True)
class Shape:
    """The sizes of such attention.

    Args:
        d_model: width of the stream.
        n_heads: query heads.
        n_kv_heads: heads of keys and values.
        d_head: width of a head.
        window: how many positions a query sees, its own included; None for all. Then the convolutions have computed taps.
        d_bias: width of what the biases are read with.
        extent: how many distances have a bias.
        taps: of the convolutions.
        clip: greatest length of queries and keys.
        bias_clip: greatest length of what the biases are read with.
        floor: from how many positions on queries grow, in layers that see all positions.
        growth: how much.
        eps: of the norm of the values.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    window: int | None
    d_bias: int
    extent: int
    taps: int
    clip: float
    bias_clip: float
    floor: int
    growth: float
    eps: float | None


class Clip(Lean):
    """Vectors of heads, of at most some length, after a scale on every entry if there is one.

    Args:
        n_heads: how many.
        width: of each.
        length: the greatest length.
        scaled: whether there is a scale.
    """

    def __init__(self, n_heads: int, width: int, length: float, scaled: bool = True):
        super().__init__()
        self.length: float = length
        self.shape: tuple[int, int] = (n_heads, width)
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(n_heads * width)) if scaled else None

    def forward(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos head d_head"]:
        """The clipped vectors, in fp32 and cast back."""
        heads = (wide(x) if self.weight is None else wide(x) * wide(self.weight)).unflatten(-1, self.shape)
        return (heads * (self.length / (heads.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1)).to(x.dtype)


class ClippedAttention(Lean):
    """Attention whose queries, keys and values each have an input of their own.

    `hook_attn_scores` has the biases in it, [batch, head, query, key]; a row of `hook_pattern` sums to one with what the sink
    of the head gets, whose logits are `hook_sink` [batch, pos, head]. `hook_q_clipped`, `hook_k_clipped` and `hook_v_normed`
    are what the scores are made of and what is mixed, `hook_rel` what the biases are read with.

    Args:
        shape: its sizes.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape: Shape = shape
        self.head_dim: int = shape.d_head
        self.slot: int = -1
        q_width, kv_width, d_model = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head, shape.d_model
        self.q: nn.Linear = Linear(d_model, q_width, bias=False)
        self.k: nn.Linear = Linear(d_model, kv_width, bias=False)
        self.v: nn.Linear = Linear(d_model, kv_width, bias=False)
        self.o: nn.Linear = Linear(q_width, d_model, bias=False)
        self.gate: nn.Linear = Linear(d_model, q_width, bias=False)
        self.rel: nn.Linear = Linear(d_model, shape.n_heads * shape.d_bias, bias=False)
        self.sink: nn.Linear = Linear(d_model, shape.n_heads, bias=False)
        self.by_distance: nn.Parameter = nn.Parameter(torch.zeros(shape.d_bias, shape.extent))
        self.q_clip: Clip = Clip(shape.n_heads, shape.d_head, shape.clip)
        self.k_clip: Clip = Clip(shape.n_kv_heads, shape.d_head, shape.clip, scaled=False)
        self.rel_clip: Clip = Clip(shape.n_heads, shape.d_bias, shape.bias_clip)
        self.v_norm: RMSNorm = RMSNorm(shape.d_head, shape.eps, weight=False)
        self.k_conv: ShortConv = self._conv(kv_width)
        self.v_conv: ShortConv = self._conv(kv_width)
        self.hook_attn_scores: nn.Module = nn.Identity()
        self.hook_pattern: nn.Module = nn.Identity()
        for name in ("rel", "sink", "q_clipped", "k_clipped", "v_normed"):
            setattr(self, f"hook_{name}", nn.Identity())

    def _conv(self, width: int) -> ShortConv:
        of = self.shape
        return ShortConv(width, of.taps) if of.window else DynamicConv(width, of.taps, of.n_kv_heads, of.d_model)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        inputs: Inputs,
        of_keys: Float[Tensor, "batch pos d_model"],
        of_values: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the heads write.

        Args:
            x: what queries, biases, sinks and gates are made of.
            inputs: what the layer reads beside the stream.
            of_keys: what keys are made of.
            of_values: what values are made of.
        """
        slots = self._modules
        k = self.k_clip(self.k_conv(self.k(of_keys), inputs, of_keys))
        v = self.v_norm.unhooked(self.v_conv(self.v(of_values), inputs, of_values).unflatten(-1, self.k_clip.shape))
        q, rel = self._grown(self.q_clip(self.q(x)), inputs), self._grown(self.rel_clip(self.rel(x)), inputs)
        q, k, v, rel, sink = (
            observe(slots[f"hook_{name}"], t)  # type: ignore[arg-type]
            for name, t in (("q_clipped", q), ("k_clipped", k), ("v_normed", v), ("rel", rel), ("sink", self.sink(x)))
        )
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if inputs.cache is not None:
            k, v = inputs.cache.update(k, v, self.slot)
        z = self._mix(q.transpose(1, 2), k, v, rel, sink, inputs.masks[self.shape.window], inputs.past)
        return self.o((wide(z.transpose(1, 2).flatten(-2)) * torch.sigmoid(wide(self.gate(x)))).to(z.dtype))

    def _grown(self, x: Tensor, inputs: Inputs) -> Tensor:
        """What queries are read with, larger at late positions where all positions are seen."""
        if self.shape.window is not None:
            return x
        assert inputs.positions is not None
        growth = ((inputs.positions + 1).to(wide(x).dtype) / self.shape.floor).clamp(min=1).log()
        return (wide(x) * (1 + self.shape.growth * growth)[..., None, None]).to(x.dtype)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, sink: Tensor, mask: Tensor | None, past: int
    ) -> Float[Tensor, "batch head query d_head"]:
        groups = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        scores = q @ keys.mT * self.head_dim**-0.5 + self._bias(rel, past, keys.shape[2])
        scores = scores.masked_fill(~(causal(q, keys) if mask is None else mask), float("-inf"))
        scores = self.hook_attn_scores(scores)
        wide_scores = wide(torch.cat((scores, sink.mT[..., None].to(scores.dtype)), dim=-1))
        pattern = wide_scores.softmax(-1)[..., :-1].to(scores.dtype)
        return self.hook_pattern(pattern) @ values

    def _bias(self, rel: Float[Tensor, "batch pos head d_bias"], past: int, n_keys: int) -> Tensor:
        """The bias of every pair of positions, by their distance in the text, [batch, head, query, key]."""
        by_distance = (rel @ self.by_distance.to(rel.dtype)).transpose(1, 2)  # [batch, head, query, distance]
        query = torch.arange(past, past + rel.shape[1], device=rel.device)
        distance = query[:, None] - torch.arange(n_keys, device=rel.device)
        known = distance.clamp(0, self.shape.extent - 1).expand(*by_distance.shape[:2], -1, -1)
        return by_distance.gather(-1, known).masked_fill((distance < 0) | (distance >= self.shape.extent), 0)
