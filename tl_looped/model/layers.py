"""A block: attention, MLP, and what every layer of a run reads beside the stream.

Every intermediate value a researcher may want passes through a slot, an `nn.Identity` named `hook_*`. The plain model computes
the same with or without them; the bridge puts TransformerLens hook points in their place, so there is one forward to read and
to trust.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..running import Running, is_observed
from .config import LoopedConfig
from .devices import Carried
from .lean import Lean, Linear
from .mlps import MLP
from .norms import NORMS, Gain, RMSNorm, norm_of
from .residuals import Add, Interpolate, residual_write
from .rotary import Angles
from .slots import same_bits


@dataclass(eq=False)
class Inputs(Running):
    """What every layer of a run reads beside the residual stream; hooks ask `running()` for it."""

    rope: dict[float, Angles]  # cos and sin, by the base of their frequencies
    # Attention masks by window (None: no window), True where a query may look; None means plain causal.
    masks: dict[int | None, Bool[Tensor, "#batch 1 query key"] | None]
    value_embeds: dict[int, Float[Tensor, "batch pos kv_width"]] = field(default_factory=dict)
    carried: Carried = field(default_factory=Carried)  # beside the stream, see `Stream`; layers may read and write it
    positions: Int[Tensor, "#batch pos"] | None = None  # of the tokens that are run
    device: torch.device | None = None  # of the layer that reads next; None before the first

    def move(self, device: torch.device) -> None:
        """Bring everything to the device of the layer that reads next.

        Args:
            device: where that layer lies.
        """
        self.carried.device = device
        if device != self.device:
            self.rope = {base: (cos.to(device), sin.to(device)) for base, (cos, sin) in self.rope.items()}
            self.masks = {window: None if mask is None else mask.to(device) for window, mask in self.masks.items()}
            self.value_embeds = {i: embed.to(device) for i, embed in self.value_embeds.items()}
            self.positions = None if self.positions is None else self.positions.to(device)
            self.device = device


def rotate(
    x: Float[Tensor, "batch pos head d_head"], rope: tuple[Tensor, Tensor], layout: str
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotary position embedding; `rope` holds cos and sin, [batch or 1, pos, d_head / 2], in fp32 or wider."""
    cos, sin = (angle.unsqueeze(-2) for angle in rope)
    if layout == "half":
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


class Attention(Lean):
    """Causal self-attention with grouped keys and values; fused unless a hook asks for scores or pattern."""

    def __init__(self, cfg: LoopedConfig, physical: int):
        super().__init__()
        self.head_dim: int = cfg.d_head
        self.rope_layout, self.qk_norm = cfg.rope_layout, cfg.qk_norm
        self.rope_base: float = cfg.rope_base(physical)
        self.window: int | None = cfg.windows[physical] if cfg.windows else None
        self.scale: float = cfg.d_head**-0.5
        self.grouped: bool = cfg.n_kv_heads != cfg.n_heads
        self.value_table: int | None = physical if physical in cfg.value_embed_layers else None
        self.slot: int = -1  # the virtual layer, set when the model is unrolled
        q_width, kv_width = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.q: nn.Linear = Linear(cfg.d_model, q_width, bias="q" in cfg.biases)
        self.k: nn.Linear = Linear(cfg.d_model, kv_width, bias="k" in cfg.biases)
        self.v: nn.Linear = Linear(cfg.d_model, kv_width, bias="v" in cfg.biases)
        self.o: nn.Linear = Linear(q_width, cfg.d_model, bias="o" in cfg.biases)
        self.gate: nn.Linear | None = None
        if cfg.attn_gate:
            self.gate = Linear(cfg.d_model, q_width, bias="attn_gate" in cfg.biases)
        self.value_gate: nn.Linear | None = None
        if self.value_table is not None:
            self.value_gate = Linear(cfg.value_gate_width, cfg.n_kv_heads, bias=False)
            self.hook_value_embed: nn.Module = nn.Identity()
        if cfg.qk_norm != "none":
            after = cfg.qk_norm == "after_rope"
            widths = (q_width, kv_width) if cfg.qk_norm == "flat" else (cfg.d_head, cfg.d_head)
            eps = cfg.qk_norm_eps if cfg.qk_norm_eps is not None or after else cfg.norm_eps
            weight = cfg.qk_norm_weight and not after
            self.q_norm: RMSNorm = NORMS[cfg.norm_kind](widths[0], eps, weight)
            self.k_norm: RMSNorm = NORMS[cfg.norm_kind](widths[1], eps, weight)
        self.q_gain: nn.Parameter | None = nn.Parameter(torch.ones(q_width)) if cfg.query_gain else None
        self.inner_norm: RMSNorm | None = norm_of(cfg, q_width) if cfg.inner_norm else None
        if cfg.rope_layout != "none":
            self.hook_rot_q: nn.Module = nn.Identity()
            self.hook_rot_k: nn.Module = nn.Identity()
        self.hook_attn_scores: nn.Module = nn.Identity()
        self.hook_pattern: nn.Module = nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], inputs: Inputs, *beside: Tensor
    ) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "flat":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # [batch, pos, head, d_head]
        if self.value_gate is not None and self.value_table is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))
            embed = inputs.value_embeds[self.value_table].view_as(v)
            v = v + self.hook_value_embed(gate.unsqueeze(-1) * embed)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if inputs.rope:
            angles = inputs.rope[self.rope_base]
            q = self.hook_rot_q(rotate(q, angles, self.rope_layout))
            k = self.hook_rot_k(rotate(k, angles, self.rope_layout))
        if self.qk_norm == "after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.q_gain is not None:
            q = q * self.q_gain.view(-1, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [batch, head, pos, d_head]
        if inputs.cache is not None:
            k, v = inputs.cache.update(k, v, self.slot)
        z = self.attend(q, k, v, inputs, *beside).transpose(1, 2).flatten(-2)  # [batch, pos, head * d_head]
        if self.gate is not None:
            z = z * torch.sigmoid(self.gate(x))
        return self.o(z if self.inner_norm is None else self.inner_norm(z))

    def attend(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        v: Float[Tensor, "batch kv_head key d_head"],
        inputs: Inputs,
        *beside: Tensor,
    ) -> Float[Tensor, "batch head query d_head"]:
        """What the heads read, from the queries of this run and the keys and values of the text up to now.

        Args:
            q: the queries.
            k: the keys.
            v: the values.
            inputs: what the layer reads beside the stream.
            *beside: what else its block gives the attention.
        """
        return self.mix(q, k, v, inputs.masks[self.window])

    def mix(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        v: Float[Tensor, "batch kv_head key d_head"],
        mask: Bool[Tensor, "#batch 1 query key"] | None,
        slots: tuple[str, str] = ("hook_attn_scores", "hook_pattern"),
    ) -> Float[Tensor, "batch head query d_head"]:
        """Attention-weighted values.

        Looking at scores or pattern never changes the bits of the result, with or without gradients; only an edit does.
        """
        hook_scores, hook_pattern = (getattr(self, slot) for slot in slots)
        causal_only = mask is None and q.shape[-2] > 1
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal_only, scale=self.scale, enable_gqa=self.grouped
        )
        if not (is_observed(hook_scores) or is_observed(hook_pattern)):
            return z
        groups = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(groups, dim=1) if self.grouped else t for t in (k, v))
        scores = q @ keys.transpose(-2, -1) * self.scale
        scores = scores.masked_fill(~(causal(q, k) if mask is None else mask), float("-inf"))
        expected = _softmax(scores.detach())
        pattern = hook_pattern(_softmax(hook_scores(scores)))
        mixed = pattern @ values
        return same_bits(z, mixed) if torch.equal(pattern, expected) else mixed


def _softmax(scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Softmax over keys, in fp32 for narrower dtypes."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)


def causal(q: Tensor, k: Tensor) -> Bool[Tensor, "query key"]:
    """The causal mask for queries that are the last of the keys' positions."""
    n_query, n_key = q.shape[-2], k.shape[-2]
    return torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).tril(n_key - n_query)


class Block(Lean):
    """Attention and MLP around the residual stream, with the norms where the family has them."""

    slots: tuple[int, ...] = ()  # of a key-value cache, where the layer keeps more than keys and values

    def __init__(self, cfg: LoopedConfig, physical: int):
        super().__init__()

        def norm(*kinds: str) -> RMSNorm | None:
            return norm_of(cfg) if cfg.norm in kinds else None

        self.ln1: RMSNorm | None = norm("pre", "sandwich", "stream")
        self.attn: Attention = Attention(cfg, physical)
        self.ln1_post: RMSNorm | Gain | None = norm("branch", "sandwich")
        self.attn_write: Add | Interpolate = residual_write(cfg)
        self.ln1_stream: RMSNorm | None = norm("stream")
        self.hook_resid_mid: nn.Module = nn.Identity()
        self.ln2: RMSNorm | None = norm("pre", "sandwich", "stream")
        self.mlp: MLP = MLP(cfg)
        self.ln2_post: RMSNorm | Gain | None = norm("branch", "sandwich")
        self.mlp_write: Add | Interpolate = residual_write(cfg)
        self.ln2_stream: RMSNorm | None = norm("stream")

    def attended(self, x: Tensor, read: Tensor, inputs: Inputs) -> Tensor:
        """What the attention returns, [batch, pos, d_model].

        Args:
            x: the stream.
            read: the stream after the norm.
            inputs: what the layer reads beside the stream.
        """
        return self.attn(read, inputs)

    def place(self, slot: int, loop: int | None) -> None:
        """Say where in the run this layer stands.

        Args:
            slot: the virtual layer, which is its slot in a key-value cache.
            loop: its loop; None outside.
        """
        self.attn.slot = slot

    def forward(self, x: Float[Tensor, "batch pos d_model"], inputs: Inputs) -> Float[Tensor, "batch pos d_model"]:
        read = x if self.ln1 is None else self.ln1(x)
        out = self.attended(x, read, inputs)
        x = self.attn_write(x, read, out if self.ln1_post is None else self.ln1_post(out))
        x = self.hook_resid_mid(x if self.ln1_stream is None else self.ln1_stream(x))
        read = x if self.ln2 is None else self.ln2(x)
        out = self.mlp(read)
        x = self.mlp_write(x, read, out if self.ln2_post is None else self.ln2_post(out))
        return x if self.ln2_stream is None else self.ln2_stream(x)

    def follow(
        self,
        x: Tensor,
        carried: dict[str, Tensor],
        apply: Callable[[nn.Module, str, Tensor], Tensor],
        write: Callable[[Tensor | None, str], Tensor],
    ) -> Generator[tuple[str, Tensor], None, Tensor]:
        """Go the way of the stream through the layer, without attention and MLP; what leaves the layer is returned.

        Args:
            x: the stream entering the layer.
            carried: what lies beside it, see `Stream`; changed in place.
            apply: runs a norm on the way, which is given with its name.
            write: adds to a stream what "attn" or "mlp" writes, or begins one with it.

        Yields:
            The stream before each branch, with the place in the layer, "pre" or "mid".
        """
        for branch, place, before, after in (("attn", "pre", "ln1", "ln1_stream"), ("mlp", "mid", "ln2", "ln2_stream")):
            yield place, x
            residual, norm = getattr(self, f"{branch}_write"), getattr(self, before)
            if isinstance(residual, Interpolate):
                read = x if norm is None else apply(norm, before, x)
                x = residual.kept(read) + residual.added(write(None, branch))
            else:
                x = write(x, branch)
            norm = getattr(self, after)
            x = x if norm is None else apply(norm, after, x)
        return x

    def heads_written(
        self, z: Float[Tensor, "*batch pos head d_head"], weight: Float[Tensor, "head d_head d_model"], real: Tensor | None
    ) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        """What every head writes, as coefficients [..., head, i] of rows of a weight [head, i, d_model].

        Args:
            z: what the heads read.
            weight: of the output projection.
            real: which positions are no padding, [batch, pos]; None for all.
        """
        return z, weight


def each_module(*roots: nn.Module) -> Iterator[nn.Module]:
    """Every module under some roots once, in the order of `nn.Module.modules`, whose recursion is ten times as slow."""
    seen: set[nn.Module] = set()
    pending = list(reversed(roots))
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            yield module
            if children := module._modules:
                pending += [child for child in reversed(children.values()) if child is not None]
