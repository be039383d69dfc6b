"""A looped model whose passes hold weights of their own for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .looped_model import LoopedModel
from .undo import undone

PASS_PARAMETERS = ("inject.", "pass_norm.", "exit_gate.")
T = TypeVar("T")


def with_weights_of_their_own(
    model: LoopedModel, action: Callable[[dict[str, list[nn.Parameter]]], T]
) -> tuple[dict[str, list[nn.Parameter]], T]:
    """The views, and what an action returns while every use of a looped parameter holds a view of its own.

    It is called with the views by canonical name, in the order of the run.
    """
    prefixes = (*(f"{stack}." for stack in model.cfg.schedule.core_stacks), *PASS_PARAMETERS)
    slots = {name: holders for name, holders in model.parameter_slots.items() if name.startswith(prefixes)}
    shared = {name: getattr(*holders[0]) for name, holders in slots.items()}
    views = {name: [nn.Parameter(shared[name].detach()) for _ in holders] for name, holders in slots.items()}

    def act() -> T:
        for name, holders in slots.items():
            for (owner, attribute), view in zip(holders, views[name], strict=True):
                setattr(owner, attribute, view)
        return action(views)

    def share_again() -> None:
        for name, parameter in shared.items():
            model.set_parameter(name, parameter)

    return views, undone(act, share_again)
