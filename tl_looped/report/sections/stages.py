"""Stages of inference in every loop."""

from __future__ import annotations

from ...analysis import inference_stages
from ...analysis.inference_stages import METRICS
from ...names import stack_prefix
from ..question import Question
from ..section import Section, Unmeasured, listed, number
from ._common import left_out, say_first_token

REPEATS = 0.8  # concordance of a curve with that of the loop before
TITLES = {
    "colsum": "how much of the attention goes to few tokens (ColSum concentration)",
    "sink_rate": "share of heads that attend to the first token",
    "mixing": "how widely a token looks (entropy of its attention)",
    "entropy": "how many directions the states take up (matrix entropy)",
    "norm": "norm of the state",
}


def the_stages(asked: Question, section: Section) -> None:
    """Stages of inference in every loop."""
    schedule = asked.model.schedule
    if asked.model.n_loops == 1 and schedule.n_passes == 1:
        raise Unmeasured("The model loops once, so no loop repeats another's stages.", asked.command(at_loop=1))
    found = inference_stages(asked.model, asked.of_length(3 if asked.skip_first else 2), positions=asked.kept, verbose=False)
    section.numbers |= {metric: getattr(found, metric) for metric in METRICS} | {"repeats_from": REPEATS}
    constant = {m: float(v[0]) for m in METRICS if float((v := getattr(found, m).values).max() - v.min()) < 1e-6}
    told = [metric for metric in METRICS if metric not in constant]
    for stack in schedule.core_stacks:
        name = stack_prefix(stack, ": ")

        def repeats(stack: str = stack, name: str = name) -> None:
            if schedule.n_loops_of(stack) == 1 or (points := schedule.stacks[stack]) < 2 or not told:
                return
            scores = found.repetition(stack)
            mean: dict[str, float] = dict(
                zip(METRICS, scores.values[..., 1].mean(0).tolist(), strict=True)
            )  # concordance by metric
            section.numbers[f"repetition_{stack}"] = scores
            section.numbers[f"mean_concordance_{stack}"] = mean
            yes = [m for m in told if mean[m] >= REPEATS]
            no = [f"{m} ({number(mean[m])})" for m in told if mean[m] < REPEATS]
            section.reading.append(
                f"{name}From one {schedule.names.pass_word} to the next, the curve over the layers stays about "
                f"the same (mean concordance of at least {REPEATS}; 1: the same curve) in "
                f"{listed(yes) if yes else 'none of the measures'}"
                + (f"; it does not in {listed(no)}." if no else ".")
                + (f" A curve over {points} layers has {points} points, so this says little." if points < 6 else "")
            )

        section.attempt(repeats)
    for metric, value in constant.items():
        section.numbers[f"constant_{metric}"] = value
        section.reading.append(f"{metric} ({TITLES[metric]}) is {number(value)} in every layer, and is not drawn.")
    left_out(asked, section, 2)
    # A line over two layers would be two points.
    over, lines = (
        ("recurrence", "one line per loop") if schedule.n_core > 2 else ("depth", "over all layers, with the loop above")
    )
    say_first_token(asked, section, " (norm and entropy)")
    for metric in told:
        figure = found.plot(metric, over)
        figure.for_each_annotation(lambda note: note.update(text=note.text.replace("loop ", "")))  # it has no room
        section.draw(f"{metric}: {TITLES[metric]}, {lines}.", figure)
