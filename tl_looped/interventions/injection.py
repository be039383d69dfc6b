"""Changing what passes are injected, and the state before the first one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..looped import Cache, Looped, check_model, require
from ..schedule import LoopSelector, Pass
from ._hooks import Hooks, Positions, Seen, cached, here, passes_from, real_in, write

Value = Float[Tensor, "batch pos d_model"] | Float[Tensor, " d_model"]


def freeze_injection(model: Looped, from_loop: int, *, stack: str | None = None) -> Hooks:
    """Give every pass after `from_loop` the injection of that pass.

    In a model with one looped stack every pass is injected the same, so this carries an edit of one pass on to the later ones
    and does nothing in an unedited run. In HRM-Text the injection is the other stack's state, and later passes are cut off from
    it.

    Args:
        model: the model.
        from_loop: the loop whose injection stays.
        stack: "L" or "H" for HRM-Text.

    Raises:
        LoopedError: a family without injection; a loop that does not exist; when the hooks run, a run without that pass.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, n_prelude=1, injection="concat")
        >>> [name for name, _ in freeze_injection(LoopedBridge.from_config(cfg), from_loop=1)]
        ['loops.1.hook_injection', 'loops.2.hook_injection']
    """
    check_model(model)
    name, *later = _names(model, passes_from(model, from_loop, stack))
    seen = Seen()
    frozen: Hooks = [(n, lambda x, hook: seen.load(hook, name)) for n in later]
    return [(name, seen.store), *frozen] if frozen else []


@accepts_old("loops")
def replace_injection(
    model: Looped,
    source: Cache | Value,
    *,
    loops: LoopSelector = "all",
    positions: Positions = None,
    stack: str | None = None,
) -> Hooks:
    """Replace the injection of chosen passes, for example by that of another prompt's run at the same loop.

    Args:
        model: the model.
        source: another run's cache that holds `loops.{t}.hook_injection`; or a tensor [batch, pos, d_model], or [d_model] for
            every row and position.
        loops: in which loops; `slice(3, None)` from loop 3 on.
        positions: at which positions; None for all.
        stack: "L" or "H" for HRM-Text.

    Raises:
        LoopedError: a family without injection; loops that do not exist or were not cached; when the hooks run, another shape.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, n_prelude=1, injection="concat")
        >>> model = LoopedBridge.from_config(cfg)
        >>> _, other = model.run_with_cache(torch.tensor([[4, 5, 6]]))
        >>> hooks = replace_injection(model, other, loops=slice(1, None))
        >>> model.run_with_hooks(torch.tensor([[1, 2, 3]]), fwd_hooks=hooks).shape
        torch.Size([1, 3, 10])
    """
    check_model(model)
    names = _names(model, model.schedule.passes_of(loops, stack))
    if isinstance(source, Tensor):
        _check_value("source", source, model.cfg.d_model)
        return [(name, _write(source, positions)) for name in names]
    values = cached(model, source, names)
    return [(name, _write(value, positions, real_in(source, value))) for name, value in values.items()]


@accepts_old("loops")
def drop_injection(
    model: Looped, *, loops: LoopSelector = "all", positions: Positions = None, stack: str | None = None
) -> Hooks:
    """Inject zeros in chosen passes: the prompt no longer reaches them, except through the state.

    Args:
        model: the model.
        loops: in which loops; `slice(3, None)` from loop 3 on.
        positions: at which positions; None for all.
        stack: "L" or "H" for HRM-Text, whose injection is the other stack's state.

    Raises:
        LoopedError: a family without injection; loops that do not exist.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, n_prelude=1, injection="concat")
        >>> [name for name, _ in drop_injection(LoopedBridge.from_config(cfg), loops=slice(1, None))]
        ['loops.1.hook_injection', 'loops.2.hook_injection']
    """
    check_model(model)
    zero = torch.zeros(model.cfg.d_model, device="cpu")
    return [(name, _write(zero, positions)) for name in _names(model, model.schedule.passes_of(loops, stack))]


def set_initial_state(
    model: Looped, state: Value | Literal["zero"], *, positions: Positions = None, stack: str | None = None
) -> Hooks:
    """Set the state before the first pass; the injection, if there is one, stays that of the prompt.

    `initial_state=` of `forward` and `generate` takes seeds too; as hooks, a state can be set at some positions only, in either
    stack of HRM-Text, and for the tokens that are generated.

    Args:
        model: the model.
        state: [batch, pos, d_model]; or [d_model], for every row and position; or "zero".
        positions: at which positions; None for all.
        stack: "L" or "H" for HRM-Text. The state of H is also what the passes of L before the first one of H are injected.

    Raises:
        LoopedError: another width; when the hooks run, another shape.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
        >>> model.run_with_hooks(torch.tensor([[1, 2, 3]]), fwd_hooks=set_initial_state(model, "zero")).std().item()
        0.0
    """
    check_model(model)
    require(model, "state", "another initial state")
    value = torch.zeros(model.cfg.d_model, device="cpu") if isinstance(state, str) and state == "zero" else state
    if not isinstance(value, Tensor):
        raise LoopedError(f'state={state!r} was given; pass a tensor or "zero" (seeds: initial_state= of forward, generate).')
    _check_value("state", value, model.cfg.d_model)
    schedule = model.schedule
    first = schedule.passes_of(0, stack)[0]
    names = [f"{schedule.pass_prefix(p)}.hook_injection" for p in schedule.passes[: first.index]]
    return [(name, _write(value, positions)) for name in [*names, f"{schedule.pass_prefix(first)}.{model.entrance}"]]


def _names(model: Looped, passes: list[Pass]) -> list[str]:
    require(model, "injection", "an edit of the injection")
    return list(dict.fromkeys(f"{model.schedule.pass_prefix(p)}.hook_injection" for p in passes))


def _check_value(name: str, value: Tensor, d_model: int) -> None:
    if value.ndim not in (1, 3) or value.shape[-1] != d_model:
        raise LoopedError(
            f"{name} of shape {tuple(value.shape)} was given; pass [batch, pos, d_model={d_model}], or [d_model={d_model}]."
        )


def _write(value: Tensor, positions: Positions, real: Tensor | None = None) -> Any:
    def hook_function(x: Tensor, hook: Any) -> Tensor:
        new = value.to(x.device, x.dtype) if value.ndim == 1 else here(value, x, positions, hook, real)
        return write(x, new, positions, hook)

    return hook_function
