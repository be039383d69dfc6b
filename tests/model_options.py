"""Small configurations of the canonical model that together use every option of `LoopedConfig`, built and looked into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tl_looped.model import LoopedModel
from tl_looped.model.config import LoopedConfig
from tl_looped.model.layers import Block
from tl_looped.model.passes import PassEnds

SIZES: dict[str, Any] = {"d_model": 24, "n_heads": 3, "d_vocab": 29, "n_core": 2, "n_loops": 3, "d_mlp": 40, "n_ctx": 24}
FINAL_PASS_NORM = {"pass_norm": True, "final_norm": False}
NOISE = {"injection": "concat", "initial_state": "noise", "noise_std": 0.6}
EVERY_BIAS = ("q", "k", "v", "o", "gate", "in", "out", "attn_gate")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 16
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"n_kv_heads": 1, "tied": True},
    "ouro": {"norm": "sandwich", "exit_gate": True, "rope_theta": 1e6, **FINAL_PASS_NORM},
    "huginn": {"norm": "stream", **NOISE, "after_loop": "final_norm", "rope_layout": "pairs", "tied": True, "embed_scale": 4.9}
    | {"biases": ("q", "k"), "n_prelude": 1, "n_coda": 1, "noise_scale": 1.5},
    "retrofit_llama": {
        **NOISE,
        "n_heads": 6,
        "n_kv_heads": 2,
        "rope_scaling": LLAMA3,
        "n_prelude": 2,
        "n_coda": 1,
        "d_head": 8,
    },
    "retrofit_olmo": {
        "norm": "branch",
        **NOISE,
        "noise": "normal",
        "qk_norm": "flat",
        "n_kv_heads": 1,
        "n_prelude": 1,
        "n_coda": 2,
    },
    "hrm_text": {"l_cycles": 2, "n_loops": 2, "injection": "add", "initial_state": "learned", **FINAL_PASS_NORM}
    | {"norm_weight": False, "attn_gate": True, "prefix_lm": True, "embed_scale": 3.0},
    "parcae": {"mlp": "relu_squared", "injection": "decay", "initial_state": "noise", "noise_std": 0.3, "prelude_norm": True}
    | {"after_loop": "linear", "rope_layout": "pairs", "qk_norm": "after_rope", "n_prelude": 1, "n_coda": 1, "tied": True}
    | {"value_embed_layers": (1, 3), "value_gate_width": 5, "logit_softcap": 6.0},
    "nanbeige": {"d_head": 10, "n_kv_heads": 1, "act_fn": "gelu", **FINAL_PASS_NORM},
    "qwen3": {"qk_norm": "head", "windows": (3, None), "biases": EVERY_BIAS, "attn_gate": True, "act_fn": "gelu_tanh"},
    "anchored": {"strategy": "anchored", "anchor_steps": 3, "beta": 0.3, "n_prelude": 1, "n_coda": 1, "exit_gate": True},
    "nanochat": {"norm": "stream", "injection": "add", "prelude_norm": True, "pass_norm": True, "rope_layout": "none"}
    | {"windows": (4, 4, None), "n_coda": 1, "act_fn": "relu", "logit_softcap": 15.0},
    "decay": {"injection": "decay", "norm": "sandwich", "n_prelude": 2, "qk_norm": "head", "norm_eps": 1e-5, "n_loops": 4}
    | {"qk_norm_eps": 1e-3},
    "dory": {"norm": "sandwich", "norm_kind": "l2", "norm_weight": False, "inner_norm": True, "residual": "interpolate"}
    | {"qk_norm": "head", "qk_norm_weight": False, "query_gain": True, "attn_gate": True, "windows": (3, None, 3)}
    | {"rope_theta_windowed": 50.0, "injection": "add", "prelude_norm": True, "entry_norm": True, "n_prelude": 1},
    "gpt": {"mlp": "plain", "act_fn": "gelu", "learned_positions": True, "norm_eps": None, "biases": ("q", "o", "in")}
    | {"rope_layout": "none", "n_prelude": 1, "tied": True},
    "bf16 angles": {"rope_precision": "bfloat16"},
    "loopus": {"loop": "gated", "options": {"gate_rank": 3}, "exit_gate": True, "n_prelude": 1, "qk_norm": "head"},
}
EVERY = pytest.mark.parametrize("name", OPTIONS)


def config(name: str, **changes: Any) -> LoopedConfig:
    return LoopedConfig(family=name, **{**SIZES, **OPTIONS[name], **changes})


def build(cfg: LoopedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoopedModel:
    """A model with parameters of trained size: matrices that keep the scale, gains and biases away from 1 and 0."""
    model, generator = LoopedModel(cfg), torch.Generator().manual_seed(seed)
    for name, parameter in model.canonical_parameters().items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 2:
            noise *= 1.2 / parameter.shape[1] ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.25 * noise
        else:
            noise *= 0.3
        model.set_parameter(name, nn.Parameter(noise.to(dtype)))
    return model.eval()


def tokens_for(cfg: LoopedConfig, batch: int = 2, pos: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(cfg.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))


def blocks(model: LoopedModel) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def passes(model: LoopedModel) -> list[PassEnds]:
    return [ends for ends in model.passes if isinstance(ends, PassEnds)]


@contextmanager
def hooked(*pairs: tuple[nn.Module, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Run functions on the outputs of modules; what they return, if anything, takes the place of the output."""
    handles = [module.register_forward_hook(lambda _m, _i, out, f=f: f(out)) for module, f in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def close(got: Tensor, wanted: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)


def injections(model: LoopedModel, tokens: Tensor) -> list[Tensor | None]:
    """What every pass injects."""
    found: list[Tensor | None] = [None] * len(model.passes)
    if model.cfg.injection != "none":

        def keep(index: int) -> Callable[[Tensor], None]:
            return lambda out: found.__setitem__(index, out)

        with hooked(*((ends.hook_injection, keep(i)) for i, ends in enumerate(passes(model)))):
            model(tokens)
    return found
