"""Neurons that raise or lower few tokens, by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import LoopedError
from ..looped import Hooked, Looped, require
from ..results import Grid
from ._streaming import check_bridge


def output_neurons(model: Hooked, *, kurtosis: float = 10.0) -> Grid:
    """The share of prediction and of suppression neurons in every layer, from the weights alone (arXiv 2401.12181, 2406.19384).

    A neuron writes `W_U w_out` to the logits, with the weights of the last norm and of the norm on the MLP's output applied. It
    raises few tokens (prediction) if this has a high excess kurtosis over the vocabulary and a positive skew, and lowers few
    (suppression) if the skew is negative. Weights know no loops: there is one value per layer, whatever the number of passes.

    Args:
        model: a looped model, or any TransformerBridge to compare it with.
        kurtosis: the least excess kurtosis (0 for a normal distribution); the paper gives none, 10 is our choice.

    Returns:
        Axes (kind, layer).

    Raises:
        LoopedError: the unembedding was processed.
    """
    check_bridge(model)
    if isinstance(kurtosis, bool) or not isinstance(kurtosis, (int, float)):
        raise LoopedError(f"kurtosis={kurtosis!r} was asked; pass a number.")
    parts: Any = model  # weights, which no other tool asks for
    if isinstance(model, Looped):
        require(model, "neurons", "the share of neurons")
        layers: dict[str, int] = {}
        for i, site in enumerate(model.schedule.sites):
            layers.setdefault(parts.plain.layer_name(site), i)
    else:
        layers = {f"blocks.{i}": i for i in range(model.cfg.n_layers)}
    if getattr(model, "_weights_processed", False):
        raise LoopedError("the weights of this model were processed, so its norms hold other weights; use it before that.")
    unembed = parts.W_U.detach().float()
    unembed = unembed * _weight(model, "ln_final", unembed)[:, None]
    shares = []
    for i in layers.values():
        block = parts.blocks[i]
        writes = block.mlp.W_out.detach().float()
        writes = (writes * _weight(block, "ln2_post", writes)).to(unembed.device)
        prediction = suppression = 0
        for some in writes.split(256):  # [neuron, d_model]; a block of neurons at a time has all the vocabulary
            x = some @ unembed
            x = x - x.mean(-1, keepdim=True)
            std = x.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
            x = x / std
            sharp, skew = x.pow(4).mean(-1) - 3 >= kurtosis, x.pow(3).mean(-1)
            prediction += int((sharp & (skew > 0)).sum())
            suppression += int((sharp & (skew < 0)).sum())
        shares.append([prediction / len(writes), suppression / len(writes)])
    labels = {"kind": ["prediction", "suppression"], "layer": list(layers)}
    return Grid(torch.tensor(shares, dtype=torch.float64, device="cpu").T, ("kind", "layer"), labels, "share of neurons")


def _weight(owner: Any, norm: str, like: Tensor) -> Tensor:
    """The weight of a norm, or 1 for every direction."""
    weight = getattr(getattr(owner, norm, None), "weight", None)
    return like.new_ones(1) if not isinstance(weight, Tensor) else weight.detach().to(like.device).float()
