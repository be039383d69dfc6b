"""IQuest LoopCoder and LoopCoder-V2: a Llama whose later loops also attend to the keys and values of the first.

In every later loop a head mixes two readings of its own queries, one of the first loop's keys and values and one of this
loop's in a window, by a gate (`attn.hook_source_gate`). `attn.hook_pattern` is that of the window,
`attn.hook_first_pattern` that of the first loop.

LoopCoder-V2 also moves the state by a position between two loops, so that a loop reads what the loop before made of the token
before, and adds the embedding again. Contributions are followed along: a component of loop `t` reaches the logits as many
positions later as loops follow.

The published prefill of LoopCoder mixes up heads and positions; its decoding, token by token, is what is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import CheckpointError
from ..kinds import choice, count, flag, number, several
from ..model.config import LoopedConfig
from ..model.layers import Attention, Block, Inputs
from ..model.loops import Parts, Repeat, register_loop
from ..model.norms import RMSNorm
from ..model.slots import observe
from ..running import running
from ..schedule import Pass
from ._common import Shapes, Source, decoder_fields, layers, llama_sources
from ._read import get, need

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)
_SLOTS = ("hook_source_gate", "hook_first_scores", "hook_first_pattern", "hook_first_z", "hook_own_z")


class TwoSources(Attention):
    """Attention that in later loops mixes what it reads of the first loop with what it reads of its own.

    Args:
        cfg: the structure; its options are the `window` of the later loops, and whether the gate reads the queries or the
            `stream`.
        physical: which layer.
    """

    def __init__(self, cfg: LoopedConfig, physical: int):
        super().__init__(cfg, physical)
        self.first: str = f"first.{physical}"
        self.own_window: int = count()("options['window']", cfg.options.get("window"))
        self.is_later: bool = False
        self.source_norm: RMSNorm | None = None
        if choice("query", "stream")("options['gate']", cfg.options.get("gate")) == "stream":
            self.source_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.source_gate: nn.Linear = nn.Linear(cfg.d_head if self.source_norm is None else cfg.d_model, cfg.n_heads)

    def attend(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        v: Float[Tensor, "batch kv_head key d_head"],
        inputs: Inputs,
        *beside: Tensor,
    ) -> Float[Tensor, "batch head query d_head"]:
        """What the heads read: of the first loop, and in later ones of their own too; `beside` is the stream."""
        kept, everywhere = inputs.carried, inputs.masks[None]
        if not self.is_later:
            kept[f"{self.first}.k"], kept[f"{self.first}.v"] = k, v
            return self.mix(q, k, v, everywhere)
        slots, part = self._modules, ("hook_first_scores", "hook_first_pattern")
        first = self.mix(q, kept[f"{self.first}.k"], kept[f"{self.first}.v"], everywhere, part).transpose(1, 2)
        own = self.mix(q, k, v, inputs.masks[self.own_window]).transpose(1, 2)  # [batch, pos, head, d_head]
        if self.source_norm is None:
            logit = torch.einsum("bhpi,hi->bph", q, self.source_gate.weight) + self.source_gate.bias
        else:
            logit = self.source_gate(self.source_norm.unhooked(beside[0]))
        gate, first, own = (
            observe(slots[slot], x)  # type: ignore[arg-type]
            for slot, x in (("hook_source_gate", torch.sigmoid(logit)), ("hook_first_z", first), ("hook_own_z", own))
        )
        return (gate[..., None] * first + (1 - gate[..., None]) * own).transpose(1, 2)


class TwoSourcesBlock(Block):
    """A layer with such attention."""

    def __init__(self, cfg: LoopedConfig, physical: int):
        super().__init__(cfg, physical)
        self.attn: Any = TwoSources(cfg, physical)

    def place(self, slot: int, loop: int | None) -> None:
        """Say where in the run this layer stands."""
        super().place(slot, loop)
        assert isinstance(self.attn, TwoSources)
        self.attn.is_later = bool(loop)
        for name in _SLOTS if loop else ():  # in the first loop they would never fire
            slot_of: Any = nn.Identity()
            if name in ("hook_first_scores", "hook_first_pattern"):
                slot_of.pos_dim = -2  # where the queries are
            setattr(self.attn, name, slot_of)

    def attended(self, x: Tensor, read: Tensor, inputs: Inputs) -> Tensor:
        """What the attention returns."""
        return self.attn(read, inputs, x)


class TwoSourcesLoop(Repeat):
    """Later loops that also attend to the first."""

    def block(self, physical: int) -> Block:
        """One layer."""
        return TwoSourcesBlock(self.cfg, physical)

    @property
    def windows(self) -> set[int | None]:
        """All positions, and the window of the later loops."""
        return {None, self.cfg.options["window"]}

    @property
    def changes(self) -> str | None:
        """Why one loop is not the same map of the state as the next."""
        return "the later loops also attend to the keys and values of the first"

    @property
    def patterns(self) -> str | None:
        """Why a head has more than one pattern."""
        return "the heads of later loops have two patterns, of their own loop and of the first (attn.hook_first_pattern)"

    def is_whole(self, name: str) -> bool:
        """The keys and values of the first loop are those of the whole text."""
        return name.startswith("first.")

    def reads_the_past(self) -> str | None:
        """Which loop needs more than the residual stream inside a pass, and what."""
        return "a loop that also attends to the keys and values of the first one"


class Shifted(nn.Module):
    """The state of the position before, scaled, plus the scaled embedding of this one.

    Args:
        cfg: the structure; its options are `embed_scale` and `state_scale`.
    """

    HELD: tuple[str, ...] = ("hook_kept",)

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        options = ("embed_scale", "state_scale")
        self.scales: list[float] = [number()(f"options[{name!r}]", cfg.options.get(name, 1.0)) for name in options]
        self.slot: int = -1  # of a key-value cache, for the states of earlier calls
        self.hook_kept: nn.Module = nn.Identity()  # 1 where there is a position before, else 0
        self.hook_shifted: nn.Module = nn.Identity()

    def forward(
        self, state: Float[Tensor, "batch pos d_model"], embed: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What enters a later loop."""
        run, n_new = running(), state.shape[1]
        text, past, real = state, 0, None
        if run is not None:
            past, real = run.past, run.real
            if run.cache is not None:
                text = run.cache.update(state[:, None], state[:, None, :, :0], self.slot)[0][:, 0]
        before = F.pad(text, (0, 0, 1, 0))[:, -1 - n_new : -1]
        kept = torch.arange(past, past + n_new, device=state.device)[None, :, None] > 0
        if real is not None:
            before_is_real = F.pad(real.to(state.device), (1, 0))[:, past : past + n_new, None]
            kept = kept & before_is_real.repeat(len(state) // len(real), 1, 1)
        kept = observe(self.hook_kept, kept.to(state.dtype).expand(*state.shape[:2], 1))
        embed_scale, state_scale = self.scales
        return embed_scale * embed + state_scale * observe(self.hook_shifted, kept * before)

    def frozen(
        self,
        state: Float[Tensor, "*rows d_model"],
        embed: Float[Tensor, "*rows d_model"],
        kept: Float[Tensor, "*shape one"],
    ) -> Float[Tensor, "*rows d_model"]:
        """The same of states that are named by the position that reads them."""
        embed_scale, state_scale = self.scales
        return embed_scale * embed + state_scale * kept * state


class ShiftedLoop(TwoSourcesLoop):
    """Later loops that also attend to the first, and read the state of the position before."""

    lag: int = 1

    @property
    def not_injected(self) -> str | None:
        """Why a pass has no injection that can be edited."""
        return "the first loop has no injection, and the later ones the embedding (loops.1:.hook_injection)"

    def pass_parts(self, is_last: bool) -> dict[str, nn.Module]:
        """The modules of one pass."""
        return {**super().pass_parts(is_last), "hook_injection": nn.Identity(), "shift": Shifted(self.cfg)}

    def place(self, ends: nn.Module, p: Pass) -> None:
        """Tell the modules of a pass which one it is; the first has no loop before it."""
        if p.loop == 0:
            del ends._modules["hook_injection"], ends._modules["shift"]
        else:
            shift: Any = ends.shift
            shift.slot = self.cfg.schedule.n_layers + p.loop

    def enter(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor:
        """The input of the first layer of a pass."""
        if p.loop == 0:
            return super().enter(parts, p, carried)
        carried["entered"] = state = parts("hook_state", carried[p.stack])
        return parts("hook_in", parts("shift", state, parts("hook_injection", carried["embed"])))


register_loop("two_sources", TwoSourcesLoop)
register_loop("two_sources_shifted", ShiftedLoop)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is one of the two."""
    return config.get("model_type") in ("iquestloopcoder", "iquestpltcoder")


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    fields = decoder_fields(config, default_theta=500000.0)
    fields["n_core"] = need(config, "num_hidden_layers", count())
    if config["model_type"] == "iquestloopcoder":
        return LoopedConfig(
            family="loopcoder",
            n_loops=get(config, "loop_num", 2, count()),
            loop="two_sources",
            options={"window": get(config, "loop_window_size", 64, count()), "gate": "query"},
            **fields,
        )
    left, *right = get(config, "plt_window_size", (64, 0), several(count(0)))
    if right not in ([], [0]):
        raise CheckpointError(
            f"config.json has plt_window_size={[left, *right]}, but a causal window has no positions on the "
            f"right; it is [{left}, 0]."
        )
    normed = get(config, "plt_normalize_per_loop", False, flag)
    return LoopedConfig(
        family="loopcoder_v2",
        n_loops=get(config, "plt_num_loops", 2, count()),
        loop="two_sources_shifted",
        pass_norm=normed,
        final_norm=not normed,
        options={
            "window": left + 1,  # the current position counts here
            "gate": "stream" if get(config, "plt_gate_use_hidden_states", False, flag) else "query",
            "embed_scale": get(config, "plt_emb_scale", 1.0, number()),
            "state_scale": get(config, "plt_hidden_scale", 1.0, number()),
        },
        **fields,
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    found: dict[str, Source] = dict(llama_sources(cfg, shapes))
    names = {"loopcoder": ("model.gate_projections.{}", "model.layers.{}.gate_projection")}
    usual, other = names.get(cfg.family, ("model.layers.{}.self_attn.plt_gate", "model.layers.{}.self_attn.loop_gate_proj"))
    for at, _, _, i in layers(cfg):
        stored = other.format(i) if f"{other.format(i)}.weight" in shapes else usual.format(i)
        found |= {f"{at}.attn.source_gate.{leaf}": Source(f"{stored}.{leaf}") for leaf in ("weight", "bias")}
        if cfg.options["gate"] == "stream":
            found[f"{at}.attn.source_norm.weight"] = Source(f"{stored}.gate_norm.weight")
    return found
