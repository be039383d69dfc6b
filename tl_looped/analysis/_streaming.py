"""Reading a run while it goes on: every activation is handed to a function and dropped; and numbers of a run as estimates."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._together import stacked
from ..errors import LoopedError
from ..looped import Hooked, Looped, check_model, require
from ..record import InitialState, rehearsal
from ..results import Estimate
from ..schedule import Indices, Pass, Schedule, select_indices
from ._kept import Kept

Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")
At = tuple[int, int]  # loop and layer
KEPT = 2**26  # bytes of the activations of all loops that are kept, rather than the batch run again


class Look(NamedTuple):
    """What a measure asks to be shown of one run: as the arguments of `visit`."""

    hooks: Mapping[str, Any]
    function: Callable[[Any, Tensor], None]
    stop: int | None = None
    initial_state: InitialState = None


Plan = Generator[Look, None, Found]  # the looks that a measure needs, one after the other, and what it found; see `together`


def carry_out(model: Hooked, tokens: Int[Tensor, "batch pos"], plan: Plan[Found]) -> Found:
    """Run the model for every look of a plan."""
    while True:
        try:
            hooks, function, stop, initial_state = next(plan)
        except StopIteration as end:
            return end.value
        visit(model, tokens, hooks, function, stop=stop, initial_state=initial_state)


def together(
    model: Hooked, tokens: Int[Tensor, "batch pos"], plans: Mapping[str, Plan[Any]]
) -> tuple[dict[str, Any], dict[str, LoopedError]]:
    """What several plans find, and why some find nothing: the first looks of all are of one run, the second of another.

    A plan that refuses is left out, and the others go on; an activation that is not finite ends all that look at its run. All
    begin from the initial state of the first.
    """
    found: dict[str, Any] = {}
    refused: dict[str, LoopedError] = {}
    left = dict(plans)
    while left:
        looks: dict[str, Look] = {}
        for name, plan in left.items():
            try:
                looks[name] = next(plan)
            except StopIteration as end:
                found[name] = end.value
            except LoopedError as error:
                refused[name] = error
        if looks:
            try:
                refused |= _one_run(model, tokens, looks)
            except LoopedError as error:
                refused |= dict.fromkeys(looks, error)
        left = {name: left[name] for name in looks if name not in refused}
    return found, refused


def _one_run(model: Hooked, tokens: Int[Tensor, "batch pos"], looks: Mapping[str, Look]) -> dict[str, LoopedError]:
    """Show one run to all; returns who refused what they saw."""
    refused: dict[str, LoopedError] = {}
    readers: dict[str, list[str]] = {}
    for name, look in looks.items():
        for hook in look.hooks:
            readers.setdefault(hook, []).append(name)

    def show(hook: str, value: Tensor) -> None:
        for name in readers[hook]:
            try:
                if name not in refused:
                    looks[name].function(looks[name].hooks[hook], value)
            except LoopedError as error:
                refused[name] = error

    stops = [look.stop for look in looks.values()]
    stop = None if None in stops else max(at for at in stops if at is not None)
    state = next(iter(looks.values())).initial_state
    visit(model, tokens, {hook: hook for hook in readers}, show, stop=stop, initial_state=state)
    return refused


def layer_hooks(schedule: Schedule, passes: Sequence[Pass], hook: str) -> dict[str, tuple[int, int]]:
    """The name of one hook of every layer of some passes, and its (loop, layer)."""
    return {schedule.name(i, hook): (p.loop, j) for p in passes for j, i in enumerate(p.layers)}


@torch.no_grad()
def visit(
    model: Hooked,
    tokens: Int[Tensor, "batch pos"],
    hooks: Mapping[str, Key],
    function: Callable[[Key, Tensor], None],
    *,
    stop: int | None = None,
    initial_state: InitialState = None,
) -> None:
    """Run the model and call `function(key, activation)` at every named hook, in the order of the run.

    The model's own hooks act before these. Whatever `function` does not keep is freed; an activation that is not finite is an
    error that names it. Virtual layer `stop` is the first that is not run.
    """
    passes = [*map(model.schedule.pass_prefix, model.schedule.passes)] if isinstance(model, Looped) else []
    if isinstance(model, Looped) and not hooks.keys().isdisjoint(f"{prefix}.hook_out" for prefix in passes):
        require(model, "equal passes", "an analysis of the states leaving the loops")
    if isinstance(model, Looped) and any(
        "blocks." in name and model.schedule.names.loop_of(name) is not None for name in hooks
    ):
        require(model, "every position", "an analysis of what the layers of every loop compute")

    def reader(name: str, key: Key) -> Callable[..., None]:
        def read(value: Tensor, hook: object) -> None:
            check_finite(value, name)
            function(key, value)

        return read

    given = {"stop": stop, "initial_state": initial_state}
    options = {name: value for name, value in given.items() if value is not None}  # which only looped models know
    model.run_with_hooks(tokens, [(name, reader(name, key)) for name, key in hooks.items()], **options)


def run_twice(
    model: Looped,
    hooks: Sequence[str],
    shown: Sequence[Pass],
    last: Pass,
    initial_state: InitialState,
    step: Callable[[str, At, Tensor, Tensor], None],
    measure: Callable[[str, At, Tensor, Tensor], None],
) -> Plan[dict[tuple[str, int], Tensor]]:
    """Show activations of every layer beside those of the loop before, then beside those of the last loop, which are returned.

    The first run calls `step(hook, at, before, value)` in all shown loops but the first, and ends with the last loop in hand.
    `measure(hook, at, value, end)` is called for all that are shown: from memory if they take no more than `KEPT` bytes, else
    from a second run, so that one loop of the activations is held.
    """
    held: dict[tuple[str, int], Tensor] = {}
    kept = Kept[tuple[str, At]](-1 if isinstance(initial_state, torch.Generator) else KEPT)  # the last run advances a generator

    def keys(passes: Sequence[Pass]) -> dict[str, tuple[str, At]]:
        return {name: (hook, at) for hook in hooks for name, at in layer_hooks(model.schedule, passes, hook).items()}

    def first(key: tuple[str, At], value: Tensor) -> None:
        hook, at = key
        before = held.pop((hook, at[1]), None)
        if before is not None and at[0] <= shown[-1].loop:
            step(hook, at, before, value)
        held[hook, at[1]] = value
        if at[0] <= shown[-1].loop:
            kept.put(key, value)

    def second(key: tuple[str, At], value: Tensor) -> None:
        hook, at = key
        measure(hook, at, value, held[hook, at[1]])

    every = [*shown, *([] if last in shown else [last])]
    yield Look(keys(every), first, last.layers.stop, rehearsal(initial_state))
    if not kept.is_full:
        for key, value in kept.items():
            second(key, value)
    else:
        yield Look(keys(shown), second, shown[-1].layers.stop, initial_state)
    return held


def check_bridge(model: object) -> None:
    """Refuse what is neither a looped model nor a plain `TransformerBridge`."""
    if not isinstance(model, Hooked) or isinstance(model, type):
        check_model(model)


def check_finite(values: Float[Tensor, ...], name: str) -> None:
    """Refuse an activation that is not finite; called in the order of the run, it names the first place where one is."""
    if bool(torch.isfinite(values.sum())):  # never of values that are not finite, and it needs no memory
        return
    if not bool(torch.isfinite(values).all()):
        bad = "NaN" if bool(torch.isnan(values).any()) else "an infinite value"
        raise LoopedError(f"{name} holds {bad}, the first activation looked at that does; see it with run_with_cache.")


def by_layer(cells: Mapping[tuple[int, int], Tensor], name: str, *axes: str) -> Estimate:
    """Numbers [batch, ...] of every (loop, layer) as one estimate; `axes` are those after the batch."""
    loops, layers = (sorted({at[k] for at in cells}) for k in range(2))
    values = stacked((stacked((cells[t, j] for j in layers), 1) for t in loops), 1)
    labels = {"loop": loops, "layer": layers} | {a: list(range(n)) for a, n in zip(axes, values.shape[3:], strict=True)}
    return Estimate.of(values.cpu(), tuple(labels), labels, name)


def at_positions(x: Float[Tensor, "batch pos d_model"], positions: Indices) -> Float[Tensor, "batch chosen d_model"]:
    """The states at some positions."""
    return x if positions is None else x[:, select_indices(positions, x.shape[1], "positions")]


def last_norm(model: Looped, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """The model's last norm (in Ouro, HRM-Text and Nanbeige the norm of every pass), without firing its hooks."""
    require(model, "lens", "after_norm=True")
    return model.last_norm(x)


def need_loops(n: int, minimum: int, what: str, why: str) -> None:
    """Refuse a run with too few loops for a question."""
    if n < minimum:
        raise LoopedError(f"{what} was asked of {n} loops, but {why} needs at least {minimum}; pass n_loops=.")
