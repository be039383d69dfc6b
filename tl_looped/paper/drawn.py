"""What every figure of the paper is here: a sentence made from the numbers, and panels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..analysis.fixed_points import FixedPoints, Metric, Quantity
from ..analysis.inference_stages import METRICS
from ..errors import LoopedError
from ..names import stack_prefix
from ..panels import Axis, Panel, grouped, heat_map
from ..report.drawing import linear_if_narrow
from ..report.section import Figure, listed, number, share
from ..results import Estimate
from ..schedule import Schedule, Site
from .findings import Findings

NEAR = 0.01  # of the norm of X*: there; our choice
MOST_ROWS = 256  # of a heat map on the page; tables have them all
MOST_LINES = 24


class Missing(LoopedError):
    """Why a figure is not there."""


@dataclass(frozen=True)
class About:
    """What a figure is drawn from.

    Args:
        findings: what was measured.
        schedule: of the model with its own loops.
        n_loops: how far it was looped.
        stacks: the looped stacks.
        missing: why a part is not there, beside what the findings say.
    """

    findings: Findings
    schedule: Schedule
    n_loops: int
    stacks: tuple[str, ...]
    missing: dict[str, str]

    def part(self, name: str) -> Any:
        """A result by its name.

        Args:
            name: of the part.

        Raises:
            Missing: it is not there.
        """
        if name not in self.findings.parts:
            raise Missing(self.findings.why_not(name) or self.missing.get(name) or "it was not measured")
        return self.findings.parts[name]

    def by_stack(self, name: str) -> list[tuple[str, Any]]:
        """The result of every looped stack, with what the stack is called before a sentence.

        Args:
            name: of the part.
        """
        several = len(self.stacks) > 1
        return [(stack_prefix(s, ": "), self.part(f"{name}.{s}" if several else name)) for s in self.stacks]


Drawn = tuple[str, list[Figure]]
Draws = Callable[[About], Drawn]


def _fixed(quantity: Quantity, metric: Metric, title: str) -> Draws:
    def draw(about: About) -> Drawn:
        said, figures = list[str](), list[Figure]()
        for name, found in about.by_stack("fixed_points"):
            read = _step if quantity == "successive" else _to_the_end
            said.append(name + read(found, metric))
            (panel,) = found.panels(quantity, metric)
            is_cover = (quantity, metric) == ("distance", "l2")
            figures.append(Figure(f"{title}: {name}{_unit(metric)}.", [linear_if_narrow(panel)], is_cover=is_cover))
        return " ".join(said), figures

    return draw


def _unit(metric: Metric) -> str:
    return "cosine of every token, mean" if metric == "cosine" else "L2 norm of every token, mean"


def _step(found: FixedPoints, metric: Metric) -> str:
    grid = found.successive["cosine" if metric == "cosine" else "relative"]
    mean, loops = grid.values.mean(-1), grid.labels["loop"]
    if metric == "cosine":
        return f"Mean cosine {number(mean[0])} in loop {loops[0]}, {number(mean[-1])} in loop {loops[-1]}."
    first, last = float(mean[0]), float(mean[-1])
    return f"A step is {share(first)} of the state's norm in loop {loops[0]} and {share(last)} in loop {loops[-1]}."


def _to_the_end(found: FixedPoints, metric: Metric) -> str:
    grid = found.distance["cosine" if metric == "cosine" else "relative"]
    half = len(grid.values) // 2 - 1
    mean = grid.values.mean(-1)
    if half < 1:
        return "Too few loops to see X* from afar."
    if metric == "cosine":
        first = f"Mean cosine to the state of loop {found.reference}: {number(mean[0])} after loop 0"
        return f"{first}, {number(mean[half])} after loop {half}."
    near = (found.distance["relative"].values[:-1] < NEAR).all(-1)
    there = next((t for t in range(len(near)) if bool(near[t:].all())), None)
    at = f"In loop {found.reference - 1} some layer is still farther away than 1 %."
    if there is not None:
        at = f"From loop {there} on it is within 1 % in every layer."
    away = f"After loop {half} the state is {share(mean[half])} of the norm of X* away from it"
    return f"{away} (X* is that of loop {found.reference}). {at}"


def _patterns_over_loops(quantity: str, title: str) -> Draws:
    def draw(about: About) -> Drawn:
        said, figures = list[str](), list[Figure]()
        for name, found in about.by_stack("fixed_points"):
            grid: Estimate = getattr(found, quantity)
            values = grid.values.clone()
            if quantity == "pattern_distance" and grid.labels["loop"][-1] == found.reference:
                values[-1] = torch.nan  # by construction
            at = [Site(found.stack, t, j) for t in grid.labels["loop"] for j in grid.labels["layer"]]
            layers = [found.schedule.virtual(site) for site in at]
            shown = values.flatten().tolist()
            what = "Frobenius distance / sqrt(head · query)"
            panel = grouped(shown, found.schedule, layers=layers, group_by="layer", name=what, log_y=True)
            figures.append(Figure(f"{title}: {name}mean over prompts.", [linear_if_narrow(panel)]))
            mean, loops = grid.values.mean(-1), grid.labels["loop"]
            last = -1 if quantity == "pattern_successive" else max(0, len(mean) - 2)
            said.append(f"{name}{number(mean[0])} in loop {loops[0]}, {number(mean[last])} in loop {loops[last]}.")
        return " ".join(said), figures

    return draw


def _pairs(kind: str, n: int, title: str) -> Draws:
    """All pairs of layers in `n` loops, or in as many as there are."""

    def draw(about: About) -> Drawn:
        n_loops = min(n, about.n_loops)
        if n_loops < n and n > 8:
            raise Missing(f"{n} loops are compared, and {about.n_loops} were asked; pass --loops {n}")
        grid: Estimate = about.part(f"{kind}_{n_loops}")
        return _resemblance(grid, kind == "states"), [_pair_map(grid, f"{title}, {n_loops} loops")]

    return draw


def _both(one: Draws, other: Draws) -> Draws:
    """What one says and what the other does, if there is another."""

    def draw(about: About) -> Drawn:
        said, figures = one(about)
        try:
            more, others = other(about)
        except Missing as error:
            return f"{said} {error}.", figures
        return f"8 loops: {said} 32 loops: {more}", figures + others

    return draw


def _resemblance(grid: Estimate, is_cosine: bool) -> str:
    """How near a layer is to itself in the next loop, against the other layers there."""
    where = [(name.partition("blocks.")[2], name.rpartition(".blocks.")[0]) for name in grid.labels["layer"]]
    looped = [k for k, (_, loop) in enumerate(where) if "loops." in loop]
    nearest = same = 0
    own, others = list[float](), list[float]()
    for a in looped:
        stack, _, t = where[a][1].rpartition("loops.")
        later = [b for b in looped if where[b][1] == f"{stack}loops.{int(t) + 1}"]
        if not later:
            continue
        row = grid.values[a, later]
        me = next(k for k, b in enumerate(later) if where[b][0] == where[a][0])
        best = int(row.nan_to_num(-2 if is_cosine else torch.inf).argmax() if is_cosine else row.argmin())
        nearest, same = nearest + 1, same + (best == me)
        own.append(float(row[me]))
        others += [float(v) for k, v in enumerate(row) if k != me]
    if not own or not others:
        return "No layer has another one to be compared with."
    what = "cosine" if is_cosine else "distance"
    return (
        f"In {share(same / nearest)} of the layers run, what is most alike in the next loop is the same layer. Mean {what} to "
        f"itself there {number(sum(own) / len(own))}, to other layers {number(sum(others) / len(others))}."
    )


def _pair_map(grid: Estimate, title: str) -> Figure:
    n, names = len(grid.values), grid.labels["layer"]
    some = sorted({round(k * (n - 1) / (MOST_ROWS - 1)) for k in range(MOST_ROWS)}) if n > MOST_ROWS else list(range(n))
    panel = heat_map(grid[some, some])
    short = [names[k].replace("loops.", "").replace(".blocks.", "·") for k in some]
    panel = replace(panel, roles=panel.roles | {"x": Axis("layer", short), "y": Axis("layer", short)})
    drawn = f" Every {n / len(some):.1f}th layer is drawn; the table has all." if len(some) < n else ""
    return Figure(f"{title}: {grid.name.replace('_', ' ')}.{drawn}", [panel], width=480)


def _paths(about: About) -> Drawn:
    names = sorted(name for name in {*about.findings.parts, *about.findings.refused} if name.startswith("path_"))
    if not (there := [name for name in names if name in about.findings.parts]):
        raise Missing(about.findings.why_not(names[0]) if names else "no path was measured")
    what = {"path_0": "the first prompt", "path_1": "“Hello! I've been well. …”", "path_2": "“The square root of 16 is”"}
    said, figures = list[str](), list[Figure]()
    for name in there:
        found = about.part(name)
        of = what[name] if about.missing.get("texts") is None else f"prompt {name.rpartition('_')[2]}"
        said.append(f"{share(found.explained.values.sum())} of the variance on {of}")
        figures.append(Figure(f"Figures 5, 26 to 28: the last token of {of}, {found.n_loops} loops.", found.panels()))
    return f"Two directions hold {listed(said)}.", figures


def _stage(*metrics: str, by: str = "recurrence", part: str = "stages", title: str) -> Draws:
    def draw(about: About) -> Drawn:
        found, said = about.part(part), list[str]()
        for metric in metrics:
            values = getattr(found, metric).values
            said.append(f"{metric} from {number(values.min())} to {number(values.max())} over the layers")
        return f"{listed(said).capitalize()}.{_repeats(found, metrics)}", _stage_figures(about, metrics, by, part, title)

    return draw


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


def _beside_twin(about: About) -> Drawn:
    metrics, title = ("sink_rate", "mixing", "entropy"), "Figure 8"
    figures = _stage_figures(about, metrics, "recurrence", "stages", title)
    twin, found = about.findings.parts.get("stages_feed_forward"), about.part("stages")
    if twin is None:
        why = about.missing.get("stages_feed_forward", "")
        return f"Drawn without a feed-forward model beside it{why}.{_repeats(found, metrics)}", figures
    said = list[str]()
    for stack in about.stacks:
        scores = found.compare(twin, stack).sel(score="correlation").values.nanmean(0)
        each = [f"{m} {number(v)}" for m, v in zip(METRICS, scores, strict=True)]
        said.append(
            f"{stack_prefix(stack, ': ')}Correlation of a pass with the feed-forward model on relative depth: {listed(each)}."
        )
    return " ".join(said), figures


def _huginn_stages(about: About) -> Drawn:
    found, said = about.part("stages"), list[str]()
    for stack in about.stacks:
        last = {m: found.curves(m, stack)[-1] for m in METRICS}
        each = [f"{m} {number(curve.max() - curve.min())}" for m, curve in last.items()]
        said.append(f"{stack_prefix(stack, ': ')}From the lowest to the highest layer of the last pass: {listed(each)}.")
    return " ".join(said) + " Drawn as figures 7 to 9.", []


def _halves(about: About) -> Drawn:
    found, said, figures = about.part("stages"), list[str](), list[Figure]()
    for stack in about.stacks:
        n = about.schedule.stacks[stack]
        if n < 4 or n % 2:
            raise Missing(f"a block of {n} layers has no two halves of two layers or more")
        each = list[str]()
        for metric in METRICS:
            curves = found.curves(metric, stack)
            a, b = curves[:, : n // 2], curves[:, n // 2 :]
            a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
            each.append(f"{metric} {number(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).nanmean())}")
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


def _over_loops(about: About) -> Drawn:
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


def _without_mlp(about: About) -> Drawn:
    before, after = about.part("stages"), about.part("stages_without_mlp")
    where, said, figures = about.schedule.layer_name(1), list[str](), list[Figure]()
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


def _behaviour(about: About) -> Drawn:
    said = list[str]()
    for name, found in about.by_stack("behaviour"):
        counts = found.counts.values
        n = int(counts[0].sum())
        off, anywhere = n - int(counts[-1, 0]), _anywhere(found)
        kinds = [f"{int(v)} {label}" for v, label in zip(counts[-1], found.counts.labels["label"], strict=True) if v]
        said.append(
            f"{name}{share(off / n)} of {n} tokens after {found.n_loops} loops ({', '.join(kinds)}); in any layer "
            f"{share(anywhere)}. The rule is a reconstruction, so shares depend on its parameters."
        )
    figures = [
        Figure(f"Limiting behaviour: {name}share of a prompt's tokens by layer.", found.panels())
        for name, found in about.by_stack("behaviour")
    ]
    return " ".join(said), figures


def _anywhere(found: Any) -> float:
    off = torch.cat([(example.labels != 0).any(0) for example in found.examples])
    return float(off.double().mean())


def _together(about: About) -> Drawn:
    said, figures = list[str](), list[Figure]()
    for name, found in about.by_stack("behaviour"):
        grid = found.co_occurrence
        both = float(grid.sel(given="orbit", label="slider").values)
        orbits, fixed = both == both, float(grid.sel(given="orbit", label="fixed").values)
        how = (
            f"{share(both)} of the tokens with an orbit are sliders too, {share(fixed)} fixed too"
            if orbits
            else "no token has an orbit"
        )
        said.append(f"{name}{how}.".capitalize())
        figures.append(Figure(f"Figure 14: {name}P(label in any layer | given in any layer).", grid.panels()))
    return " ".join(said), figures


def _at_init(about: About) -> Drawn:
    first = about.part("init_12")
    said, figures = list[str](), list[Figure]()
    for n in (12, 4, 16):
        found = about.part(f"init_{n}")
        said.append(f"{n} layers: {'; '.join(f'{layout} {verdict}' for layout, verdict in found.verdicts.items())}.")
        (panel,) = found.panels()
        figures.append(Figure(f"Figures 6, 29 to 31: {n} layers, relative distance to X*.", [panel]))
        lines = [grid | {"y": row[:-1]} for grid, row in zip(panel.grids, found.cosine.values.tolist(), strict=True)]
        roles = panel.roles | {"y": Axis("cosine to X*")}
        figures.append(Figure(f"Figures 6, 29 to 31: {n} layers, cosine to X*.", [replace(panel, grids=lines, roles=roles)]))
    low = zip(first.degeneracy.labels["layout"], first.degeneracy.values.tolist(), strict=True)
    said.append(f"Degeneracy with 12 layers: {'; '.join(f'{name} {number(v)}' for name, v in low)}.")
    return " ".join(said) + f" Weights of std {first.std}, width {first.d_model}: verdicts depend on both.", figures


def _bound(about: About) -> Drawn:
    said, figures = list[str](), list[Figure]()
    for name, found in about.by_stack("bound"):
        known = found.values[found.values.isfinite()]
        if not len(known):
            raise Missing("what attention reads does not move, so the bound is 0")
        said.append(f"{name}At most {number(known.max())}, {number(known.mean())} on average.")
        figures.append(Figure(f"Proposition 4.2: {name}share of the bound that is used.", found.panels()))
    return " ".join(said), figures


def _not_here(reason: str) -> Draws:
    def draw(about: About) -> Drawn:
        raise Missing(reason)

    return draw


DRAWN: dict[str, Draws] = {
    "3": _fixed("successive", "l2", "Figure 3"),
    "4": _fixed("distance", "l2", "Figure 4"),
    "22": _fixed("distance", "cosine", "Figure 22"),
    "24": _fixed("successive", "cosine", "Figure 24"),
    "19": _both(_pairs("states", 8, "Figure 19"), _pairs("states", 32, "Figure 19")),
    "2": _pairs("patterns", 8, "Figure 2"),
    "21": _pairs("patterns", 32, "Figure 21"),
    "23": _patterns_over_loops("pattern_distance", "Figure 23"),
    "25": _patterns_over_loops("pattern_successive", "Figure 25"),
    "4.2": _bound,
    "5": _paths,
    "6": _at_init,
    "7": _stage("colsum", title="Figure 7"),
    "8": _beside_twin,
    "9": _stage("norm", title="Figure 9"),
    "10": _not_here(
        "it needs models trained from scratch and their control, not one checkpoint; the page “Stages on text” of the "
        "documentation has small ones"
    ),
    "11": _over_loops,
    "36": _huginn_stages,
    "40": _halves,
    "41": _without_mlp,
    "14": _together,
    "tables": _behaviour,
    "tables of others": _not_here(
        "the settings of those tables are not public; compare runs over other prompts, or of other models"
    ),
    "5.2": _not_here(
        "it needs a benchmark with answers; tl_looped.analysis.more_loops has loss and accuracy by loop for such prompts"
    ),
}
