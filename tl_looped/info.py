"""What a checkpoint is before it is loaded: schedule, sizes, cost of a loop, hook names."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from ._words import aligned
from .bridge.looped_bridge import LoopedBridge
from .checkpoints import make_plan, open_checkpoint, stored_dtype
from .model import LoopedModel
from .model.config import LoopedConfig
from .model.facts import facts
from .schedule import Pass, virtual_layer
from .sites import KINDS
from .toys import TOYS

# Family, checkpoints on the Hub, what is special about the loop.
FAMILIES = (
    ("ouro", "ByteDance/Ouro-*", "sandwich norms, a norm and an exit gate after every pass"),
    ("huginn", "tomg-group-umd/huginn-0125", "prelude, concat-linear injection, random state, norms on the stream, coda"),
    ("retrofit", "smcleish/Recurrent-*", "Huginn's loop around the layers of Llama, TinyLlama and OLMo"),
    ("hrm_text", "sapientinc/HRM-Text-1B", "two stacks, L several times and H once per loop"),
    ("parcae", "SandyResearch/parcae-*", "decay injection, value embeddings"),
    ("nanbeige", "Nanbeige/Nanbeige4.2-*", "a Llama run twice, a norm after every pass"),
    ("dory", "nvidia/NVIDIA-Nemotron-Labs-Dory1.0-4B-BF16", "a looped nGPT: states on the unit sphere, steps at learned rates"),
    ("loopus", "Thrillcrazyer/*LoopUS*", "the middle of a Qwen3 or Llama behind a gate that opens as far as the state moves"),
    ("loopformer", "of armenjeddi/loopformer", "a GPT whose norms and gains know the time and the size of every step"),
    ("looped_nanochat", "of kschwethelm/looped_nanochat", "norms on the stream, the prelude's output joined to the state"),
    ("llama_rrt", "of axolotl-ai-cloud/axolotl", "a Llama whose loops add low-rank matrices and norms of their own"),
    ("loopcoder", "IQuestLab/IQuest-Coder-V1-*-Loop-*", "a Llama whose later loops also attend to the first"),
    ("loopcoder_v2", "Multilingual-Multimodal-NLP/LoopCoder-V2", "the same, and a loop reads the state of the position before"),
    ("tl_looped", "what save_pretrained writes", "any"),
)


def families_text() -> str:
    """The families and toys that can be loaded, as a table."""
    toys = [[f"toy:{name}", what] for name, what in TOYS.items()]
    return "\n".join(
        [
            *aligned([["family", "checkpoints", "loop"], *map(list, FAMILIES)]),
            "",
            *aligned([["toy", "what it is"], *toys]),
            "",
            "Layers of an ordinary Llama, Mistral, Qwen2, Qwen3 or SmolLM: LoopedBridge.loop_layers.",
        ]
    )


def checkpoint_text(name_or_dir: str | Path, revision: str | None = None) -> str:
    """What a checkpoint computes, from its config.json and the names of its tensors, none of which is read.

    Args:
        name_or_dir: as for `LoopedBridge.from_pretrained`.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: there is no such checkpoint, no family knows it, or its config.json and tensors do not fit together.
    """
    checkpoint = open_checkpoint(name_or_dir, revision)
    _, cfg, sources = make_plan(checkpoint)
    rows = [[name, text] for name, text in facts(cfg, stored_dtype(checkpoint, sources)).items()]
    return "\n".join([str(name_or_dir), *aligned(rows), "", hooks_text(cfg)])


def hooks_text(cfg: LoopedConfig) -> str:
    """The names of all hook points of a model, by place and shape; `{0..5}` stands for any index in that range.

    Args:
        cfg: the structure.
    """
    few = {"n_loops": min(2, cfg.n_loops)} | ({} if cfg.l_cycles is None else {"l_cycles": 1})
    with torch.device("meta"):
        bridge = LoopedBridge(LoopedModel(cfg.replace(**few)))
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
