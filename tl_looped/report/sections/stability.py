"""Beyond the model's own number of loops."""

from __future__ import annotations

from dataclasses import replace

from ..._words import counted
from ...analysis import more_loops
from ...figures.plots import panels
from .. import pointer_chasing
from ..drawing import thinned
from ..question import Question
from ..section import Section, measured, number, says_something, share
from ._common import left_out

DRAWN = {
    "loss": "loss (nats)",
    "accuracy": "accuracy",
    "margin": "margin (logits)",
    "kl": "KL from the own loops' answer (nats)",
    "overthinking": "overthinking",
}


def the_stability(asked: Question, section: Section) -> None:
    """Beyond the loops it was trained for."""
    if asked.hops is not None:
        return pointer_chasing.accuracy_beyond(asked, section)
    own = asked.model.n_loops
    found = more_loops(asked.deep, asked.of_length(2), n_loops=asked.n_loops, trained=own, verbose=False)
    section.numbers |= {name: getattr(found, name) for name in (*DRAWN, "loss_change", "agreement")}
    loss, best, n_prompts = found.loss.values, int(found.loss.values.argmin()), found.loss.count
    section.numbers |= {"own": own, "best_number_of_loops": best + 1}
    its_own, at_most = counted(own, "loop"), counted(len(loss), "loop")
    costs = [f"{measured(found.loss, own - 1)} nats each after {its_own}"]
    if best not in (own - 1, len(loss) - 1):
        costs.append(f"the least, {number(loss[best])}, after {counted(best + 1, 'loop')}")
    if len(loss) > own:
        costs.append(f"{measured(found.loss, -1)} after {at_most}")
    section.reading.append(
        f"Predicting the next tokens of the prompts costs {costs[0] if len(costs) == 1 else ', '.join(costs)} ("
        + (f"mean and standard error over {n_prompts} prompts)." if n_prompts > 1 else "one prompt, so no error).")
    )
    left_out(asked, section, 2)
    if len(loss) == own:
        section.reading.append(f"{its_own} were asked for, which is what the model has; nothing lies beyond.")
    else:
        section.numbers["agreement_own_last"] = agree = float(found.agreement.values[own - 1, -1])
        verdict = ""
        if n_prompts > 1:
            change, error = float(found.loss_change.values[-1]), float(found.loss_change.stderr[-1])
            verdict = "hurts" if found.overthinks else "helps" if change < -2 * error else "neither clearly hurts nor helps"
            section.reading.append(
                f"The change from {its_own} to {at_most} is {change:+.3g} ± {number(error)} nats, prompt by "
                f"prompt: looping on {verdict}."
            )
        section.reading.append(
            f"After {at_most} the most probable token is that after {its_own} at {share(agree)} of the positions."
        )
        section.headline = (
            f"Looping on from {own} to {at_most} {verdict}: predicting a token of the prompts costs {number(loss[own - 1])} "
            f"nats after {own}, {number(loss[-1])} after {len(loss)} ({n_prompts} prompts)."
            if verdict
            else f"Predicting a token of the prompt costs {number(loss[own - 1])} nats after {its_own}, {number(loss[-1])} "
            f"after {at_most} (one prompt)."
        )
    curves = [replace(getattr(found, metric), name=name) for metric, name in DRAWN.items()]
    curves = [one for one in curves if says_something(one.plot())]
    caption = "Quality of the next-token predictions over the number of loops."
    if any(one.name == "overthinking" for one in curves):
        caption += " Overthinking is the share that was right after fewer loops and is wrong."
    if curves:
        section.draw(caption, panels(curves, title=" ", mark=own))
    section.draw(
        "Share of positions with the same answer after two numbers of loops.",
        thinned(found.agreement.plot(title="agreement"), title="other number"),
    )
