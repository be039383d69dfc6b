"""The path of the state."""

from __future__ import annotations

from ..._words import counted
from ...analysis import step_geometry, trajectories
from ..drawing import thinned
from ..question import Question
from ..section import Section, number, share
from ._common import left_out, say_first_token


def the_trajectories(asked: Question, section: Section) -> None:
    """The path of the state."""
    least = 4 if asked.skip_first else 3
    say_first_token(asked, section)
    loops, stack = asked.n_loops, asked.model.schedule.core_stacks[-1]

    def layers() -> None:
        found = trajectories(asked.deep, asked.shown, n_components=2, verbose=False)
        (path,) = found.paths
        section.numbers |= {"last_token": path.coordinates, "last_token_explained": path.explained}
        section.numbers["explained_by_two"] = float(path.explained.sum())
        section.reading.append(
            f"Two directions hold {share(path.explained.sum())} of the variance of the last token's states over "
            f"{counted(loops, 'loop')}."
        )
        section.draw(
            "The last token after every layer of every loop, in the plane of its first two principal components.", found.plot()
        )

    def ends() -> None:
        if loops < 3:
            return
        found = trajectories(
            asked.deep, asked.shown, over="loop_ends", positions=asked.kept, stack=stack, n_components=2, verbose=False
        )
        (path,) = found.paths
        section.numbers |= {"loop_ends": path.coordinates, "loop_ends_explained": path.explained}
        section.draw("The states of all tokens at the ends of the loops, one path for each.", found.plot())

    def steps() -> None:
        if loops < 3:
            return
        found = step_geometry(asked.deep, asked.of_length(least), positions=asked.kept, stack=stack, verbose=False)
        cosine = found.step_cosine.values
        cosine = cosine[cosine.isfinite()]
        section.numbers |= {
            name: getattr(found, name) for name in ("step_norm", "step_cosine", "turning_angle", "anisotropy", "cka")
        }
        if len(cosine):  # a state that stands still has no direction
            section.numbers["mean_step_cosine"] = mean = float(cosine.mean())
            way = (
                "mostly goes on" if mean > 0.5 else "bends" if mean > 0.2 else "turns sideways" if mean > -0.2 else "turns back"
            )
            section.reading.append(
                f"From one step to the next the state {way}: the mean cosine between successive steps is {number(mean)} (1: "
                "straight on, 0: at a right angle, −1: back)."
            )
        section.draw(
            "How alike the states of two loops are over the tokens (linear CKA, 1: alike up to rotation and scale).",
            thinned(found.cka.plot(title="linear CKA")),
        )

    for part in (layers, ends, steps):
        section.attempt(part)
    left_out(asked, section, least)
