"""Which tokens of a prompt are real and which are padding, and which positions are meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import LoopedError
from .kinds import plain
from .schedule import Indices, select_indices

Mask = Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None  # 1 for real tokens; None where all are


def check_tokens(tokens: Tensor, d_vocab: int) -> None:
    """Raise a `LoopedError` unless `tokens` is a non-empty integer [batch, pos] inside the vocabulary."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
        raise LoopedError(
            f"tokens of shape {tuple(tokens.shape)} and {tokens.dtype} were given; pass a non-empty int [batch, pos]."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        bad = low if low < 0 else high
        raise LoopedError(f"token {bad} was given, but the vocabulary of this model is 0..{d_vocab - 1}.")


def refuse_unmarked_padding(tokenizer: Any, tokens: Tensor, what: str, sides: Sequence[str] = ("left", "right")) -> None:
    """Refuse rows that look padded to the longest where no mask says whether they are.

    One pad token at the start of a row, where it is the beginning-of-sequence token too, or at the end, where it is the
    end-of-sequence token too, is the text's own. Rows that all begin or end alike are no rows of different lengths.

    Args:
        tokenizer: whose pad token is meant; without one nothing is refused.
        tokens: [batch, pos].
        what: what was asked, for the error.
        sides: where padding matters.

    Raises:
        LoopedError: some rows, not all, begin or end with pad tokens.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or tokens.ndim != 2 or tokens.is_floating_point() or len(tokens) < 2:
        return
    for side in sides:
        own = tokenizer.bos_token_id if side == "left" else tokenizer.eos_token_id
        at_edge = (tokens if side == "left" else tokens.flip(1)) == pad
        n_pads = at_edge.long().cumprod(1).sum(1)
        looks_padded = n_pads > (own == pad)
        if bool(looks_padded.any()) and not bool(looks_padded.all()):
            row = int(looks_padded.nonzero()[0])
            raise LoopedError(
                f"{what} was asked of tokens whose row {row} {'begins' if side == 'left' else 'ends'} with {int(n_pads[row])} "
                f"pad tokens ({pad}), and nothing says whether they are padding; pass the texts, or attention_mask= with 1 for "
                "real tokens, or rows of different lengths one by one."
            )


def counts_from_end(positions: Indices) -> bool:
    """Whether negative positions are among those asked for."""
    positions = plain(positions)
    if isinstance(positions, slice):
        return any(end is not None and end < 0 for end in (positions.start, positions.stop))
    return any(i < 0 for i in ([positions] if isinstance(positions, int) else positions or ()))


def real_positions(positions: Indices, mask: Mask, n_pos: int) -> Int[Tensor, "#batch chosen"]:
    """The columns of the chosen positions in every row; negative ones count from the row's own last real token.

    Args:
        positions: an int, a slice, several ints, or None for all columns, padding included.
        mask: which columns are real.
        n_pos: how many columns there are.

    Raises:
        OutOfRangeError: a position that a row does not have.
        LoopedError: a column that is padding in some row; positions that count from both ends.
    """
    positions = plain(positions)
    if mask is None or positions is None or positions == slice(None) or bool(mask.bool().all()):
        return torch.tensor([select_indices(positions, n_pos, "positions")], device="cpu")
    real = mask.bool().cpu()
    both_ends = f"positions={positions!r} was asked, which counts from both ends of padded rows; ask for each end by itself."
    if isinstance(positions, slice):
        start, stop = positions.start or 0, positions.stop
        if stop is not None and (start < 0) != (stop < 0):
            raise LoopedError(both_ends)
        asked = list(range(start, stop or 0, positions.step or 1) if start < 0 else range(n_pos)[positions])
    else:
        asked = [positions] if isinstance(positions, int) else list(positions)
    if counts_from_end(asked):
        if not all(i < 0 for i in asked):
            raise LoopedError(both_ends)
        shortest = int(real.sum(1).min())
        back = [i - shortest for i in select_indices(asked, shortest, "real positions in the shortest row")]
        return torch.stack([row.nonzero().flatten()[back] for row in real])
    chosen = select_indices(asked, n_pos, "positions")
    if not bool(real[:, chosen].all()):
        row = int((~real[:, chosen]).any(1).nonzero()[0])
        raise LoopedError(
            f"positions={positions!r} was asked, which is padding in row {row}; count from the end of rows (-1 is a row's last "
            "token), choose positions that every row has, or give rows of different lengths one by one."
        )
    return torch.tensor([chosen], device="cpu")


def real_mean(values: Float[Tensor, "batch pos *rest"], mask: Mask) -> Float[Tensor, "*rest"]:
    """The mean over rows and real positions.

    Args:
        values: [batch, pos, ...].
        mask: which positions are real.

    Raises:
        LoopedError: the values are those of other positions than the mask.
    """
    if mask is None:
        return values.mean((0, 1))
    if mask.shape != values.shape[:2]:
        raise LoopedError(
            f"a mean of {tuple(values.shape)} was asked, but the mask of its run is {tuple(mask.shape)}: it is not known which "
            "are padding; cache all positions, or rows of different lengths one by one."
        )
    return values[mask.bool().to(values.device)].mean(0)
