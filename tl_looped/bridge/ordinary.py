"""Ordinary decoders beside looped models: one loop over all of their layers, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    device_map: checkpoints.DeviceMap | None = None,
) -> LoopedBridge:
    """Load a looped checkpoint, or a Llama-shaped decoder as one loop over all of its layers.

    Args:
        name_or_dir: as in `LoopedBridge.from_pretrained`.
        revision: branch, tag or commit on the Hub.
        device: None for CUDA where there is one, else the CPU.
        dtype: None for the one the checkpoint is stored in.
        device_map: instead of `device`, as in `LoopedBridge.from_pretrained`.

    Raises:
        CheckpointError: as in `LoopedBridge.from_pretrained`.
    """
    if device is None and device_map is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where: dict[str, Any] = {"device": device, "device_map": device_map, "dtype": dtype}
    try:
        return LoopedBridge.from_pretrained(name_or_dir, revision=revision, **where)
    except CheckpointError:
        checkpoint = checkpoints.open_checkpoint(name_or_dir, revision)
        if not families.llama.matches(checkpoint.config, checkpoint.shapes) or checkpoint.path is None:
            raise
    n_layers = stored_layers(checkpoint.shapes, "model.layers.")
    cfg = families.read(families.llama, checkpoint.config, checkpoint.shapes, start=0, stop=n_layers, n_loops=1)
    model = checkpoints.load_model(checkpoint, cfg=cfg, **where)
    bridge = LoopedBridge(model, checkpoints.load_tokenizer(checkpoint.path), str(name_or_dir))
    bridge.made_for = 1
    return bridge
