"""Sharing keys and values between loops while generating."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import LoopedError
from ..looped import Looped, check_model, require
from ..schedule import Schedule, check_count
from ._hooks import Hooks, current_run

Policy = Literal["first", "last", "mean"] | int
KeyValues = tuple[Tensor, Tensor]  # each [batch, kv_head, key, d_head]


def share_kv(model: Looped, policy: Policy) -> Hooks:
    """Generate with one set of keys and values for several loops.

    Without it, every loop of every layer keeps keys and values of its own. With it, a looped layer keeps one set ("first",
    "last", "mean"), or `k` sets, and all loops that share a set read the same keys and values of *earlier* positions. Exactly:

    - The prompt is computed as always: in its run every loop reads its own keys and values, so the first new token is exact.
    - While decoding, a position attends to itself by the keys and values of the loop that is running, and to every earlier
      position by the shared set. What is shared of a position is fixed once all its loops have run: its keys (after rotary)
      and values of the first loop, of the last, or their mean over all loops; for an int `k`, loop `t` uses set `t mod k`,
      which holds the latest of its loops. `k = 1` is "last"; `k >= n_loops` shares nothing.
    - Prelude and coda layers keep their own. HRM-Text's stacks share separately, L over its L cycles.

    Kept are `n_prelude + k * n_core + n_coda` sets instead of `n_prelude + n_loops * n_core + n_coda` (`k = 1` by name).

    The named policies are those of Ouro (arXiv 2510.25741, which reports GSM8K 78.92 in full, 78.85 last, 78.73 mean, 18.73
    first), the int is Huginn's KV budget (arXiv 2502.05171, slot `t mod k`). The Ouro paper does not say which loop's keys a
    new token reads of itself; here its own. Huginn's published code keeps the slots of several tokens in one table under the
    same rule.

    Args:
        model: the model.
        policy: "first", "last", "mean", or how many sets to keep.

    Raises:
        LoopedError: an unknown policy; an exit policy, under which positions lack loops; when the hooks run, a run that
            keeps no keys and values, or goes on with some that another cache holds.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
        >>> with model.hooks(fwd_hooks=share_kv(model, "last")):
        ...     text = model.generate(torch.tensor([[1, 2]]), 3, stop_at_eos=False, verbose=False)
        >>> text.shape
        torch.Size([1, 5])
    """
    check_model(model)
    SharedKeyValues(model.schedule, policy)  # checks the policy
    require(model, "every position", "one set of keys and values for several loops")
    if model.exit_policy is not None:
        raise LoopedError("share_kv was asked under an exit policy, where positions lack loops; set model.exit_policy = None.")

    def hook_function(x: Tensor, hook: Any) -> None:
        run = current_run(hook)
        if run.cache is None:
            raise LoopedError(
                "share_kv acts on keys and values that are kept, but this run keeps none; generate with use_past_kv_cache=True."
            )
        if isinstance(run.cache, DynamicCache) and not run.past:
            run.cache = SharedKeyValues(model.schedule, policy)
        elif not isinstance(run.cache, SharedKeyValues) or run.cache.policy != policy:
            raise LoopedError(
                f"share_kv({policy!r}) is to go on with a text whose keys and values another cache holds, "
                f"a {type(run.cache).__name__} of a run without these hooks, or under an exit policy; begin with the prompt, "
                "with exit_policy = None."
            )

    return [(model.schedule.name(0, "hook_resid_pre"), hook_function)]


class SharedKeyValues:
    """A key-value cache whose loops share what they keep; see `share_kv`.

    Args:
        schedule: the order in which the layers run.
        policy: as in `share_kv`.

    Example:
        >>> from tl_looped import Schedule
        >>> SharedKeyValues(Schedule(n_core=4, n_loops=32, n_prelude=2, n_coda=2), 4).n_sets
        20
    """

    def __init__(self, schedule: Schedule, policy: Policy):
        if policy not in ("first", "last", "mean"):
            if isinstance(policy, str):
                raise LoopedError(f'policy={policy!r} was asked; choose "first", "last", "mean" or how many sets to keep.')
            check_count("policy", policy)
        self.policy = policy
        self._schedule = schedule
        self._kept: dict[Any, KeyValues] = {}  # earlier positions, by what is shared
        self._new: dict[Any, KeyValues] = {}  # positions that some of the sharing loops have yet to run

    @property
    def n_sets(self) -> int:
        """How many sets of keys and values are kept, one for every layer that does not share."""
        return len({self._set_of(i)[0] for i in range(self._schedule.n_layers)})

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions are kept.

        Raises:
            LoopedError: the latest run stopped before all loops had run.
        """
        if self._new:
            raise LoopedError("the latest run with these shared keys and values did not run all loops; begin with the prompt.")
        kept = self._kept.get(self._set_of(layer_idx)[0])
        return 0 if kept is None else kept[0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new positions; return those that the layer reads, the shared ones of earlier ones first.

        Args:
            key_states: [batch, kv_head, new_pos, d_head].
            value_states: as the keys.
            layer_idx: the virtual layer.
        """
        shared, loop, loops = self._set_of(layer_idx)
        new, kept = (key_states, value_states), self._kept.get(shared)
        read = new if kept is None else _cat(kept, new)
        if self.policy == "mean" and len(loops) > 1:
            wide = torch.promote_types(key_states.dtype, torch.float32)
            key, value = (t.to(wide) / len(loops) for t in new)
            before = self._new.get(shared)
            self._new[shared] = (key, value) if before is None else (before[0] + key, before[1] + value)
        elif self.policy != "first" or loop == loops[0]:
            self._new[shared] = new
        if loop == loops[-1]:
            key, value = (t.to(key_states.dtype) for t in self._new.pop(shared))
            self._kept[shared] = (key, value) if kept is None else _cat(kept, (key, value))
        return read

    def _set_of(self, layer_idx: int) -> tuple[Any, int | None, list[int | None]]:
        """What a virtual layer shares: a key, its loop, and all loops that share the set."""
        if layer_idx >= self._schedule.n_layers:  # what a loop kind keeps there beside keys and values
            return ("beside", layer_idx), None, [None]
        stack, loop, layer = self._schedule.site(layer_idx)
        if loop is None:
            return (stack, layer, 0), None, [None]
        n_sets = self.policy if isinstance(self.policy, int) else 1
        everyone = range(loop % n_sets, self._schedule.n_loops_of(stack), n_sets)
        return (stack, layer, loop % n_sets), loop, list(everyone)


def _cat(before: KeyValues, new: KeyValues) -> KeyValues:
    return torch.cat((before[0], new[0]), dim=2), torch.cat((before[1], new[1]), dim=2)
