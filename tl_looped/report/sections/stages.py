"""Stages of inference in every loop."""

from __future__ import annotations

from ...analysis import inference_stages
from ...analysis.inference_stages import METRICS, InferenceStages
from ...names import stack_prefix
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, Unmeasured, listed, number
from ._common import first_token, left_out

REPEATS = 0.8  # concordance of a curve with that of the loop before
TITLES = {
    "colsum": "how much of the attention goes to few tokens (ColSum concentration)",
    "sink_rate": "share of heads that attend to the first token",
    "mixing": "how widely a token looks (entropy of its attention)",
    "entropy": "how many directions the states take up (matrix entropy)",
    "norm": "norm of the state",
}


def measure(asked: Question) -> tuple[Numbers, InferenceStages]:
    """Five measures over the layers, and how alike their curves are from loop to loop."""
    schedule = asked.model.schedule
    if asked.model.n_loops == 1 and schedule.n_passes == 1:
        raise Unmeasured("The model loops once, so no loop repeats another's stages.", asked.command(at_loop=1))
    found = inference_stages(asked.model, asked.of_length(3 if asked.skip_first else 2), positions=asked.kept, verbose=False)
    numbers: Numbers = {metric: getattr(found, metric) for metric in METRICS} | {"repeats_from": REPEATS}
    constant = {m: float(v[0]) for m in METRICS if float((v := getattr(found, m).values).max() - v.min()) < 1e-6}
    for stack in schedule.core_stacks:
        if schedule.n_loops_of(stack) > 1 and schedule.stacks[stack] > 1 and len(constant) < len(METRICS):
            scores = found.repetition(stack)
            mean = dict(zip(METRICS, scores.values[..., 1].mean(0).tolist(), strict=True))  # concordance by metric
            numbers |= {f"repetition_{stack}": scores, f"mean_concordance_{stack}": mean}
    return numbers | {f"constant_{metric}": value for metric, value in constant.items()}, found


def _told(numbers: Numbers) -> list[str]:
    return [metric for metric in METRICS if f"constant_{metric}" not in numbers]


def read(asked: Question, numbers: Numbers, found: InferenceStages) -> Reading:
    """Which of the curves a loop repeats, and which are constant."""
    schedule, said = asked.model.schedule, list[str]()
    for stack in schedule.core_stacks:
        if mean := numbers.get(f"mean_concordance_{stack}"):
            yes = [m for m in _told(numbers) if mean[m] >= REPEATS]
            no = [f"{m} ({number(mean[m])})" for m in _told(numbers) if mean[m] < REPEATS]
            points = schedule.stacks[stack]
            said.append(
                f"{stack_prefix(stack, ': ')}From one {schedule.names.pass_word} to the next, the curve over the layers stays "
                f"about the same (mean concordance of at least {REPEATS}; 1: the same curve) in "
                f"{listed(yes) if yes else 'none of the measures'}"
                + (f"; it does not in {listed(no)}." if no else ".")
                + (f" A curve over {points} layers has {points} points, so this says little." if points < 6 else "")
            )
    said += [
        f"{metric} ({TITLES[metric]}) is {number(numbers[f'constant_{metric}'])} in every layer, and is not drawn."
        for metric in METRICS
        if metric not in _told(numbers)
    ]
    return Reading(said)


def panels(asked: Question, numbers: Numbers, found: InferenceStages) -> list[Figure]:
    """The curves that are not constant; a line over two layers would be two points."""
    many = asked.model.schedule.n_core > 2
    lines = "one line per loop" if many else "over all layers, with the loop above"
    return [
        Figure(f"{metric}: {TITLES[metric]}, {lines}.", found.panels(metric, "recurrence" if many else "depth"))
        for metric in _told(numbers)
    ]


PARTS = (Part(measure, read, panels), left_out(2), first_token(" (norm and entropy)"))
