"""Reading a run while it goes on: every activation is handed to a function and dropped."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import LoopedError
from ..looped import Looped, require
from ..record import InitialState
from ..schedule import Indices, Pass, Schedule, select_indices
from ._prompts import check_finite

Key = TypeVar("Key", bound=Hashable)


def layer_hooks(schedule: Schedule, passes: Sequence[Pass], hook: str) -> dict[str, tuple[int, int]]:
    """The name of one hook of every layer of some passes, and its (loop, layer).

    Args:
        schedule: names the layers.
        passes: which passes.
        hook: which hook, as in "hook_resid_post".
    """
    return {schedule.name(i, hook): (p.loop, j) for p in passes for j, i in enumerate(p.layers)}


@torch.no_grad()
def visit(
    model: Looped,
    tokens: Int[Tensor, "batch pos"],
    hooks: Mapping[str, Key],
    function: Callable[[Key, Tensor], None],
    *,
    stop: int | None = None,
    initial_state: InitialState = None,
) -> None:
    """Run the model and call `function(key, activation)` at every named hook, in the order of the run.

    Args:
        model: its own hooks act on the run too, before these.
        tokens: what it runs on.
        hooks: loop-indexed names, and the key that `function` gets for each.
        function: what is done with an activation; whatever it does not keep is freed.
        stop: first virtual layer that is not run; None to run to the end.
        initial_state: as in `LoopedBridge.forward`.

    Raises:
        LoopedError: an activation that is not finite, named; states leaving passes whose norms differ (weight processing).
    """
    if not hooks.keys().isdisjoint(f"{model.schedule.pass_prefix(p)}.hook_out" for p in model.schedule.passes):
        require(model, "equal passes", "an analysis of the states leaving the loops")

    def reader(name: str, key: Key) -> Callable[..., None]:
        def read(value: Tensor, hook: object) -> None:
            check_finite(value, name)
            function(key, value)

        return read

    model.run_with_hooks(
        tokens, [(name, reader(name, key)) for name, key in hooks.items()], stop=stop, initial_state=initial_state
    )


def at_positions(x: Float[Tensor, "batch pos d_model"], positions: Indices) -> Float[Tensor, "batch chosen d_model"]:
    """The states at some positions.

    Args:
        x: states.
        positions: which; None for all.

    Raises:
        OutOfRangeError: a position that the run does not have.
    """
    return x if positions is None else x[:, select_indices(positions, x.shape[1], "positions")]


def last_norm(model: Looped, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """The model's last norm (in Ouro, HRM-Text and Nanbeige the norm of every pass), without firing its hooks.

    Args:
        model: the model.
        x: states, [..., d_model].

    Raises:
        LoopedError: the norm has given its weight to the unembedding (weight processing).
    """
    require(model, "early readouts", "after_norm=True")
    return model.last_norm(x)


def need_loops(n: int, minimum: int, what: str, why: str) -> None:
    """Refuse a run with too few loops for a question.

    Args:
        n: the loops of the run.
        minimum: the loops needed.
        what: the question.
        why: what needs that many.

    Raises:
        LoopedError: the run is too short.
    """
    if n < minimum:
        raise LoopedError(f"{what} was asked of {n} loops, but {why} needs at least {minimum}; pass n_loops=.")
