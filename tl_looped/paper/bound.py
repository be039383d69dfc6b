"""How much of what proposition 4.2 of arXiv 2604.11791 allows a pattern moves from one loop to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._precision import wide
from ..analysis._streaming import At, Look, Plan, by_layer, layer_hooks
from ..errors import LoopedError
from ..looped import Looped
from ..results import Estimate


@dataclass(frozen=True)
class AttentionBound:
    """`|A - A'| / (B kappa / sqrt(d_head) |X - X'|)` of every head, from loop 1 on; the proposition says at most 1.

    X and X' are what attention reads in a loop and the one before (`attn.hook_in`), in the Frobenius norm; B is the larger of
    their spectral norms, kappa the spectral norm of `W_Q W_K^T`. The softmax has the Lipschitz constant 1/2 of the appendix.
    """

    stack: str

    def plan(self, model: Looped) -> Plan[Estimate]:
        """The run of one batch that it takes."""
        check_applies(model)
        schedule = model.schedule
        parts: Any = model  # weights, which no other tool asks for
        passes = schedule.passes_of("all", self.stack)
        if len(passes) < 2:
            raise LoopedError("proposition 4.2 compares two loops, and there is one")
        scale, kappa = model.cfg.d_head**-0.5, dict[int, Tensor]()
        for layer, i in enumerate(passes[0].layers):
            q, k = (wide(w.detach()) for w in (parts.blocks[i].attn.W_Q, parts.blocks[i].attn.W_K))
            k = k.repeat_interleave(len(q) // len(k), 0)
            kappa[layer] = torch.linalg.matrix_norm(q @ k.mT, ord=2)
        held: dict[tuple[str, int], Tensor] = {}
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # of every layer, B and how far what it reads moved
        used: dict[At, Tensor] = {}

        def see(key: tuple[str, At], value: Tensor) -> None:
            hook, (loop, layer) = key
            before = held.get((hook, layer))
            held[hook, layer] = value
            if before is None:
                return
            if hook == "attn.hook_in":
                x, y = wide(value), wide(before)
                size = torch.linalg.matrix_norm(x, ord=2).maximum(torch.linalg.matrix_norm(y, ord=2))
                moved[layer] = size, (x - y).flatten(1).norm(dim=-1)
            else:
                size, step = moved[layer]
                change = (wide(value) - wide(before)).flatten(2).norm(dim=-1)  # [batch, head]
                allowed = (size * step * scale)[:, None] * kappa[layer]
                used[loop, layer] = (change / allowed).where(allowed > 0, torch.nan)

        hooks = {
            name: (hook, at)
            for hook in ("attn.hook_in", "attn.hook_pattern")
            for name, at in layer_hooks(schedule, passes, hook).items()
        }
        yield Look(hooks, see, passes[-1].layers.stop)
        return by_layer(used, "share_of_the_bound", "head")


def check_applies(model: Looped) -> None:
    """Refuse a model whose scores are not `X W_Q W_K^T X^T / sqrt(d_head)`, which the proposition is about."""
    cfg: Any = getattr(model, "looped_cfg", None)
    if cfg is None:
        raise LoopedError("nothing tells how this model makes its attention scores, so proposition 4.2 cannot be applied")
    for is_other, why in (
        (cfg.rope_layout != "none", "it has rotary positions"),
        (cfg.qk_norm != "none", "it norms queries and keys"),
        (cfg.query_gain, "it has a gain on its queries"),
        ({"q", "k"} & set(cfg.biases), "its queries or keys have a bias"),
        (cfg.loop != "repeat" or cfg.own_layers, "its loops are not one map applied again"),
    ):
        if is_other:
            raise LoopedError(f"proposition 4.2 is about scores X W_Q W_K^T X^T of one map, and this {cfg.family} model: {why}")
