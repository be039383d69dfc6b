"""The parameters of a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import LoopedConfig

Shape = tuple[int, ...]


def parameter_shapes(cfg: LoopedConfig) -> Iterator[tuple[str, Shape]]:
    """Canonical name and shape of every distinct parameter, one after the other, so that a caller may stop early.

    `LoopedModel(cfg).canonical_parameters()` has the same; building a model takes time and memory, which a config.json that
    does not fit its tensors must not cost.

    Args:
        cfg: the structure; the number of loops does not matter.

    Example:
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=10**9, n_loops=3)
        >>> next(parameter_shapes(cfg))
        ('embed.weight', (10, 8))
    """
    width, kv_width = cfg.d_model, cfg.n_kv_heads * cfg.d_head
    norm = [("weight", (width,))] if cfg.norm_weight else []
    yield "embed.weight", (cfg.d_vocab, width)
    if not cfg.tied:
        yield "unembed.weight", (cfg.d_vocab, width)
    yield from _named("pass_norm" if cfg.pass_norm_is_final else "ln_final", norm)
    if cfg.pass_norm and not cfg.pass_norm_is_final:
        yield from _named("pass_norm", norm)
    if cfg.prelude_norm:
        yield from _named("prelude_norm", norm)
    if cfg.initial_state == "learned":
        yield "learned_state", (width,)
    if cfg.injection == "concat":
        yield "inject.weight", (width, 2 * width)
    elif cfg.injection == "decay":
        yield from _named("inject", [("A_log", (width,)), ("dt_bias", (width,)), ("B", (width, width))])
    if cfg.exit_gate:
        yield from _named("exit_gate", [("weight", (1, width)), ("bias", (1,))])
    if cfg.after_loop == "linear":
        yield "after_loop.weight", (width, width)
    block, value_embed_layers, physical = list(_block(cfg)), set(cfg.value_embed_layers), 0
    for stack, n_layers in cfg.schedule.stacks.items():
        for j in range(n_layers):
            yield from _named(f"{stack}.{j}", block)
            if physical in value_embed_layers:
                yield f"{stack}.{j}.attn.value_gate.weight", (cfg.n_kv_heads, cfg.value_gate_width)
                yield f"value_embeds.{physical}.weight", (cfg.d_vocab, kv_width)
            physical += 1


def _block(cfg: LoopedConfig) -> Iterator[tuple[str, Shape]]:
    """The parameters that every block has."""
    width, q_width, kv_width = cfg.d_model, cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    matrices = {
        "attn.q": ("q", q_width, width),
        "attn.k": ("k", kv_width, width),
        "attn.v": ("v", kv_width, width),
        "attn.o": ("o", width, q_width),
        **({"attn.gate": ("attn_gate", q_width, width)} if cfg.attn_gate else {}),
        **({"mlp.gate": ("gate", cfg.d_mlp, width)} if cfg.mlp == "gated" else {}),
        "mlp.up": ("in", cfg.d_mlp, width),
        "mlp.down": ("out", width, cfg.d_mlp),
    }
    for name, (bias, rows, columns) in matrices.items():
        yield f"{name}.weight", (rows, columns)
        if bias in cfg.biases:
            yield f"{name}.bias", (rows,)
    if cfg.qk_norm in ("head", "flat"):
        yield "attn.q_norm.weight", (q_width if cfg.qk_norm == "flat" else cfg.d_head,)
        yield "attn.k_norm.weight", (kv_width if cfg.qk_norm == "flat" else cfg.d_head,)
    kinds = {"ln{}": ("pre", "sandwich", "stream"), "ln{}_post": ("branch", "sandwich"), "ln{}_stream": ("stream",)}
    for name, having in kinds.items():
        if cfg.norm_weight and cfg.norm in having:
            yield from ((f"{name.format(i)}.weight", (width,)) for i in (1, 2))


def _named(at: str, parts: list[tuple[str, Shape]]) -> Iterator[tuple[str, Shape]]:
    return ((f"{at}.{part}", shape) for part, shape in parts)
