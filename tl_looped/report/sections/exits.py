"""When it could stop."""

from __future__ import annotations

from ... import exits
from ..._words import counted
from ...analysis import exit_steps
from ...results import Grid
from ..drawing import over_positions
from ..question import Question
from ..section import Section, Unmeasured, number, share
from ._common import SHOWN_POSITIONS, left_out


def the_exits(asked: Question, section: Section) -> None:
    """When it could stop."""
    model = asked.model
    if model.n_loops == 1:
        raise Unmeasured("The model loops once, so there is no earlier loop to stop after.", asked.command(at_loop=1))
    policies: dict[str, exits.ExitPolicy] = {"KL < 5e-4": exits.KL(), "state moves < 3 %": exits.StateChange()}
    if model.looped_cfg.exit_gate:
        policies |= {f"gate ≥ {q}": exits.Gate(q) for q in (0.5, 0.9)}
    if asked.hops is None:
        prompts, answers, what = asked.of_length(2), None, "the next tokens of the prompts"
        left_out(asked, section, 2)
    else:
        prompts, answers = [asked.hops.tokens], asked.hops.answers(model.n_loops)[-1, :, -1]
        what = (
            f"hop {model.n_loops} from the last query of {len(answers)} mappings, which only the last loop is trained to name,"
        )
    found = exit_steps(model, prompts, policies=policies, answers=answers, verbose=False)
    section.numbers |= {"cost": found.cost, "accuracy": found.accuracy, "loss": found.loss}
    full = float(found.accuracy.values[-1])
    section.numbers["examples"] = n = found.accuracy.count
    section.reading.append(
        f"With all {counted(model.n_loops, 'loop')} the model names {what} in {share(full)} of the cases"
        + (f", over {counted(n, 'prompt')}." if asked.hops is None else ".")
    )
    for k, name in enumerate(policies):
        cost, right = float(found.cost.values[k]), found.accuracy.values[k]
        section.reading.append(
            f"Leaving when “{name}” takes {number(cost)} loops per token and is right in {share(right)} of the cases."
            if cost < model.n_loops
            else f"“{name}” never leaves before the last loop."
        )
    if any(float(cost) < model.n_loops for cost in found.cost.values[: len(policies)]):
        section.draw(
            "What exit policies cost and keep, against a fixed number of loops for every token.",
            found.plot().update_yaxes(range=(-0.03, 1.03)),
        )
    if found.pdf:
        first = asked.prompts[0][0]
        pdf = found.pdf[0][:, 0, -SHOWN_POSITIONS:]
        positions = list(range(len(first) - pdf.shape[1], len(first)))
        labels = {"loop": list(range(len(pdf))), "pos": list(positions)}
        section.numbers["gate_pdf"] = grid = Grid(pdf, ("loop", "pos"), labels, "probability of leaving")
        words = [asked.word(int(first[p])) for p in positions]
        section.draw(
            "Where the exit gate of the model would leave, token by token.",
            over_positions(grid, words, positions, "loop"),
            110 + 30 * len(words),
        )
