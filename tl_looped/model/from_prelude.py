"""Layers that read mixtures of block sums, in a loop whose passes all begin with the prelude's output (Inkling-2-Mini).

The residual stream is the sum of a block of layers and starts anew with every block. What a branch reads is a mixture over
depth: of the embedding, the sums of the finished blocks, and the stream; so is what the last norm reads. In every later loop
each branch mixes what it reads with a message from the block sums of the pass before.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import LoopedError
from ..kinds import Kind, count, number, several, shown
from ..schedule import Pass
from .clipped_attention import ClippedAttention, Shape
from .config import LoopedConfig
from .depth_mix import DepthMix, MessageGate, wide
from .experts import Experts
from .layers import Block, Inputs
from .loops import Initial, Parts, Repeat, register_loop
from .norms import RMSNorm
from .short_conv import ShortConv, shifted
from .slots import observe

READERS = ("q", "k", "v", "mlp")  # of messages
_SIZE = number(above=True)
# What the loop kind is told beside the fields of the config.
OPTIONS: dict[str, Kind[Any]] = {
    **dict.fromkeys("block gate_rank d_bias extent taps floor n_experts n_chosen".split(), count()),
    **dict.fromkeys(("clip", "bias_clip", "route_scale"), _SIZE),
    "growth": number(),
    "windowed_heads": several(count()),  # heads, heads of keys and values, width of a head, in layers with a window
    "mlp_caps": several(_SIZE),  # of gate and up
}


def block_sums(carried: Mapping[str, Tensor], name: str = "source") -> list[Tensor]:
    """The embedding and the sums of the finished blocks, as they are carried.

    Args:
        carried: see `tl_looped.model.Stream`.
        name: "source" for those of this pass; "left" for those that the pass before has left, "past" for what of them it reads.
    """
    found: list[Tensor] = []
    while (value := carried.get(f"{name}.{len(found)}")) is not None:
        found.append(value)
    return found


class BranchNorm(RMSNorm):
    """The norm of what queries, keys and values are made of: of all three, or one for each.

    Args:
        width: that of the stream.
        eps: added to the mean square.
        n_rows: how many norms.
    """

    def __init__(self, width: int, eps: float | None, n_rows: int):
        super().__init__(width, eps)
        if n_rows > 1:
            self.weight: nn.Parameter | None = nn.Parameter(torch.ones(n_rows, width))


class MixingBlock(Block):
    """A layer that reads mixtures.

    Args:
        cfg: the structure.
        physical: which layer.
    """

    def __init__(self, cfg: LoopedConfig, physical: int):
        nn.Module.__init__(self)
        options, width, window = cfg.options, cfg.d_model, cfg.windows[physical]
        self.starts_block: bool = physical % options["block"] == 0
        self.is_later: bool = False
        n_loops, n_coda = cfg.n_loops, cfg.n_coda
        self.stride: int = cfg.schedule.n_layers + n_loops * n_coda  # slots of a cache, also where every readout has its own
        own = () if window is None else options["windowed_heads"]
        n_heads, n_kv_heads, d_head = own or (cfg.n_heads, cfg.n_kv_heads, cfg.d_head)
        self.attn_mix: DepthMix | None = DepthMix(1 if window else 3, width) if physical else None
        self.ln1: Any = BranchNorm(width, cfg.norm_eps, 1 if window else 3)
        self.attn: Any = ClippedAttention(
            Shape(
                width, n_heads, n_kv_heads, d_head, window, options["d_bias"], window or options["extent"], options["taps"],
                options["clip"], options["bias_clip"], options["floor"], options["growth"], cfg.norm_eps,
            )
        )  # fmt: skip
        self.attn_conv: ShortConv = ShortConv(width, options["taps"])
        self.hook_resid_mid: nn.Module = nn.Identity()
        self.mlp_mix: DepthMix = DepthMix(width)
        self.ln2: Any = RMSNorm(width, cfg.norm_eps)
        self.mlp: Any = Experts(
            width, cfg.d_mlp, options["n_experts"], options["n_chosen"], options["route_scale"], tuple(options["mlp_caps"])
        )
        self.mlp_conv: ShortConv = ShortConv(width, options["taps"])
        self.ln1_post: Any = None
        self.ln1_stream: Any = None
        self.ln2_post: Any = None
        self.ln2_stream: Any = None
        for name in ("hook_q_in", "hook_k_in", "hook_v_in"):
            setattr(self, name, nn.Identity())
        if cfg.n_prelude <= physical < cfg.n_prelude + cfg.n_core:
            self.message: DepthMix = DepthMix(len(READERS), width, fires=False)
            for reader in READERS:
                setattr(self, f"{reader}_message", MessageGate(width, options["gate_rank"], cfg.norm_eps))

    def place(self, slot: int, loop: int | None) -> None:
        """Say where in the run this layer stands."""
        self.attn.slot = slot
        convs = (self.attn.k_conv, self.attn.v_conv, self.attn_conv, self.mlp_conv)
        self.slots: tuple[int, ...] = tuple(self.stride * i + slot for i in range(1, len(convs) + 1))
        for conv, own in zip(convs, self.slots, strict=True):
            conv.slot = own
        self.is_later = bool(loop)
        if loop:
            for name in ("message", *(f"{reader}_message" for reader in READERS)):
                getattr(self, name).place()

    def forward(self, x: Float[Tensor, "batch pos d_model"], inputs: Inputs) -> Float[Tensor, "batch pos d_model"]:
        """The stream after the layer."""
        carried, stream = inputs.carried, wide(x)
        read = stream[..., None, :] if self.attn_mix is None else self.attn_mix(*block_sums(carried), stream)
        messages = self.message(*block_sums(carried, "past")) if self.is_later else None
        if messages is not None:
            gates = (getattr(self, f"{reader}_message") for reader in READERS[:3])
            read = torch.stack([gate(_row(read, j), messages[..., j, :]) for j, gate in enumerate(gates)], dim=-2)
        read = self.ln1(read).to(x.dtype)
        q, k, v = (observe(self._modules[f"hook_{name}_in"], _row(read, j)) for j, name in enumerate("qkv"))  # type: ignore[arg-type]
        out = wide(self.attn_conv(self.attn(q, inputs, k, v), inputs))
        if self.starts_block:
            carried[f"source.{len(block_sums(carried))}"] = x
        stream = self.hook_resid_mid(out if self.starts_block else stream + out)
        read = self.mlp_mix(*block_sums(carried), stream)
        if messages is not None:
            read = self._modules["mlp_message"](read, messages[..., 3, :])  # type: ignore[misc]
        return (stream + wide(self.mlp_conv(self.mlp(self.ln2(read).to(x.dtype)), inputs))).to(x.dtype)

    def follow(
        self,
        x: Tensor,
        carried: dict[str, Tensor],
        apply: Callable[[nn.Module, str, Tensor], Tensor],
        write: Callable[[Tensor | None, str], Tensor],
    ) -> Generator[tuple[str, Tensor], None, Tensor]:
        """Go the way of the stream through the layer, without attention and MLP."""
        yield "pre", x
        if self.starts_block:
            carried[f"source.{len(block_sums(carried))}"] = x
        x = write(None if self.starts_block else x, "attn")
        yield "mid", x
        return write(x, "mlp")

    def heads_written(
        self, z: Float[Tensor, "*batch pos head d_head"], weight: Float[Tensor, "head d_head d_model"], real: Tensor | None
    ) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        """What every head writes after the convolution, as coefficients of rows of a weight for every lag."""
        taps = self.attn_conv.by_lag().detach().to(weight.device, weight.dtype)
        own = torch.zeros_like(taps)
        own[0] = 1
        by_lag = torch.cat([weight * tap for tap in (taps + own) * (len(taps) + 1) ** -0.5], dim=1)
        rows = z if z.ndim == 4 else z[None]
        rows = rows if real is None else rows * real[..., None, None].to(z.device, z.dtype)
        coefficients = torch.cat(list(shifted(rows, len(taps), z.shape[-3])), dim=-1)
        return coefficients if z.ndim == 4 else coefficients[0], by_lag


def _row(x: Float[Tensor, "*shape row d_model"], j: int) -> Float[Tensor, "*shape d_model"]:
    """One row, or the only one."""
    return x[..., min(j, x.shape[-2] - 1), :]


class FromPrelude(Repeat):
    """Passes that all begin with what the prelude left, and read messages of the one before."""

    def __init__(self, cfg: LoopedConfig):
        super().__init__(cfg)
        given = cfg.options
        if missing := [name for name in OPTIONS if name not in given]:
            raise LoopedError(f"loop={cfg.loop!r} needs options {', '.join(missing)}; it has {shown(sorted(given))}.")
        for name, kind in OPTIONS.items():
            kind(f"options[{name!r}]", given[name])
        block, heads = given["block"], given["windowed_heads"]
        if cfg.n_prelude % block or cfg.n_core % block or not cfg.n_prelude or len(cfg.windows) != cfg.n_physical:
            raise LoopedError(
                f"loop={cfg.loop!r} was asked with n_prelude={cfg.n_prelude}, n_core={cfg.n_core} and {len(cfg.windows)} "
                f"windows; prelude and loop are whole blocks of {block} layers, at least one each, and every layer has a "
                "window or None."
            )
        if len(heads) != 3 or heads[0] % heads[1] or len(given["mlp_caps"]) != 2 or given["n_chosen"] > given["n_experts"]:
            raise LoopedError(
                f"loop={cfg.loop!r} was asked with windowed_heads={shown(heads)}, mlp_caps={shown(given['mlp_caps'])} and "
                f"{given['n_chosen']} of {given['n_experts']} experts; heads are [heads, groups that divide them, width], caps "
                "[gate, up], and no more experts are chosen than there are."
            )

    def model_parts(self) -> dict[str, nn.Module]:
        """The mixture that the last norm reads."""
        return {"final_mix": DepthMix(self.cfg.d_model)}

    def block(self, physical: int) -> Block:
        """One layer."""
        return MixingBlock(self.cfg, physical)

    def alike(self, physical: int) -> object:
        """What the shapes of a layer's parameters depend on."""
        cfg = self.cfg
        return cfg.windows[physical], physical == 0, cfg.n_prelude <= physical < cfg.n_prelude + cfg.n_core

    def pass_parts(self, is_last: bool) -> dict[str, nn.Module]:
        """The modules of one pass."""
        return {**super().pass_parts(is_last), "hook_sources": nn.Identity()}

    def place(self, ends: nn.Module, p: Pass) -> None:
        """Tell the modules of a pass which one it is; the first reads no messages."""
        if p.loop == 0:
            del ends._modules["hook_sources"]

    @property
    def mixes(self) -> str | None:
        """Why what a layer reads is not the stream alone."""
        return "every branch reads a mixture of the sums of all blocks up to there"

    @property
    def heads_differ(self) -> str | None:
        """Which layers have other heads than the rest."""
        cfg, windowed = self.cfg, tuple(self.cfg.options["windowed_heads"])
        if windowed == (cfg.n_heads, cfg.n_kv_heads, cfg.d_head) or len({window is None for window in cfg.windows}) == 1:
            return None
        return (
            f"layers with a window have {windowed[0]} heads of {windowed[2]} entries and {windowed[1]} of keys and values, the "
            f"others {cfg.n_heads} of {cfg.d_head} and {cfg.n_kv_heads}"
        )

    @property
    def no_neurons(self) -> str | None:
        """Why an MLP has no neurons that all positions go through."""
        return "the MLPs are mixtures of experts, of which a position goes through a few"

    @property
    def scaled(self) -> str | None:
        """Nothing is added to what all later layers read."""
        return f"the stream is the sum of one block, and {self.mixes}"

    @property
    def changes(self) -> str | None:
        """Why one loop is not the same map of the state as the next."""
        return "every pass starts again from the prelude's output, and the later ones read messages of the one before"

    @property
    def not_injected(self) -> str | None:
        """Why a pass has no injection that can be edited."""
        return "the later passes are given messages in every layer, and no injection (loops.1:.hook_sources)"

    def between(self, p: Pass) -> str | None:
        """What happens to what the layers of a pass write."""
        return self.scaled

    def begin(self, parts: Parts, x: Tensor, initial: Initial) -> dict[str, Tensor]:
        """What is carried before the first pass: the state that every pass begins with."""
        state = initial(x, x)
        return {"begun": state, self.stack: state}

    def enter(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor:
        """The input of the first layer of a pass."""
        if p.loop:
            of_pass = block_sums(carried)[self._n_before :]
            for j in range(len(of_pass)):
                carried[f"left.{j}"] = carried.pop(f"source.{self._n_before + j}")
            past = torch.stack([*of_pass[1:], carried[p.stack]], dim=-2)  # the first is what the pass began with
            carried |= {f"past.{j}": value for j, value in enumerate(parts("hook_sources", past).unbind(-2))}
        state = parts("hook_state", carried["begun"])
        if p.loop == 0:
            carried["begun"] = state  # a hook may have changed what all passes begin with
        carried["entered"] = state
        return parts("hook_in", state)

    @property
    def _n_before(self) -> int:
        """How many sums the first layer of a pass finds."""
        return self.cfg.n_prelude // self.cfg.options["block"]

    def finish(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor:
        """What the coda reads if the loop ends after a pass, also when the next one has been entered already."""
        if len(block_sums(carried)) == self._n_before:
            carried |= {f"source.{self._n_before + j}": value for j, value in enumerate(block_sums(carried, "left"))}
        return super().finish(parts, p, carried)

    def read(self, parts: Parts, x: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """What the last norm reads."""
        return parts("final_mix", *block_sums(carried), x)


register_loop("from_prelude", FromPrelude)
