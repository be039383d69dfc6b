"""When it could stop."""

from __future__ import annotations

from dataclasses import replace

from ... import exits
from ..._words import counted
from ...analysis import exit_steps
from ...analysis.exit_steps import ExitSteps
from ...results import Grid
from ..drawing import over_positions, with_axes
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, Unmeasured, number, share
from ._common import SHOWN_POSITIONS, left_out

POLICIES: dict[str, exits.ExitPolicy] = {"KL < 5e-4": exits.KL(), "state moves < 3 %": exits.StateChange()}
GATES: dict[str, exits.ExitPolicy] = {f"gate ≥ {q}": exits.Gate(q) for q in (0.5, 0.9)}


def measure(asked: Question) -> tuple[Numbers, ExitSteps]:
    """What exit policies cost and keep; for pointer chasing, of the answers to the last query."""
    model, hops = asked.model, asked.hops
    if model.n_loops == 1:
        raise Unmeasured("The model loops once, so there is no earlier loop to stop after.", asked.command(at_loop=1))
    policies = POLICIES | (GATES if model.lacks("exit gate") is None else {})
    prompts = asked.of_length(2) if hops is None else [hops.tokens]
    answers = None if hops is None else hops.answers(model.n_loops)[-1, :, -1]
    found = exit_steps(model, prompts, policies=policies, answers=answers, verbose=False)
    numbers: Numbers = {"cost": found.cost, "accuracy": found.accuracy, "loss": found.loss, "examples": found.accuracy.count}
    if found.pdf:
        pdf, n = found.pdf[0][:, 0, -SHOWN_POSITIONS:], asked.prompts[0].shape[1]
        labels = {"loop": list(range(len(pdf))), "pos": list(range(n - pdf.shape[1], n))}
        numbers["gate_pdf"] = Grid(pdf, ("loop", "pos"), labels, "probability of leaving")
    return numbers, found


def _policies(asked: Question, found: ExitSteps) -> list[tuple[str, float, float]]:
    """Name, cost and accuracy of every policy, without the fixed numbers of loops."""
    n = len(found.cost.values) - found.n_loops
    rows = zip(found.cost.labels["policy"], found.cost.values.tolist(), found.accuracy.values.tolist(), strict=True)
    return list(rows)[:n]


def read(asked: Question, numbers: Numbers, found: ExitSteps) -> Reading:
    """How much every policy saves, and whether its answers are as good."""
    n_loops, n = asked.model.n_loops, numbers["examples"]
    what = (
        "the next tokens of the prompts"
        if asked.hops is None
        else f"hop {n_loops} from the last query of {n} mappings, which only the last loop is trained to name,"
    )
    full, over = share(found.accuracy.values[-1]), f", over {counted(n, 'prompt')}." if asked.hops is None else "."
    said = [f"With all {counted(n_loops, 'loop')} the model names {what} in {full} of the cases{over}"]
    for name, cost, right in _policies(asked, found):
        said.append(
            f"Leaving when “{name}” takes {number(cost)} loops per token and is right in {share(right)} of the cases."
            if cost < n_loops
            else f"“{name}” never leaves before the last loop."
        )
    return Reading(said)


def panels(asked: Question, numbers: Numbers, found: ExitSteps) -> list[Figure]:
    """Accuracy over cost, and where a gate would leave."""
    figures: list[Figure] = []
    if any(cost < asked.model.n_loops for _, cost, _ in _policies(asked, found)):
        (panel,) = found.panels()
        panel = with_axes(panel, y=replace(panel.roles["y"], range=(-0.03, 1.03)))
        figures.append(Figure("What exit policies cost and keep, against a fixed number of loops for every token.", [panel]))
    if grid := numbers.get("gate_pdf"):
        positions = grid.labels["pos"]
        words = asked.words(asked.prompts[0][0])[positions[0] :]
        panel = over_positions(grid, words, positions, "loop")
        caption = "Where the exit gate of the model would leave, token by token."
        figures.append(Figure(caption, [panel], 110 + 30 * len(words)))
    return figures


PARTS = (Part(measure, read, panels), left_out(2))
