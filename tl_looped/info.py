"""What a checkpoint is before it is loaded: schedule, sizes, cost of a loop, hook names."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from ._words import aligned
from .bridge.looped_bridge import LoopedBridge
from .checkpoints import make_plan, open_checkpoint, stored_dtype
from .families import TABLE, Row
from .looped import Ability
from .model import LoopedModel
from .model.config import LoopedConfig
from .model.facts import facts
from .model.loops import loop_of
from .model.sizes import sizes
from .schedule import Pass, virtual_layer
from .sites import KINDS
from .toys import TOYS

ABILITIES: tuple[Ability, ...] = get_args(Ability)
_NAME = 26  # columns of a family's or toy's name


def families_text(width: int = 100) -> str:
    """The families and toys that can be loaded, and what their models lack.

    Args:
        width: of a line.
    """
    heading = "checkpoints; loop; since which version, what it lacks (tl-looped info MODEL says why)"
    lines = _beside("family", [heading], width)
    for row in TABLE:
        terms = [since(row), f"lacks {', '.join(found)}" if (found := lacking_in(row)) else "", refused(row)]
        lines += ["", *_beside(row.title, [_plain(row.checkpoints), _plain(row.loop), "; ".join(filter(None, terms))], width)]
    lines += ["", f"{'toy':{_NAME}}what it is", ""]
    for name, what in TOYS.items():
        lines += _beside(f"toy:{name}", [what], width)
    return "\n".join(lines)


def since(row: Row) -> str:
    """How models of a family are made, and since which version."""
    return f"{row.made} since {row.since}" + (f", in transformers since {row.transformers}" if row.transformers else "")


def refused(row: Row) -> str:
    """The values in config.json that a family refuses, as in "refuses use_dora=False"; "" for none."""
    return f"refuses {', '.join(f'{key}={value!r}' for key, value in row.refused.items())}" if row.refused else ""


def lacking_in(row: Row) -> list[Ability]:
    """What models of a family lack; nothing where it depends on the model.

    Args:
        row: the family.
    """
    return [] if row.small is None else [*lacking(row.small)]


def _plain(markdown: str) -> str:
    return markdown.replace("`", "")


def _beside(name: str, texts: Sequence[str], width: int) -> list[str]:
    """A name, and beside it texts of several lines, each wrapped."""
    lines = [line for text in texts for line in textwrap.wrap(text, max(width - _NAME, 20), subsequent_indent="  ")]
    return [f"{name if k == 0 else '':{_NAME}}{line}" for k, line in enumerate(lines)]


def lacking(cfg: LoopedConfig) -> dict[Ability, str]:
    """What a model lacks that tools ask for, and why.

    Args:
        cfg: the structure.

    Example:
        >>> [*lacking(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, own_layers=True))]
        ['equal loops', 'exit gate', 'injection', 'shared weights']
    """
    bridge = _bridge(cfg)
    return {ability: why for ability in ABILITIES if (why := bridge.lacks(ability)) is not None}


def _bridge(cfg: LoopedConfig) -> LoopedBridge:
    """A model of a structure, without values and with few loops where it may have few."""
    if loop_of(cfg).fixed is not None:
        with torch.device("meta"):
            return LoopedBridge(LoopedModel(cfg))
    few = {"n_loops": min(2, cfg.n_loops)} | ({} if cfg.l_cycles is None else {"l_cycles": 1})
    with torch.device("meta"):
        return LoopedBridge(LoopedModel(cfg.replace(**few)))


def checkpoint_text(name_or_dir: str | Path, revision: str | None = None, width: int = 100) -> str:
    """What a checkpoint computes, from its config.json and the names of its tensors, none of which is read.

    Args:
        name_or_dir: as for `LoopedBridge.from_pretrained`.
        revision: branch, tag or commit on the Hub.
        width: of a line about what it lacks.

    Raises:
        CheckpointError: there is no such checkpoint, no family knows it, or its config.json and tensors do not fit together.
    """
    checkpoint = open_checkpoint(name_or_dir, revision)
    _, cfg, sources = make_plan(checkpoint)
    dtype = stored_dtype(checkpoint, sources)
    told = facts(cfg, dtype)
    if checkpoint.quantised is not None:
        told["stored"] = checkpoint.quantised.told(sizes(cfg).n_parameters * dtype.itemsize, dtype)
    rows = [[name, text] for name, text in told.items()]
    lines = [str(name_or_dir), *aligned(rows), ""]
    if lacks := lacking(cfg):
        lines += ["it lacks", *(line for ability, why in lacks.items() for line in _beside(f"  {ability}", [why], width)), ""]
    return "\n".join([*lines, hooks_text(cfg)])


def hooks_text(cfg: LoopedConfig) -> str:
    """The names of all hook points of a model, by place and shape; `{0..5}` stands for any index in that range.

    Args:
        cfg: the structure.
    """
    bridge = _bridge(cfg)
    hooks_at: dict[tuple[str, int | None], list[str]] = {}  # by the part of the name before a layer's index, and the layer
    for name in bridge.hook_dict:
        before, layer, hook = _split(bridge, name, cfg)
        hooks = hooks_at.setdefault((before, layer), [])
        if hook not in hooks:
            hooks.append(hook)
    layers: dict[tuple[str, frozenset[str]], list[int | None]] = {}
    for (before, layer), hooks in hooks_at.items():
        layers.setdefault((before, frozenset(hooks)), []).append(layer)
    alike: dict[frozenset[str], list[str]] = {}
    places: dict[str, list[str]] = {}
    for (before, same), indices in layers.items():
        place = before if indices[0] is None else before + _indices([i for i in indices if i is not None])
        places[place] = hooks_at[before, indices[0]]
        alike.setdefault(same, []).append(place)
    shapes, lines = _shapes(cfg), []
    for same in alike.values():
        lines += ["", ", ".join(f"{place}." if place else "outside the layers:" for place in same)]
        by_shape: dict[str, list[str]] = {}
        for hook in sorted(places[same[0]], key=lambda hook: [*shapes, hook].index(hook)):
            by_shape.setdefault(shapes.get(hook, "other points"), []).append(hook)
        for shape, hooks in by_shape.items():
            lines += textwrap.wrap(" ".join(hooks), 120, initial_indent=f"  {shape:28}", subsequent_indent=" " * 30)
    return "\n".join(lines[1:])


def _split(bridge: LoopedBridge, name: str, cfg: LoopedConfig) -> tuple[str, int | None, str]:
    """Where a hook stands, with the range of all loops of the model; its layer, if it is in one; its own name."""
    schedule = bridge.schedule

    def all_loops(p: Pass) -> str:
        return f"{schedule.pass_prefix(p).rpartition('.')[0]}.{_indices(range(cfg.schedule.n_loops_of(p.stack)))}"

    if (layer := virtual_layer(name)) is not None:
        site, p = schedule.site(layer), schedule.pass_of_layer(layer)
        place = site.stack if p is None else all_loops(p)
        return f"{place}.blocks.", site.layer, name.removeprefix(f"blocks.{layer}.")
    for p in schedule.passes:
        if name.startswith(f"{schedule.pass_prefix(p)}."):
            return all_loops(p), None, name.removeprefix(f"{schedule.pass_prefix(p)}.")
    return "", None, name


def _indices(found: Sequence[int]) -> str:
    """Ascending indices as in "3", "{0..5}" or "{1,3}"."""
    if len(found) == 1:
        return str(found[0])
    is_range = len(found) == found[-1] + 1 - found[0]
    return f"{{{found[0]}..{found[-1]}}}" if is_range else f"{{{','.join(map(str, found))}}}"


def _shapes(cfg: LoopedConfig) -> dict[str, str]:
    """The shapes of the hooks that users of TransformerLens know, in the order in which they are shown."""
    pair = {"pos": "query", "src_pos": "key"}
    shapes: dict[str, str] = {}
    for kind in KINDS.values():
        names = (
            pair if "src_pos" in kind.axes else {"head": "kv_head"} if kind.is_grouped and cfg.n_kv_heads < cfg.n_heads else {}
        )
        shapes[kind.hook] = f"[{', '.join(['batch', *(names.get(axis, axis) for axis in kind.axes)])}]"
    return shapes
