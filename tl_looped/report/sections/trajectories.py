"""The path of the state."""

from __future__ import annotations

from ..._words import counted
from ...analysis import step_geometry, trajectories
from ...analysis.step_geometry import StepGeometry
from ...analysis.trajectories import Trajectories
from ..drawing import by_loops
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, number, share
from ._common import first_token, left_out

STEPS = ("step_norm", "step_cosine", "turning_angle", "anisotropy", "cka")
WAYS = ((0.5, "mostly goes on"), (0.2, "bends"), (-0.2, "turns sideways"), (-2.0, "turns back"))  # above a cosine


def _measure_layers(asked: Question) -> tuple[Numbers, Trajectories]:
    found = trajectories(asked.deep, asked.shown, n_components=2, verbose=False)
    (path,) = found.paths
    numbers = {"last_token": path.coordinates, "last_token_explained": path.explained}
    return numbers | {"explained_by_two": float(path.explained.sum())}, found


def _read_layers(asked: Question, numbers: Numbers, found: Trajectories) -> Reading:
    part, loops = share(numbers["explained_by_two"]), counted(asked.n_loops, "loop")
    return Reading([f"Two directions hold {part} of the variance of the last token's states over {loops}."])


def _draw_layers(asked: Question, numbers: Numbers, found: Trajectories) -> list[Figure]:
    where = "in the plane of its first two principal components"
    return [Figure(f"The last token after every layer of every loop, {where}.", found.panels())]


def _measure_ends(asked: Question) -> tuple[Numbers, Trajectories] | None:
    if asked.n_loops < 3:
        return None
    found = trajectories(
        asked.deep,
        asked.shown,
        over="loop_ends",
        positions=asked.kept,
        stack=asked.last_stack,
        n_components=2,
        verbose=False,
    )
    (path,) = found.paths
    return {"loop_ends": path.coordinates, "loop_ends_explained": path.explained}, found


def _draw_ends(asked: Question, numbers: Numbers, found: Trajectories) -> list[Figure]:
    return [Figure("The states of all tokens at the ends of the loops, one path for each.", found.panels())]


def _measure_steps(asked: Question) -> tuple[Numbers, StepGeometry] | None:
    if asked.n_loops < 3:
        return None
    prompts = asked.of_length(4 if asked.skip_first else 3)
    found = step_geometry(asked.deep, prompts, positions=asked.kept, stack=asked.last_stack, verbose=False)
    numbers: Numbers = {name: getattr(found, name) for name in STEPS}
    cosine = found.step_cosine.values
    if len(cosine := cosine[cosine.isfinite()]):  # a state that stands still has no direction
        numbers["mean_step_cosine"] = float(cosine.mean())
    return numbers, found


def _read_steps(asked: Question, numbers: Numbers, found: StepGeometry) -> Reading:
    if (mean := numbers.get("mean_step_cosine")) is None:
        return Reading()
    way = next(way for above, way in WAYS if mean > above)
    scale = "1: straight on, 0: at a right angle, −1: back"
    return Reading([
        f"From one step to the next the state {way}: the mean cosine between successive steps is {number(mean)} ({scale})."
    ])  # fmt: skip


def _draw_steps(asked: Question, numbers: Numbers, found: StepGeometry) -> list[Figure]:
    caption = "How alike the states of two loops are over the tokens (linear CKA, 1: alike up to rotation and scale)."
    return [Figure(caption, by_loops(found.cka, "other loop"))]


PARTS = (
    first_token(),
    Part(_measure_layers, _read_layers, _draw_layers),
    Part(_measure_ends, panels=_draw_ends),
    Part(_measure_steps, _read_steps, _draw_steps),
    left_out(3, first_too=True),
)
