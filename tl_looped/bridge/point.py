"""Hook points of traced modules."""

from __future__ import annotations

from typing import Any

from transformer_lens.hook_points import HookPoint

from ..traced.places import Place


class Point(HookPoint):
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
