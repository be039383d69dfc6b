"""What a looped model weighs, and what a loop costs."""

from __future__ import annotations

import math
from collections import Counter

import torch

from ..facts import Sizes
from .config import LoopedConfig
from .loops import loop_of
from .parameters import parameter_shapes


def sizes(cfg: LoopedConfig) -> Sizes:
    """Count the parameters and the work of a model from its structure alone; no weights are needed.

    Args:
        cfg: the structure; the number of loops does not matter.

    Example:
        >>> from tl_looped import LoopedConfig
        >>> found = sizes(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, d_mlp=16))
        >>> found.parameters["core"], found.flops_per_loop  # the norms' 32 weights are no matrices
        (1312, 2560)
    """
    parameters = dict(parameter_shapes(cfg))
    stacks = [name for name, n_layers in cfg.schedule.stacks.items() if n_layers]
    runs = Counter(p.stack for p in cfg.schedule.passes_in(0))
    with torch.device("meta"):
        of_pass = loop_of(cfg).pass_parts(is_last=False)
    counts, per_loop, outside = dict.fromkeys(["embed", *stacks, "between", "unembed"], 0), 0, 0
    for name, shape in parameters.items():
        first = name.split(".")[0]
        n = math.prod(shape)
        part = first if first in counts else "embed" if first == "value_embeds" else "between"
        counts[part] += n
        if len(shape) < 2 or part == "embed":
            continue
        if (of_loop := name.partition(".loops.")[2]) and not of_loop.startswith("0."):
            continue  # of another loop
        if ".mlp." in name and len(shape) == 3:  # of experts, of which a token goes through a few
            n = n * cfg.options["n_chosen"] // cfg.options["n_experts"]
        if part in runs:
            per_loop += runs[part] * n
        elif first in of_pass:
            per_loop += sum(runs.values()) * n
        else:
            outside += n
    if cfg.tied:
        outside += math.prod(parameters["embed.weight"])
    stack_of = [stack for stack, n_layers in cfg.schedule.stacks.items() for _ in range(n_layers)]
    heads = [(runs[stack], *_heads(cfg, i)) for i, stack in enumerate(stack_of) if stack in runs]
    return Sizes(
        {part: n for part, n in counts.items() if n},
        flops_per_loop=2 * per_loop,
        flops_outside=2 * outside,
        attention_flops=4 * sum(times * n_heads * width for times, n_heads, _, width in heads),
        cache_per_loop=2 * sum(times * n_kv_heads * width for times, _, n_kv_heads, width in heads),
    )


def _heads(cfg: LoopedConfig, physical: int) -> tuple[int, int, int]:
    """Heads of a layer, those of its keys and values, and their width."""
    windowed = cfg.options.get("windowed_heads") if cfg.windows and cfg.windows[physical] is not None else None
    return tuple(windowed) if windowed else (cfg.n_heads, cfg.n_kv_heads, cfg.d_head)
