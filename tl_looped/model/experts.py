"""A mixture of experts: every position goes through the few MLPs that a router chooses for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .depth_mix import wide
from .lean import Lean, Linear
from .slots import observe


def capped(x: Tensor, cap: float) -> Tensor:
    """`cap tanh(x / cap)`."""
    return cap * torch.tanh(x / cap)


class Experts(Lean):
    """`sum of weight * down(cap(gate(x)) * sigmoid(gate(x)) * cap(up(x)))` over the chosen experts.

    The weights are the scores of the chosen ones, sigmoids in `hook_router`, divided by their sum, times a factor; for every
    expert they pass through `hook_expert_weights`, 0 for one that was not chosen. A bias moves the choice alone.

    Args:
        d_model: width of the stream.
        d_mlp: neurons of an expert.
        n_experts: how many there are.
        n_chosen: how many a position goes through.
        scale: the factor.
        caps: on gate and up.
    """

    def __init__(self, d_model: int, d_mlp: int, n_experts: int, n_chosen: int, scale: float, caps: tuple[float, float]):
        super().__init__()
        self.n_chosen: int = n_chosen
        self.scale: float = scale
        self.caps: tuple[float, float] = caps
        self.router: nn.Linear = Linear(d_model, n_experts)
        self.gate: nn.Parameter = nn.Parameter(torch.zeros(n_experts, d_mlp, d_model))
        self.up: nn.Parameter = nn.Parameter(torch.zeros(n_experts, d_mlp, d_model))
        self.down: nn.Parameter = nn.Parameter(torch.zeros(n_experts, d_model, d_mlp))
        self.hook_router: nn.Module = nn.Identity()
        self.hook_expert_weights: nn.Module = nn.Identity()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the chosen experts return."""
        scores = observe(self.hook_router, torch.sigmoid(F.linear(wide(x), wide(self.router.weight))))
        chosen = (scores + wide(self.router.bias)).topk(self.n_chosen, dim=-1).indices
        kept = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        weights = observe(self.hook_expert_weights, kept / (kept.sum(-1, keepdim=True) + 1e-20) * self.scale)
        out, rows, of_rows = wide(x).new_zeros(x.shape).flatten(0, -2), x.flatten(0, -2), weights.flatten(0, -2)
        is_used = of_rows != 0
        for expert in is_used.any(0).nonzero().flatten().tolist():
            at = is_used[:, expert].nonzero().flatten()
            out = out.index_add(0, at, of_rows[at, expert, None] * wide(self._expert(expert, rows[at])))
        return out.view_as(x).to(x.dtype)

    def _expert(self, expert: int, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        gate, up = wide(F.linear(x, self.gate[expert])), wide(F.linear(x, self.up[expert]))
        post = capped(gate, self.caps[0]) * torch.sigmoid(gate) * capped(up, self.caps[1])
        return F.linear(post.to(x.dtype), self.down[expert])
