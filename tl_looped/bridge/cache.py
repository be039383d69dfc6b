"""`LoopedCache`: an ActivationCache that understands loop-indexed names."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name

from ..errors import LoopedError, UnknownNameError
from ..schedule import Site, is_pattern


class LoopedCache(ActivationCache):
    """The activations of one run, under TransformerLens names and under loop-indexed ones.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> logits, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
        >>> cache["loops.2.blocks.1.attn.hook_z"] is cache["z", 5]
        True
        >>> tuple(cache.stack_loops("resid_post").shape)
        (3, 2, 1, 3, 8)
    """

    model: Any  # a LoopedBridge; TransformerLens's own annotation knows less

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and key not in self.cache_dict:
            key = self._one_name(key)
        elif isinstance(key, tuple) and len(key) > 1 and key[1] is not None:
            key = (key[0], self.model.schedule.layer(key[1]), *key[2:])
        try:
            return super().__getitem__(key)
        except KeyError:
            name = key if isinstance(key, str) else get_act_name(*key)
            known = name.removesuffix("_grad") in self.model.hook_dict
            why = "exists, but was not cached in this run; name it in names_filter" if known else "is no hook of this model"
            raise UnknownNameError(f"{name!r} {why}. The cache holds {len(self.cache_dict)} entries.") from None

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self.cache_dict or self._one_name(key) in self.cache_dict)

    def _one_name(self, key: str) -> str:
        if is_pattern(key):
            raise LoopedError(f"{key!r} may stand for several activations; use cache.stack_loops(name, layer, loops).")
        names = self.model.expand_name(key, check=False)
        return names[0] if names[0] in self.cache_dict else get_act_name(names[0])

    def stack_loops(
        self, name: str, layer: int | None = None, loops: list[int] | range | None = None, stack: str | None = None
    ) -> Float[Tensor, "loop ..."]:
        """One activation of every loop, stacked.

        Args:
            name: TransformerLens's short name ("pattern", "resid_post", "z", ...) or the hook of a layer ("attn.hook_z").
            layer: one layer inside the loop; None for all, with a layer axis after the loop axis.
            loops: which loops; None for all.
            stack: "L" or "H" for HRM-Text; not needed elsewhere.

        Returns:
            [loop, ...] or [loop, layer, ...], followed by the shape of the activation.

        Raises:
            LoopedError: the stack is ambiguous; a loop or layer is out of range; the activation was not cached.
        """
        schedule = self.model.schedule
        if stack is None and len(schedule.core_stacks) > 1:
            raise LoopedError(f"this model loops the stacks {schedule.core_stacks}; pass stack='L' or stack='H'.")
        looped = schedule.core_stacks[0] if stack is None else stack
        chosen = range(schedule.n_loops_of(looped)) if loops is None else loops
        layers = range(schedule.stacks[looped]) if layer is None else [layer]
        rows = []
        for loop in chosen:
            indices = [schedule.virtual(Site(looped, loop, j)) for j in layers]
            cells = [self[f"blocks.{i}.{name}"] if "." in name or name.startswith("hook_") else self[name, i] for i in indices]
            rows.append(cells[0] if layer is not None else torch.stack(cells))
        return torch.stack(rows)
