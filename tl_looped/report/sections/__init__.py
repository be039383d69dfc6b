"""The sections of a report, each from one or two analyses."""

from __future__ import annotations

from collections.abc import Callable

from ..question import Question
from ..section import Section
from .answers import the_answers
from .attention import the_attention
from .exits import the_exits
from .fixed_points import the_fixed_points
from .model import the_model
from .patching import the_patches
from .stability import the_stability
from .stages import the_stages
from .trajectories import the_trajectories

Part = Callable[[Question, Section], None]
SECTIONS: dict[str, tuple[str, Part]] = {
    "model": ("What the model is", the_model),
    "answers": ("What it would answer after each loop", the_answers),
    "patching": ("Where the answer is made", the_patches),
    "fixed_points": ("Does the state settle?", the_fixed_points),
    "trajectories": ("The path of the state", the_trajectories),
    "attention": ("Attention across loops", the_attention),
    "stages": ("Stages of inference in every loop", the_stages),
    "stability": ("More loops", the_stability),
    "exits": ("When it could stop", the_exits),
}
