"""One file per checkpoint family: what a checkpoint computes, and where its parameters are stored.

A family from outside the package is a module or an object with the attributes of `Family`, made known by `register`. The
functions that the family files of the package are written with are here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from ..errors import LoopedError, UnknownFamilyError
from ..kinds import choice, count, flag, number, optional, several, shown, table, text
from ..model.config import LoopedConfig
from . import canonical, llama
from ._common import Computed, Shapes, Source, activation, attention_rows, fused, layers, mlp_rows, modules, readout, rope
from ._read import Recorded, get, need, only, unused
from .table import TABLE, Row

__all__ = [
    "Family",
    "Row",
    "TABLE",
    "register",
    "detect",
    "read",
    "Source",
    "Computed",
    "Shapes",
    "need",
    "get",
    "only",
    "unused",
    "count",
    "number",
    "flag",
    "text",
    "choice",
    "optional",
    "several",
    "table",
    "activation",
    "rope",
    "layers",
    "modules",
    "fused",
    "attention_rows",
    "mlp_rows",
    "readout",
]


@runtime_checkable
class Family(Protocol):
    """What a family file provides.

    `TIED` names the two copies of a tied embedding; `IGNORED` are patterns of tensors that hold nothing the model reads. A
    family may have `FILES`, the names of JSON and YAML files beside config.json whose content `config` then has under these
    names.
    """

    @property
    def TIED(self) -> tuple[str, str]:
        """The stored names of the embedding and the unembedding."""
        ...

    @property
    def IGNORED(self) -> tuple[str, ...]:
        """Patterns of stored names, as in `fnmatch`."""
        ...

    def matches(self, config: Mapping[str, Any], shapes: Shapes) -> bool:
        """Whether a checkpoint is of this family, from its config.json and the shapes of its tensors.

        Args:
            config: the content of config.json.
            shapes: the shape of every stored tensor, by its name.
        """
        ...

    def looped_config(self, config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
        """What the checkpoint computes.

        Args:
            config: the content of config.json.
            shapes: the shape of every stored tensor, by its name.

        Raises:
            CheckpointError: it has an option that is not implemented.
            LoopedError: values of the wrong kind.
        """
        ...

    def sources(self, cfg: LoopedConfig, shapes: Shapes) -> Mapping[str, Source | Computed]:
        """Where every parameter of the model is stored, by its canonical name.

        Args:
            cfg: what `looped_config` returned, maybe with other loop counts.
            shapes: the shape of every stored tensor, by its name.
        """
        ...


_FAMILIES: list[Family] = list(dict.fromkeys(row.module for row in TABLE if row.module is not None))  # type: ignore[arg-type]


def register(family: Family) -> None:
    """Make a family known to `from_pretrained` and `from_hf` of this process, before those that are known already.

    The command is a process of its own and does not know it; what it shows is `tl_looped.report.report` and
    `tl_looped.lenses.logit_lens` here.

    Args:
        family: a module or an object with `matches`, `looped_config`, `sources`, `TIED` and `IGNORED`.

    Raises:
        LoopedError: it lacks one of them.

    Example:
        >>> from tl_looped import families
        >>> families.register(families.ouro)  # known already; it is now asked first
    """
    wanted = ("matches", "looped_config", "sources", "TIED", "IGNORED")
    if missing := [name for name in wanted if not hasattr(family, name)]:
        raise LoopedError(
            f"{family!r} was registered as a family, but has no {', '.join(missing)}; a family has {', '.join(wanted)}."
        )
    if family in _FAMILIES:
        _FAMILIES.remove(family)
    _FAMILIES.insert(0, family)


def detect(config: Mapping[str, Any], shapes: Shapes) -> Family:
    """The family of a checkpoint, from its config.json and the shapes of its tensors.

    Args:
        config: the content of config.json.
        shapes: the shape of every stored tensor, by its name.

    Raises:
        UnknownFamilyError: no family knows it.
    """
    for family in _FAMILIES:
        if family.matches(config, shapes):
            return family
    raise UnknownFamilyError(
        f"this checkpoint has model_type={shown(config.get('model_type'))} and "
        f"architectures={shown(config.get('architectures'))}, "
        f"which no family knows; known looped families are {', '.join(_titles())} and tl_looped's own format, and what was "
        "given to tl_looped.families.register. The layers of an ordinary decoder "
        f"({', '.join(llama.MODEL_TYPES)}) can be looped with LoopedBridge.loop_layers; any "
        "other looped model in memory can be traced with LoopedBridge.trace(module, tokens)."
    )


def _titles() -> list[str]:
    return [row.title for row in TABLE if row.module not in (canonical, llama, None)]


def read(family: Family, config: Mapping[str, Any], shapes: Shapes, **options: Any) -> LoopedConfig:
    """What a checkpoint of a family computes; keys of its config.json that the family did not ask for are judged too.

    Args:
        family: its family.
        config: the content of config.json.
        shapes: the shape of every stored tensor, by its name.
        **options: passed on to the family.

    Raises:
        CheckpointError: it has an option that is not implemented.
        LoopedError: values of the wrong kind.
    """
    recorded = Recorded(config)
    cfg = family.looped_config(recorded, shapes, **options)
    recorded.check_unread(cfg.family)
    return cfg
