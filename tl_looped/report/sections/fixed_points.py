"""Does the state settle?"""

from __future__ import annotations

from ...analysis import fixed_points
from ...analysis._directions import SETTLED
from ...analysis.fixed_points import FixedPoints
from ...names import stack_prefix
from ..drawing import linear_if_narrow
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, number, share
from ._common import first_token

ONE_DIRECTION = 0.99  # cosine of states that are said to have one direction


def measure(asked: Question) -> tuple[Numbers, dict[str, FixedPoints]]:
    """How far the state moves from loop to loop, in every stack."""
    prompts = asked.of_length(2) if asked.skip_first else asked.prompts
    numbers, results = Numbers(), dict[str, FixedPoints]()
    for stack in asked.model.schedule.core_stacks:
        results[stack] = found = fixed_points(
            asked.deep, prompts, n_loops=None, positions=asked.kept, stack=stack, verbose=False
        )
        moved = found.successive["relative"].values.mean(-1)
        half = len(moved) // 2
        numbers[stack] = {
            "successive": found.successive,
            "distance": found.distance,
            "norm": found.norm,
            "layer_cosine": found.layer_cosine,
            "degeneracy": found.degeneracy,
            "moved_by_loop": moved,
            "norm_by_loop": found.norm.values.mean(-1),
            "rate_of_the_second_half": (float(moved[-1]) / max(float(moved[half]), 1e-300))
            ** (1 / max(1, len(moved) - 1 - half)),
            "own_loop": asked.model.n_loops - 1,
        }
    return numbers, results


def read(asked: Question, numbers: Numbers, results: dict[str, FixedPoints]) -> Reading:
    """Whether it has settled, and whether all layers settle in one direction."""
    said, headline, own = list[str](), "", asked.model.n_loops
    a_pass = asked.model.schedule.names.pass_word.capitalize()
    for stack, found in results.items():
        moved, norms, name = numbers[stack]["moved_by_loop"], numbers[stack]["norm_by_loop"], stack_prefix(stack, ": ")
        labels, lowest = found.successive["relative"].labels["loop"], float(found.degeneracy.values[0])
        first = f"{a_pass} {labels[0]} moves the state by {share(moved[0])} of its norm"
        end = f", {a_pass.lower()} {labels[-1]} by {share(moved[-1])}" if len(moved) > 1 else ""
        middle = f", loop {own - 1} by {share(moved[own - 2])}" if a_pass == "Loop" and 2 < own < asked.n_loops else ""
        settled = float(moved[-1]) < SETTLED
        if bool(moved.isfinite().all()):
            rate = number(numbers[stack]["rate_of_the_second_half"])
            said.append(
                f"{name}{first}{middle if end else ''}{end}: it has {'' if settled else 'not '}settled (less than "
                f"{share(SETTLED)} would count as settled)."
                + (f" In the second half a step is on average {rate} times the one before." if len(moved) > 2 else "")
            )
            verdict = "settles" if settled else "does not settle"
            start = f"{a_pass.lower()} {labels[0]} moves it by {share(moved[0])} of its length"
            headline = headline or f"The state {verdict}: {start}{end}."
        else:
            said.append(f"{name}The state is zero, so it has no direction, and no step is a share of its norm.")
        turn = "no layer turns it much" if lowest > ONE_DIRECTION else "some layer turns it"
        said.append(
            f"{name}The norm of the state goes from {number(norms[0])} to {number(norms[-1])}."
            + (
                f" At the end the state leaving another layer has a cosine of {number(lowest)} or more with that leaving the "
                f"first one: {turn}."
                if lowest == lowest  # a loop of one layer has no other layer
                else ""
            )
        )
    return Reading(said, headline)


def panels(asked: Question, numbers: Numbers, results: dict[str, FixedPoints]) -> list[Figure]:
    """Steps, distances from the last state, and norms."""
    a_pass, figures = asked.model.schedule.names.pass_word, list[Figure]()
    for stack, found in results.items():
        name = stack_prefix(stack, ": ")
        drawn = {
            f"{name}How far each {a_pass} moves the state, over its norm.": found.panels("successive", "relative"),
            f"{name}How far the state is from where it is after {a_pass} {found.reference}, over the norm there; "
            "0 there by construction, which is left out.": found.panels("distance", "relative"),
            f"{name}The norm of the state, which a norm before the answer hides.": found.panels("norm"),
        }
        figures += [Figure(caption, [linear_if_narrow(panel)]) for caption, (panel,) in drawn.items()]
    return figures


PARTS = (first_token(), Part(measure, read, panels))
