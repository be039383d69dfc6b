"""Ablation of attention, MLPs, heads and neurons in chosen loops."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, cast

import torch
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..looped import Cache, Looped, check_model, require
from ..schedule import Indices, LoopSelector, select_indices
from ..sites import select_layers
from ..tokens import real_mean
from ._hooks import Hooks, Positions, cached, here, real_in, unit_mask, write

P = ParamSpec("P")

HOOKS: dict[str, tuple[str, ...]] = {
    "attn": ("hook_attn_out",),
    "mlp": ("hook_mlp_out",),
    "layer": ("hook_attn_out", "hook_mlp_out"),
    "head": ("attn.hook_z",),
    "neuron": ("mlp.hook_post",),
}


def _units(function: Callable[P, Hooks]) -> Callable[P, Hooks]:
    """The release before called heads and neurons by one name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Hooks:
        if "units" in kwargs:
            new = "neurons" if "neuron" in (kwargs.get("part"), *args[1:2]) else "heads"
            if new in kwargs:
                raise LoopedError(f"ablate(units=, {new}=) was called; they are one argument, pass {new}= alone.")
            warnings.warn(f"ablate(units=) is now ablate({new}=).", FutureWarning, stacklevel=3)
            kwargs[new] = kwargs.pop("units")
        return function(*args, **kwargs)

    return cast(Callable[P, Hooks], call)


@accepts_old("loops", "layers", "units")
@_units
def ablate(
    model: Looped,
    part: Literal["attn", "mlp", "layer", "head", "neuron"],
    *,
    loops: LoopSelector = "all",
    layers: Indices = None,
    heads: Indices = None,
    neurons: Indices = None,
    mode: Literal["zero", "mean", "resample"] = "zero",
    cache: Cache | None = None,
    positions: Positions = None,
    stack: str | None = None,
) -> Hooks:
    """Replace what parts of layers write in chosen loops: by zero, by a mean, or by what they write in another run.

    Zeroing the MLP of one layer is the causal test of arXiv 2604.11791, fig. 41.

    Args:
        model: the model.
        part: "attn" or "mlp": what the branch adds to the residual stream (after its norm, where it has one); "layer": both;
            "head": `attn.hook_z` of heads, that is the head's summand of the attention output, before any norm and without the
            bias; "neuron": `mlp.hook_post` of neurons. A "layer" keeps norms on the stream (Huginn); `skip_layer` does not.
        loops: in which loops.
        layers: layers inside the loop (or inside the prelude or coda); None for all.
        heads: for "head": which; None for all.
        neurons: for "neuron": which; None for all.
        mode: "zero"; "mean": the mean over all rows and positions of `cache` but padding, separately for every loop;
            "resample": the values of `cache` at the same loop, row and position, which needs a run of the same shape.
        cache: another run's cache, for "mean" and "resample".
        positions: at which positions; None for all.
        stack: "L" or "H" for HRM-Text; "prelude" or "coda" (without `loops`).

    Raises:
        LoopedError: loops, layers, heads or neurons that do not exist; a cache that lacks an activation or, when the hooks run,
            has another shape.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
        >>> hooks = ablate(model, "head", loops=slice(1, None), layers=0, heads=1)
        >>> [name for name, _ in hooks]
        ['loops.1.blocks.0.attn.hook_z', 'loops.2.blocks.0.attn.hook_z']
        >>> model.run_with_hooks(torch.tensor([[1, 2, 3]]), fwd_hooks=hooks).shape
        torch.Size([1, 3, 10])
    """
    check_model(model)
    if part not in HOOKS or mode not in ("zero", "mean", "resample"):
        raise LoopedError(
            f'part={part!r} and mode={mode!r} were asked; choose part from {", ".join(map(repr, HOOKS))} and mode from "zero", '
            '"mean", "resample".'
        )
    if (cache is None) != (mode == "zero"):
        wants = "no cache=" if mode == "zero" else "cache= of another run, such as run_with_cache(other_tokens)[1]"
        raise LoopedError(f"mode={mode!r} needs {wants}.")
    if part == "neuron":
        require(model, "neurons", "an ablation of neurons")
    if heads is not None:
        require(model, "equal heads", f"heads={heads!r}")
    mask = None
    for name, units, own, n in (
        ("heads", heads, "head", model.cfg.n_heads),
        ("neurons", neurons, "neuron", model.cfg.d_mlp),
    ):
        if units is not None and part != own:
            raise LoopedError(f'{name}={units!r} was asked of part={part!r}; {name} are those of part="{own}".')
        if units is not None:
            mask = unit_mask(select_indices(units, n, name), n, after=1 if part == "head" else 0)
    chosen = select_layers(model.schedule, loops, layers, stack)
    names = [model.schedule.name(layer, hook_name) for layer in chosen for hook_name in HOOKS[part]]
    if cache is None:
        return [(name, _replace(None, None, positions, mask)) for name in names]
    sources = cached(model, cache, names)
    if mode == "mean":
        means = {name: real_mean(source, cache.attention_mask) for name, source in sources.items()}
        return [(name, _replace(mean, None, positions, mask)) for name, mean in means.items()]
    return [(name, _replace(source, real_in(cache, source), positions, mask)) for name, source in sources.items()]


def _replace(source: Tensor | None, real: Tensor | None, positions: Positions, units: Tensor | None) -> Any:
    """A hook that writes zeros; a mean; or what another run had, whose real positions are then given."""

    def hook_function(x: Tensor, hook: Any) -> Tensor:
        if source is None:
            new = torch.zeros_like(x)
        elif real is not None:
            new = here(source, x, positions, hook, real)
        else:
            new = source.to(x.device, x.dtype)
        return write(x, new, positions, hook, units)

    return hook_function
