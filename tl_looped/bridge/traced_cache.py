"""`TracedCache`: the activations of a run of a traced module, which knows no sum that its stream would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ..looped import require
from .named_cache import NamedCache


def _refused(what: str) -> Callable[..., NoReturn]:
    def refuse(self: NamedCache, *args: Any, **kwargs: Any) -> NoReturn:
        require(self.model, "exact decomposition", what)
        raise AssertionError(what)  # every traced module lacks it

    refuse.__doc__ = f"""Refused: {what} takes the stream apart.

        Raises:
            LoopedError: always.
        """
    refuse.__name__ = what
    return refuse


class TracedCache(NamedCache):
    """The activations of one run of a traced module, under TransformerLens names and under loop-indexed ones.

    What takes a residual stream apart refuses: nothing is known of what the module does between and inside its layers.
    """

    accumulated_resid: Callable[..., NoReturn] = _refused("accumulated_resid")
    apply_ln_to_stack: Callable[..., NoReturn] = _refused("apply_ln_to_stack")
    attribute_logits: Callable[..., NoReturn] = _refused("attribute_logits")
    compute_head_results: Callable[..., NoReturn] = _refused("compute_head_results")
    decompose_resid: Callable[..., NoReturn] = _refused("decompose_resid")
    get_full_resid_decomposition: Callable[..., NoReturn] = _refused("get_full_resid_decomposition")
    get_neuron_results: Callable[..., NoReturn] = _refused("get_neuron_results")
    logit_attrs: Callable[..., NoReturn] = _refused("logit_attrs")
    stack_head_results: Callable[..., NoReturn] = _refused("stack_head_results")
    stack_neuron_results: Callable[..., NoReturn] = _refused("stack_neuron_results")
