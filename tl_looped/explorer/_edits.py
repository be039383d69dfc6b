"""The interventions that the explorer offers: what each is called, what it asks for, and which call of the library it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import interventions
from ..errors import LoopedError
from ..kinds import choice, count
from ..looped import Ability, Looped
from ._asked import a_number, optional, selector, token_id

Hooks = list[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True)
class Kind:
    """A kind of intervention.

    Args:
        title: what it is called.
        function: of `tl_looped.interventions`.
        fields: what it asks for, in the order of the form.
        part: for `ablate`, what is removed.
    """

    title: str
    function: str
    fields: tuple[str, ...]
    part: str = ""


KINDS = {
    "ablate_head": Kind("ablate a head", "ablate", ("stack", "loops", "layers", "heads", "positions"), "head"),
    "ablate_attn": Kind("ablate attention", "ablate", ("stack", "loops", "layers", "positions"), "attn"),
    "ablate_mlp": Kind("ablate an MLP", "ablate", ("stack", "loops", "layers", "positions"), "mlp"),
    "ablate_layer": Kind("ablate a layer", "ablate", ("stack", "loops", "layers", "positions"), "layer"),
    "skip_layer": Kind("skip a layer", "skip_layer", ("stack", "loops", "layers")),
    "skip_loop": Kind("skip a loop", "skip_loop", ("stack", "loops")),
    "repeat_loop": Kind("repeat a loop", "repeat_loop", ("loop", "times")),
    "freeze_attention": Kind("freeze attention from a loop", "freeze_attention", ("stack", "from_loop", "layers", "heads")),
    "drop_injection": Kind("drop the injection", "drop_injection", ("stack", "loops", "positions")),
    "freeze_injection": Kind("freeze the injection from a loop", "freeze_injection", ("stack", "from_loop")),
    "steer": Kind("steer between two tokens", "steer", ("stack", "toward", "away", "scale", "loops", "positions")),
}
_EDGES = ("prelude", "coda")


@dataclass(frozen=True)
class Call:
    """A call of the library, to be made and to be written down.

    Args:
        function: of `tl_looped.interventions`.
        positional: after the model, as they are written in Python.
        named: by name.
        direction: for `steer`, the two tokens.
    """

    function: str
    positional: tuple[Any, ...]
    named: dict[str, Any]
    direction: tuple[int, int] | None = None

    def source(self) -> str:
        """The call as Python."""
        given = [repr(value) for value in self.positional]
        if self.direction is not None:
            given = ["model.W_U[:, {}] - model.W_U[:, {}]".format(*self.direction)]
        given += [f"{name}={value!r}" for name, value in self.named.items()]
        return f"interventions.{self.function}({', '.join(['model', *given])})"

    def hooks(self, model: Looped) -> Hooks:
        """What the call returns."""
        function: Any = getattr(interventions, self.function)
        positional = self.positional
        if self.direction is not None:
            toward, away = self.direction
            weights: Any = model
            positional = (weights.W_U[:, toward] - weights.W_U[:, away],)
        return function(model, *positional, **self.named)


NEEDS: dict[str, tuple[Ability, ...]] = {
    "drop_injection": ("injection",),
    "freeze_injection": ("injection",),
    "freeze_attention": ("one pattern", "every position"),
    "repeat_loop": ("early readouts", "equal loops"),
    "skip_layer": ("one stream",),
    "skip_loop": ("one stream",),
}


def lacking(model: Looped, ability: Ability) -> str:
    """Why a model cannot do something, as a sentence; nothing if it can.

    Args:
        model: the model.
        ability: what it would take.
    """
    why = model.lacks(ability)
    return "" if why is None else f"{why[0].upper()}{why[1:]}"


def offered(model: Looped) -> list[dict[str, Any]]:
    """Every kind, with what it asks for, and for those that the model does not have the reason.

    Args:
        model: the model.
    """
    found: list[dict[str, Any]] = []
    for name, kind in KINDS.items():
        why = "".join(lacking(model, ability) for ability in NEEDS.get(name, ()))
        stacks = _stacks(model, name)
        fields = [field for field in kind.fields if field != "stack" or len(stacks) > 1]
        found.append({"kind": name, "title": kind.title, "fields": fields, "stacks": stacks, "why": why})
    return found


def _stacks(model: Looped, kind: str) -> list[str]:
    """The parts of the model that a kind of intervention can be in."""
    edges = [name for name in _EDGES if model.schedule.stacks[name]] if kind.startswith(("ablate", "skip_layer")) else []
    return [*model.schedule.core_stacks, *edges]


def calls(model: Looped, edits: Sequence[dict[str, Any]]) -> tuple[list[Call], list[tuple[int, int]]]:
    """The calls that make the hooks of interventions, and the loops that are repeated, each with how often.

    Args:
        model: the model.
        edits: interventions as JSON.

    Raises:
        LoopedError: a kind, or a value, that does not exist.
    """
    found: list[Call] = []
    repeats: list[tuple[int, int]] = []
    for edit in edits:
        name = choice(*KINDS)("kind", edit.get("kind"))
        if name == "repeat_loop":
            loop = count(least=0)("loop", edit.get("loop", 0))
            repeats.append((model.schedule.loop(loop), count(most=64)("times", edit.get("times", 1))))
        else:
            found.append(_call(model, name, edit))
    if len({loop for loop, _ in repeats}) < len(repeats):
        raise LoopedError("One loop is repeated by two interventions; repeat it more often by one.")
    return found, sorted(repeats, reverse=True)  # the last first, so that earlier ones keep their numbers


def _call(model: Looped, name: str, edit: dict[str, Any]) -> Call:
    kind = KINDS[name]
    stacks = _stacks(model, name)
    stack = choice(*stacks)("stack", edit.get("stack") or stacks[0])
    positional: list[Any] = [kind.part] if kind.part else []
    named: dict[str, Any] = {}
    if "from_loop" in kind.fields:
        positional.append(count(least=0)("from_loop", edit.get("from_loop", 0)))
    if "loops" in kind.fields and stack not in _EDGES:
        loops = selector("loops", edit.get("loops", "all"))
        if name == "skip_loop":
            positional.append(loops)
        else:
            named["loops"] = loops
    for field in ("layers", "heads", "positions"):
        if field in kind.fields and (value := optional(field, edit.get(field))) is not None:
            named[field] = value
    if stack != "core":
        named["stack"] = stack
    direction = None
    if name == "steer":
        direction = (token_id(model, "toward", edit.get("toward", "")), token_id(model, "away", edit.get("away", "")))
        if direction[0] == direction[1]:
            raise LoopedError("toward and away are the same token, which is no direction; choose two.")
        named |= {"scale": a_number("scale", edit.get("scale", 1.0)), "relative_to_rms": True}
    return Call(kind.function, tuple(positional), named, direction)


def edited(
    model: Looped, made: Sequence[Call], repeats: Sequence[tuple[int, int]], patches: Hooks
) -> tuple[Looped, Hooks, list[int]]:
    """The model that runs, the hooks that act in it, and which loop of the unedited run each of its loops is.

    Args:
        model: the model at the number of loops that is asked for.
        made: calls, in their order.
        repeats: loops that run again, the last first.
        patches: hooks that put in activations of another run, after the interventions.
    """
    with torch.no_grad():
        hooks = [hook for call in made for hook in call.hooks(model)] + patches
        runs, loops = model, list(range(model.n_loops))
        for loop, times in repeats:
            runs, hooks = interventions.repeat_loop(runs, loop, times=times, fwd_hooks=hooks)
            loops[loop : loop + 1] = [loop] * (times + 1)
    return runs, hooks, loops
