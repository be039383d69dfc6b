"""The same model with another number of loops: which one a call means by `at_loop=` and `n_loops=`."""

from __future__ import annotations

from .bridge.looped_bridge import LoopedBridge
from .errors import LoopedError
from .schedule import check_count, check_index


def stopping(model: LoopedBridge, at_loop: int | None, n_loops: int | None) -> LoopedBridge:
    """The model that answers after one of the loops: itself where that is its own last one, else an unroll without its hooks.

    Args:
        model: the model.
        at_loop: after which loop (0-based; negative counts from the end); None for the last.
        n_loops: of how many loops; None for the model's own number.

    Raises:
        LoopedError: a loop or a number that does not exist; the model has hooks, which would silently not act on the unroll.
    """
    check_model(model)
    if at_loop is None:
        return at_depth(model, n_loops)
    total = model.n_loops if n_loops is None else check_count("n_loops", n_loops)
    asked = check_index(at_loop, total, "loop") + 1
    if model.plain.loop.changes is None or asked == total:
        return at_depth(model, asked)
    return at_depth(at_depth(model, n_loops), asked, cut=True)


def at_depth(model: LoopedBridge, n_loops: int | None, cut: bool = False) -> LoopedBridge:
    """The model with `n_loops` loops: itself where that is its own number or None, else an unroll without its hooks.

    Args:
        model: the model.
        n_loops: the number asked for.
        cut: as in `LoopedBridge.unroll`.

    Raises:
        LoopedError: `n_loops` is no positive int; the model has hooks, which would silently not act on the unroll.
    """
    check_model(model)
    if n_loops is None or check_count("n_loops", n_loops) == model.n_loops:
        return model
    if hooked := first_hooked(model):
        raise LoopedError(
            f"{n_loops} loops were asked of a model of {model.n_loops} that has hooks, such as at {hooked}; they would not act "
            f"on that run. Hook other = model.unroll({n_loops}) and ask that."
        )
    return model.unroll(n_loops, cut=cut)


def check_model(model: object) -> None:
    """Refuse what is no looped model, in a sentence.

    Args:
        model: what was given.

    Raises:
        LoopedError: it is none.
    """
    if not isinstance(model, LoopedBridge):
        raise LoopedError(
            f"a {type(model).__name__} was given as the model; pass a LoopedBridge, from LoopedBridge.from_pretrained(name) or "
            "LoopedBridge.from_hf(model)."
        )


def first_hooked(model: LoopedBridge) -> str | None:
    """The name of a hook point of the model that has a hook; None if none has."""
    return next((name for name, point in model.hook_dict.items() if point.has_hooks(including_permanent=True)), None)
