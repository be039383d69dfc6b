"""Figures of stages of inference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..analysis.inference_stages import METRICS, correlation
from ..names import stack_prefix
from ..panels import Axis, Panel
from ..report.section import Figure, listed, number, share
from .about import About, Drawn, Draws, Missing

MOST_LINES = 24


def stage(*metrics: str, by: str = "recurrence", part: str = "stages", title: str) -> Draws:
    """Some measures over the depth of the block, and how alike successive passes are.

    Args:
        *metrics: which of `METRICS`.
        by: the grouping.
        part: which stages.
        title: the figure's name.
    """

    def draw(about: About) -> Drawn:
        found, said = about.part(part), list[str]()
        for metric in metrics:
            values = getattr(found, metric).values
            said.append(f"{metric} from {number(values.min())} to {number(values.max())} over the layers")
        return f"{listed(said).capitalize()}.{_repeats(found, metrics)}", _stage_figures(about, metrics, by, part, title)

    return draw


def _known(correlation: Any) -> str:
    """A correlation, or that there is none with a curve of one number."""
    return number(correlation) if bool(correlation == correlation) else "none (a constant)"


def _repeats(found: Any, metrics: tuple[str, ...]) -> str:
    """How alike the curves of successive passes are."""
    said = list[str]()
    for stack in found.schedule.core_stacks:
        if found.schedule.n_loops_of(stack) > 1 and found.schedule.stacks[stack] > 1:
            scores = found.repetition(stack).sel(score="concordance")
            each = [f"{m} {number(scores.sel(metric=m).values.nanmean())}" for m in metrics]
            said.append(
                f" {stack_prefix(stack, ': ')}Concordance of a pass with the one before (1: the same curve): {listed(each)}."
            )
    return "".join(said)


def _stage_figures(about: About, metrics: tuple[str, ...], by: str, part: str, title: str) -> list[Figure]:
    found, twin = about.part(part), about.findings.parts.get("stages_feed_forward")
    figures = list[Figure]()
    for metric in metrics:
        (panel,) = found.panels(metric, by)
        if len(panel.grids) > MOST_LINES and by == "recurrence":
            some = {round(k * (len(panel.grids) - 1) / (MOST_LINES - 1)) for k in range(MOST_LINES)}
            panel = replace(panel, grids=[grid for k, grid in enumerate(panel.grids) if k in some])
        beside = ""
        if twin is not None and by == "recurrence":
            y = getattr(twin, metric).values.tolist()
            x = [100 * k / max(1, len(y) - 1) for k in range(len(y))]
            panel = replace(panel, grids=[*panel.grids, {"name": "feed-forward", "x": x, "y": y, "ink": "#888", "dash": "dot"}])
            beside = ", the feed-forward model dotted"
        lines = {"recurrence": "a line for every pass", "layer": "a line for every layer"}[by]
        figures.append(Figure(f"{title}: {metric}, {lines}{beside}.", [panel]))
    return figures


def beside_twin(about: About) -> Drawn:
    """The measures of attention and the entropy of every pass, beside a feed-forward model's if there is one.

    Args:
        about: what was measured.
    """
    metrics, title = ("sink_rate", "mixing", "entropy"), "Figure 8"
    figures = _stage_figures(about, metrics, "recurrence", "stages", title)
    twin, found = about.findings.parts.get("stages_feed_forward"), about.part("stages")
    if twin is None:
        why = about.missing.get("stages_feed_forward", "")
        return f"Drawn without a feed-forward model beside it{why}.{_repeats(found, metrics)}", figures
    said = list[str]()
    for stack in about.stacks:
        scores = found.compare(twin, stack).sel(score="correlation").values.nanmean(0)
        each = [f"{m} {_known(v)}" for m, v in zip(METRICS, scores, strict=True)]
        said.append(
            f"{stack_prefix(stack, ': ')}Correlation of a pass with the feed-forward model on relative depth: {listed(each)}."
        )
    return " ".join(said), figures


def huginn_stages(about: About) -> Drawn:
    """How far the layers of the last pass differ, in every measure.

    Args:
        about: what was measured.
    """
    found, said = about.part("stages"), list[str]()
    for stack in about.stacks:
        last = {m: found.curves(m, stack)[-1] for m in METRICS}
        each = [f"{m} {number(curve.max() - curve.min())}" for m, curve in last.items()]
        said.append(f"{stack_prefix(stack, ': ')}From the lowest to the highest layer of the last pass: {listed(each)}.")
    return " ".join(said) + " Drawn as figures 7 to 9.", []


def halves(about: About) -> Drawn:
    """How alike the two halves of the block are.

    Args:
        about: what was measured.
    """
    found, said, figures = about.part("stages"), list[str](), list[Figure]()
    for stack in about.stacks:
        n = found.schedule.stacks[stack]
        if n < 4 or n % 2:
            raise Missing(f"a block of {n} layers has no two halves of two layers or more")
        each = list[str]()
        for metric in METRICS:
            curves = found.curves(metric, stack)
            alike = correlation(curves[:, : n // 2], curves[:, n // 2 :]).nanmean()
            each.append(f"{metric} {_known(alike)}")
        said.append(f"{stack_prefix(stack, ': ')}Correlation of the two halves, mean over passes: {listed(each)}.")
        last = found.curves("colsum", stack)[-1].tolist()
        lines = [
            {"name": name, "x": list(range(n // 2)), "y": half, "ink": ink}
            for name, half, ink in (("first half", last[: n // 2], "#2166ac"), ("second half", last[n // 2 :], "#d95f0e"))
        ]
        roles = {"x": Axis("layer of the half", form="count"), "y": Axis("ColSum concentration")}
        figures.append(
            Figure(f"Figure 40: {stack_prefix(stack, ': ')}colsum in the last pass.", [Panel("lines", lines, roles)])
        )
    return " ".join(said), figures


def over_loops(about: About) -> Drawn:
    """What every measure does in all loops, layer by layer.

    Args:
        about: what was measured.
    """
    found, said = about.part("stages_deep"), list[str]()
    for stack in about.stacks:
        n = found.schedule.n_loops_of(stack)
        if n < 4:
            raise Missing(f"{n} loops say nothing of what stays; pass --loops")
        half = n // 2 - 1
        each = list[str]()
        for metric in METRICS:
            curves = found.curves(metric, stack)
            spread = float(curves.max() - curves.min())
            each.append(f"{metric} {share((curves[-1] - curves[half]).abs().mean() / spread) if spread > 0 else 'none'}")
        said.append(
            f"{stack_prefix(stack, ': ')}Mean change of a layer from loop {half} to {n - 1}, as a share of the range over all "
            f"loops and layers: {listed(each)}."
        )
    return " ".join(said), _stage_figures(about, METRICS, "layer", "stages_deep", "Figures 11, 12")


def without_mlp(about: About) -> Drawn:
    """Norm, sinks and entropy with and without what the second executed layer's MLP writes.

    Args:
        about: what was measured.
    """
    before, after = about.part("stages"), about.part("stages_without_mlp")
    where, said, figures = before.schedule.layer_name(1), list[str](), list[Figure]()
    for metric in ("norm", "sink_rate", "entropy"):
        a, b = (getattr(found, metric).values for found in (before, after))
        said.append(f"highest {metric} {number(a.max())}, without {number(b.max())}")
        lines = [
            {"name": name, "x": list(range(len(v))), "y": v.tolist(), "ink": ink}
            for name, v, ink in (("as it is", a, "#2166ac"), ("without", b, "#d95f0e"))
        ]
        roles = {"x": Axis("virtual layer"), "y": Axis(metric.replace("_", " "))}
        figures.append(
            Figure(f"Figure 41: {metric}, and with the MLP of {where} writing zeros.", [Panel("lines", lines, roles)])
        )
    return f"Of {where}: {listed(said)}.", figures
