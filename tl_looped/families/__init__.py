"""One file per checkpoint family: what a checkpoint computes, and where its parameters are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from ..config import LoopedConfig
from ..errors import CheckpointError
from . import canonical, hrm_text, huginn, llama, nanbeige, ouro, parcae, retrofit
from ._common import Shapes, Source

__all__ = ["Family", "Source", "detect"]


@runtime_checkable
class Family(Protocol):
    """What a family file provides.

    `TIED` names the two copies of a tied embedding; `IGNORED` are patterns of tensors that hold nothing the model reads.
    """

    @property
    def TIED(self) -> tuple[str, str]: ...

    @property
    def IGNORED(self) -> tuple[str, ...]: ...

    def matches(self, config: Mapping[str, Any], shapes: Shapes) -> bool: ...

    def looped_config(self, config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig: ...

    def sources(self, cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source]: ...


_FAMILIES: tuple[Family, ...] = (canonical, ouro, huginn, retrofit, hrm_text, nanbeige, parcae, llama)


def detect(config: Mapping[str, Any], shapes: Shapes) -> Family:
    """The family of a checkpoint, from its config.json and the shapes of its tensors.

    Raises:
        CheckpointError: no family knows it.
    """
    for family in _FAMILIES:
        if family.matches(config, shapes):
            return family
    raise CheckpointError(
        f"this checkpoint has model_type={config.get('model_type')!r} and architectures={config.get('architectures')!r}, "
        "which no family knows; known looped families are ouro, huginn, retrofit, hrm_text, parcae, nanbeige and tl_looped's "
        f"own format. The layers of an ordinary decoder ({', '.join(llama.MODEL_TYPES)}) can be looped with "
        "LoopedBridge.loop_layers."
    )
