"""LoopUS: a decoder whose middle layers are looped behind a gate (arXiv 2605.11011).

A pass moves the state of every entry a part of the way from what entered the pass to what its layers return; how far is
computed from the difference of the two. The published forward stops at the first loop at which its halting rule, which reads
the last position, is met (`q_threshold`, `halting_strategy`); here the last loop is always read, as the published forward does
with a threshold above 1, and the probability of halting after loop `t` is the sigmoid of `loops.{t}.hook_exit_logit`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..errors import CheckpointError
from ..kinds import count, several, table
from ..model.config import LoopedConfig
from ..model.loops import Parts, Repeat, register_loop
from . import llama
from ._common import Shapes, Source, layers
from ._read import Recorded, get, need, unused

TIED = ("encoder.embed_tokens.weight", "decoder.lm_head.weight")
IGNORED = ("*.rotary_emb.*",)
_PARTS = ("encoder", "reasoning", "decoder")
_ENDS = {"model.embed_tokens": "encoder.embed_tokens", "model.norm": "decoder.norm", "lm_head": "decoder.lm_head"}
_LAYER = re.compile(r"(encoder|reasoning|plateau|decoder)\.layers\.(\d{1,9})\.(.*)")


class Gate(nn.Module):
    """`alpha u + (1 - alpha) h`, where `alpha = exp(-softplus(delta(u - h)) exp(A_log))` passes through `hook_alpha`.

    Args:
        width: that of the state.
        rank: that of the map `delta`.
    """

    HELD: tuple[str, ...] = ("hook_alpha",)

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down: nn.Linear = nn.Linear(width, rank, bias=False)
        self.up: nn.Linear = nn.Linear(rank, width)
        self.A_log: nn.Parameter = nn.Parameter(torch.zeros(width))
        self.hook_alpha: nn.Module = nn.Identity()

    def forward(
        self, returned: Float[Tensor, "*rows d_model"], entered: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """The state that leaves the pass, from what its layers returned and what entered it."""
        delta = softplus(self.up(self.down(returned - entered)))
        return self.frozen(returned, entered, self.hook_alpha(torch.exp(-delta * self.A_log.exp())))

    def frozen(
        self,
        returned: Float[Tensor, "*rows d_model"],
        entered: Float[Tensor, "*rows d_model"],
        alpha: Float[Tensor, ...],
    ) -> Float[Tensor, "*rows d_model"]:
        """The gate with its opening held, a linear map."""
        return alpha * returned + (1 - alpha) * entered


class Gated(Repeat):
    """Passes behind a gate, and a norm before the exit gate."""

    def pass_parts(self, is_last: bool) -> dict[str, nn.Module]:
        """The modules of one pass."""
        width = self.cfg.d_model
        parts: dict[str, nn.Module] = {"gate": Gate(width, count()("gate_rank", self.cfg.options.get("gate_rank")))}
        if self.cfg.exit_gate:
            parts["exit_gate"] = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        return parts

    def written(self, parts: Parts, x: Tensor, entered: Tensor | None) -> Tensor:
        """The state that a pass leaves."""
        assert entered is not None
        return parts("gate", x, entered)


register_loop("gated", Gated)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is a LoopUS checkpoint."""
    return config.get("model_type") == "lds"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    base = Recorded(need(config, "base_config_dict", table))
    encoder, reasoning, decoder = (need(config, f"{part}_layer_indices", several(count(0))) for part in _PARTS)
    order = (*encoder, *reasoning, *decoder)
    if order != tuple(range(len(order))) or not reasoning:
        raise CheckpointError(
            f"config.json has encoder, reasoning and decoder layers {[*encoder]}, {[*reasoning]}, {[*decoder]} of the base "
            "model; implemented are all of its layers in their order, with at least one reasoning layer."
        )
    need(config, "N", count())
    unused(config, "hidden_size vocab_size base_model_name_or_path convergence_epsilon halting_strategy q_* early_stop*")
    names = {_base_name(name, len(encoder), len(encoder + reasoning)): shape for name, shape in shapes.items()}
    down = next((shape for name, shape in shapes.items() if name.endswith(".gate.dt_input_proj.weight")), None)
    if down is None:
        raise CheckpointError("this lds checkpoint has no tensor reasoning.gate.dt_input_proj.weight; it is no LoopUS model.")
    cfg = llama.looped_config(
        base, names, start=len(encoder), stop=len(encoder + reasoning), n_loops=get(config, "N", 8, count())
    )
    base.check_unread("loopus")
    has_head = "q_head.1.weight" in shapes
    return dataclasses.replace(
        cfg, family="loopus", loop="gated", tied=False, exit_gate=has_head, options={"gate_rank": down[0]}
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored."""
    looped = "plateau" if any(name.startswith("plateau.") for name in shapes) else "reasoning"
    parts = {"prelude": "encoder", "core": looped, "coda": "decoder"}
    stored = [f"{parts[stack]}.layers.{j}" for _, stack, j, _ in layers(cfg)]

    def name_of(base: str) -> str:
        if base.startswith("model.layers."):
            index, _, rest = base.removeprefix("model.layers.").partition(".")
            return f"{stored[int(index)]}.{rest}"
        module, _, leaf = base.rpartition(".")
        return f"{_ENDS[module]}.{leaf}"

    found = {
        ours: dataclasses.replace(source, name=name_of(source.name)) for ours, source in llama.sources(cfg, shapes).items()
    }
    gate = {"down.weight": "dt_input_proj.weight", "up.weight": "delta_proj.weight", "up.bias": "delta_proj.bias"}
    found |= {f"gate.{ours}": Source(f"{looped}.gate.{theirs}") for ours, theirs in {**gate, "A_log": "A_log"}.items()}
    if cfg.exit_gate:
        found |= {f"exit_gate.{i}.{leaf}": Source(f"q_head.{i}.{leaf}") for i in (0, 1) for leaf in ("weight", "bias")}
    return found


def _base_name(name: str, first_core: int, first_coda: int) -> str:
    """What the base model calls a stored tensor."""
    if match := _LAYER.fullmatch(name):
        first = {"encoder": 0, "decoder": first_coda}.get(match[1], first_core)
        return f"model.layers.{first + int(match[2])}.{match[3]}"
    return name
