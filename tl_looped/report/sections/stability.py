"""Beyond the model's own number of loops."""

from __future__ import annotations

from dataclasses import replace

from ..._words import counted
from ...analysis import more_loops
from ...analysis.more_loops import MoreLoops
from ...panels import curves
from .. import pointer_chasing
from ..drawing import by_loops
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, measured, number, share
from ._common import left_out

DRAWN = {
    "loss": "loss (nats)",
    "accuracy": "accuracy",
    "margin": "margin (logits)",
    "kl": "KL from the own loops' answer (nats)",
    "overthinking": "overthinking",
}


def measure(asked: Question) -> tuple[Numbers, MoreLoops] | None:
    """How good the answers are after every number of loops; of pointer chasing the right answers are known instead."""
    if asked.hops is not None:
        return None
    own = asked.model.n_loops
    found = more_loops(asked.deep, asked.of_length(2), n_loops=asked.n_loops, trained=own, verbose=False)
    numbers: Numbers = {name: getattr(found, name) for name in (*DRAWN, "loss_change", "agreement")}
    numbers |= {"own": own, "best_number_of_loops": int(found.loss.values.argmin()) + 1}
    return numbers | ({"agreement_own_last": float(found.agreement.values[own - 1, -1])} if asked.n_loops > own else {}), found


def read(asked: Question, numbers: Numbers, found: MoreLoops) -> Reading:
    """What predictions cost after the own number of loops, after the best and after the most, and whether more help."""
    own, best, loss, n_prompts = numbers["own"], numbers["best_number_of_loops"], found.loss.values, found.loss.count
    its_own, at_most = counted(own, "loop"), counted(len(loss), "loop")
    costs = [f"{measured(found.loss, own - 1)} nats each after {its_own}"]
    if best not in (own, len(loss)):
        costs.append(f"the least, {number(loss[best - 1])}, after {counted(best, 'loop')}")
    if len(loss) > own:
        costs.append(f"{measured(found.loss, -1)} after {at_most}")
    basis = f"mean and standard error over {n_prompts} prompts" if n_prompts > 1 else "one prompt, so no error"
    said = [f"Predicting the next tokens of the prompts costs {', '.join(costs)} ({basis})."]
    if len(loss) == own:
        return Reading([*said, f"{its_own} were asked for, which is what the model has; nothing lies beyond."])
    agree = share(numbers["agreement_own_last"])
    same = f"After {at_most} the most probable token is that after {its_own} at {agree} of the positions."
    before, after = number(loss[own - 1]), number(loss[-1])
    if n_prompts == 1:
        costs_one = f"Predicting a token of the prompt costs {before} nats after {its_own}, {after} after {at_most}"
        return Reading([*said, same], f"{costs_one} (one prompt).")
    change, error = float(found.loss_change.values[-1]), float(found.loss_change.stderr[-1])
    verdict = "hurts" if found.overthinks else "helps" if change < -2 * error else "neither clearly hurts nor helps"
    said.append(
        f"The change from {its_own} to {at_most} is {change:+.3g} ± {number(error)} nats, prompt by prompt: looping on "
        f"{verdict}."
    )
    return Reading(
        [*said, same],
        f"Looping on from {own} to {at_most} {verdict}: predicting a token of the prompts costs {before} "
        f"nats after {own}, {after} after {len(loss)} ({n_prompts} prompts).",
    )


def panels(asked: Question, numbers: Numbers, found: MoreLoops) -> list[Figure]:
    """The curves over the number of loops, and which numbers of loops answer alike."""
    named = [replace(numbers[metric], name=name) for metric, name in DRAWN.items()]
    drawn = [panel for panel in curves(named, mark=numbers["own"]) if panel.says_something]
    caption = "Quality of the next-token predictions over the number of loops."
    if any(panel.roles["y"].title == "overthinking" for panel in drawn):
        caption += " Overthinking is the share that was right after fewer loops and is wrong."
    figures = [Figure(caption, drawn)] if drawn else []
    same = "Share of positions with the same answer after two numbers of loops."
    return [*figures, Figure(same, by_loops(found.agreement, "other number"))]


PARTS = (Part(measure, read, panels), pointer_chasing.ACCURACY, left_out(2))
