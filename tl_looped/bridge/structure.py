"""What a bridge knows of the model that it wraps: its structure, the order of its layers, its dtype and device."""

from __future__ import annotations

from typing import Any, cast

from transformer_lens.model_bridge import TransformerBridge

from ..kinds import plain
from ..model import LoopedModel
from ..model.config import LoopedConfig
from ..schedule import Schedule


class StructuredBridge(TransformerBridge):
    """The part of a `LoopedBridge` that knows its model."""

    looped_cfg: LoopedConfig

    @property
    def schedule(self) -> Schedule:
        """The order in which the layers run."""
        return self.looped_cfg.schedule

    @property
    def n_loops(self) -> int:
        """Number of loops (of H cycles for HRM-Text)."""
        return self.looped_cfg.n_loops

    @property
    def plain(self) -> LoopedModel:
        """The model that is wrapped, in plain PyTorch; hooks on the bridge act in it too."""
        return cast(LoopedModel, self.original_model)

    @property
    def cfg(self) -> Any:
        """TransformerLens's config; dtype and device are those of the parameters, which another unroll may have moved."""
        cfg, weight = self.__dict__["cfg"], self.plain.embed.weight
        if cfg.dtype != weight.dtype or cfg.device != str(weight.device):
            cfg.dtype, cfg.device = weight.dtype, str(weight.device)
        return cfg

    @cfg.setter
    def cfg(self, value: Any) -> None:
        self.__dict__["cfg"] = value

    def _stop(self, stop_at_layer: int) -> int:
        stop = plain(stop_at_layer)
        return stop if stop == self.schedule.n_layers else self.schedule.layer(stop)
