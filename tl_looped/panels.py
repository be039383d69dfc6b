"""Figures as plain data: what is drawn, from which numbers, with which marks. `tl_looped.figures` and pages draw panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from itertools import groupby, pairwise, product
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import LoopedError
from .names import stack_prefix
from .schedule import Schedule, Site

if TYPE_CHECKING:
    from .results import Grid

Kind = Literal["heat map", "floorplan", "lines", "bars", "trajectories"]
Number = int | float
GroupBy = Literal["depth", "recurrence", "layer"]
# The colours of arXiv 2604.11791: first and last line of a figure by recurrence, and by layer.
RECURRENCE_COLOURS = ((26, 152, 80), (254, 224, 60))
LAYER_COLOURS = ((33, 102, 172), (102, 189, 99))
INK = "rgb(33,102,172)"
EDGES = {"prelude", "coda"}  # beside the loops on an axis of loops
ACROSS: dict[GroupBy, str] = {"depth": "virtual layer", "recurrence": "depth in the block (%)", "layer": "loop"}


@dataclass(frozen=True)
class Axis:
    """What a role of a panel stands for.

    Args:
        title: what is along it.
        labels: the names of its places 0, 1, 2, ..., "" for one without a name; none for an axis of numbers.
        said: what its places are called where a reader points at them; title and label if empty.
        scale: "linear"; "log", where what is not positive is left out; or "rank": from 0, the best on top, by its logarithm.
        form: "%" for shares, "count" for whole numbers, "tokens" for those of a prompt, which stand above the cells.
        range: its first and last number; those of the panel's numbers if None.
        palette: of colours, such as "Blues", "RdBu" or "Viridis"; "Blues_r" is reversed.
    """

    title: str = ""
    labels: list[str] = field(default_factory=list[str])
    said: list[str] = field(default_factory=list[str])
    scale: Literal["linear", "log", "rank"] = "linear"
    form: Literal["", "%", "count", "tokens"] = ""
    range: tuple[Number, Number] | None = None
    palette: Literal["", "Blues", "Blues_r", "Oranges", "Purples", "RdBu", "Viridis"] = ""

    @property
    def places(self) -> list[str]:
        """What every place is called where a reader points at it."""
        return self.said or [f"{self.title} {label}" for label in self.labels]


@dataclass(frozen=True)
class Mark:
    """A line at a place of one axis, the start of a stretch with a name, or a box around cells.

    Args:
        x: a place of the axis across, or the ends of a stretch.
        y: the same of the axis down; a box has ends on both.
        text: the name of the stretch.
        look: "line", "bold" (where a stack ends), "dotted" (the model's own number of loops), "none" for a name alone, or a
            colour.
    """

    x: Number | tuple[Number, Number] | None = None
    y: Number | tuple[Number, Number] | None = None
    text: str = ""
    look: str = "line"


@dataclass(frozen=True)
class Panel:
    """A figure as plain data, which plotly, a page or anything else draws.

    Args:
        kind: "heat map", "floorplan" (a heat map of square cells), "lines", "bars", or "trajectories" in a plane.
        grids: the numbers by their role: of a heat map "colour", rows of cells, and if there is any the "text" in each and what
            is "said" of it; of every line "y" over "x", with "band" (half the height of its error bars), "colour" or "text" of
            every point. Beside them the "name" of a line, its "ink" and "dash", and "points", their symbol where no line joins
            them.
        roles: what "x", "y" and "colour" stand for.
        marks: what is marked: where loops begin, the trained number of loops, chosen cells.
        caption: what is to be seen.

    Example:
        >>> panel = Panel("lines", [{"x": [0, 1], "y": [2.5, float("nan")]}], {"x": Axis("loop"), "y": Axis("loss")})
        >>> panel.to_dict()["grids"]
        [{'x': [0, 1], 'y': [2.5, None]}]
    """

    kind: Kind
    grids: list[dict[str, Any]]
    roles: dict[str, Axis]
    marks: list[Mark] = field(default_factory=list[Mark])
    caption: str = ""

    @property
    def numbers(self) -> list[list[float]]:
        """The numbers of every line, or of all cells, that are known."""
        cells = self.kind in ("heat map", "floorplan")
        rows = [[v for row in g["colour"] for v in row] if cells else g["y"] for g in self.grids]
        return [[v for v in row if math.isfinite(v)] for row in rows]

    @property
    def says_something(self) -> bool:
        """Whether it has a line of three points or a grid of three cells, and not one number everywhere."""
        return max(map(len, self.numbers), default=0) > 2 and len({f"{v:.3g}" for row in self.numbers for v in row}) > 1

    def to_dict(self) -> dict[str, Any]:
        """The panel as JSON has it; what is not finite is None."""
        return json_ready(vars(self))


def json_ready(value: Any) -> Any:
    """Results, panels, tensors and containers of them as JSON has them; what is not finite becomes None.

    Args:
        value: a value, or a container of values.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_ready(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(entry) for entry in value]
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return json_ready(vars(value)) if is_dataclass(value) else value


def draw(panels: Sequence[Panel]) -> Any:
    """Draw panels with plotly, one below the other.

    What draws is found by its name, so that what holds numbers does not depend on it.

    Args:
        panels: the panels; the caption of the first is the title.

    Raises:
        LoopedError: plotly is not installed.
    """
    return import_module(f"{__package__}.figures.plotly").draw(panels)


def heat_map(grid: Grid, *, title: str = "") -> Panel:
    """Rows for all axes but the last, which runs across; a line where the first axis moves on, a bold one where the stack does.

    One axis gives a line plot, or bars where its labels are no numbers.

    Args:
        grid: what is drawn.
        title: the caption; the name of the grid if empty.

    Raises:
        LoopedError: a single number, without axes.
    """
    values, name = grid.values.detach().double().cpu(), words(grid.name)
    if not grid.axes:
        raise LoopedError(f"a figure of {grid.name} was asked, which is a single number, {float(values):.4g}.")
    *down, across = grid.axes
    labels = list(map(str, grid.labels[across]))
    if not down:
        line: dict[str, Any] = {"y": values.tolist(), "ink": INK}
        roles = {"x": Axis(words(across), form="count"), "y": Axis(name)}
        try:
            line["x"] = list(map(float, labels))
        except ValueError:
            roles["x"] = Axis(words(across), labels)
        return Panel("lines" if "x" in line else "bars", [line], roles, caption=title or name)
    rows = list(product(*(grid.labels[axis] for axis in down)))
    z = values.reshape(len(rows), len(labels))
    if not EDGES.isdisjoint(grid.labels[down[0]]):  # a stack with fewer layers than another has no rows for those it lacks
        there = [i for i, row in enumerate(z) if not bool(row.isnan().all())] or list(range(len(rows)))
        rows, z = [rows[i] for i in there], z[there]
    firsts = [row[0] for row in rows]
    marks: list[Mark] = []
    for boundary, (above, below) in enumerate(pairwise(firsts), 1):
        between_stacks = not EDGES.isdisjoint({above, below})
        if above != below and (len(set(firsts)) < len(rows) or between_stacks):
            marks.append(Mark(y=boundary - 0.5, look="bold" if between_stacks else "line"))
    said = [" · ".join(f"{words(a)} {b}" for a, b in zip(down, row, strict=True)) for row in rows]
    roles = {
        "x": Axis(words(across), labels),
        "y": Axis(" · ".join(map(words, down)), [" · ".join(map(str, row)) for row in rows], said),
        "colour": _colours(z, name),
    }
    return Panel("heat map", [{"colour": z.tolist()}], roles, marks, title or name)


def _colours(z: Any, name: str) -> Axis:
    known = z[z.isfinite()]
    limit = (float(known.abs().max()) if len(known) else 1.0) or 1.0
    if bool((z < 0).any()):
        return Axis(name, range=(-limit, limit), palette="RdBu")
    # One number everywhere would be put in the middle of a range that has no meaning.
    return Axis(name, range=(float(known.min()), limit) if len(known.unique()) > 1 else (0.0, limit), palette="Blues")


def grouped(
    values: Sequence[Number],
    schedule: Schedule,
    *,
    layers: Sequence[int],
    group_by: GroupBy,
    name: str,
    title: str = "",
    log_y: bool = False,
) -> Panel:
    """One number per virtual layer, in one of the three groupings of arXiv 2604.11791.

    "depth" is one line over the virtual layers, under their own indices, with a mark where a new pass begins; "recurrence" one
    line per pass over the depth in the block in percent, green to yellow, prelude and coda in grey; "layer" one line per
    physical layer over the loops, blue to green.

    Args:
        values: one per layer; NaN leaves a gap.
        schedule: what ran.
        layers: the virtual layers that the values were read at, in ascending order.
        group_by: "depth", "recurrence" or "layer".
        name: what the numbers are.
        title: the caption; the name of the numbers if empty.
        log_y: draw logarithms; numbers that are not positive are left out.

    Raises:
        LoopedError: another grouping.
    """
    if group_by not in get_args(GroupBy):
        raise LoopedError(f'group_by={group_by!r} was asked; choose "depth", "recurrence" or "layer".')
    sites = [schedule.site(i) for i in layers]
    physical = list(dict.fromkeys(site[::2] for site in sorted(sites, key=lambda s: (s[0] == "coda") - (s[0] == "prelude"))))
    last = max((site.loop or 0 for site in sites), default=0)
    lines: dict[str, dict[str, Any]] = {}
    for i, site, value in zip(layers, sites, values, strict=True):
        line, x = {
            "depth": (name, i),
            "recurrence": (site.where, 100 * physical.index(site[::2]) / max(1, len(physical) - 1)),
            "layer": (
                f"{stack_prefix(site.stack, ' ')}layer {site.layer}",
                site.loop if site.loop is not None else 0 if site.stack == "prelude" else last,
            ),
        }[group_by]
        points = lines.setdefault(line, {"name": line, "x": [], "y": [], "ink": "grey"})
        points["x"].append(x)
        points["y"].append(value)
    looped = [line for line in lines.values() if line["name"] not in EDGES]
    for k, line in enumerate(looped):
        ends = LAYER_COLOURS if group_by == "layer" else RECURRENCE_COLOURS
        line["ink"] = _between(*ends, k / max(1, len(looped) - 1))
    across = Axis(ACROSS[group_by], form="count" if group_by == "layer" else "")
    roles = {"x": across, "y": Axis(name, scale="log" if log_y else "linear")}
    marks = pass_names(sites, layers) if group_by == "depth" else []
    return Panel("lines", list(lines.values()), roles, marks, title or name)


def rank_trajectories(
    ranks: Mapping[str, Sequence[Number]], schedule: Schedule, *, layers: Sequence[int], title: str = ""
) -> Panel:
    """Ranks of tokens over the virtual layers, under their own indices, with a mark where a new pass begins.

    Args:
        ranks: 0-based ranks, one per layer, for every token by its name.
        schedule: what ran.
        layers: the virtual layers that the ranks were read at, in ascending order.
        title: the caption.
    """
    grids = [
        {"name": token, "x": list(layers), "y": list(values), "text": [f"rank {v:g}" for v in values]}
        for token, values in ranks.items()
    ]
    roles = {"x": Axis("virtual layer"), "y": Axis("rank (0 is the top)", scale="rank")}
    return Panel("lines", grids, roles, pass_names([schedule.site(i) for i in layers], layers), title)


def curves(grids: Sequence[Grid], *, title: str = "", mark: Number | None = None) -> list[Panel]:
    """One panel below the other for every grid of one axis, over the labels of that axis.

    Args:
        grids: grids of one axis each, with numbers as labels.
        title: the caption of the first panel.
        mark: where to draw a line through all of them.
    """
    marks = [] if mark is None else [Mark(x=mark, look="dotted")]
    found: list[Panel] = []
    for k, grid in enumerate(grids):
        (axis,) = grid.axes
        x = [float(label) for label in grid.labels[axis]]
        line = {"name": grid.name, "x": x, "y": grid.values.cpu().tolist(), "ink": INK}
        roles = {"x": Axis(words(axis)), "y": Axis(words(grid.name))}
        found.append(Panel("lines", [line], roles, marks, title if k == 0 else ""))
    return found


def paths(
    points: Mapping[str, Sequence[Sequence[Number]]],
    colour: Sequence[Number],
    *,
    hover: Sequence[str],
    axes: tuple[str, str],
    title: str = "",
    colour_name: str = "loop",
) -> Panel:
    """Paths in a plane, one per name: its points in order, coloured by the place along the path.

    Args:
        points: (x, y) of every point.
        colour: one number per point of a path.
        hover: one text per point of a path.
        axes: titles of x and y.
        title: the caption.
        colour_name: what the colours stand for.
    """
    grids: list[dict[str, Any]] = []
    for name, path in points.items():
        x, y = zip(*path, strict=True)
        grids.append({"name": name, "x": list(x), "y": list(y), "colour": list(colour), "text": list(hover)})
    roles = {"x": Axis(axes[0]), "y": Axis(axes[1]), "colour": Axis(colour_name, palette="Viridis")}
    return Panel("trajectories", grids, roles, caption=title)


def floorplan(grid: Grid, sites: Sequence[Site], *, title: str = "") -> Panel:
    """Every attention pattern of a run, a row for each pass (the "looped floorplan", figure 63 of arXiv 2604.11791).

    The prelude is on top in a blue box, the coda at the bottom in a red one.

    Args:
        grid: axes (layer, query, key), as from `tl_looped.analysis.looped_floorplan`.
        sites: of its layers; `model.unroll(n_loops).schedule.sites`.
        title: the caption; the name of the grid if empty.

    Raises:
        LoopedError: the sites are not those of the grid.
    """
    if len(sites) != len(grid.values):
        raise LoopedError(
            f"floorplan was asked of {len(grid.values)} layers and {len(sites)} sites; pass the sites of the run that the grid "
            "is of, such as model.unroll(n_loops).schedule.sites."
        )
    rows = stretches(sites)
    size, widest = grid.values.shape[-1] + 1, max(map(len, rows))  # one empty line between patterns
    z = grid.values.new_full((len(rows) * size, widest * size), math.nan)
    marks: list[Mark] = []
    for r, row in enumerate(rows):
        for c, i in enumerate(row):
            z[r * size : (r + 1) * size - 1, c * size : (c + 1) * size - 1] = grid.values[i]
        if sites[row[0]].loop is None:
            look = "blue" if sites[row[0]].stack == "prelude" else "red"
            marks.append(Mark((-1, len(row) * size - 1), (r * size - 1, (r + 1) * size - 1), look=look))

    def in_the_middle(names: list[str]) -> list[str]:
        return [name if k == size // 2 else "" for name in names for k in range(size)]

    roles = {
        "x": Axis("in each pattern, queries run down and keys across", in_the_middle([f"layer {c}" for c in range(widest)])),
        "y": Axis("", in_the_middle([sites[row[0]].where for row in rows])),
        "colour": Axis("share of attention", range=(0.0, 1.0), palette="Viridis"),
    }
    return Panel("floorplan", [{"colour": z.tolist()}], roles, marks, title or words(grid.name))


def stretches(sites: Sequence[Site]) -> list[range]:
    """The places of the layers of every pass, of the prelude and of the coda.

    Args:
        sites: the layers, in the order of the run.
    """
    found, start = list[range](), 0
    for _, run in groupby(sites, key=lambda site: site[:2]):
        found.append(range(start, start := start + len(list(run))))
    return found


def pass_lines(sites: Sequence[Site]) -> list[Mark]:
    """Marks between rows where a new pass begins, bold ones where the prelude ends and the coda begins.

    Args:
        sites: the layers of the rows.
    """
    starts = [run.start for run in stretches(sites)[1:]]
    edges = ["bold" if None in (sites[i - 1].loop, sites[i].loop) else "line" for i in starts]
    return [Mark(y=i - 0.5, look=look) for i, look in zip(starts, edges, strict=True)]


def pass_names(sites: Sequence[Site], layers: Sequence[int]) -> list[Mark]:
    """Marks where a new pass begins, with its name; of many passes only some.

    Args:
        sites: the layers, in the order of the run.
        layers: their places on the axis across.
    """
    runs, word, found = stretches(sites), "loop ", list[Mark]()
    for run in runs[:: -(-len(runs) // 16)]:
        stack, loop, _ = sites[run.start]
        name = stack if loop is None else f"{stack_prefix(stack, ' ')}{word}{loop}"
        word = word if loop is None else ""  # once is enough
        ends = (layers[run.start] - 0.5, layers[run[-1]] + 0.5)
        found.append(Mark(x=ends, text=name, look="line" if run.start else "none"))
    return found


def words(name: str) -> str:
    """The name of an axis or a quantity in words.

    Args:
        name: such as "n_loops".
    """
    return "number of loops" if name == "n_loops" else name.replace("_", " ")


def _between(first: tuple[int, int, int], last: tuple[int, int, int], share: float) -> str:
    """A colour on the way from one to another."""
    return "rgb({},{},{})".format(*(round(a + (b - a) * share) for a, b in zip(first, last, strict=True)))
