"""Steering: adding a direction to the stream in chosen loops."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..looped import Looped, check_model
from ..schedule import Indices, LoopSelector
from ..sites import PASSES, STREAMS, check_site, select_places
from ._hooks import Hooks, Positions, write


@accepts_old("scale", "loops")
def steer(
    model: Looped,
    direction: Float[Tensor, " d_model"],
    *,
    scale: float = 1.0,
    loops: LoopSelector = "all",
    site: Literal["state", "injection", "out", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"] = "state",
    layers: Indices = None,
    positions: Positions = None,
    decay: float = 1.0,
    relative_to_rms: bool = False,
    stack: str | None = None,
) -> Hooks:
    """Add `scale * decay^k * direction` in chosen loops, `k` loops after the first of them.

    Args:
        model: the model.
        direction: [d_model]; its length counts, unless `relative_to_rms`.
        scale: how much of it.
        loops: in which loops.
        site: where: the "state" entering the pass, its "injection", the state leaving it ("out"), or in layers "resid_pre",
            "resid_mid", "resid_post", "attn_out", "mlp_out".
        layers: for sites in layers: layers inside the loop (or inside the prelude or coda); None for all.
        positions: at which positions; None for all.
        decay: factor per loop.
        relative_to_rms: add a vector along `direction` whose RMS is `scale * decay^k` times that of what is there, at every
            position.
        stack: "L" or "H" for HRM-Text; "prelude" or "coda" for sites in layers.

    Raises:
        LoopedError: a direction of another width, or not finite; a site, loops or layers that do not exist.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
        >>> hooks = steer(model, torch.ones(8), scale=0.02, loops=slice(1, None), relative_to_rms=True)
        >>> model.generate(torch.tensor([[1, 2]]), 3, verbose=False, stop_at_eos=False).shape
        torch.Size([1, 5])
    """
    check_model(model)
    d_model = model.cfg.d_model
    if not isinstance(direction, Tensor) or direction.shape != (d_model,):
        shape = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise LoopedError(f"direction of shape {shape} was given; pass a tensor [d_model={d_model}].")
    norm = float(direction.detach().double().norm())
    if not math.isfinite(norm) or (relative_to_rms and not norm):
        raise LoopedError(f"direction has norm {norm}; it must be finite, and with relative_to_rms=True not zero.")
    for name, value in (("scale", scale), ("decay", decay)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise LoopedError(f"{name}={value!r} was asked; pass a finite number.")

    check_site(site, (*PASSES, *STREAMS))
    places = select_places(model, site, loops, layers, stack)
    start = min(place.site.loop or 0 for place in places)

    def add(amount: float) -> Any:
        def hook_function(x: Tensor, hook: Any) -> Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            push = direction.to(x.device, wide) * amount
            if relative_to_rms:
                push = push * (_rms(x.to(wide)) / _rms(direction.to(x.device, wide)))
            return write(x, x + push.to(x.dtype), positions, hook)

        return hook_function

    return [(place.hook, add(scale * decay ** ((place.site.loop or 0) - start))) for place in places]


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()
