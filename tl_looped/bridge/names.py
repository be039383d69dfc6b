"""Hook points by name: patterns, both spellings, functions of names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformer_lens.hook_points import HookPoint

from ..errors import LoopedError, UnknownNameError
from ..schedule import virtual_layer
from .hooking import Hooked, without_leftovers

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class Named:
    """What finds the hook points of a model in either spelling; before one of TransformerLens's classes, which it calls."""

    def expand_name(self: Any, name: str, check: bool = True) -> list[str]:
        """The TransformerLens names of all hook points that a name or pattern in either spelling stands for.

        Args:
            name: such as "blocks.3.hook_mlp_out", "loops.2.blocks.5.attn.hook_z", "loops.1:.blocks.*.attn.hook_pattern".
            check: raise if no such hook point exists.

        Raises:
            UnknownNameError: no such hook; the message has the nearest names.
            OutOfRangeError: a loop or layer that this run does not have.
        """
        names = self._also_called(self.schedule.names.expand(name))
        if check:
            known = self.hook_dict.keys()
            names = [n for n in names if n in known]
            if not names:
                raise self.unknown_name(name)
        return names

    def _also_called(self: Any, names: list[str]) -> list[str]:
        """The names of hook points, from names of which some are second ones."""
        return names

    def unknown_name(self: Any, name: str) -> UnknownNameError:
        """The error for a hook name that this model does not have, with the nearest names that it has."""
        plain = list(self.hook_dict)
        known = plain if name.startswith("blocks.") else [self.schedule.loop_name(n) for n in plain]
        last = name.rsplit(".", 1)[-1]
        # Somebody who names a layer may have left out "attn."; one who names a pass, the layer.
        same = [n for n in known if n.rsplit(".", 1)[-1].removeprefix("hook_") == last.removeprefix("hook_")]
        same = [n for n in same if n.startswith(name.rpartition(".")[0] + ".")] or same
        near = difflib.get_close_matches(name, same, n=4, cutoff=0.5) or difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        if not near:  # the right layer, but a hook that is nothing like the one asked for
            stem = name.rsplit(".", 1)[0]
            near = [n for n in known if n.startswith(f"{stem}.")][:4]
        hint = f" Nearest: {', '.join(near)}." if near else ""
        if "*" in name.rsplit(".", 1)[-1]:
            hint = " A * stands for an index only; name the hook, or pass a function of names." + hint
        return UnknownNameError(f"hook {name!r} was asked, but this model has no such hook point.{hint} All: model.hook_dict.")

    def _expand_hooks(self: Any, hooks: Iterable[Hook]) -> list[Hook]:
        expanded: list[Hook] = []
        for name, function in hooks:
            if not isinstance(name, str) and not callable(name):
                raise LoopedError(f"hook name {name!r} was given; pass a name, a pattern or a function of names.")
            where = self.expand_name(name) if isinstance(name, str) else [self._matching(name)]
            expanded += [(place, function) for place in where]
        return expanded

    def _matching(self: Any, accepts: Callable[[str], bool]) -> Callable[[str], bool]:
        """A function of TransformerLens names from one that may be written for either spelling.

        Where it accepts no hook of a layer by its TransformerLens name, loop-indexed
        names are meant; passes have those alone.
        """
        names = list(self.hook_dict)
        plain = [n for n in names if accepts(n)]
        if any(virtual_layer(n) is not None for n in plain):
            return frozenset(plain).__contains__
        return frozenset(n for n in names if n in plain or accepts(self.schedule.loop_name(n))).__contains__

    def _expand_filter(self: Any, names_filter: NamesFilter) -> list[str] | Callable[[str], bool] | None:
        if names_filter is None:
            return None
        if callable(names_filter):
            return self._matching(names_filter)
        names = (
            list(names_filter) if isinstance(names_filter, Iterable) and not isinstance(names_filter, str) else [names_filter]
        )
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise LoopedError(f"names_filter holds {wrong[0]!r}; pass a name, names or patterns, or one function of names.")
        return list(dict.fromkeys(n for name in names for n in self.expand_name(name)))

    def add_hook(self: Any, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """Add a hook as in TransformerBridge; a name may be loop-indexed and may be a pattern.

        Args:
            name: a name or pattern in either spelling, or a function of names (see `hooks`).
            *args: the function to call, and more as in TransformerBridge.
            **kwargs: as in TransformerBridge.

        Raises:
            LoopedError: no such hook; a loop or layer that this run does not have.
        """
        parent: Any = super()
        add = parent.add_hook

        def add_everywhere() -> None:
            for n in self.expand_name(name) if isinstance(name, str) else [self._matching(name)]:
                add(n, *args, **kwargs)

        without_leftovers(self, add_everywhere)

    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, fwd_hooks: Iterable[Hook] = (), bwd_hooks: Iterable[Hook] = (), **kwargs: Any
    ) -> Any:
        """Context manager with hooks, as in TransformerBridge; names may be loop-indexed and may be patterns.

        Args:
            fwd_hooks: pairs of where and what to call: a name or pattern in either spelling, or a function of names; and a
                function of the activation and the hook point, `fn(tensor, hook)`. A function of names is asked about
                TransformerLens's, and about loop-indexed ones if it accepts no layer by its TransformerLens name.
            bwd_hooks: such pairs for the gradients of activations.
            **kwargs: as in TransformerBridge.

        Raises:
            LoopedError: no such hook; a loop or layer that this run does not have.
        """
        parent: Any = super()
        return Hooked(self, parent.hooks(self._expand_hooks(fwd_hooks), self._expand_hooks(bwd_hooks), **kwargs))

    def get_caching_hooks(self: Any, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> Any:
        """Caching hooks as in TransformerBridge; names may be loop-indexed and may be patterns.

        Args:
            names_filter: as in `run_with_cache`.
            *args: as in TransformerBridge.
            **kwargs: as in TransformerBridge.
        """
        parent: Any = super()
        return parent.get_caching_hooks(self._expand_filter(names_filter), *args, **kwargs)


class HookDict(dict[str, HookPoint]):
    """TransformerLens's hook dictionary; `[name]` also takes loop-indexed names."""

    expand_name: Callable[[str], list[str]]

    def __init__(self, hooks: Mapping[str, HookPoint]):
        super().__init__(hooks)
        self._names: dict[int, list[str]] = {}

    def names_of(self, hook: HookPoint) -> list[str]:
        """All TransformerLens names of a hook point."""
        found = self._names.get(id(hook))
        if found is None or super().__getitem__(found[0]) is not hook:  # not asked before, or in the original of this copy
            self._names = {}
            for name, point in self.items():
                self._names.setdefault(id(point), []).append(name)
        return self._names[id(hook)]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and self.get(name) is not None)

    def get(self, name: str, default: Any = None) -> Any:
        """The hook point of a name in either spelling, or a default."""
        if super().__contains__(name):
            return super().__getitem__(name)
        try:
            return self[name]
        except LoopedError:
            return default

    def __missing__(self, name: str) -> HookPoint:
        names = self.expand_name(name)
        if len(names) > 1:
            raise LoopedError(f"{name!r} stands for {len(names)} hook points, from {names[0]!r} to {names[-1]!r}; name one.")
        return self[names[0]]
