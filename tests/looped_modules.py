"""Looped modules as people write them, none of them known to the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, HEADS, VOCAB = 16, 2, 20


class Attention(nn.Module):
    """One map for queries, keys and values, and PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).split(D, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(z.transpose(1, 2).flatten(2))


class EagerAttention(nn.Module):
    """Three maps, and attention step by step; it looks both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in maps)
        pattern = torch.softmax(q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5, dim=-1)
        return self.o_proj((pattern @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(D), attention(), nn.LayerNorm(D), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoLoop(nn.Module):
    """A nanoGPT whose middle layers run several times; it returns logits and a loss that nobody asked for."""

    def __init__(self, n_loops: int = 4, n_coda: int = 0) -> None:
        super().__init__()
        self.n_loops = n_loops
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, D),
                "wpe": nn.Embedding(32, D),
                "first": nn.ModuleList([Block()]),
                "h": nn.ModuleList([Block() for _ in range(3)]),
                "last": nn.ModuleList([Block() for _ in range(n_coda)]),
                "ln_f": nn.LayerNorm(D),
            }
        )
        self.lm_head = nn.Linear(D, VOCAB, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        parts: Any = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1]))
        for block in parts.first:
            x = block(x)
        for _ in range(self.n_loops):
            for block in parts.h:
                x = block(x)
        for block in parts.last:
            x = block(x)
        return self.lm_head(parts.ln_f(x)), None


class Universal(nn.Module):
    """One layer that is told the time; keyword arguments only, and a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"steps": 5}
        self.emb, self.time, self.block = nn.Embedding(VOCAB, D), nn.Embedding(16, D), Block()
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, VOCAB)

    def forward(self, *, tokens: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.emb(tokens) * scale
        for t in range(self.settings["steps"]):
            x = self.block(x + self.time.weight[t])
        return {"state": x, "logits": self.out(self.norm(x))}


class Halting(nn.Module):
    """A `while` with a test of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.block, self.norm, self.out = nn.Embedding(VOCAB, D), Block(), nn.LayerNorm(D), nn.Linear(D, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x, n = self.emb(tokens), 0
        while n < 2 + int(tokens[0, 0]) % 4:
            x, n = self.block(x), n + 1
        return self.out(self.norm(x))


class InPlaceBlock(Block):
    """Adds to its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.ln_1(x))
        x += self.mlp(self.ln_2(x))
        return x


class InPlace(nn.Module):
    """Layers and loop write to the state in place."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layers = nn.Embedding(VOCAB, D), nn.ModuleList([InPlaceBlock() for _ in range(2)])
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for _ in range(3):
            for layer in self.layers:
                x = self.step(layer, x)
            x.mul_(0.9)
        return self.out(self.norm(x))

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)


class LooksAway(InPlace):
    """Does not look at what layers return, but at what they do to their input."""

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        layer(x)
        return x


class Level(nn.Module):
    """A stack with an injection."""

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(n_layers)])

    def forward(self, x: Tensor, injected: Tensor) -> Tensor:
        x = x + injected
        for layer in self.layers:
            x = layer(x)
        return x


class Hierarchical(nn.Module):
    """Two stacks; gradients reach the last cycle only."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.start, self.head = nn.Embedding(VOCAB, D), nn.Parameter(torch.randn(D)), nn.Linear(D, VOCAB)
        self.L_level, self.H_level = Level(2), Level(1)

    def forward(self, tokens: Tensor) -> Tensor:
        e = self.emb(tokens)
        high = low = self.start.expand_as(e)
        for cycle in range(3):
            with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == 2):
                for _ in range(2):
                    low = self.L_level(low, high + e)
                high = self.H_level(high, low)
        return self.head(high)


class Noisy(NanoLoop):
    """Begins with noise."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        parts: Any = self.transformer
        injected = parts.wte(idx)
        x = torch.randn_like(injected)
        for _ in range(self.n_loops):
            x = x + injected
            for block in parts.h:
                x = block(x)
        return self.lm_head(parts.ln_f(x)), None


class Capped(nn.Module):
    """An encoder in an `nn.Sequential`, with eager attention, a softcap and the embedding as unembedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm = nn.Embedding(VOCAB, D), nn.LayerNorm(D)
        self.body = nn.Sequential(Block(EagerAttention), Block(EagerAttention))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for _ in range(3):
            x = self.body(x)
        return self.unembed(self.norm(x))

    def unembed(self, x: Tensor) -> Tensor:
        return 5 * torch.tanh(F.linear(x, self.emb.weight) / 5)


class PerToken(nn.Module):
    """Every token has a depth of its own: later loops run some positions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layers = nn.Embedding(VOCAB, D), nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for loop in range(3):
            kept = torch.arange(0, tokens.shape[1], loop + 1)
            part = x[:, kept]
            for layer in self.layers:
                part = layer(part)
            x = x.index_copy(1, kept, part)
        return self.out(self.norm(x))


class Between(nn.Module):
    """Transformer layers of PyTorch, with a norm between the loops that a list of modules holds."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(D, HEADS, 2 * D, 0.0, batch_first=True) for _ in range(2)])
        self.norms, self.out = nn.ModuleList([nn.LayerNorm(D) for _ in range(3)]), nn.Linear(D, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for norm in self.norms:
            for layer in self.layers:
                x = layer(x, src_mask=mask, is_causal=True)
            x = norm(x)
        return self.out(x)


class Shuffled(NanoLoop):
    """Runs its layers forwards, then backwards."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        parts: Any = self.transformer
        x = parts.wte(idx)
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
            for i in order:
                x = parts.h[i](x)
        return self.lm_head(parts.ln_f(x)), None


class Grouped(nn.Module):
    """One map for queries, keys and values, of which heads share the latter two, and rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.Wqkv, self.out = nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.Wqkv(x).split([D, D // 2, D // 2], -1))
        angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
        z = F.scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v, is_causal=True, enable_gqa=True)
        return self.out(z.transpose(1, 2).flatten(2))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Halves of heads, rotated."""
    one, other = x.chunk(2, -1)
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)


class Memory(nn.Module):
    """An MLP whose maps are called as those of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(torch.relu(self.key(x)) ** 2)


class Parallel(nn.Module):
    """Both parts of a layer read the same; embedding and last norm have one dropout; the state comes before the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.drop = nn.Embedding(VOCAB, D), nn.Dropout(0.1)
        self.blocks = nn.ModuleList([ParallelBlock() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, VOCAB)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(self.emb(tokens))
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        x = self.drop(self.norm(x))
        return x, self.head(x)


class ParallelBlock(nn.Module):
    """A layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer, self.memory = nn.LayerNorm(D), Grouped(), Memory()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.memory(y) + self.mixer(y)


class Handing(nn.Module):
    """Loops over two layers that are given something before their stream, or return something before it."""

    takes: int | None = 0  # where in its arguments a layer is given its stream
    gives: int | str | None = None  # where in what it returns the stream is

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.encoder, self.layers = nn.Embedding(VOCAB, D), Block(), nn.ModuleList([self.layer() for _ in range(2)])
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, VOCAB)

    def layer(self) -> nn.Module:
        raise NotImplementedError

    def given(self, x: Tensor, beside: Any) -> tuple[Any, ...]:
        return (beside, x)

    def beside(self, tokens: Tensor) -> Any:
        return None

    def forward(self, tokens: Tensor) -> Tensor:
        x, beside = self.emb(tokens), self.beside(tokens)
        for _ in range(3):
            for layer in self.layers:
                x = self.stream(layer(*self.given(x, beside)))
        return self.out(self.norm(x))

    def stream(self, returned: Any) -> Tensor:
        if self.gives is None:
            return returned
        return getattr(returned, self.gives) if isinstance(self.gives, str) else returned[self.gives]


class MaskedLayer(Block):
    """Takes a mask of numbers first."""

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x + self.attn(self.ln_1(x)) + mask.exp() @ x
        return x + self.mlp(self.ln_2(x))


class MaskFirst(Handing):
    """A mask of numbers [1, query, key] comes first."""

    takes, layer = 1, MaskedLayer

    def beside(self, tokens: Tensor) -> Tensor:
        return torch.full((1, tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)


class RotaryLayer(Block):
    """Takes angles first."""

    def forward(self, angles: tuple[Tensor, Tensor], x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = angles
        y = self.ln_1(x)
        x = x + self.attn(y * cos + y.roll(1, -1) * sin)
        return x + self.mlp(self.ln_2(x))


class TableFirst(Handing):
    """Cosines and sines [1, pos, width] come first, in a tuple, computed anew for every layer."""

    takes, layer = 1, RotaryLayer

    def given(self, x: Tensor, beside: Any) -> tuple[Any, ...]:
        angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.1, 1.0, D)
        return ((angles.cos()[None], angles.sin()[None]), x)


class CrossLayer(Block):
    """Takes a memory first."""

    def forward(self, memory: Tensor, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x + self.attn(self.ln_1(x)) + torch.softmax(x @ memory.mT, -1) @ memory
        return x + self.mlp(self.ln_2(x))


class MemoryFirst(Handing):
    """What an encoder of the same width returns comes first."""

    takes, layer = 1, CrossLayer

    def beside(self, tokens: Tensor) -> Tensor:
        return self.encoder(self.emb(tokens))


@dataclass(frozen=True)
class LayerOutput:
    """What a layer returns."""

    used: Tensor
    hidden: Tensor


class DescribingLayer(Block):
    """Says what it used, and its state."""

    def forward(self, x: Tensor) -> LayerOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.ln_1(x)
        x = x + self.attn(y)
        return LayerOutput(used=y, hidden=x + self.mlp(self.ln_2(x)))


class DataclassOutput(Handing):
    """Layers return a dataclass in which the stream is not the first of its shape."""

    gives, layer = "hidden", DescribingLayer

    def given(self, x: Tensor, beside: Any) -> tuple[Any, ...]:
        return (x,)


class TellingLayer(Block):
    """Returns its attention, averaged over heads, before its stream."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.ln_1(x)
        pattern = (y @ y.mT / D**0.5 + torch.full((x.shape[1],) * 2, -torch.inf).triu(1)).softmax(-1)
        x = x + pattern @ y
        return pattern, x + self.mlp(self.ln_2(x))


class AttentionFirst(Handing):
    """Layers return (attention, stream)."""

    gives, layer = 1, TellingLayer

    def given(self, x: Tensor, beside: Any) -> tuple[Any, ...]:
        return (x,)


class Added(Handing):
    """Layers return what the module adds to its stream."""

    layer = MLP

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for _ in range(3):
            for layer in self.layers:
                x = x + layer(x)
        return self.out(self.norm(x))


class WrittenOut(Added):
    """There is no module of a layer: norms and parts are called in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.ln_1, self.ln_2 = nn.ModuleDict({"attn": Attention(), "mlp": MLP()}), nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for _ in range(3):
            x = x + self.layers["attn"](self.ln_1(x))
            x = x + self.layers["mlp"](self.ln_2(x))
        return self.out(self.norm(x))


class CoupledLayer(nn.Module):
    """Two states in, two states out."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = Block(), Block()

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(low + high)
        return low, self.high(high + low)


class Coupled(Handing):
    """Two states go through every layer."""

    layer = CoupledLayer

    def forward(self, tokens: Tensor) -> Tensor:
        low = high = self.emb(tokens)
        for _ in range(3):
            for layer in self.layers:
                low, high = layer(low, high)
        return self.out(self.norm(low + high))


class Experts(nn.Module):
    """Several MLPs on the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 3), nn.ModuleList([MLP() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return torch.stack([expert(x) for expert in self.experts], -1) @ shares[..., None] @ torch.ones(1)


class OneBlock(nn.Module):
    """One block loops, of which the MLP has experts; layers in lists run once before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.before, self.core = nn.Embedding(VOCAB, D), nn.ModuleList([Block(), Block()]), Block()
        self.after, self.norm, self.out = nn.ModuleList([Block()]), nn.LayerNorm(D), nn.Linear(D, VOCAB)
        self.core.mlp = Experts()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for layer in (*self.before, *[self.core] * 4, *self.after):
            x = layer(x)
        return self.out(self.norm(x))


class Bypassing(NanoLoop):
    """Runs its layers without hooks after its first run, as compiled code does."""

    is_compiled = False

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        parts: Any = self.transformer
        x = parts.wte(idx)
        for _ in range(3):
            for block in parts.h:
                x = block.forward(x) if self.is_compiled else block(x)
        self.is_compiled = True
        return self.lm_head(parts.ln_f(x)), None


class Checkpointed(NanoLoop):
    """Runs its layers again for gradients."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        parts: Any = self.transformer
        x = parts.wte(idx)
        for _ in range(3):
            for block in parts.h:
                x = checkpoint(block, x, use_reentrant=False)
        return self.lm_head(parts.ln_f(x)), None


class HaltingLayer(Block):
    """Moves some positions only, from the state that entered the loop."""

    def forward(self, moves: Tensor, old: Tensor, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return moves * super().forward(x) + (1 - moves) * old


class OldFirst(Handing):
    """How far positions move, and the state that entered the loop, come first."""

    takes, layer = 2, HaltingLayer

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for _ in range(3):
            moves, old = torch.sigmoid(x.mean(-1, keepdim=True)), x
            for layer in self.layers:
                x = layer(moves, old, x)
        return self.out(self.norm(x))


class Equilibrium(Handing):
    """Layers add to nothing, and the embedding, or a time, goes into every loop."""

    is_timed = False

    def layer(self) -> nn.Module:
        return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, tokens: Tensor) -> Tensor:
        x = e = self.emb(tokens)
        for t in range(3):
            x = self.layers[0](x + (torch.linspace(-t, t, D) if self.is_timed else e))
        return self.out(self.norm(x))
