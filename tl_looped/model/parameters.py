"""The parameters of a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .config import LoopedConfig
from .loops import loop_of
from .norms import norm_of
from .passes import PASS_NAMES

Shape = tuple[int, ...]


def parameter_shapes(cfg: LoopedConfig) -> Iterator[tuple[str, Shape]]:
    """Canonical name and shape of every distinct parameter, one after the other, so that a caller may stop early.

    `LoopedModel(cfg).canonical_parameters()` has the same; building a model takes time and memory, which a config.json that
    does not fit its tensors must not cost.

    Args:
        cfg: the structure; the number of loops matters with `own_layers` alone.

    Example:
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=10**9, n_loops=3)
        >>> next(parameter_shapes(cfg))
        ('embed.weight', (10, 8))
    """
    with torch.device("meta"):
        loop, blocks = loop_of(cfg), dict[object, list[tuple[str, Shape]]]()
        around: dict[str, nn.Module] = {PASS_NAMES.get(n, n): part for n, part in loop.pass_parts(is_last=False).items()}
        around |= loop.model_parts()
        around["pass_norm" if cfg.pass_norm_is_final else "ln_final"] = norm_of(cfg)
        if cfg.prelude_norm:
            around["prelude_norm"] = norm_of(cfg)
        if cfg.after_loop == "linear":
            around["after_loop"] = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
    yield "embed.weight", (cfg.d_vocab, cfg.d_model)
    if cfg.learned_positions:
        yield "embed.positions", (cfg.n_ctx, cfg.d_model)
    if not cfg.tied:
        yield "unembed.weight", (cfg.d_vocab, cfg.d_model)
    if cfg.initial_state == "learned":
        yield "learned_state", (cfg.d_model,)
    for name, part in around.items():
        for at in [f"{name}.loops.{t}" for t in range(cfg.n_loops)] if name in loop.own_ends else [name]:
            yield from _named(at, _shapes(part))
    physical = 0
    for stack, n_layers in cfg.schedule.stacks.items():
        for j in range(n_layers):
            if (kind := loop.alike(physical)) not in blocks:
                with torch.device("meta"):
                    blocks[kind] = _shapes(loop.block(physical))
            for t, at in enumerate(cfg.layer_names(stack, j)):
                for name, shape in _named(at, blocks[kind]):
                    if not t or cfg.shared_name(name) == name:
                        yield cfg.shared_name(name), shape
            if physical in cfg.value_embed_layers:
                yield f"value_embeds.{physical}.weight", (cfg.d_vocab, cfg.n_kv_heads * cfg.d_head)
            physical += 1


def _shapes(module: nn.Module) -> list[tuple[str, Shape]]:
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


def _named(at: str, parts: list[tuple[str, Shape]]) -> Iterator[tuple[str, Shape]]:
    return ((f"{at}.{part}", shape) for part, shape in parts)
