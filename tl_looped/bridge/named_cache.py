"""Activations by name: both spellings, short names, views of a layer or a pass, stacks over loops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name
from transformer_lens.utilities.slice import Slice

from .._old_calls import accepts_old
from .._together import stacked
from ..errors import LoopedError, UnknownNameError
from ..kinds import plain
from ..record import Run
from ..schedule import LoopSelector, Site, is_pattern, virtual_layer
from .fingerprint import Fingerprint
from .tokens import check_real

_SWITCHES = {  # hook points that fire only with a setting of TransformerLens
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}


class NamedCache(ActivationCache):
    """The part of a `LoopedCache` that finds activations, and knows which run and which weights made them."""

    model: Any  # a LoopedBridge; TransformerLens's own annotation knows less
    run: Run | None = None  # what made these activations, where a whole run did
    attention_mask: Tensor | None = None  # [batch, pos], 1 for real positions; None where all are
    loop: int | None = None  # after which the run stopped; None after the last one

    def __init__(
        self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True, weights: Fingerprint | None = None
    ):
        super().__init__(cache_dict, model, has_batch_dim)
        # Nothing is known of a cache that somebody makes by hand; it is taken for one of the model as it is.
        self.weights: Fingerprint = model.fingerprint() if weights is None else weights

    def __getitem__(self, key: Any) -> Tensor:
        if not isinstance(key, (str, tuple)) or not key:
            raise LoopedError(
                f'cache[{key!r}] was asked; pass a name, or a short name and a virtual layer: cache["pattern", 3].'
            )
        asked = key
        if isinstance(key, tuple):
            short, layer, *more = map(plain, (*key, None) if len(key) == 1 else key)
            if any(isinstance(part, int) for part in more):
                raise LoopedError(
                    f"cache[{key!r}] was asked; a short name goes with one virtual layer, cache[{short!r}, {layer!r}]. A loop "
                    f"and a layer: cache.at(loop={layer!r}, layer={more[0]!r})[{short!r}]."
                )
            key = get_act_name(short, None if layer is None else self.model.schedule.layer(layer), *more)
        name = key if key in self.cache_dict else self._one_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        if name.removesuffix("_grad") not in self.model.hook_dict:
            raise self.model.unknown_name(asked if isinstance(asked, str) else name)
        raise UnknownNameError(
            f"{asked!r} exists, but was not cached in this run; {self._way_to(name)}. The cache holds {len(self.cache_dict)} "
            "entries."
        )

    def _way_to(self, name: str) -> str:
        """How a hook point gets into a cache: some fire only after a switch."""
        switch = next((switch for hook, switch in _SWITCHES.items() if name.removesuffix("_grad").endswith(hook)), None)
        if switch is None or getattr(self.model.cfg, switch):
            return "name it in names_filter, and run that far"
        return f"it fires after model.set_{switch}(True)"

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and (key in self.cache_dict or self._one_name(key) in self.cache_dict)
        except LoopedError:
            return False

    def _one_name(self, key: str) -> str:
        if is_pattern(key):
            raise LoopedError(f"{key!r} may stand for several activations; use cache.stack_loops(name, layer, loops=loops).")
        name = self.model.expand_name(key, check=False)[0]
        name = name if name in self.cache_dict else get_act_name(name)
        if name in self.cache_dict:
            return name
        hooks, end = self.model.hook_dict, "_grad" * name.endswith("_grad")
        point = hooks.get(name.removesuffix("_grad"))  # which may be cached under another of its names only
        others = [] if point is None else [f"{other}{end}" for other in hooks.names_of(point)]
        return next((other for other in others if other in self.cache_dict), name)

    @accepts_old("stack")
    def at(self, loop: int | None = None, layer: int | None = None, *, stack: str | None = None) -> CacheView:
        """The activations of one layer or of one pass, under names without indices.

        Args:
            loop: the loop; None in prelude and coda.
            layer: the layer inside the loop, prelude or coda; None for the hooks of the pass itself (`hook_out`, ...).
            stack: "prelude", "coda", or "L" or "H" for HRM-Text; None for the one looped stack.

        Raises:
            LoopedError: no such loop, layer or stack.

        Example:
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
            >>> _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
            >>> cache.at(loop=-1, layer=0)["attn.hook_pattern"] is cache["pattern", 4]
            True
            >>> list(cache.at(loop=1))
            ['hook_state', 'hook_in', 'hook_out']
        """
        schedule = self.model.schedule
        if stack in ("prelude", "coda"):
            if loop is not None or layer is None:
                raise LoopedError(f"stack={stack!r} runs once: pass layer= and no loop=.")
            return CacheView(self, f"blocks.{schedule.virtual(Site(stack, None, layer))}")
        looped = schedule.looped_stack(stack)
        if loop is None:
            raise LoopedError(f"the stack {looped!r} runs {schedule.n_loops_of(looped)} times: pass loop=, or stack='prelude'.")
        index = schedule.virtual(Site(looped, loop, 0 if layer is None else layer))
        if layer is not None:
            return CacheView(self, f"blocks.{index}")
        return CacheView(self, next(schedule.pass_prefix(p) for p in schedule.passes if index in p.layers))

    @accepts_old("loops", "stack")
    def stack_loops(
        self, name: str, layer: int | None = None, *, loops: LoopSelector = "all", stack: str | None = None
    ) -> Float[Tensor, "loop ..."]:
        """One activation of every loop, stacked.

        Args:
            name: as in `at`: TransformerLens's short name ("pattern", "resid_post", ...) or a hook ("attn.hook_z"). Without
                `layer`, a name that passes have is the pass's: "hook_state", "hook_injection", "hook_in", "hook_out",
                "hook_exit_logit", "norm.hook_scale".
            layer: one layer inside the loop; None for all, with a layer axis after the loop axis, or for the pass itself.
            loops: which loops: an int, a slice, several ints, "all" or "last".
            stack: "L" or "H" for HRM-Text; not needed elsewhere.

        Returns:
            [loop, ...] or [loop, layer, ...], followed by the shape of the activation.

        Raises:
            LoopedError: the stack is ambiguous; a loop or layer is out of range; the activation was not cached.
        """
        schedule, looped = self.model.schedule, self.model.schedule.looped_stack(stack)
        chosen = schedule.select_loops(loops, looped)
        a_pass = schedule.pass_prefix(schedule.passes_of(0, looped)[0])
        if layer is None and f"{a_pass}.{_hook(name)}" in self.model.hook_dict:
            return stacked(self.at(loop=loop, stack=looped)[name] for loop in chosen)
        layers = range(schedule.stacks[looped]) if layer is None else [layer]
        rows = []
        for loop in chosen:
            cells = [self.at(loop, j, stack=looped)[name] for j in layers]
            rows.append(cells[0] if layer is not None else stacked(cells))
        return stacked(rows)

    def select_loops(self, loops: LoopSelector) -> Any:
        """A cache without the activations of other loops; the tensors are shared, not copied.

        Args:
            loops: the loops to keep, as in `stack_loops`; for HRM-Text H cycles, each with its L passes. Prelude,
                coda and the rest are kept too.

        Raises:
            OutOfRangeError: a loop that this run does not have.
        """
        schedule = self.model.schedule
        kept = {p for t in schedule.select_loops(loops, schedule.core_stacks[-1]) for p in schedule.passes_in(t)}
        others = [p for p in schedule.passes if p not in kept]
        dropped = tuple(f"blocks.{i}." for p in others for i in p.layers) + tuple(f"{schedule.pass_prefix(p)}." for p in others)
        entries = {name: value for name, value in self.cache_dict.items() if not name.startswith(dropped)}
        selected = type(self)(entries, self.model, self.has_batch_dim, self.weights)
        selected.run, selected.attention_mask = self.run, self.attention_mask
        return selected

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """A cache of chosen rows, as in TransformerLens.

        Args:
            batch_slice: which rows, as a TransformerLens `Slice` or what one is made of.
        """
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        chosen = type(self)(sliced.cache_dict, self.model, sliced.has_batch_dim, self.weights)
        if self.attention_mask is not None:
            mask = as_slice(batch_slice).apply(self.attention_mask, dim=0)
            chosen.attention_mask = mask if mask.ndim == 2 else mask[None]
        return chosen

    def check_weights(self, what: str, model: Any = None) -> None:
        """Refuse to use weights beside these activations if others made them: those of the model, or of another."""
        self.weights.check((self.model if model is None else model).fingerprint(), what)

    def padding(self) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are real, where some are padding; None where all are real."""
        mask = None if self.attention_mask is None else self.attention_mask.bool()
        return None if mask is None or bool(mask.all()) else mask

    def check_real(self, positions: Slice) -> None:
        """Refuse positions which are padding in some row (`tokens.check_real`)."""
        check_real(positions, self.padding())


class CacheView(Mapping[str, Tensor]):
    """The activations of one layer or pass of a `LoopedCache`; made by `LoopedCache.at`.

    Keys are hook names without indices (`hook_resid_post`, `attn.hook_z`); short names (`resid_post`, `z`) work too.
    """

    def __init__(self, cache: NamedCache, prefix: str):
        self.cache: NamedCache = cache
        self.prefix: str = prefix

    def __getitem__(self, name: str) -> Tensor:
        layer = virtual_layer(self.prefix)
        short = _hook(name) != name
        return self.cache[name, layer] if short and layer is not None else self.cache[f"{self.prefix}.{_hook(name)}"]

    def __iter__(self) -> Iterator[str]:
        start = f"{self.prefix}."
        inside = (name.removeprefix(start) for name in self.cache.cache_dict if name.startswith(start))
        return (name for name in inside if not name.startswith("blocks."))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"CacheView({self.cache.model.schedule.loop_name(f'{self.prefix}.hook')[:-5]!r}, {list(self)})"


def _hook(name: str) -> str:
    """A hook's name; "out" is short for "hook_out"."""
    return name if "." in name or name.startswith("hook_") else f"hook_{name}"


def as_slice(chosen: Any) -> Slice:
    """A TransformerLens `Slice`, from one or from what one is made of: None for all, an int, a slice, several ints."""
    return chosen if isinstance(chosen, Slice) else Slice(plain(chosen))
