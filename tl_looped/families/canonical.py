"""The package's own format: config.json holds the `LoopedConfig`, tensors carry the canonical names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kinds import table
from ..model.config import LoopedConfig
from ..model.parameters import parameter_shapes
from ._common import Shapes, Source
from ._read import need

TIED = ("embed.weight", "unembed.weight")
IGNORED = ()


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this was written by `save_model`."""
    return config.get("model_type") == "tl_looped"


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    return LoopedConfig.from_dict(need(config, "looped_config", table))


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]:
    """Where every parameter is stored: under its own name."""
    return {name: Source(name) for name, _ in parameter_shapes(cfg)}
