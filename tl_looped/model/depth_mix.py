"""Attention over depth: a mixture of several streams at every position, and a gate between what is read and a message."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .lean import Lean
from .norms import RMSNorm
from .slots import observe

EPS = 1e-6  # of the norm of the sources, whatever the others have


def wide(x: Tensor) -> Tensor:
    """A tensor in fp32 or wider."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class DepthMix(Lean):
    """Mixtures of several sources at every position, each divided by its root mean square, by the products with queries.

    `hook_sources` are the sources [batch, pos, source, d_model], `hook_scale` their root mean squares, `hook_weights` what each
    is multiplied by after that; with several queries the weights and what is read have an axis for them after the position.

    Args:
        shape: of the queries, (d_model,) or (query, d_model).
        fires: whether hooks fire in it from the beginning, or `place` will make their slots.
    """

    HELD: tuple[str, ...] = ("hook_weights", "hook_scale")

    def __init__(self, *shape: int, fires: bool = True):
        super().__init__()
        self.query: nn.Parameter = nn.Parameter(torch.zeros(shape))
        if fires:
            self.place()

    def place(self) -> None:
        """Make the slots."""
        self.hook_sources: nn.Module = nn.Identity()
        self.hook_scale: nn.Module = nn.Identity()
        self.hook_weights: nn.Module = nn.Identity()
        self.hook_out: nn.Module = nn.Identity()

    def forward(self, *sources: Float[Tensor, "*shape d_model"]) -> Float[Tensor, ...]:
        """What the queries read."""
        at = self.query.device
        stack = observe(self.hook_sources, torch.stack([wide(x).to(at) for x in sources], dim=-2))
        scale = observe(self.hook_scale, (stack.square().mean(-1) + EPS).sqrt())
        unit, query = stack / scale[..., None], wide(self.query)
        products = unit @ (query if query.ndim == 2 else query[None]).mT * query.shape[-1] ** -0.5
        weights = products.mT.softmax(-1)  # [..., query, source]
        weights = observe(self.hook_weights, weights if query.ndim == 2 else weights[..., 0, :])
        read = (weights if query.ndim == 2 else weights[..., None, :]) @ unit
        return self.hook_out(read if query.ndim == 2 else read[..., 0, :])

    def frozen(self, *given: Tensor) -> Tensor:
        """The mixture of one query with its weights and the sizes of the sources held, a linear map.

        Args:
            *given: the sources [*rows, d_model], then what `hook_weights` and `hook_scale` were in a run.
        """
        *sources, weights, scale = given
        share = (weights / scale).expand(*weights.shape[:-1], len(sources))
        total = share[..., :1] * sources[0]
        for j, source in enumerate(sources[1:], 1):
            total = total + share[..., j : j + 1] * source
        return total


class MessageGate(Lean):
    """`(1 - forget) x + gain message`, both computed from the two; they pass through `hook_forget` and `hook_gain`.

    Args:
        width: that of the stream.
        rank: that of the map that reads both.
        eps: of the norm of what it reads.
    """

    def __init__(self, width: int, rank: int, eps: float | None):
        super().__init__()
        self.norm: RMSNorm = RMSNorm(width, eps, weight=False)
        self.down: nn.Linear = nn.Linear(2 * width, rank, bias=False)
        self.forget: nn.Linear = nn.Linear(rank, width, bias=False)
        self.gain: nn.Linear = nn.Linear(rank, width, bias=False)

    def place(self) -> None:
        """Make the slots, in a layer where they fire."""
        self.hook_forget: nn.Module = nn.Identity()
        self.hook_gain: nn.Module = nn.Identity()
        self.hook_out: nn.Module = nn.Identity()

    def forward(
        self, x: Float[Tensor, "*shape d_model"], message: Float[Tensor, "*shape d_model"]
    ) -> Float[Tensor, "*shape d_model"]:
        """What becomes of what was read, beside a message."""
        both = torch.cat((self.norm.unhooked(x), self.norm.unhooked(message)), dim=-1).to(self.down.weight.dtype)
        low = wide(self.down(both))
        forget = observe(self.hook_forget, torch.tanh(low @ wide(self.forget.weight).mT))
        gain = observe(self.hook_gain, torch.tanh(low @ wide(self.gain.weight).mT))
        return self.hook_out((1 - forget) * x + gain * message)
