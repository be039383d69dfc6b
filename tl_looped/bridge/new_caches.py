"""What this package changes in TransformerLens: `ActivationCache(activations, model)` is a `LoopedCache` if the model loops.

Caches made from caching hooks (`get_caching_hooks`) and by TransformerLens's tools go through that constructor, and its own
methods would add up a residual stream that is no running sum. Importing this module makes the change; nothing else is changed.
"""

from __future__ import annotations

from typing import Any

from transformer_lens import ActivationCache


def _new_cache(cls: type, cache_dict: Any = None, model: Any = None, *args: Any, **kwargs: Any) -> ActivationCache:
    return object.__new__(getattr(model, "_cache_class", cls) if cls is ActivationCache else cls)


ActivationCache.__new__ = _new_cache  # pyright: ignore[reportAttributeAccessIssue]
