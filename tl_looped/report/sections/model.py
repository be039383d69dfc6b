"""What the model is."""

from __future__ import annotations

from ..._words import counted
from ...model.sizes import human, sizes
from ..diagram import schedule_diagram
from ..question import Question
from ..section import Section, share
from ..tables import facts


def the_model(asked: Question, section: Section) -> None:
    """What the model is."""
    model, cfg = asked.model, asked.model.looped_cfg
    schedule, found = cfg.schedule, sizes(cfg)
    cache_bytes = found.cache_per_loop * model.cfg.dtype.itemsize
    share_of_one_loop = found.flops_per_loop / found.flops(cfg.n_loops)
    section.numbers |= {
        "family": cfg.family,
        "n_loops": cfg.n_loops,
        "made_for_loops": asked.made_for,
        "n_virtual_layers": schedule.n_layers,
        "n_physical_layers": cfg.n_physical,
        "n_parameters": found.n_parameters,
        "parameters": found.parameters,
        "flops_per_token": found.flops(cfg.n_loops),
        "flops_per_token_and_loop": found.flops_per_loop,
        "share_of_one_loop": share_of_one_loop,
        "cache_bytes_per_token_and_loop": cache_bytes,
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.n_kv_heads,
        "d_head": cfg.d_head,
        "stacks": schedule.stacks,
        "l_cycles": cfg.l_cycles,
        "anchor_steps": cfg.anchor_steps if cfg.strategy == "anchored" else None,
        "d_vocab": cfg.d_vocab,
        "examples": asked.n_examples,
        "loops_looked_at": asked.n_loops,
    }
    section.reading += [
        f"A token passes {counted(schedule.n_layers, 'layer')} with the weights of {cfg.n_physical}: "
        f"{schedule.describe().split(':')[0]}. The model has {human(found.n_parameters)} parameters, however often it loops.",
        f"One loop costs a token {human(found.flops_per_loop, 'FLOP')}, {share(share_of_one_loop)} of an answer "
        f"after {counted(cfg.n_loops, 'loop')}, and {cache_bytes:,} bytes of keys and values. Loops are "
        "numbered from 0 on this page.",
    ]
    if asked.made_for is None:
        section.reading.append(
            f"Its number of loops, {cfg.n_loops}, is a setting: "
            + (
                "the layers were trained to run once, and were looped afterwards."
                if cfg.family == "looped_llama"
                else "nothing tells how many loops it was trained for, or whether it was trained."
                if cfg.family == "custom" or model.made_for is None
                else "it predicts the prompts hardly better than chance, as with random weights."
            )
        )
    section.draw("The order in which the layers run.", schedule_diagram(cfg))
    section.draw("Sizes and costs.", facts(model, found))
