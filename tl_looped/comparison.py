"""A corrupted run beside the cache of a clean one: activations, gradients, and what a metric says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .bridge.cache import LoopedCache
from .bridge.looped_bridge import LoopedBridge
from .errors import LoopedError, UnknownNameError

Metric = Callable[[Tensor], Tensor]
Hooks = Sequence[tuple[str, Callable[..., Any]]]


class Comparison:
    """A corrupted run beside the cache of a clean one, and what a metric says of it.

    Args:
        model: the model.
        corrupted_tokens: the prompt that is run.
        clean_cache: activations of the clean run.
        metric: from logits to a number, or one per row.
        run: what `model.forward` takes besides.
    """

    def __init__(
        self, model: LoopedBridge, corrupted_tokens: Any, clean_cache: LoopedCache, metric: Metric, run: dict[str, Any]
    ):
        if clean_cache.model.schedule != model.schedule:
            raise LoopedError(
                f"the clean cache comes from a run of {clean_cache.model.schedule.describe()}, but the model runs "
                f"{model.schedule.describe()}; cache the clean run with this model."
            )
        self.model, self.cache, self.metric = model, clean_cache, metric
        self.state = f"{model.schedule.pass_prefix(model.schedule.passes[0])}.hook_state"
        self.per_example = False
        record = clean_cache.run
        self.starts_alike = None if record is None else True
        if record is not None and run.get("initial_state") is None:
            run = {**run, "initial_state": record.arguments()["initial_state"]}
        elif record is not None:
            self.starts_alike = record.starts_like(run["initial_state"])
        elif run.get("initial_state") is None and model.looped_cfg.initial_state == "noise" and self.state in clean_cache:
            run = {**run, "initial_state": self._batched(self.state)}
        with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for the way back
            self.tokens = corrupted_tokens.clone() if isinstance(corrupted_tokens, Tensor) else corrupted_tokens
            self.run = {name: x.clone() if isinstance(x, Tensor) else x for name, x in run.items()}

    def require(self, names: Iterable[str]) -> None:
        """Raise an `UnknownNameError` that says which activations the clean cache lacks."""
        own_state = self.model.looped_cfg.initial_state == "noise" or self.run.get("initial_state") is not None
        wanted = [*names, *([self.state] if own_state and self.starts_alike is None else [])]
        missing = [n for n in wanted if n not in self.cache and self.model.expand_name(n)]  # raises if there is no such hook
        if missing:
            spelled = [self.model.schedule.loop_name(name) for name in missing]
            shown = ", ".join(spelled[:8]) + (f" and {len(spelled) - 8} more" if len(spelled) > 8 else "")
            why = "" if missing[-1] != self.state else f" ({self.state} tells which random state the clean run started from)"
            raise UnknownNameError(f"the clean cache lacks {shown}{why}; name them in names_filter, or cache a whole run.")

    def clean(self, name: str, like: Tensor) -> Tensor:
        """An activation of the clean run, in fp32 or wider."""
        value = self._batched(name)
        if value.shape != like.shape:
            raise LoopedError(
                f"the clean {self.model.schedule.loop_name(name)} has the shape {tuple(value.shape)}, the corrupted one "
                f"{tuple(like.shape)}: the prompts must have equally many rows and positions."
            )
        return wide(value.detach().to(like.device))

    def _batched(self, name: str) -> Tensor:
        return self.cache[name] if self.cache.has_batch_dim else self.cache[name][None]

    def activations(self, names: Sequence[str], hooks: Hooks = ()) -> dict[str, Tensor]:
        """Activations of the corrupted run."""
        with torch.no_grad():
            return self._run(hooks, names)[1]

    def value(self, hooks: Hooks = ()) -> Float[Tensor, "*example"]:
        """The metric of the corrupted run."""
        with torch.no_grad():
            return self._run(hooks, ())[0]

    def gradients(
        self, names: Sequence[str], hooks: Hooks = (), also: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations of the corrupted run, and the gradients of the metric at `names`, in fp32 or wider.

        Args:
            names: where to take gradients.
            hooks: what to do to the run; called before activations are read.
            also: names of activations to return without a gradient.
        """
        with torch.inference_mode(False), torch.enable_grad():
            value, seen = self._run([*hooks, ("hook_embed", _differentiable)], [*names, *also])
            if not value.requires_grad:
                raise LoopedError("the metric has no gradient; compute it from its logits by differentiable steps.")
            gradients = torch.autograd.grad(value.sum(), [seen[name] for name in names], allow_unused=True)
        found = {n: torch.zeros_like(seen[n]) if g is None else g for n, g in zip(names, gradients, strict=True)}
        return {n: x.detach() for n, x in seen.items()}, {n: wide(g) for n, g in found.items()}

    def _run(self, hooks: Hooks, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def see(name: str, x: Tensor, hook: Any) -> Tensor:
            seen[name] = x
            return x  # where a hook reshapes, what it returns is what goes on, so gradients reach it

        watched = [(name, partial(see, name)) for name in dict.fromkeys([self.state, *names])]
        run: Any = self.model.run_with_hooks
        logits = run(self.tokens, fwd_hooks=[*hooks, *watched], **{"return_type": "logits", **self.run})
        if missed := [name for name in names if name not in seen]:
            missing = self.model.schedule.loop_name(missed[0])
            raise LoopedError(f"the corrupted run did not reach {missing}; run the whole model.")
        self._check_state(seen[self.state].detach())
        value = self.metric(logits)
        if not isinstance(value, Tensor) or value.shape not in ((), logits.shape[:1]):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LoopedError(
                f"the metric returned {found}; from logits {tuple(logits.shape)} it must return a scalar tensor, or one number "
                f"per row, [batch={logits.shape[0]}]."
            )
        self.per_example = value.ndim == 1
        return value, {name: seen[name] for name in names}

    def _check_state(self, state: Tensor) -> None:
        """The initial state must be the same in both runs, unless it is the embedding."""
        given, same = self.run.get("initial_state"), self.starts_alike is not False
        if isinstance(given, torch.Generator):
            self.run["initial_state"] = state  # later runs would draw another one
        if self.state in self.cache and (given is not None or self.model.looped_cfg.initial_state != "embedding"):
            same = torch.equal(self.clean(self.state, state), wide(state))
        if not same:
            raise LoopedError(
                "the corrupted run started from another initial state than the clean one, so that their difference would not "
                "be one of the prompts; leave initial_state= out to start like the clean run."
            )


def wide(x: Tensor) -> Tensor:
    """A tensor in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _differentiable(embed: Tensor, hook: Any) -> Tensor:
    return embed if embed.requires_grad else embed.requires_grad_()  # the parameters may be frozen
