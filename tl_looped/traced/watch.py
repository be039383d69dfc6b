"""Runs of a module in which hook points act: every call of a submodule is counted, and named by its number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoopedError
from .attention import FUSED, PATTERN, SCORES, Watching, fused, is_pattern
from .calls import replaced, tensor_at
from .places import Place

OTHER_DEPTH = "How often it loops depends on its input: trace it on inputs that loop as often, or fix the number by set_loops=."
Point = Callable[[Tensor], Tensor]


class Stopped(BaseException):
    """The run has come to the layer that is not run; a BaseException, so that the module does not catch it.

    Args:
        x: what enters the layer.
    """

    def __init__(self, x: Tensor):
        super().__init__()
        self.x: Tensor = x


class Watch:
    """One run of a module, in one thread.

    Args:
        module: what is run.
        order: the modules of its layers, in the order that the recorded run had.
        points: the hook points that act, with their places.
        stop: where the first layer that is not run is given its stream; None to run all.
    """

    def __init__(self, module: nn.Module, order: Sequence[str], points: Iterable[tuple[Place, Point]], stop: Place | None):
        self.module: nn.Module = module
        self.order: Sequence[str] = order
        self.thread: int = threading.get_ident()
        self.at: dict[str, dict[int, dict[str, tuple[Place, Point]]]] = {}
        stops = [] if stop is None else [(replace(stop, name=""), _stop)]  # before hooks at the same place
        for place, point in [*stops, *points]:
            self.at.setdefault(place.path, {}).setdefault(place.number, {})[place.name] = (place, point)
        self.numbers: dict[str, list[int]] = {}
        self.began: dict[str, int] = {}
        self.n_layers: int = 0
        self.attending: list[dict[str, tuple[Place, Point]]] = []

    def run(self, function: Callable[[], Any]) -> Any:
        """What a function returns that runs the module; with `stop`, what enters that layer.

        Args:
            function: runs the module once.

        Raises:
            LoopedError: the run calls its layers in another order, or another number of times, than the recorded one.
        """
        layers, handles = set(self.order), list[Any]()
        attends = any(
            place.side not in ("in", "out") for calls in self.at.values() for at in calls.values() for place, _ in at.values()
        )
        try:
            for path in layers | self.at.keys():
                submodule = self.module.get_submodule(path)
                handles.append(submodule.register_forward_pre_hook(self._before(path, path in layers), with_kwargs=True))
                if path in self.at:
                    handles.append(submodule.register_forward_hook(self._after(path), always_call=True))
            if attends:
                with Watching(self._attend):
                    output = function()
            else:
                output = function()
        except Stopped as stopped:
            return stopped.x
        finally:
            for handle in handles:
                handle.remove()
        if self.n_layers == 0:
            raise LoopedError(
                f"the module ran none of its {len(self.order)} layers where hooks see it. Compiled code runs without them: "
                "trace the module before torch.compile, also of functions that call its layers."
            )
        if self.n_layers != len(self.order):
            raise LoopedError(
                f"the module ran {self.n_layers} layers, but {len(self.order)} when it was traced, so that names would mean "
                f"other loops. {OTHER_DEPTH}"
            )
        return output

    def _before(self, path: str, is_layer: bool) -> Callable[..., Any]:
        calls = self.at.get(path, {})

        def hook(_: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            if threading.get_ident() != self.thread:
                return None
            number = self.began.get(path, 0)
            self.began[path] = number + 1
            if is_layer:
                self._count(path)
            if not calls:
                return None
            self.numbers.setdefault(path, []).append(number)
            here = calls.get(number, {})
            self.attending.append({name: at for name, at in here.items() if at[0].side not in ("in", "out")})
            changed = (tuple(args), dict(kwargs))
            for place, point in here.values():
                if place.side == "in":
                    changed = _through(changed, place, point)
            return changed

        return hook

    def _count(self, path: str) -> None:
        """Compare with the recorded order."""
        i = self.n_layers
        if i < len(self.order) and self.order[i] != path:
            raise LoopedError(
                f"the module called {path} as its layer {i}, but {self.order[i]} when it was traced, so that names would mean "
                "other layers. It decides by its input which layers run: trace it on an input on which it runs as here."
            )
        if i >= len(self.order):
            raise LoopedError(
                f"the module called {path} after the {len(self.order)} layers that it ran when it was traced. {OTHER_DEPTH}"
            )
        self.n_layers += 1

    def _after(self, path: str) -> Callable[..., Any]:
        calls = self.at[path]

        def hook(_: nn.Module, args: Sequence[Any], output: Any) -> Any:
            if threading.get_ident() != self.thread or not self.numbers.get(path):
                return None
            number = self.numbers[path].pop()
            self.attending.pop()
            if output is None:  # the call raised
                return None
            for place, point in calls.get(number, {}).values():
                if place.side == "out":
                    output = _through(output, place, point)
            return output

        return hook

    def _attend(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention is computed; hooks of the layer that is run act."""
        here = {at[0].side: at for held in self.attending for at in held.values()}
        if not here or threading.get_ident() != self.thread:
            return func(*args, **kwargs)

        def hook(name: str, x: Tensor) -> Tensor:
            return here[name][1](x) if name in here else x

        if func is FUSED:
            return fused(args, kwargs, hook, is_eager=SCORES in here or PATTERN in here)
        found = func(*args, **kwargs)
        return hook(PATTERN, found) if is_pattern(found) else found


def _stop(x: Tensor) -> Tensor:
    raise Stopped(x)


def _through(value: Any, place: Place, point: Point) -> Any:
    """What a module takes or returns, after a hook point has seen its tensor."""
    x = tensor_at(value, place.at)
    if x is None:
        raise LoopedError(
            f"{place.path} {'takes' if place.side == 'in' else 'returns'} no tensor where it did when it was traced, so that "
            f"nothing is at {place.name or 'the layer to stop at'}. Trace it on inputs on which it is called in the same way."
        )
    seen = point(x if place.heads is None else x.unflatten(-1, (place.heads, -1)))
    new = seen if place.heads is None else seen.flatten(-2)
    if place.copies:
        new = new.clone()
    elif place.heads is not None and new.data_ptr() == x.data_ptr() and new.shape == x.shape:
        return value  # nothing was changed, and the module is given the tensor itself
    return value if new is x else replaced(value, place.at, new)


@torch.no_grad()
def attention_in(
    module: nn.Module, function: Callable[[], Any], seen: Callable[[Callable[..., Any], Any, Any, Any], None]
) -> Any:
    """Run a function and show every attention that it computes.

    Args:
        module: what is run.
        function: runs it.
        seen: called with the function of PyTorch, its arguments, and what it returned.
    """

    def attend(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = func(*args, **kwargs)
        seen(func, args, kwargs, found)
        return found

    with Watching(attend):
        return function()
