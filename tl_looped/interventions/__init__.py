"""Interventions: lists of hooks that change what chosen loops do.

Functions return `(hook name, function)` pairs for `run_with_hooks(fwd_hooks=...)` and `model.hooks(fwd_hooks=...)`, and so for
`generate`; lists add up, and hooks of one hook point act in the order of the list. (`repeat_loop` returns a model too.) Hooks
keep nothing from one run to the next, edit out of place and let gradients through. `loops` is an int, a slice (`slice(2,
None)`: from loop 2 on), a list, "all" or "last"; `stack` is "L" or "H" for HRM-Text, and "prelude" or "coda" where layers are
meant.

`positions` are positions of the whole text (columns of the batch, padding included), also while generating, where a run has new
tokens only: what is done to positions of the prompt reaches later tokens through the keys and values kept, and
`slice(n_prompt - 1, None)` means every position that a new token is read from. Negative positions count from the last real
token of each row, which changes while generating with a KV cache, and are refused there.
"""

from __future__ import annotations

from .ablation import ablate
from .injection import drop_injection, freeze_injection, replace_injection, set_initial_state
from .passes import freeze_attention, repeat_loop, skip_layer, skip_loop
from .shared_kv import SharedKeyValues, share_kv
from .steering import steer

__all__ = [
    "ablate",
    "skip_layer",
    "skip_loop",
    "repeat_loop",
    "freeze_attention",
    "freeze_injection",
    "replace_injection",
    "drop_injection",
    "set_initial_state",
    "steer",
    "share_kv",
    "SharedKeyValues",
]
