"""Hook points, of which a model has a hundred thousand, and those of traced modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformer_lens.hook_points import HookPoint

from ..model.lean import Lean
from ..traced.places import Place


class MadeWhenRead:
    """An attribute that an object has from when it is first read.

    Args:
        make: makes its value.
    """

    def __init__(self, make: Callable[[], Any]):
        self.make: Callable[[], Any] = make

    def __set_name__(self, owner: type, name: str) -> None:
        self.name: str = name

    def __get__(self, holder: Any, owner: type) -> Any:
        return self if holder is None else holder.__dict__.setdefault(self.name, self.make())


class LightPoint(HookPoint, Lean):
    """A hook point that holds only what it does not have in common with all others."""

    fwd_hooks: Any = MadeWhenRead(list)
    bwd_hooks: Any = MadeWhenRead(list)
    ctx: Any = MadeWhenRead(dict)
    name: str | None = None
    hook_conversion: Any = None
    backward_scale: float = 1.0
    pos_dim: int | None = None

    def __init__(self) -> None:
        super().__init__()
        lighten(self)

    def clear_context(self) -> None:
        """Forget what hooks remembered, as in TransformerLens."""
        self.__dict__.pop("ctx", None)

    def remove_hooks(self, dir: Any = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Remove hooks, as in TransformerLens; nothing is made to find that there are none.

        Args:
            dir: as there.
            including_permanent: as there.
            level: as there.
        """
        if dir not in ("fwd", "bwd", "both") or not self.__dict__.keys().isdisjoint(("fwd_hooks", "bwd_hooks")):
            super().remove_hooks(dir, including_permanent, level)


_AS_IN_ALL = {name: held for name, held in vars(HookPoint()).items() if name in vars(LightPoint) | vars(Lean)}


def lighten(point: HookPoint) -> None:
    """Make one of TransformerLens's hook points a light one, as long as it has no hooks.

    Args:
        point: what is changed.
    """
    if type(point) is HookPoint:
        point.__class__ = LightPoint
    if isinstance(point, LightPoint):
        held = point.__dict__
        for name in [name for name, value in _AS_IN_ALL.items() if name in held and held[name] == value]:
            del held[name]


class Point(LightPoint):
    """A hook point that tells its model when it gets a hook, so that a run need not look at all of them.

    Args:
        place: where it acts.
        hooked: the model's list of points that may have hooks.
    """

    def __init__(self, place: Place, hooked: dict[int, Point]):
        super().__init__()
        self.name: str | None = place.name
        self.place: Place = place
        self.hooked: dict[int, Point] = hooked

    def add_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Add a hook, as in TransformerLens.

        Args:
            *args: as there.
            **kwargs: as there.
        """
        self.hooked[id(self)] = self
        return super().add_hook(*args, **kwargs)
