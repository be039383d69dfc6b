"""What a model is, in words: for `tl-looped info`, and for the table and the drawing of a report."""

from __future__ import annotations

import torch

from .._words import counted
from ..facts import Facts, Order, human
from .config import LoopedConfig
from .loops import loop_of
from .sizes import sizes

NORMS = {"pre": "before", "branch": "after", "sandwich": "before and after", "stream": "on the stream"}
AFTER_LOOP = {"none": "", "final_norm": "norm", "linear": "linear map"}
BEGINS = {"embedding": "", "noise": "the state begins as noise", "learned": "the states begin as a learned vector"}


def facts(cfg: LoopedConfig, dtype: torch.dtype) -> dict[str, str]:
    """What a reader wants to know of a model at a glance, from its structure alone.

    Args:
        cfg: the structure.
        dtype: of its parameters.
    """
    found, bits = sizes(cfg), str(dtype).removeprefix("torch.")
    parts = ", ".join(f"{part} {human(n)}" for part, n in found.parameters.items())
    share = found.flops_per_loop / found.flops(cfg.n_loops)
    rows = {
        "family": cfg.family,
        "runs": cfg.schedule.describe(),
        "width": f"{cfg.d_model}, {cfg.n_heads} heads of {cfg.d_head}, {cfg.n_kv_heads} of keys and values",
        "norms of a block": NORMS[cfg.norm] + (", of length 1" if cfg.norm_kind == "l2" else ""),
        "residual": "steps towards every branch, at learned rates" if cfg.residual == "interpolate" else "",
        "injection": cfg.injection,
        "vocabulary": f"{cfg.d_vocab:,}; context {cfg.n_ctx:,}",
        "parameters": f"{human(found.n_parameters)}: {parts}",
        "memory": f"{human(found.n_parameters * dtype.itemsize, 'B')} in {bits}",
        "cost of a token": f"{human(found.flops(cfg.n_loops), 'FLOP')} with {counted(cfg.n_loops, 'loop')}",
        "one loop more": f"{human(found.flops_per_loop, 'FLOP')} per token ({share:.0%} of that), "
        f"{human(found.attention_flops, 'FLOP')} for every earlier token, "
        f"{human(found.cache_per_loop * dtype.itemsize, 'B')} of keys and values, no parameter",
    }
    return {name: text for name, text in rows.items() if text}


def order(cfg: LoopedConfig) -> Order:
    """The order in which a model runs, from its schedule and the parts of a pass.

    Args:
        cfg: the structure.

    Example:
        >>> found = order(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, n_coda=1, pass_norm=True))
        >>> found.loop, found.after
        ([('looped layers', '2 layers'), ('after every loop', 'norm')], [('coda', '1 layer'), ('answer', 'norm, unembedding')])
    """
    schedule = cfg.schedule
    with torch.device("meta"):
        parts = [*loop_of(cfg).pass_parts(is_last=False)]
    before = [("embedding", "the token")]
    if schedule.n_prelude:
        before.append(("prelude", counted(schedule.n_prelude, "layer") + (", norm" if cfg.prelude_norm else "")))
    loop = [("before every loop", "norm")] if "entry_norm" in parts else []
    for stack in schedule.core_stacks:
        times = sum(p.stack == stack for p in schedule.passes_in(0))
        detail = counted(schedule.stacks[stack], "layer") + (f", {times} times" if times > 1 else "")
        loop.append(("looped layers" if len(schedule.core_stacks) == 1 else f"{stack} stack", detail))
    ends = [cfg.loop] if cfg.loop != "repeat" else []
    ends += [words for part, words in {"norm": "norm", "exit_gate": "exit gate"}.items() if part in parts]
    ends += [f"1/{cfg.anchor_steps} of the step"] if cfg.strategy == "anchored" else []
    loop += [("after every loop", ", ".join(ends))] if ends else []
    last = AFTER_LOOP[cfg.after_loop]
    after = [("after the loop", last)] if last else []
    after += [("coda", counted(schedule.n_coda, "layer"))] if schedule.n_coda else []
    answer = ("answer", ("norm, " if cfg.final_norm else "") + "unembedding")
    return Order(before, BEGINS[cfg.initial_state], loop, [*after, answer], "inject" in parts)


def facts_of(cfg: LoopedConfig, dtype: torch.dtype) -> Facts:
    """All that is told of a model.

    Args:
        cfg: the structure.
        dtype: of its parameters.
    """
    n_physical = cfg.schedule.n_layers if cfg.own_layers else cfg.n_physical
    anchor_steps = cfg.anchor_steps if cfg.strategy == "anchored" else None
    return Facts(cfg.family, n_physical, anchor_steps, facts(cfg, dtype), order(cfg), sizes(cfg))
