"""looped_nanochat: norms on the stream, the prelude's output joined to the state at every pass.

Its angles are rounded to bfloat16 in every dtype, and every layer has a window: layers of the kind "L" look back a whole
training sequence, those of the kind "S" half of one. Its own generation keeps the keys of one loop for all of them unless it is
told otherwise, and starts every token from the state that the last token ended in; here every loop has its own keys, which is
what a run without a cache computes, and `initial_state=` says where a run starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..kinds import choice, count, number, optional, text
from ..model.config import LoopedConfig
from ._common import Computed, Shapes, Source, layers, modules
from ._read import get, need, unused

TIED = ("transformer.wte.weight", "lm_head.weight")
IGNORED = ("cos", "sin")
_MODES = ("inject_init_prelude", "inject_init_random", "passthrough")
_STACKS = {"prelude": "prelude", "core": "recur", "coda": "coda"}
_NORMS = {"ln1": "n1", "ln1_stream": "n2", "ln2": "n3", "ln2_stream": "n4"}
_BLOCK = {**_NORMS, "attn.v": "attn.c_v", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc"}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this is looped_nanochat."""
    return config.get("model_type") == "looped_nanochat"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    unused(config, "size train_recur_max bptt_k")
    mode = get(config, "input_injection", _MODES[0], choice(*_MODES))
    length = need(config, "sequence_len", count())
    pattern = get(config, "window_pattern", "L", text).upper()
    if not pattern or set(pattern) - set("LS"):
        raise CheckpointError(
            f"config.json has window_pattern={pattern!r}; it is made of L (long) and S (short), such as 'SSSL'."
        )
    counts = [need(config, key, count(least)) for key, least in (("n_prelude", 0), ("n_recur_block", 1), ("n_coda", 0))]
    kinds = [pattern[i % len(pattern)] for i in range(sum(counts) - 1)] + ["L"]
    width = need(config, "n_embd", count())
    return LoopedConfig(
        family="looped_nanochat",
        n_prelude=counts[0],
        n_core=counts[1],
        n_coda=counts[2],
        n_loops=max(1, int(need(config, "train_recur_mean", number(above=True)))),
        d_model=width,
        n_heads=need(config, "n_head", count()),
        n_kv_heads=need(config, "n_kv_head", count()),
        d_vocab=need(config, "vocab_size", count()),
        n_ctx=10 * length,  # so many positions have angles
        windows=tuple(length + 1 if kind == "L" else length // 2 + 1 for kind in kinds),
        norm="stream",
        qk_norm="after_rope",
        qk_norm_eps=1e-6,
        rope_precision="bfloat16",
        mlp="relu_squared",
        injection="none" if mode == "passthrough" else "concat",
        initial_state="noise" if mode == "inject_init_random" else "embedding",
        noise="normal",
        noise_std=width**-0.5,
        pass_norm=True,
        exit_gate="exit_gate.proj.weight" in shapes,
        logit_softcap=get(config, "logit_softcap", None, optional(number(above=True))),
    )


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source | Computed]:
    """Where every parameter is stored; rows of the tables beyond the vocabulary are padding."""
    width = cfg.d_model
    padded = -(-cfg.d_vocab // 64) * 64
    table = {"pass_norm": "norm_recur", "ln_final": "norm_final"}
    found: dict[str, Source | Computed] = {
        # The norm of a row depends on the token alone.
        "embed.weight": Computed(
            lambda wte, weight: F.rms_norm(wte[: cfg.d_vocab], (width,), weight, eps=1e-6),
            {"transformer.wte.weight": (padded, width), "norm_emb.weight": (width,)},
        ),
        "unembed.weight": Computed(lambda head: head[: cfg.d_vocab], {"lm_head.weight": (padded, width)}),
    }
    if cfg.injection == "concat":  # it has the prelude's output first
        found["inject.weight"] = Computed(lambda weight: weight.roll(width, 1), {"inject.weight": (width, 2 * width)})
    if cfg.exit_gate:
        found |= {f"exit_gate.{leaf}": Source(f"exit_gate.proj.{leaf}") for leaf in ("weight", "bias")}
    for at, stack, j, _ in layers(cfg):
        stored = f"transformer.{_STACKS[stack]}.{j}"
        table |= {f"{at}.{ours}": f"{stored}.{theirs}" for ours, theirs in _BLOCK.items()}
        for part, n_heads in (("q", cfg.n_heads), ("k", cfg.n_kv_heads)):
            shape = {f"{stored}.attn.c_{part}.weight": (n_heads * cfg.d_head, width)}
            found[f"{at}.attn.{part}.weight"] = Computed(_with_halves_exchanged(n_heads), shape)
        shape = {f"{stored}.mlp.c_proj.weight": (width, cfg.d_mlp)}
        found[f"{at}.mlp.down.weight"] = Computed(lambda weight: 2 * weight, shape)  # the square is halved here
    return {**modules(cfg, table), **found}


def _with_halves_exchanged(n_heads: int) -> Callable[[Tensor], Tensor]:
    """Its rotation runs backwards; with the two halves of every head exchanged it runs forwards, with the same scores."""
    return lambda weight: weight.unflatten(0, (n_heads, 2, -1)).flip(1).flatten(0, 2)
