"""What the model is."""

from __future__ import annotations

from ..._words import counted
from ...facts import Facts, human
from ..diagram import schedule_diagram
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, share
from ..tables import table


def measure(asked: Question) -> tuple[Numbers, Facts]:
    """Structure, sizes and costs."""
    model, cfg, schedule, facts = asked.model, asked.model.cfg, asked.model.schedule, asked.model.facts()
    found = facts.sizes
    return {
        "family": facts.family,
        "n_loops": model.n_loops,
        "made_for_loops": asked.made_for,
        "n_virtual_layers": schedule.n_layers,
        "n_physical_layers": facts.n_physical,
        "n_parameters": found.n_parameters,
        "parameters": found.parameters,
        "flops_per_token": found.flops(model.n_loops),
        "flops_per_token_and_loop": found.flops_per_loop,
        "share_of_one_loop": found.flops_per_loop / found.flops(model.n_loops),
        "cache_bytes_per_token_and_loop": found.cache_per_loop * model.cfg.dtype.itemsize,
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.n_key_value_heads,
        "d_head": cfg.d_head,
        "stacks": schedule.stacks,
        "l_cycles": schedule.l_cycles,
        "anchor_steps": facts.anchor_steps,
        "d_vocab": cfg.d_vocab,
        "examples": asked.n_examples,
        "loops_looked_at": asked.n_loops,
    }, facts


def read(asked: Question, numbers: Numbers, facts: Facts) -> Reading:
    """What a token passes, and what a loop costs."""
    found, n_loops = facts.sizes, numbers["n_loops"]
    one_loop = f"{human(found.flops_per_loop, 'FLOP')}, {share(numbers['share_of_one_loop'])} of an answer"
    said = [
        f"A token passes {counted(numbers['n_virtual_layers'], 'layer')} with the weights of {numbers['n_physical_layers']}: "
        f"{asked.model.schedule.describe().split(':')[0]}. The model has {human(found.n_parameters)} parameters, however often "
        "it loops.",
        f"One loop costs a token {one_loop} after {counted(n_loops, 'loop')}, and "
        f"{numbers['cache_bytes_per_token_and_loop']:,} bytes of keys and values. Loops are numbered from 0 on this page.",
    ]
    if asked.made_for is None:
        why = (
            "the layers were trained to run once, and were looped afterwards."
            if facts.family == "looped_llama"
            else "nothing tells how many loops it was trained for, or whether it was trained."
            if facts.family == "custom" or asked.model.made_for is None
            else "it predicts the prompts hardly better than chance, as with random weights."
        )
        said.append(f"Its number of loops, {n_loops}, is a setting: {why}")
    return Reading(said)


def panels(asked: Question, numbers: Numbers, facts: Facts) -> list[Figure]:
    """The order of the layers, and a table."""
    model = asked.model
    rows = {"checkpoint": str(model.cfg.model_name)} | facts.rows
    rows["device"] = str(model.cfg.device)
    diagram = Figure("The order in which the layers run.", schedule_diagram(facts.order, model.n_loops))
    return [diagram, Figure("Sizes and costs.", table((), rows.items()))]


PARTS = (Part(measure, read, panels),)
