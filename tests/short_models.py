"""Models of the zoo of few layers, for tools of TransformerLens that take one run a cell."""

from __future__ import annotations

import torch
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge

SHORT = {
    "ouro": {"n_loops": 2},
    "huginn": {"n_core": 1, "n_loops": 2, "n_prelude": 1},
    "hrm_text": {"n_core": 1, "l_cycles": 1},
    "looped_qwen": {"n_core": 1, "n_loops": 2, "windows": (None, 2, None)},
    "parcae": {"n_core": 1, "n_loops": 2, "n_prelude": 1, "n_coda": 1, "value_embed_layers": (0, 1)},
}
CLEAN, CORRUPTED = random_tokens(1, 3, seed=1), random_tokens(1, 3)


def short(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> LoopedBridge:
    return random_bridge(name, dtype, **{**SHORT[name], **changes})


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, :5].sum() - logits[0, -2, 5:9].sum()
