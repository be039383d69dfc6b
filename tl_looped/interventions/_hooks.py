"""What interventions share: which layers and positions are meant, and how hooks of one run pass values on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import LoopedError, OutOfRangeError
from ..kinds import plain
from ..looped import Cache, Looped
from ..running import Running, running
from ..schedule import Pass
from ..tokens import counts_from_end, real_positions

Hooks = list[tuple[str, Callable[..., Tensor | None]]]
Positions = int | slice | Sequence[int] | None


def passes_from(model: Looped, from_loop: int, stack: str | None) -> list[Pass]:
    """The pass of loop `from_loop`, and all later ones of its stack."""
    if not isinstance(from_loop := plain(from_loop), int):
        raise LoopedError(f"from_loop={from_loop!r} was asked; pass one loop, an int.")
    return model.schedule.passes_of("all", stack)[model.schedule.select_loops(from_loop, stack)[0] :]


def unit_mask(chosen: list[int], n: int, after: int) -> Bool[Tensor, "unit ..."]:
    """True for the chosen units, with `after` more axes."""
    mask = torch.zeros(n, dtype=torch.bool, device="cpu")
    mask[chosen] = True
    return mask.reshape(n, *[1] * after)


def write(
    x: Float[Tensor, "batch pos ..."],
    new: Float[Tensor, ...],
    positions: Positions,
    hook: Any,
    units: Bool[Tensor, "unit ..."] | None = None,
) -> Float[Tensor, "batch pos ..."]:
    """`x` with `new` at the chosen positions and units."""
    mask = None if positions is None else _position_mask(positions, x, hook)[(..., *[None] * (x.ndim - 2))]
    if units is not None:
        mask = units.to(x.device) if mask is None else mask & units.to(x.device)
    return new.expand_as(x).clone() if mask is None else torch.where(mask, new, x)


def _position_mask(asked: Positions, x: Tensor, hook: Any) -> Bool[Tensor, "*batch pos"]:
    """Which positions of this run are meant; those of every row where negative ones count from the last real token."""
    inputs, asked = current_run(hook), plain(asked)
    total = inputs.past + x.shape[1]
    negative = counts_from_end(asked)
    if isinstance(asked, slice):
        chosen = list(range(total))[asked]
    else:
        numbers = [asked] if isinstance(asked, int) else list(asked or ())
        outside = [i for i in numbers if not -total <= i < total]
        if outside and inputs.cache is None:
            raise OutOfRangeError(f"positions={asked!r} was asked, but the text of this run has {total} (0..{total - 1}).")
        chosen = [i % total for i in numbers if i not in outside]
    if negative and inputs.cache is not None:
        raise LoopedError(
            f"positions={asked!r} was asked, which counts from the end of the text, but this run keeps keys and values for a "
            "text that grows; count from the beginning: slice(n_prompt - 1, None) means the last position of the prompt and "
            "all later ones."
        )
    if negative and inputs.real is not None:
        columns = real_positions(asked, inputs.real, total)
        rows = columns.new_zeros(len(x), total, dtype=torch.bool).scatter_(1, columns.expand(len(x), -1), True)
        return rows[:, inputs.past :].to(x.device)
    mask = torch.zeros(total, dtype=torch.bool, device="cpu")
    mask[chosen] = True
    return mask[inputs.past :].to(x.device)


def here(source: Tensor, x: Tensor, positions: Positions, hook: Any, real: Tensor | None = None) -> Tensor:
    """The part of an activation of a whole text, [batch, pos, ...], that lies at the positions of this run.

    Args:
        source: the activation.
        x: what it goes to.
        positions: which positions are wanted.
        hook: where.
        real: which positions of that text are no padding, where this is known.

    Raises:
        LoopedError: other shapes; a text that lacks positions that are wanted, or is padded where this one is not.
    """
    inputs = current_run(hook)
    total, length = inputs.past + x.shape[1], source.shape[1]
    fits = source.ndim == x.ndim and source.shape[0] == x.shape[0] and source.shape[2:] == x.shape[2:]
    if positions is None:  # the same text, or with a cache the part of it that was run so far
        fits = fits and (length == total if inputs.cache is None else length >= total)
    elif fits:
        wanted = _position_mask(positions, x, hook).nonzero()[:, -1]
        fits = not len(wanted) or int(wanted.max()) + inputs.past < length
    if not fits:
        raise LoopedError(
            f"{tuple(source.shape)} is to be written to {hook.name}, which is {(x.shape[0], total, *x.shape[2:])} up to here "
            "in this run; give it the same batch and the same number of positions, or choose positions= that both have, such "
            f"as slice(0, {min(length, total)})."
        )
    if real is not None:
        own = torch.ones(len(x), total, dtype=torch.bool, device="cpu") if inputs.real is None else inputs.real.cpu()
        n = min(length, total)
        differs = (real.bool().cpu()[:, :n] != own[:, :n])[:, inputs.past :]
        if positions is not None:
            differs = differs & _position_mask(positions, x, hook).cpu()[..., : differs.shape[1]]
        if bool(differs.any()):
            raise LoopedError(
                f"an activation is to be written to {hook.name} at row {int(differs.nonzero()[0, 0])}, which is padded "
                "otherwise in the run that it comes from; give both runs rows of the same lengths, or choose positions= that "
                "are real in both."
            )
    return source[:, torch.arange(inputs.past, total, device=source.device).clamp(max=length - 1)].to(x.device, x.dtype)


def cached(model: Looped, cache: object, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations of another run of the model, under their loop-indexed names."""
    if not isinstance(cache, Cache) or not cache.has_batch_dim:
        raise LoopedError("a cache was asked for: pass the LoopedCache that run_with_cache returns, with its batch dimension.")
    cache.check_weights("an intervention with a cache", model)
    return {name: cache[name].detach() for name in names}


def real_in(cache: Cache, source: Tensor) -> Tensor:
    """Which positions of a cached run are no padding, [batch, pos]."""
    mask = cache.attention_mask
    return torch.ones(source.shape[:2], dtype=torch.bool, device="cpu") if mask is None else mask


def current_run(hook: Any) -> Running:
    """The run that a hook is part of."""
    inputs = running()
    if inputs is None:
        raise LoopedError(f"{hook.name} fired outside a run of a looped model; interventions act in runs of a LoopedBridge.")
    return inputs


class Seen:
    """A value that one hook leaves for later hooks of the same run; gone when the run ends."""

    def __init__(self) -> None:
        self._values: WeakKeyDictionary[Running, Tensor] = WeakKeyDictionary()

    def store(self, x: Tensor, hook: Any) -> None:
        """A hook function that keeps what it sees."""
        self._values[current_run(hook)] = x

    def load(self, hook: Any, what: str) -> Tensor:
        """What was stored in this run."""
        value = self._values.get(current_run(hook))
        if value is None:
            raise LoopedError(
                f"{hook.name} is to reuse {what}, which this run did not compute for the same positions: it began later "
                "(start_at_layer), or it is catching up under an exit policy. Run from the beginning, with exit_policy = None."
            )
        return value.clone()
