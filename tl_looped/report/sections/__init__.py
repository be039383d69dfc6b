"""The sections of a report, each in a file of its own: what it measures, what the numbers say, and what is drawn."""

from __future__ import annotations

from ..section import Part
from . import answers, attention, exits, fixed_points, model, patching, stability, stages, trajectories

SECTIONS: dict[str, tuple[str, tuple[Part, ...]]] = {
    "model": ("What the model is", model.PARTS),
    "answers": ("What it would answer after each loop", answers.PARTS),
    "patching": ("Where the answer is made", patching.PARTS),
    "fixed_points": ("Does the state settle?", fixed_points.PARTS),
    "trajectories": ("The path of the state", trajectories.PARTS),
    "attention": ("Attention across loops", attention.PARTS),
    "stages": ("Stages of inference in every loop", stages.PARTS),
    "stability": ("More loops", stability.PARTS),
    "exits": ("When it could stop", exits.PARTS),
}
