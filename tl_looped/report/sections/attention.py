"""Attention across loops."""

from __future__ import annotations

import torch

from ... import plots
from ..._words import counted
from ...analysis import attention_distances, attention_stability
from ...results import Grid
from ..question import Question
from ..section import Figure, Section, listed, number
from ._common import left_out

ALIKE = 0.8  # a distance below this share of another one is said to be smaller
SHOWN_HEADS = 64  # attention patterns on the page


def the_attention(asked: Question, section: Section) -> None:
    """Attention across loops."""
    model, prompts = asked.model, asked.of_length(2)
    stack = model.schedule.core_stacks[-1]
    changes: list[Grid] = []

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
            max(480, 200 + 9 * len(model.schedule.sites)),
        )

    def changing() -> None:
        found = attention_stability(asked.deep, prompts, stack=stack, verbose=False)
        changes.append(found.successive)
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
        tokens = asked.shown[:, :48]
        n_loops, n_layers, n_heads = model.schedule.n_loops_of(stack), model.schedule.stacks[stack], model.cfg.n_heads
        layer, loops = None, list(range(n_loops))
        if n_loops * n_layers * n_heads > SHOWN_HEADS and n_layers > 1:
            layer = int(changes[0].values.mean((0, 2)).argmax()) if changes else 0
        shown_layers = n_layers if layer is None else 1
        most = max(2, SHOWN_HEADS // (shown_layers * n_heads))
        if n_loops > most:
            loops = sorted({round(k * (n_loops - 1) / (most - 1)) for k in range(most)})
        prefix = "" if stack == "core" else f"{stack}."
        which = "*" if layer is None else str(layer)
        with torch.no_grad():
            _, cache = model.run_with_cache(
                tokens, names_filter=[f"{prefix}loops.{t}.blocks.{which}.attn.hook_pattern" for t in loops]
            )
        html = plots.attention_heads(cache, asked.words(tokens[0]), layer=layer, loops=loops, stack=stack).local_src
        what = "all layers" if layer is None else f"layer {layer}, the one whose patterns change most between loops"
        section.figures.append(
            Figure(
                "Attention of the first prompt in "
                f"{'all loops' if len(loops) == n_loops else 'loops ' + listed([*map(str, loops)])}, "
                f"{what} (circuitsvis). Rows are queries; point at a head to see it large.",
                html,
                700,
                is_light=True,
            )
        )
        section.numbers["patterns"] = {
            "loops": loops,
            "layers": list(range(n_layers)) if layer is None else [layer],
            "values": [
                [cache.stack_loops("pattern", j, t, stack)[0, 0] for j in (range(n_layers) if layer is None else [layer])]
                for t in loops
            ],
        }

    for part in (distances, changing, heads):
        section.attempt(part)
    left_out(asked, section, 2)
