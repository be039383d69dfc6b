"""What the checks are asked with: a model, tokens, and a run of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoopedError
from ..looped import Cache, Looped

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
_HALF = 5e-2  # bfloat16 and float16


class Fault(AssertionError):
    """What a check found wrong, in a sentence."""


@dataclass(frozen=True)
class Case:
    """A model and a run of it.

    Args:
        model: the model.
        tokens: what it ran on, [batch, pos].
        other: other tokens of the same shape.
        logits: of the run.
        cache: its activations.
        tolerance: how far apart numbers may be that must be the same.
    """

    model: Looped
    tokens: Tensor
    other: Tensor
    logits: Tensor
    cache: Cache
    tolerance: float

    @classmethod
    def of(cls, model: Looped, tokens: Tensor | None, tolerance: float | None) -> Case:
        """Run a model.

        Args:
            model: the model.
            tokens: as in `check_family`.
            tolerance: likewise.

        Raises:
            LoopedError: tokens of which fewer than two rows, or too few positions, are there.
        """
        if tokens is None:
            tokens = _random_tokens(model)
        if tokens.ndim != 2 or len(tokens) < 2 or tokens.shape[1] < 4:
            raise LoopedError(f"tokens of shape {list(tokens.shape)} were given; pass two rows of four tokens or more.")
        logits, cache = model.run_with_cache(tokens)
        if not bool(logits.isfinite().all()):
            raise LoopedError("the logits of the model are not finite; check a model whose weights are all right.")
        unit = _TOLERANCE.get(logits.dtype, _HALF) if tolerance is None else tolerance
        scale = max(1.0, float(logits.abs().max()))
        return cls(model, tokens, tokens.roll(1, dims=0).flip(1), logits, cache, unit * scale)

    @property
    def passes(self) -> list[str]:
        """The passes in the order of the run, as prefixes of names."""
        schedule = self.model.schedule
        return [schedule.pass_prefix(p) for p in schedule.passes]

    def pass_of(self, name: str) -> str | None:
        """The pass in which a hook stands; None outside the loops.

        Args:
            name: of the hook.
        """
        looped = self.model.schedule.loop_name(name)
        return next((prefix for prefix in self.passes if looped.startswith(f"{prefix}.")), None)

    def metric(self, logits: Tensor) -> Tensor:
        """A number for every row, of the last two positions.

        Args:
            logits: [batch, pos, d_vocab].
        """
        weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return (logits[:, -1] * weights).mean(-1) - (logits[:, -2] * weights.flip(0)).mean(-1)


def _random_tokens(model: Looped) -> Tensor:
    pad = getattr(model.tokenizer, "pad_token_id", None)
    ids = torch.tensor([i for i in range(min(int(model.cfg.d_vocab), 1000)) if i != pad])
    width = min(7, int(getattr(model.cfg, "n_ctx", None) or 10) - 3)
    chosen = torch.randint(0, len(ids), (2, width), generator=torch.Generator().manual_seed(3))
    return ids[chosen].to(model.cfg.device)


def apart(one: Tensor, other: Tensor) -> float:
    """How far two tensors are apart; infinite where their shapes differ.

    Args:
        one: a tensor.
        other: another.
    """
    if one.shape != other.shape:
        return float("inf")
    distance = torch.where(one == other, 0.0, (one.double() - other.double()).abs())  # scores are -inf where nothing is seen
    return float(distance.max()) if one.numel() else 0.0


def close(case: Case, what: str, found: Tensor, expected: Tensor) -> str:
    """Say how far apart numbers are that must be the same.

    Args:
        case: whose tolerance counts.
        what: they are.
        found: what there is.
        expected: what should be there.

    Raises:
        Fault: they are too far apart.
    """
    if found.shape != expected.shape:
        raise Fault(f"{what} have shape {list(found.shape)}, not {list(expected.shape)}")
    if not (distance := apart(found, expected)) <= case.tolerance:
        raise Fault(f"{what} differ by {distance:.2g}, where {case.tolerance:.1g} is allowed")
    return f"{what} differ by {distance:.2g}"


def copied(value: Any) -> Any:
    """A hook that puts a value in the place of what it sees.

    Args:
        value: the value.
    """
    return lambda x, hook: value.clone()
