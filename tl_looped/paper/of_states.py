"""Figures of states and patterns: fixed points, pairs of layers, paths, layouts at initialisation."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..analysis.fixed_points import FixedPoints, Metric, Quantity
from ..panels import Axis, grouped, heat_map
from ..report.drawing import linear_if_narrow
from ..report.section import Figure, listed, number, share
from ..results import Estimate
from ..schedule import Site
from .about import About, Drawn, Draws, Missing

NEAR = 0.01  # of the norm of X*: there; our choice


def fixed(quantity: Quantity, metric: Metric, title: str) -> Draws:
    """A quantity of the fixed points over the loops, layer by layer.

    Args:
        quantity: "successive" or "distance".
        metric: "l2" or "cosine".
        title: the figure's name.
    """

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


def patterns_over_loops(quantity: str, title: str) -> Draws:
    """How far attention patterns are from others, over the loops.

    Args:
        quantity: "pattern_successive" or "pattern_distance".
        title: the figure's name.
    """

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


def pairs(kind: str, n: int, title: str) -> Draws:
    """All pairs of layers in `n` loops, or in as many as there are.

    Args:
        kind: "patterns" or "states".
        n: the number of loops.
        title: the figure's name.
    """

    def draw(about: About) -> Drawn:
        n_loops = min(n, about.n_loops)
        if n_loops < n and n > 8:
            raise Missing(f"{n} loops are compared, and {about.n_loops} were asked; pass --loops {n}")
        grid: Estimate = about.part(f"{kind}_{n_loops}")
        return _resemblance(grid, kind == "states"), [_pair_map(grid, f"{title}, {n_loops} loops")]

    return draw


def both(one: Draws, other: Draws) -> Draws:
    """What one says and what the other does, if there is another.

    Args:
        one: of 8 loops.
        other: of 32 loops.
    """

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
    what, of = ("cosine", "state") if is_cosine else ("distance", "attention pattern")
    return (
        f"In {share(same / nearest)} of the layers run, the {of} most alike in the next loop is that of the same layer. "
        f"Mean {what} to its own there {number(sum(own) / len(own))}, to other layers' {number(sum(others) / len(others))}."
    )


def _pair_map(grid: Estimate, title: str) -> Figure:
    panel = heat_map(grid)
    short = [name.replace("loops.", "").replace(".blocks.", "·") for name in grid.labels["layer"]]
    panel = replace(panel, roles=panel.roles | {"x": Axis("layer", short), "y": Axis("layer", short)})
    return Figure(f"{title}: {grid.name.replace('_', ' ')}, rows are loop·layer.", [panel], width=480)


def paths(about: About) -> Drawn:
    """The last token's paths in a plane.

    Args:
        about: what was measured.
    """
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


def at_init(about: About) -> Drawn:
    """What six layouts do at random initialisation.

    Args:
        about: what was measured.
    """
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


def bound(about: About) -> Drawn:
    """How much of the bound of proposition 4.2 is used.

    Args:
        about: what was measured.
    """
    said, figures = list[str](), list[Figure]()
    for name, found in about.by_stack("bound"):
        known = found.values[found.values.isfinite()]
        if not len(known):
            raise Missing("what attention reads does not move, so the bound is 0")
        said.append(f"{name}At most {number(known.max())}, {number(known.mean())} on average.")
        figures.append(Figure(f"Proposition 4.2: {name}share of the bound that is used.", found.panels()))
    return " ".join(said), figures
