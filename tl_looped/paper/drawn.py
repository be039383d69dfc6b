"""What every figure of the paper is here: a sentence made from the numbers, and panels."""

from __future__ import annotations

from typing import Any

import torch

from ..report.section import Figure, share
from . import of_stages, of_states
from .about import About, Drawn, Draws, Missing


def _behaviour(about: About) -> Drawn:
    said = list[str]()
    for name, found in about.by_stack("behaviour"):
        counts = found.counts.values
        n = int(counts[0].sum())
        off, anywhere = n - int(counts[-1, 0]), _anywhere(found)
        kinds = [f"{int(v)} {label}" for v, label in zip(counts[-1], found.counts.labels["label"], strict=True) if v]
        said.append(
            f"{name}{share(off / n)} of {n} tokens are at no fixed point after {found.n_loops} loops ({', '.join(kinds)}); in "
            f"any layer {share(anywhere)}. The rule is a reconstruction, so shares depend on its parameters."
        )
    figures = [
        Figure(f"Limiting behaviour: {name}share of a prompt's tokens by layer.", found.panels())
        for name, found in about.by_stack("behaviour")
    ]
    return " ".join(said), figures


def _anywhere(found: Any) -> float:
    off = torch.cat([(example.labels != 0).any(0) for example in found.examples])
    return float(off.double().mean())


def _together(about: About) -> Drawn:
    said, figures = list[str](), list[Figure]()
    for name, found in about.by_stack("behaviour"):
        grid = found.co_occurrence
        both = float(grid.sel(given="orbit", label="slider").values)
        orbits, fixed = both == both, float(grid.sel(given="orbit", label="fixed").values)
        how = (
            f"{share(both)} of the tokens with an orbit are sliders too, {share(fixed)} fixed too"
            if orbits
            else "no token has an orbit"
        )
        said.append(f"{name}{how}.".capitalize())
        figures.append(Figure(f"Figure 14: {name}P(label in any layer | given in any layer).", grid.panels()))
    return " ".join(said), figures


def _not_here(reason: str) -> Draws:
    def draw(about: About) -> Drawn:
        raise Missing(reason)

    return draw


DRAWN: dict[str, Draws] = {
    "3": of_states.fixed("successive", "l2", "Figure 3, from the loop before"),
    "4": of_states.fixed("distance", "l2", "Figure 4, from X*"),
    "22": of_states.fixed("distance", "cosine", "Figure 22, to X*"),
    "24": of_states.fixed("successive", "cosine", "Figure 24, to the loop before"),
    "19": of_states.both(of_states.pairs("states", 8, "Figure 19"), of_states.pairs("states", 32, "Figure 19")),
    "2": of_states.pairs("patterns", 8, "Figure 2"),
    "21": of_states.pairs("patterns", 32, "Figure 21"),
    "23": of_states.patterns_over_loops("pattern_distance", "Figure 23, patterns from those of the last loop"),
    "25": of_states.patterns_over_loops("pattern_successive", "Figure 25, patterns from those of the loop before"),
    "4.2": of_states.bound,
    "5": of_states.paths,
    "6": of_states.at_init,
    "7": of_stages.stage("colsum", title="Figure 7"),
    "8": of_stages.beside_twin,
    "9": of_stages.stage("norm", title="Figure 9"),
    "10": _not_here(
        "it needs models trained from scratch and their control, not one checkpoint; the page “Stages on text” of the "
        "documentation has small ones"
    ),
    "11": of_stages.over_loops,
    "36": of_stages.huginn_stages,
    "40": of_stages.halves,
    "41": of_stages.without_mlp,
    "14": _together,
    "tables": _behaviour,
    "tables of others": _not_here(
        "the settings of those tables are not public; compare runs over other prompts, or of other models"
    ),
    "5.2": _not_here(
        "it needs a benchmark with answers; tl_looped.analysis.more_loops has loss and accuracy by loop for such prompts"
    ),
}
