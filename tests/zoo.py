"""Small random models of the structure of every family, with grouped keys, odd head numbers and uneven stacks.

And the golden checkpoints, with some keys of their configs changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.checkpoints import MemoryCheckpoint

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = sorted(path.name for path in GOLDEN.iterdir())
SMALL = {"d_model": 24, "n_heads": 3, "d_head": 8, "d_mlp": 20, "d_vocab": 31, "n_ctx": 32}

ZOO = {
    "ouro": LoopedConfig(
        **SMALL, n_core=2, n_loops=3, norm="sandwich", pass_norm=True, final_norm=False, exit_gate=True, family="ouro"
    ),
    "huginn": LoopedConfig(
        **SMALL, n_core=3, n_loops=3, n_prelude=2, n_coda=1, norm="stream", injection="concat", initial_state="noise",
        noise_std=0.1, noise_scale=5.0, embed_scale=5.0, after_loop="final_norm", rope_layout="pairs", tied=True,
        biases=("q", "k"), family="huginn",
    ),
    "retrofit_llama": LoopedConfig(
        **SMALL, n_core=2, n_loops=3, n_prelude=1, n_coda=2, n_kv_heads=1, injection="concat", initial_state="noise",
        noise_std=0.1, family="retrofit",
    ),
    "retrofit_olmo": LoopedConfig(
        **SMALL, n_core=2, n_loops=2, n_prelude=1, n_coda=1, norm="branch", qk_norm="flat", injection="concat",
        initial_state="noise", noise_std=0.1, family="retrofit",
    ),
    "hrm_text": LoopedConfig(
        **SMALL, n_core=2, n_loops=2, l_cycles=2, norm_weight=False, attn_gate=True, pass_norm=True, final_norm=False,
        injection="add", initial_state="learned", prefix_lm=True, embed_scale=4.0, family="hrm_text",
    ),
    "nanbeige": LoopedConfig(**SMALL, n_core=2, n_loops=3, n_kv_heads=1, pass_norm=True, final_norm=False, family="nanbeige"),
    "parcae": LoopedConfig(
        **SMALL, n_core=2, n_loops=3, n_prelude=2, n_coda=2, mlp="relu_squared", qk_norm="after_rope", injection="decay",
        initial_state="noise", noise_std=0.1, prelude_norm=True, after_loop="linear", rope_layout="pairs",
        value_embed_layers=(1, 3, 5), value_gate_width=8, tied=True, logit_softcap=9.0, family="parcae",
    ),
    "looped_qwen": LoopedConfig(
        **SMALL, n_core=2, n_loops=3, n_prelude=1, n_coda=1, n_kv_heads=1, qk_norm="head", biases=("q", "k", "v"),
        windows=(None, 3, None, 4), family="llama",
    ),
    "dory": LoopedConfig(
        **SMALL, n_core=2, n_loops=3, n_prelude=1, n_coda=1, n_kv_heads=1, norm="sandwich", norm_kind="l2", norm_weight=False,
        inner_norm=True, residual="interpolate", qk_norm="head", qk_norm_weight=False, query_gain=True, attn_gate=True,
        windows=(3, None, 3, None), rope_theta_windowed=100.0, injection="add", prelude_norm=True, entry_norm=True,
        family="dory",
    ),
    "loopus": LoopedConfig(
        **SMALL, n_core=2, n_loops=3, n_prelude=1, n_coda=1, loop="gated", options={"gate_rank": 3}, exit_gate=True,
        family="loopus",
    ),
    "anchored": LoopedConfig(
        **SMALL, n_core=2, n_loops=3, n_prelude=1, n_coda=1, strategy="anchored", anchor_steps=3, family="llama"
    ),
}  # fmt: skip

# All that differ in structure: Nanbeige has part of what Ouro has, the retrofitted Llama of what Huginn has.
STRUCTURES = sorted(ZOO.keys() - {"nanbeige", "retrofit_llama"})
FAMILIES = pytest.mark.parametrize("name", STRUCTURES)
FEW = ("ouro", "huginn", "hrm_text", "dory")  # one for each kind of stream and of loop


def slow_but(chosen: Iterable[str], names: Iterable[str] = STRUCTURES) -> list[Any]:
    """Names as parameters, all slow but those that the default suite looks at."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Golden checkpoints; those whose structure a random model above has too are slow.
PUBLISHED = slow_but(set(CHECKPOINTS) - ZOO.keys(), CHECKPOINTS)


def random_bridge(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> LoopedBridge:
    """A bridge whose parameters are all different from their usual initial values, so that none can go unnoticed."""
    bridge = LoopedBridge.from_config(ZOO[name].replace(**changes))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in bridge.original_model.canonical_parameters().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2 and "embed" not in key:
            parameter.data = 1.2 * noise / parameter.shape[-1] ** 0.5
        else:
            parameter.data = 0.3 * noise + (1.0 if key.endswith("weight") and parameter.ndim == 1 else 0.0)
    return bridge if dtype == torch.float32 else bridge.to(dtype)  # a conversion looks at every module


@functools.cache
def _made(name: str, dtype: torch.dtype) -> tuple[LoopedBridge, dict[str, Any]]:
    bridge = random_bridge(name, dtype)
    return bridge, _condition(bridge)


def _bits(parameter: torch.Tensor) -> int:
    return hash(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())


def _condition(bridge: LoopedBridge) -> dict[str, Any]:
    """What a test might leave changed."""
    parameters = bridge.original_model.canonical_parameters().values()
    return {
        "hooks": [name for name, point in bridge.hook_dict.items() if point.has_hooks()],
        "parameters": [(id(p), _bits(p), p.requires_grad, p.grad is None) for p in parameters],
        "settings": {name: str(value) for name, value in vars(bridge.cfg).items()},
        "others": (bridge.exit_policy, bridge.tokenizer, bridge.context_level, bridge.training, sorted(bridge.hook_dict)),
    }


_lent: set[tuple[str, torch.dtype]] = set()


def shared_bridge(name: str, dtype: torch.dtype = torch.float32) -> LoopedBridge:
    """`random_bridge(name, dtype)`, made once, for the tests that leave it as it was; each is looked at when it ends."""
    _lent.add((name, dtype))
    return _made(name, dtype)[0]


def changed_bridges() -> list[str]:
    """What the test that ends has changed in shared bridges."""
    lent = [(key, *_made(*key)) for key in sorted(_lent, key=str)]
    _lent.clear()
    found = [
        f"{what} of {key[0]}"
        for key, bridge, before in lent
        for what, value in _condition(bridge).items()
        if value != before[what]
    ]
    if found:
        _made.cache_clear()  # the next test gets new ones
    return found


def random_tokens(batch: int = 2, pos: int = 7, seed: int = 0) -> torch.Tensor:
    """Tokens of the zoo's vocabulary, [batch, pos]."""
    return torch.randint(0, SMALL["d_vocab"], (batch, pos), generator=torch.Generator().manual_seed(seed))


@functools.cache
def golden_tensors(checkpoint: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / checkpoint / "model.safetensors")


def with_config(checkpoint: str, **changes: Any) -> MemoryCheckpoint:
    """A golden checkpoint with some keys of its config.json changed."""
    config = json.loads((GOLDEN / checkpoint / "config.json").read_text())
    for file in (GOLDEN / checkpoint).glob("*.yaml"):
        config[file.name] = yaml.safe_load(file.read_text())
    return MemoryCheckpoint(config | changes, golden_tensors(checkpoint))
