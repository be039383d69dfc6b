"""Does the state settle?"""

from __future__ import annotations

from ...analysis import fixed_points
from ...analysis._directions import SETTLED
from ...names import stack_prefix
from ..drawing import linear_if_narrow
from ..question import Question
from ..section import Section, number, share
from ._common import say_first_token

ONE_DIRECTION = 0.99  # cosine of states that are said to have one direction


def the_fixed_points(asked: Question, section: Section) -> None:
    """Whether the state settles."""
    own, prompts = asked.model.n_loops, asked.of_length(2) if asked.skip_first else asked.prompts
    say_first_token(asked, section)
    schedule = asked.model.schedule
    for stack in schedule.core_stacks:
        found = fixed_points(asked.deep, prompts, n_loops=None, positions=asked.kept, stack=stack, verbose=False)
        moved = found.successive["relative"].values.mean(-1)
        labels = found.successive["relative"].labels["loop"]
        half = len(moved) // 2
        rate = (float(moved[-1]) / max(float(moved[half]), 1e-300)) ** (1 / max(1, len(moved) - 1 - half))
        norms = found.norm.values.mean(-1)
        lowest = float(found.degeneracy.values[0])
        name, a_pass = stack_prefix(stack, ": "), schedule.names.pass_word.capitalize()
        section.numbers[stack] = {
            "successive": found.successive,
            "distance": found.distance,
            "norm": found.norm,
            "layer_cosine": found.layer_cosine,
            "degeneracy": found.degeneracy,
            "moved_by_loop": moved,
            "norm_by_loop": norms,
            "rate_of_the_second_half": rate,
            "own_loop": own - 1,
        }
        middle = f"loop {own - 1} by {share(moved[own - 2])}, " if a_pass == "Loop" and 2 < own < asked.n_loops else ""
        last = f", {middle}{a_pass.lower()} {labels[-1]} by {share(moved[-1])}" if len(moved) > 1 else ""
        is_finite = bool(moved.isfinite().all())
        has_settled = float(moved[-1]) < SETTLED
        section.reading.append(
            f"{name}{a_pass} {labels[0]} moves the state by {share(moved[0])} of its norm{last}: "
            + ("it has settled" if has_settled else "it has not settled")
            + f" (less than {share(SETTLED)} would count as settled)."
            + (f" In the second half a step is on average {number(rate)} times the one before." if len(moved) > 2 else "")
            if is_finite
            else f"{name}The state is zero, so it has no direction, and no step is a share of its norm."
        )
        if is_finite and not section.headline:
            section.headline = (
                f"The state {'settles' if has_settled else 'does not settle'}: {a_pass.lower()} {labels[0]} moves it by "
                f"{share(moved[0])} of its length"
                + (f", {a_pass.lower()} {labels[-1]} by {share(moved[-1])}." if last else ".")
            )
        section.reading.append(f"{name}The norm of the state goes from {number(norms[0])} to {number(norms[-1])}.")
        if lowest == lowest:  # a loop of one layer has no other layer
            section.reading[-1] += (
                f" At the end the state leaving another layer has a cosine of {number(lowest)} or more with that leaving the "
                f"first one: {'no layer turns it much' if lowest > ONE_DIRECTION else 'some layer turns it'}."
            )
        section.draw(
            f"{name}How far each {a_pass.lower()} moves the state, over its norm.",
            linear_if_narrow(found.plot("successive", "relative")),
        )
        section.draw(
            f"{name}How far the state is from where it is after {a_pass.lower()} {found.reference}, over the norm there; "
            "0 there by construction, which is left out.",
            linear_if_narrow(found.plot("distance", "relative")),
        )
        section.draw(f"{name}The norm of the state, which a norm before the answer hides.", found.plot("norm"))
