"""LoopFormer: a looped GPT whose layers know how far along they are and how big their step is (arXiv 2602.11451).

A run goes from time 0 to 1 in steps, one a loop. The time and the size of a step condition every layer of that loop: they scale
what its branches read and what they return. `options["steps"]` are the sizes; where there is not one for every loop, as after
`unroll`, the loops share the way evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import CheckpointError, LoopedError
from ..kinds import count, flag, number, several
from ..model.config import LoopedConfig
from ..model.layers import Block, Inputs
from ..model.loops import Parts, Repeat, register_loop
from ..model.norms import ConditionedNorm, Gain
from ..model.slots import is_observed, observe, same_bits
from ..schedule import Pass
from ._common import Shapes, Source, attention_rows, fused, layers, modules
from ._read import get, need, unused

TIED = ("transformer.wte.weight", "lm_head.weight")
IGNORED = ("*.attn.bias",)  # the causal mask
WAVES = 256  # entries of the sines and cosines of a time
_LAYER = {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj", "modulation.map": "adaLN_modulation.1"}


class Conditioning(nn.Module):
    """What every layer of a loop is told: a map of its time plus another of its step.

    Args:
        width: that of the stream.
    """

    BESIDE: bool = True  # what a layer is told is no part of the stream

    def __init__(self, width: int):
        super().__init__()
        self.at: tuple[float, float] = (0.0, 1.0)  # time and step
        self.time: nn.Sequential = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.step: nn.Sequential = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.hook_time: nn.Module = nn.Identity()
        self.hook_step: nn.Module = nn.Identity()
        self.hook_out: nn.Module = nn.Identity()

    def forward(self, state: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch 1 d_model"]:
        """The conditioning of a loop, for as many rows as the state that enters it has."""
        frequencies = 10000.0 ** (-2 * torch.arange(WAVES // 2, device=state.device) / WAVES)
        angles = torch.tensor(self.at, dtype=torch.float32, device=state.device)[:, None] * frequencies
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(state.dtype)
        time, step = (part(wave).expand(len(state), 1, -1) for part, wave in zip((self.time, self.step), waves, strict=True))
        like = state.shape[1]
        return _seen(self.hook_out, _seen(self.hook_time, time, like) + _seen(self.hook_step, step, like), like)


def _seen(slot: nn.Module, x: Tensor, n_pos: int) -> Tensor:
    """What a slot makes of a value that is the same at all positions: one for all of them unless a hook changes it."""
    if not is_observed(slot) or x.shape[1] == n_pos:
        return observe(slot, x)
    wide = x.expand(-1, n_pos, -1)
    seen = slot(wide.clone())
    return same_bits(x, seen.mean(1, keepdim=True)) if torch.equal(seen, wide) else seen


class Modulation(nn.Module):
    """What a layer makes of the conditioning: two gains and two scales, side by side.

    Args:
        width: that of the stream.
    """

    def __init__(self, width: int):
        super().__init__()
        self.map: nn.Linear = nn.Linear(width, 4 * width)
        self.hook_out: nn.Module = nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], conditioning: Float[Tensor, "batch 1 d_model"]
    ) -> Float[Tensor, "batch pos four_d_model"]:
        """The same at every position of the stream `x`."""
        conditioning = conditioning[:, -x.shape[1] :]  # a hook may have made it differ by position
        return observe(self.hook_out, self.map(F.silu(conditioning)).expand(*x.shape[:2], -1))


class ConditionedBlock(Block):
    """A layer whose norms and whose branches' outputs the loop scales."""

    def __init__(self, cfg: LoopedConfig, physical: int):
        super().__init__(cfg, physical)
        self.modulation: Modulation = Modulation(cfg.d_model)
        self.ln1: Any = ConditionedNorm(cfg.d_model, cfg.norm_eps)
        self.ln1_post: Any = Gain()
        self.ln2: Any = ConditionedNorm(cfg.d_model, cfg.norm_eps)
        self.ln2_post: Any = Gain()

    def forward(self, x: Float[Tensor, "batch pos d_model"], inputs: Inputs) -> Float[Tensor, "batch pos d_model"]:
        """The stream after the layer."""
        of: Any = self
        attn_gain, mlp_gain, attn_scale, mlp_scale = self.modulation(x, inputs.carried["conditioning"]).chunk(4, dim=-1)
        x = self.hook_resid_mid(x + of.ln1_post(self.attn(of.ln1(x, 1 + attn_scale), inputs), attn_gain))
        return x + of.ln2_post(self.mlp(of.ln2(x, 1 + mlp_scale)), mlp_gain)


class Timed(Repeat):
    """Loops that know their time and the size of their step."""

    def __init__(self, cfg: LoopedConfig):
        super().__init__(cfg)
        steps = several(number())("options['steps']", cfg.options.get("steps", ()))
        self.steps: tuple[float, ...] = steps if len(steps) == cfg.n_loops else (1 / cfg.n_loops,) * cfg.n_loops
        if cfg.norm != "pre" or cfg.n_prelude or cfg.n_coda:
            raise LoopedError(
                f"loop={cfg.loop!r} was asked with norm={cfg.norm!r}, n_prelude={cfg.n_prelude} and n_coda={cfg.n_coda}, but "
                'its layers all lie in the loop; choose norm="pre" and no layers outside.'
            )

    def first(self, n_loops: int) -> LoopedConfig:
        """The structure of the first steps."""
        return self.cfg.replace(n_loops=n_loops, options={**self.cfg.options, "steps": list(self.steps[:n_loops])})

    @property
    def scaled(self) -> str | None:
        """Every branch has a gain."""
        return "the loop scales what every branch returns"

    @property
    def changes(self) -> str | None:
        """Its layers also read the time, which goes on."""
        return "its layers also read the time and the size of the step"

    def block(self, physical: int) -> Block:
        """One layer."""
        return ConditionedBlock(self.cfg, physical)

    def pass_parts(self, is_last: bool) -> dict[str, nn.Module]:
        """The modules of one pass."""
        return {**super().pass_parts(is_last), "conditioning": Conditioning(self.cfg.d_model)}

    def is_whole(self, name: str) -> bool:
        """The conditioning is the same at every position."""
        return name == "conditioning"

    def place(self, ends: nn.Module, p: Pass) -> None:
        """Tell the conditioning of a pass its time and step."""
        conditioning: Any = ends.conditioning
        conditioning.at = (sum(self.steps[: p.loop]), self.steps[p.loop])

    def enter(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor:
        """The input of the first layer of a pass."""
        x = super().enter(parts, p, carried)
        carried["conditioning"] = parts("conditioning", carried["entered"])
        return x

    def resume(self, parts: Parts, p: Pass, last: Pass, x: Tensor, injection: Tensor | None) -> dict[str, Tensor]:
        """What is carried into a run that starts inside a pass."""
        return {"conditioning": parts("conditioning", x)}

    def between(self, p: Pass) -> str | None:
        """Nothing happens to the stream between the loops."""
        return None

    def leave(self, parts: Parts, p: Pass, x: Tensor, carried: dict[str, Tensor]) -> None:
        """Keep the state that leaves a pass."""
        del carried["conditioning"]
        super().leave(parts, p, x, carried)


register_loop("timed", Timed)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a LoopFormer; the other models of its repository have other types."""
    return config.get("model_type") == "loopformer"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes; how often it loops is no part of its config.json, which may name `steps`."""
    unused(config, "dropout max_model_loops")
    width = _width(config, "n_embd", "hidden_size")
    steps = get(config, "steps", (1 / 8,) * 8, several(number()))
    if not steps:
        raise CheckpointError("config.json has steps=[], but a LoopFormer takes at least one; name their sizes.")
    return LoopedConfig(
        family="loopformer",
        d_model=width,
        n_heads=need(config, "n_head", count()),
        d_mlp=_width(config, "intermediate_dim", "n_inner"),
        d_vocab=need(config, "vocab_size", count()),
        n_ctx=_width(config, "block_size", "n_positions"),
        n_core=need(config, "n_layer", count()),
        n_loops=len(steps),
        norm_eps=None,
        mlp="plain",
        act_fn="gelu",
        biases=("q", "k", "v", "o", "in", "out") if get(config, "bias", False, flag) else (),
        rope_layout="none",
        learned_positions=True,
        loop="timed",
        options={"steps": list(steps)},
        tied=True,
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    found = {"embed.weight": Source(TIED[0]), "embed.positions": Source("transformer.wpe.weight")}
    found |= {"ln_final.weight": Source("transformer.norm_f.weight")}
    for ours, theirs in (("time", "time_embedder"), ("step", "dt_embedder")):
        for i, leaf in ((0, "weight"), (0, "bias"), (2, "weight"), (2, "bias")):
            found[f"conditioning.{ours}.{i}.{leaf}"] = Source(f"{theirs}.mlp.{i}.{leaf}")
    for at, _, j, _ in layers(cfg):
        stored = f"transformer.h.blocks.{j}"
        found |= modules(cfg, {f"{at}.{ours}": f"{stored}.{theirs}" for ours, theirs in _LAYER.items()})
        found[f"{at}.modulation.map.bias"] = Source(f"{stored}.adaLN_modulation.1.bias")
        found |= fused(f"{stored}.attn.c_attn", cfg.d_model, attention_rows(cfg, at, "q k v"), bias="q" in cfg.biases)
    return found


def _width(config: Mapping[str, Any], key: str, alias: str) -> int:
    """A number under its own name, or under the one that transformers' wrapper gives it."""
    return get(config, key, get(config, alias, None, count()), count()) or need(config, key)
