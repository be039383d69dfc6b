"""Directions and relative sizes of states. A state that is zero has no direction and nothing is relative to it: NaN, not 0."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Shares of a state that a loop changes, or that it is away from its end; our choice.
SETTLED = 0.01  # less than this is settled
CONVERGED = 1e-3  # and less than this near enough to a fixed point for the Jacobian there


def direction(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Vectors of length 1; NaN for a vector that is zero."""
    x = x / x.abs().amax(-1, keepdim=True)  # or squares of small entries would round to 0
    return x / x.norm(dim=-1, keepdim=True)


def cosine(a: Float[Tensor, "*rows d"], b: Float[Tensor, "*rows d"]) -> Float[Tensor, " *rows"]:
    """The cosine between vectors; NaN where one of them is zero."""
    return (direction(a) * direction(b)).sum(-1).clamp(-1, 1)


def relative_distance(x: Float[Tensor, "*rows d"], base: Float[Tensor, "*rows d"]) -> Float[Tensor, " *rows"]:
    """The distance of vectors from others, over the length of these; NaN where that is zero."""
    size = base.abs().amax(-1, keepdim=True)
    return ratio(((x - base) / size).norm(dim=-1), (base / size).norm(dim=-1))


def ratio(part: Float[Tensor, "*rows"], whole: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """`part / whole`; NaN where the whole is zero."""
    return (part / whole).where(whole > 0, torch.nan)
