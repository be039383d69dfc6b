"""What every family must pass, whatever it computes; a new one is given to `check_family` with random parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.patching import patch_sweep


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def random_model(cfg: LoopedConfig, seed: int = 1) -> LoopedBridge:
    """A float64 bridge whose parameters are far from neutral, so that none can go unnoticed."""
    bridge, generator = LoopedBridge.from_config(cfg), torch.Generator().manual_seed(seed)
    for name, parameter in bridge.plain.canonical_parameters().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.data = 0.8 * noise / parameter.shape[-1] ** 0.5
        else:
            parameter.data = 0.3 * noise + (1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0)
    return bridge.to(torch.float64)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, :5].sum(-1) - logits[:, -2, 5:9].sum(-1)


@torch.no_grad()
def check_family(bridge: LoopedBridge, sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "z", "q", "v")) -> None:
    """Cached generation, patches of a run into itself, sweeps, and padding.

    Args:
        bridge: a model in float64.
        sites: what is swept.
    """
    tokens, other = torch.randint(0, bridge.cfg.d_vocab, (2, 2, 7), generator=torch.Generator().manual_seed(3))
    logits, cache = bridge.run_with_cache(tokens)
    if bridge.lacks("causal runs") is None:
        check_steps(bridge, tokens, logits)
    own = [(name, lambda x, hook: cache[hook.name].clone()) for name in dict.fromkeys(cache) if name in bridge.hook_dict]
    close(bridge.run_with_hooks(tokens, fwd_hooks=own), logits)
    for site in sites:
        check_sweep(bridge, other, cache, site)
    padded = torch.cat((torch.zeros_like(tokens[:, :3]), tokens), 1)
    mask = torch.cat((torch.zeros_like(tokens[:, :3]), torch.ones_like(tokens)), 1)
    close(bridge(padded, attention_mask=mask)[:, 3:], logits)


def check_steps(bridge: LoopedBridge, tokens: Tensor, logits: Tensor, sizes: Sequence[int] = (3, 1, 2, 1)) -> None:
    """A text run piece by piece, through a key-value cache, has the logits of the whole text."""
    state, steps = None, []
    for piece in tokens.split(list(sizes), dim=1):
        out = bridge.plain(piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        steps.append(out.logits)
    close(torch.cat(steps, dim=1), logits)


def check_sweep(bridge: LoopedBridge, tokens: Tensor, cache: Any, site: str) -> None:
    """Some cells of a sweep equal runs with one patch."""
    found = patch_sweep(bridge, tokens, cache, metric, site=site, axes=("loop", "layer", "pos"), verbose=False)
    hook = f"attn.hook_{site}" if site in ("q", "k", "v", "z") else f"hook_{site}"
    loops = [str(loop) for loop in found.labels["loop"]]
    for t, j, pos in ((0, 0, 2), (bridge.n_loops - 1, bridge.schedule.n_core - 1, 5), (1, 0, 6), (1, 1, 1)):
        name = f"loops.{t}.blocks.{j}.{hook}"

        def patch(x: Tensor, hook: Any, pos: int = pos, name: str = name) -> Tensor:
            x[:, pos] = cache[name][:, pos]
            return x

        expected = metric(bridge.run_with_hooks(tokens, fwd_hooks=[(name, patch)]))
        close(found.values[loops.index(str(t)), j, pos], expected)


@torch.no_grad()
def check_attribution(bridge: LoopedBridge, units: Sequence[Literal["component", "head"]] = ("component", "head")) -> None:
    """The contributions of all components add up to the logit (before a cap)."""
    tokens = torch.randint(0, bridge.cfg.d_vocab, (2, 7), generator=torch.Generator().manual_seed(4))
    _, cache = bridge.run_with_cache(tokens)
    for unit in units:
        for pos in (-1, None):
            values = cache.attribute_logits(tokens=7, unit=unit, positions=pos).values.sum(0)
            before = cache["unembed.hook_in"] @ bridge.W_U[:, 7]
            close(values, before[:, -1] if pos == -1 else before)
