"""What lies between the layers of a run, done in its order; the layers are left to whoever iterates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .loops import Apply, Parts, Stream

Begin = Callable[[Tensor], dict[str, Tensor]]


def crossings(
    model: Any, stream: Stream, layers: Sequence[int], apply: Apply, begin: Begin, is_restart: bool = False, gates: bool = True
) -> Iterator[int]:
    """Do what lies between layers, and leave the layers to whoever iterates.

    Before a layer its index is yielded and `stream.x` is its input, to be replaced by its output. Then `n_layers` is yielded,
    with the output of the last layer, and in the end `stream.x` is what the last norm reads.

    Args:
        model: a `LoopedModel`.
        stream: what the first of the layers reads; changed in place.
        layers: which ones, in the order of the run.
        apply: runs the modules around the layers.
        begin: from the prelude's output to what is carried before the first pass.
        is_restart: whether `stream.x` is the input of the first layer already.
        gates: whether exit gates read the states, for whoever has hooks there.
    """
    schedule, ended = model.cfg.schedule, None
    for i in (*layers, None):
        started = None if i is None else model.pass_starting.get(i)
        if i is None:
            yield schedule.n_layers
        if is_restart:
            is_restart = False
        else:
            if ended is not None:
                parts = Parts(model, ended, apply)
                model.loop.leave(parts, ended, stream.x, stream.carried)
                if gates:
                    model.loop.exit_logit(parts, ended, stream.carried)
            if started is not None:
                if started.index == 0:
                    stream.carried.update(begin(stream.x))
                stream.x = model.loop.enter(Parts(model, started, apply), started, stream.carried)
            elif ended is not None:
                stream.x = model.loop.finish(Parts(model, None, apply), ended, stream.carried)
        if i is not None:
            yield i
            ended = model.pass_ending.get(i)
    stream.x = model.loop.read(Parts(model, None, apply), stream.x, stream.carried)
