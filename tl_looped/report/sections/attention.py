"""Attention across loops."""

from __future__ import annotations

import torch

from ..._words import counted
from ...analysis import attention_distances, attention_stability
from ...figures import plots
from ..question import Question
from ..section import Figure, Section, number
from ._common import left_out

ALIKE = 0.8  # a distance below this share of another one is said to be smaller
SHOWN_POSITIONS = 96  # of the prompt whose patterns are on the page
SHOWN_WEIGHTS = 200_000  # of attention on the page, a byte each


def the_attention(asked: Question, section: Section) -> None:
    """Attention across loops."""
    model, prompts = asked.model, asked.of_length(2)
    stack = model.schedule.core_stacks[-1]

    def distances() -> None:
        found = attention_distances(model, prompts, verbose=False)
        sites = model.schedule.sites
        at = [k for k, site in enumerate(sites) if site.loop is not None]
        same = [float(found.values[a, b]) for a in at for b in at if a < b and sites[a][::2] == sites[b][::2]]
        other = [float(found.values[a, b]) for a in at for b in at if a < b and sites[a][::2] != sites[b][::2]]
        section.numbers["distances"] = found
        if same and other:
            near, far = sum(same) / len(same), sum(other) / len(other)
            section.numbers |= {"same_layer_other_loop": near, "other_layer": far}
            how = "more than" if near < ALIKE * far else "less than" if far < ALIKE * near else "about as much as"
            section.reading.append(
                f"The patterns of one layer in two loops are {number(near)} apart on average, those of two layers "
                f"{number(far)} (Frobenius, per head and query): a layer resembles itself in other loops {how} it resembles "
                "other layers."
            )
        section.draw(
            "Distance between the attention patterns of any two executed layers (Frobenius, per head and query).",
            found.plot(),
            130 + 5 * len(model.schedule.sites),
        )

    def changing() -> None:
        found = attention_stability(asked.deep, prompts, stack=stack, verbose=False)
        mean = found.successive.values.mean((1, 2))
        section.numbers |= {"successive": found.successive, "mean_change_by_loop": mean}
        section.numbers["mean_over_heads"] = found.successive.values.mean(-1)
        section.reading.append(
            f"From loop {int(found.successive.labels['loop'][0]) - 1} to {found.successive.labels['loop'][0]} a pattern "
            f"changes by {number(mean[0])} on average"
            + (f", at the last of {counted(len(mean) + 1, 'loop')} by {number(mean[-1])}." if len(mean) > 1 else ".")
        )
        section.draw("How far each pattern is from the one in the loop before, mean over heads.", found.plot())

    def heads() -> None:
        tokens, schedule = asked.shown[:, :SHOWN_POSITIONS], model.schedule
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("attn.hook_pattern"))
        view = plots.attention_viewer(cache, asked.words(tokens[0]), max_bytes=SHOWN_WEIGHTS)
        section.figures.append(Figure("Where each head looks in the prompt that is shown.", view.html, is_wide=True))
        section.numbers["patterns"] = {
            schedule.layer_name(i): cache["pattern", i][0].double().round(decimals=4) for i in map(schedule.virtual, view.sites)
        }

    for part in (distances, changing, heads):
        section.attempt(part)
    left_out(asked, section, 2)
