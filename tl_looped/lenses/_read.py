"""What the logits of many states say, block by block of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..looped import WayOut

# Tokens per block of logits: wide enough for an efficient product, so that a larger chunk takes more rows instead.
VOCAB_CHUNK = 2**14


class FlatReadout(NamedTuple):
    """The fields of a `Readout`, for the states of every row in one long list."""

    log_probs: Float[Tensor, "row state target"]
    ranks: Int[Tensor, "row state target"]
    entropy: Float[Tensor, "row state"]
    top_tokens: Int[Tensor, "row state k"]
    top_log_probs: Float[Tensor, "row state k"]
    kl: Float[Tensor, "row state"]


def read(
    out: WayOut,
    d_vocab: int,
    hidden: Float[Tensor, "row ... d_model"],
    targets: Int[Tensor, "state target"],
    top_k: int,
    chunk_size: int,
) -> FlatReadout:
    """Unembed states block by block of the vocabulary and keep what was asked.

    Args:
        out: the way out of the model.
        d_vocab: the size of its vocabulary.
        hidden: what `run` returned, [row, ..., d_model].
        targets: the tokens asked about at every state, in all rows alike, [state, target].
        top_k: how many of the most probable tokens to keep.
        chunk_size: how many logits to hold at once.
    """
    x = hidden.reshape(len(hidden), -1, hidden.shape[-1])
    width = min(d_vocab, VOCAB_CHUNK, max(1, chunk_size // len(x)))
    states = max(1, chunk_size // (width * len(x)))
    chunks = zip(x.split(states, 1), targets.split(states), strict=True)
    parts = [_read_states(out, d_vocab, some, asked, top_k, width) for some, asked in chunks]
    return FlatReadout(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def _read_states(
    out: WayOut,
    d_vocab: int,
    x: Float[Tensor, "row state d_model"],
    targets: Int[Tensor, "state target"],
    top_k: int,
    width: int,
) -> FlatReadout:
    """All rows of some states, side by side: the last row is what the others are compared with."""
    shape, wide = x.shape[:2], torch.promote_types(x.dtype, torch.float32)
    x, targets = x.flatten(0, 1), targets.repeat(len(x), 1)
    starts = range(0, d_vocab, width)
    # A target's logit comes from the same product as the logits it is compared with; another kernel may round differently.
    target_logits = torch.empty(targets.shape, dtype=wide, device=x.device)
    for start in starts:
        inside = (targets >= start) & (targets < start + width)
        if inside.any():
            block = out.logits(x, start, width)
            picked = block.gather(1, (targets - start).clamp(0, block.shape[1] - 1))
            target_logits = torch.where(inside, picked, target_logits)
    ranks = torch.zeros_like(targets)
    peak = torch.full((len(x), 1), -torch.inf, dtype=wide, device=x.device)
    mass = moment = torch.zeros_like(peak)  # sums of exp(logit - peak), alone and times (logit - peak)
    apart = peak.new_zeros(shape)  # sums over the last row's exp(logit - peak) times (its logit - this row's)
    top, top_ids = peak[:, :0], targets.new_empty(len(x), 0)
    for start in starts:
        block = out.logits(x, start, width)
        for t in range(targets.shape[1]):
            ranks[:, t] += (block > target_logits[:, t : t + 1]).sum(1)
        best, best_ids = block.topk(min(top_k, block.shape[1]))
        top, order = torch.cat((top, best), 1).topk(min(top_k, top.shape[1] + best.shape[1]))
        top_ids = torch.cat((top_ids, best_ids + start), 1).gather(1, order)
        highest = torch.maximum(peak, best[:, :1])
        if start:  # what was summed so far, relative to the new peak
            shift = peak - highest
            mass, moment = shift.exp() * mass, shift.exp() * (moment + shift * mass)
            apart = apart * shift.exp().view(shape)[-1]
        rows = block.view(*shape, -1)
        last = (rows[-1] - highest.view(*shape, 1)[-1]).exp()
        apart = apart + torch.stack([(last * (rows[-1] - row)).sum(-1) for row in rows])
        block = block - highest
        weights = block.exp()
        mass, moment = mass + weights.sum(1, keepdim=True), moment + (weights * block).sum(1, keepdim=True)
        peak = highest
    total = peak + mass.log()
    entropy = (mass.log() - moment / mass).squeeze(1).clamp(min=0)
    totals = total.view(shape)
    kl = (apart / mass.view(shape)[-1] - totals[-1] + totals).clamp(min=0)
    found = target_logits - total, ranks, entropy, top_ids, top - total
    return FlatReadout(*(part.unflatten(0, shape) for part in found), kl=kl)
