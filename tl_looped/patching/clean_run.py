"""A corrupted run beside the cache of a clean one: activations, gradients, and what a metric says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._precision import wide
from .._words import counted
from ..errors import LoopedError, UnknownNameError
from ..looped import Cache, Looped, require, stopping
from ..metrics import bound
from ..names import in_any_loop
from ..record import InitialState, Run

Metric = Callable[[Tensor], Any]
Hooks = Sequence[tuple[str, Callable[..., Any]]]


class CleanRun:
    """The run that activations are taken from.

    Args:
        model: the model of the run they go to.
        cache: its activations.
        initial_state: asked for the other run; None for that of this one.

    Raises:
        LoopedError: another depth; a cache that other weights made; another initial state, whose difference would be mixed
            with that of the prompts.
        UnknownNameError: the cache does not tell from which random state the run started.
    """

    def __init__(self, model: Looped, cache: Cache | Mapping[str, Tensor], initial_state: InitialState = None):
        if not hasattr(cache, "items"):
            raise LoopedError(
                f"a {type(cache).__name__} was given for the clean cache; run the clean prompt first: "
                "_, clean_cache = model.run_with_cache(clean_prompt)."
            )
        if not isinstance(cache, Cache):
            cache = model.as_cache(dict(cache.items()), getattr(cache, "has_batch_dim", True))
        if cache.model.schedule != model.schedule:
            raise LoopedError(
                f"the clean cache comes from a run of {cache.model.schedule.describe()}, but the model runs "
                f"{model.schedule.describe()}; cache the clean run with this model."
            )
        cache.check_weights("a comparison with a clean cache", model)
        self.model: Looped = model
        self.cache: Cache = cache
        self.record: Run | None = cache.run
        self.state: str = f"{model.schedule.pass_prefix(model.schedule.passes[0])}.{model.entrance}"
        self.is_given: bool = initial_state is not None
        self.initial_state: Any = initial_state
        is_random = model.starts_from == "noise"
        if self.record is not None and initial_state is None:
            self.initial_state = self.record.arguments()["initial_state"]
            return
        if self.record is None and (is_random or self.is_given) and self.state not in cache:
            raise UnknownNameError(
                f"the clean cache lacks {self.state} (which tells from which random or given state the clean run started); "
                "name it in names_filter, or take the cache from run_with_cache, which records it."
            )
        if self.record is not None and self.state not in cache and not self.record.starts_like(initial_state):
            raise self._another_state()
        if is_random and initial_state is None:
            self.initial_state = self._batched(self.state)

    def require(self, names: Iterable[str]) -> None:
        """Refuse a cache that lacks activations of these hooks; the message says which."""
        missing = [n for n in names if n not in self.cache and self.model.expand_name(n)]  # raises if there is no such hook
        if missing:
            spelled = [self.model.schedule.loop_name(name) for name in missing]
            shown = ", ".join(spelled[:8]) + (f" and {len(spelled) - 8} more" if len(spelled) > 8 else "")
            raise UnknownNameError(f"the clean cache lacks {shown}; name them in names_filter, or cache a whole run.")

    def read(self, name: str, like: Tensor) -> Tensor:
        """An activation, on the device and in the dtype of the other run's, which must have the same shape."""
        value = self._batched(name)
        if value.shape != like.shape:
            raise LoopedError(
                f"the clean {self.model.schedule.loop_name(name)} has the shape {tuple(value.shape)}, the corrupted one "
                f"{tuple(like.shape)}: the prompts must have equally many rows and tokens (see model.to_str_tokens)."
            )
        return value.detach().to(like.device, like.dtype)

    def check_start(self, state: Float[Tensor, "batch pos d_model"]) -> None:
        """Refuse another run that did not start from the state that this one did; embeddings may differ."""
        own = self.model.starts_from != "embedding" or self.is_given
        if own and self.state in self.cache and not torch.equal(self.read(self.state, state), state):
            raise self._another_state()

    def check_padding(self, mask: Tensor | None) -> None:
        """Refuse another run whose rows are padded otherwise: a patch would carry padding to real positions."""
        own = self.cache.attention_mask
        if self.record is None and own is None:  # not known
            return
        one = own if mask is None else mask
        if one is None:
            return
        real = [torch.ones_like(one, dtype=torch.bool) if m is None else m.bool().to(one.device) for m in (own, mask)]
        if real[0].shape != real[1].shape or not torch.equal(*real):
            raise LoopedError(
                "the rows of the clean run are padded otherwise than those of the corrupted one, so that the same position is "
                "padding in one and real in the other; give both rows of the same lengths."
            )

    def _batched(self, name: str) -> Tensor:
        return self.cache[name] if self.cache.has_batch_dim else self.cache[name][None]

    def _another_state(self) -> LoopedError:
        return LoopedError(
            "the corrupted run starts from another initial state than the clean one, so that their difference would not be one "
            "of the prompts alone; leave initial_state= out to start like the clean run."
        )


def clean_at(
    model: Looped, cache: Cache | Mapping[str, Tensor], at_loop: int | None, n_loops: int | None
) -> tuple[Looped, Any]:
    """The model that answers after a loop, and the clean run at that depth: run again, if its cache is of another one.

    Args:
        model: the model.
        cache: the clean run.
        at_loop: after which loop; None for the last.
        n_loops: of how many loops; None for the model's own number.

    Raises:
        LoopedError: the clean run is of another depth and cannot be run again.
    """
    deeper = stopping(model, at_loop, n_loops)
    if deeper is model or (isinstance(cache, Cache) and cache.model.schedule == deeper.schedule):
        return deeper, cache
    record = cache.run if isinstance(cache, Cache) else None
    if not isinstance(cache, Cache) or record is None or record.hooked:
        raise LoopedError(
            f"the answer after {counted(deeper.n_loops, 'loop')} was asked, but the clean cache is of another depth and cannot "
            "be made again: it comes from a part of a run, or from one with hooks. Cache the clean run with "
            f"model.unroll({deeper.n_loops}), and pass that model."
        )
    cache.check_weights("a comparison with a clean cache", model)
    kept = {in_any_loop(cache.model.schedule.loop_name(name)) for name in cache}
    names = [name for name in deeper.hook_dict if in_any_loop(deeper.schedule.loop_name(name)) in kept]
    with torch.no_grad():
        return deeper, deeper.run_with_cache(record.input, names_filter=names, **record.arguments())[1]


class Comparison:
    """A corrupted run beside the cache of a clean one, and what a metric says of it.

    Args:
        model: the model.
        corrupted_tokens: the prompt that is run.
        clean_cache: activations of the clean run.
        metric: from logits to a number, or one per row.
        run: what `model.forward` takes besides.
    """

    def __init__(self, model: Looped, corrupted_tokens: Any, clean_cache: Cache, metric: Metric, run: dict[str, Any]):
        self.model: Looped = model
        self.per_example: bool = False
        self.source: CleanRun = CleanRun(model, clean_cache, run.get("initial_state"))
        self.require: Callable[[Iterable[str]], None] = self.source.require
        self.state: str = self.source.state
        texts = ("prepend_bos", "padding_side")
        corrupted_tokens, mask = model.read(corrupted_tokens, *(run.get(name) for name in (*texts, "attention_mask")))
        run = {name: value for name, value in run.items() if name not in texts}
        self.source.check_padding(mask)
        self.metric: Metric = bound(metric, model, mask)
        given = {**run, "initial_state": self.source.initial_state, **({} if mask is None else {"attention_mask": mask})}
        with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for the way back
            self.tokens: Any = corrupted_tokens.clone() if isinstance(corrupted_tokens, Tensor) else corrupted_tokens
            self.run: dict[str, Any] = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}

    def clean(self, name: str, like: Tensor) -> Tensor:
        """An activation of the clean run, in fp32 or wider."""
        return self.source.read(name, wide(like))

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

        Raises:
            LoopedError: the metric has no gradient.
        """
        require(self.model, "gradients", "a gradient of the metric")
        begins = [name for name in ("hook_embed", self.state) if name in self.model.hook_dict]
        with torch.inference_mode(False), torch.enable_grad():
            value, seen = self._run([*hooks, *((name, _differentiable) for name in begins)], [*names, *also])
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
        options: dict[str, Any] = {"return_type": "logits", **self.run}
        logits = self.model.run_with_hooks(self.tokens, [*hooks, *watched], **options)
        if missed := [name for name in names if name not in seen]:
            missing = self.model.schedule.loop_name(missed[0])
            raise LoopedError(f"the corrupted run did not reach {missing}; run the whole model.")
        state = seen[self.state].detach()
        if isinstance(self.run["initial_state"], torch.Generator):
            self.run["initial_state"] = state  # later runs would draw another one
        self.source.check_start(state)
        value = measured(self.metric, logits)
        self.per_example = value.ndim == 1
        return value, {name: seen[name] for name in names}


def measured(metric: Metric, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "*example"]:
    """What a metric says of logits, checked: a number, or one per row.

    Args:
        metric: the metric.
        logits: what it is given.

    Raises:
        LoopedError: it is neither.
    """
    value = metric(logits)
    value = torch.tensor(value, dtype=torch.float64, device="cpu") if isinstance(value, (int, float)) else value
    if not isinstance(value, Tensor) or value.shape not in ((), logits.shape[:1]):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LoopedError(
            f"the metric returned {found}; from logits {tuple(logits.shape)} it must return one number, or one per "
            f"row, [batch={logits.shape[0]}]."
        )
    return value


def _differentiable(x: Tensor, hook: Any) -> Tensor:
    return x if x.requires_grad else x.requires_grad_()  # the parameters may be frozen
