"""What a run is asked: its tokens, its positions, its masks, and which of its layers run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoopedError
from ..schedule import Schedule
from .config import LoopedConfig
from .loops import loop_of


@dataclass(frozen=True)
class Part:
    """The virtual layers `first .. stop - 1` that a run executes; `is_restart` when it begins from a given residual stream."""

    start: int | None
    stop: int | None

    @property
    def first(self) -> int:
        return self.start or 0

    @classmethod
    def of(cls, schedule: Schedule, start: int | None, stop: int | None) -> Part:
        """Check what was asked; negative indices count from the end."""
        start = None if start is None else schedule.layer(start)
        stop = stop if stop is None or stop == schedule.n_layers else schedule.layer(stop)
        if stop is not None and stop < (start or 0):
            raise LoopedError(f"start={start} and stop={stop} were asked, but a run goes forward; choose start <= stop.")
        return cls(start, stop)

    @property
    def is_restart(self) -> bool:
        return self.start is not None


def positions_of(cfg: LoopedConfig, x: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, past: int) -> Tensor:
    """The position of every token, [batch, pos], as given or counted from the first real one."""
    batch, n_new = x.shape[:2]
    if attention_mask is not None and attention_mask.shape != (batch, past + n_new):
        raise LoopedError(
            f"attention_mask of shape {tuple(attention_mask.shape)} was given; this run needs [batch, pos] = "
            f"{(batch, past + n_new)}" + (f" ({past} cached positions included)." if past else ".")
        )
    if attention_mask is not None:
        ones = attention_mask == 1
        if not bool((ones | (attention_mask == 0)).all()) or not bool(ones.any(-1).all()):
            raise LoopedError("attention_mask has 1 for real tokens and 0 for padding, and at least one real token in a row.")
    if position_ids is not None:
        if position_ids.shape not in ((batch, n_new), (1, n_new)):
            raise LoopedError(
                f"position_ids of shape {tuple(position_ids.shape)} were given; this run needs [batch, pos] = {(batch, n_new)}."
            )
        positions = position_ids.expand(batch, n_new).to(x.device)
        if attention_mask is None and loop_of(cfg).mixes is not None and bool((positions.diff(dim=-1) < 0).any()):
            raise LoopedError(
                "position_ids that begin again were given, as of texts packed into one row, but the convolutions and distances "
                f"of this {cfg.family} model go on from one text to the next; give every text a row of its own, padded."
            )
    elif attention_mask is not None:
        positions = ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, past:].to(x.device)
    else:
        positions = torch.arange(past, past + n_new, device=x.device).expand(batch, n_new)
    n_ctx = cfg.n_ctx
    if past + n_new > n_ctx and int(positions.max()) >= n_ctx:
        raise LoopedError(
            f"the prompt has {past + n_new} positions, but the context of this model is n_ctx={n_ctx}; shorten it."
        )
    if position_ids is not None and not 0 <= int(positions.min()) <= int(positions.max()) < n_ctx:
        raise LoopedError(
            f"position_ids from {int(positions.min())} to {int(positions.max())} were given; "
            f"the positions of this model are 0..{n_ctx - 1}."
        )
    return positions


def masks_of(
    cfg: LoopedConfig, x: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, past: int
) -> dict[int | None, Tensor | None]:
    """The attention mask of every window size that some layer has, for queries at the positions of x [batch, pos, ...]."""
    n_new = x.shape[1]
    prefix = None
    if token_type_ids is not None:
        prefix = (token_type_ids == 1).to(x.device)
        if not cfg.prefix_lm:
            raise LoopedError(f"token_type_ids mark a bidirectional prefix, which this {cfg.family} model does not have.")
        if token_type_ids.shape != x.shape[:2] or (past and prefix.any()):
            raise LoopedError(
                "token_type_ids [batch, pos] mark the prefix of the prompt: pass them with the whole prompt, uncached."
            )
        prefix = prefix if not past and prefix.any() else None
    real = None if attention_mask is None or bool((attention_mask != 0).all()) else (attention_mask != 0).to(x.device)
    query = torch.arange(past, past + n_new, device=x.device)[:, None]
    key = torch.arange(past + n_new, device=x.device)
    masks: dict[int | None, Tensor | None] = {}
    for window in loop_of(cfg).windows:
        narrow = window if window is not None and window < past + n_new else None
        if real is None and prefix is None and narrow is None and (not past or n_new == 1):
            masks[window] = None
            continue
        mask = (key <= query)[None]
        if prefix is not None:
            mask = mask | (prefix[:, :, None] & prefix[:, None, :])
        if narrow is not None:
            mask = mask & (query - key < narrow)
        if real is not None:
            mask = mask & real[:, None, :] | (key == query)  # a padded query looks at itself, or it would look at nothing
        masks[window] = mask[:, None]
    return masks
