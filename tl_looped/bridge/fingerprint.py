"""`Fingerprint`: which weights made a cache, so that it is not read together with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .._together import stacked
from ..errors import LoopedError
from ..model.config import LoopedConfig

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What tells the weights of a model from others: a sum of the bits of every parameter, weighted by where they stand.

    Versions and addresses would miss an edit through `.data`, and would tell apart what moved to another device or belongs to
    another unroll. Integer sums depend neither on the order of addition nor on the machine. Every parameter is read once;
    a run reads it once for every loop, and multiplies.

    Args:
        cfg: the structure; of a traced module a text.
        dtypes: of every parameter, by canonical name.
        sums: one number per parameter, in the same order.
    """

    cfg: LoopedConfig | str
    dtypes: dict[str, torch.dtype]
    sums: Int[Tensor, " parameter"]

    @classmethod
    @torch.no_grad()
    def of(cls, cfg: LoopedConfig | str, parameters: Mapping[str, Tensor]) -> Fingerprint:
        """The fingerprint of parameters as they are now.

        Args:
            cfg: the structure of the model.
            parameters: by canonical name.
        """
        sums = stacked(_weighted_sum(parameter.detach()) for parameter in parameters.values())
        return cls(cfg, {name: parameter.dtype for name, parameter in parameters.items()}, sums)

    def difference(self, other: Fingerprint) -> str | None:
        """How other weights differ from these; None if they do not. The number of loops does not matter."""
        if _unlooped(self.cfg) != _unlooped(other.cfg):
            return "the model has another structure"
        if self.dtypes.keys() != other.dtypes.keys():
            return "the weights were processed (compatibility mode)"
        for name, dtype in self.dtypes.items():
            if dtype != other.dtypes[name]:
                return f"{name} was {dtype} and is {other.dtypes[name]}"
        changed = (self.sums.cpu() != other.sums.cpu()).tolist()
        names = [name for name, differs in zip(self.dtypes, changed, strict=True) if differs]
        return f"{', '.join(names[:3])}{' and others' * (len(names) > 3)} changed" if names else None

    def check(self, weights: Fingerprint, what: str) -> None:
        """Refuse to read a cache beside the weights of a model if other weights made it; `what` was asked."""
        if (why := self.difference(weights)) is not None:
            raise LoopedError(
                f"{what} was asked, which reads a cache together with the weights of the model, but other weights made this "
                f"cache: {why}. It is another model's, or from before an edit, a training step, compatibility mode or a change "
                "of dtype; run it again with run_with_cache. To take its activations for those of the model all the same, pass "
                "LoopedCache(dict(cache.items()), model), or write them in a hook of your own."
            )


def _unlooped(cfg: LoopedConfig | str) -> LoopedConfig | str:
    return cfg if isinstance(cfg, str) else cfg.replace(n_loops=1, family="")


def _weighted_sum(x: Tensor) -> Int[Tensor, ""]:
    """The sum of the bits of `x` in rows, each row times its number, and of the first row's, each times its own."""
    rows = x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(-1, 1)
    rows = rows.contiguous()
    words = rows.view(INTEGERS[rows.element_size()])
    if not rows.shape[1] * rows.element_size() % 8 and not rows.storage_offset() * rows.element_size() % 8:
        words = rows.view(torch.int64)  # eight bytes at a time
    down, along = (torch.arange(1, n + 1, device=x.device) for n in words.shape)
    return (words.sum(1) * down).sum() + (words[0] * along).sum()
