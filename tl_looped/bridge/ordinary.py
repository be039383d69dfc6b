"""Ordinary decoders beside looped models: one loop over all of their layers, for comparison."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import checkpoints, families
from ..errors import CheckpointError
from ..families._common import stored_layers
from .looped_bridge import LoopedBridge


def looped_or_ordinary(
    name_or_dir: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LoopedBridge:
    """Load a looped checkpoint, or a Llama-shaped decoder as one loop over all of its layers.

    Args:
        name_or_dir: as in `LoopedBridge.from_pretrained`.
        revision: branch, tag or commit on the Hub.
        device: None for CUDA where there is one, else the CPU.
        dtype: None for the one the checkpoint is stored in.

    Raises:
        CheckpointError: as in `LoopedBridge.from_pretrained`.
    """
    try:
        return LoopedBridge.from_pretrained(name_or_dir, revision=revision, device=device, dtype=dtype)
    except CheckpointError:
        checkpoint = checkpoints.open_checkpoint(name_or_dir, revision)
        if not families.llama.matches(checkpoint.config, checkpoint.shapes) or checkpoint.path is None:
            raise
    n_layers = stored_layers(checkpoint.shapes, "model.layers.")
    cfg = families.read(families.llama, checkpoint.config, checkpoint.shapes, start=0, stop=n_layers, n_loops=1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoints.load_model(checkpoint, device=device, dtype=dtype, cfg=cfg)
    bridge = LoopedBridge(model, checkpoints.load_tokenizer(checkpoint.path), str(name_or_dir))
    bridge.made_for = 1
    return bridge
