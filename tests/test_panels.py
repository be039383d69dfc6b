"""Figures as data: the numbers of a panel are those of the grid, marks stand where loops begin, and JSON has it all."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.analysis import fixed_points, looped_floorplan, more_loops
from tl_looped.lenses import logit_lens
from tl_looped.panels import Axis, Mark, Panel, curves, floorplan, grouped, heat_map, paths, rank_trajectories
from tl_looped.results import Grid
from tl_looped.schedule import Schedule

LABELS = {"loop": ["prelude", 0, 1, "coda"], "layer": [0, 1], "pos": ["<s>", "a", "b"]}
CUBE = torch.arange(24.0).reshape(4, 2, 3)
EDGED = Grid(CUBE.index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(math.nan)), ("loop", "layer", "pos"), LABELS)


def test_a_heat_map_has_the_numbers_of_its_grid_row_by_row() -> None:
    panel = heat_map(EDGED)
    (cells,) = panel.grids
    # the prelude has one layer, so seven rows; places in the order of the grid
    assert cells["colour"] == [[0, 1, 2], *[[6.0 + 3 * r, 7.0 + 3 * r, 8.0 + 3 * r] for r in range(6)]]
    assert panel.roles["y"].labels == ["prelude · 0", "0 · 0", "0 · 1", "1 · 0", "1 · 1", "coda · 0", "coda · 1"]
    assert panel.roles["y"].places[2] == "loop 0 · layer 1" and panel.roles["x"].places == ["pos <s>", "pos a", "pos b"]
    assert panel.marks == [Mark(y=0.5, look="bold"), Mark(y=2.5), Mark(y=4.5, look="bold")]
    assert panel.roles["colour"] == Axis("value", range=(0.0, 23.0), palette="Blues")
    signed = heat_map(Grid(torch.tensor([[-3.0, 1.0]]), ("loop", "layer"), {"loop": [0], "layer": [0, 1]}))
    assert signed.roles["colour"].range == (-3.0, 3.0) and signed.roles["colour"].palette == "RdBu" and not signed.marks


def test_a_panel_is_json_and_what_is_not_known_is_null() -> None:
    values = torch.tensor([[0.5, math.nan], [math.inf, 0.25]])
    panel = heat_map(Grid(values, ("loop", "layer"), {"loop": [0, 1], "layer": [0, 1]}, "a_share"), title="shares")
    found = json.loads(json.dumps(panel.to_dict(), allow_nan=False))
    assert found["grids"] == [{"colour": [[0.5, None], [None, 0.25]]}] and found["caption"] == "shares"
    assert found["roles"]["colour"]["title"] == "a share" and found["roles"]["x"]["labels"] == ["0", "1"]


def test_the_axis_across_alone_gives_a_line_or_bars() -> None:
    line = heat_map(Grid(torch.tensor([3.0, 1.0]), ("n_loops",), {"n_loops": [4, 8]}))
    assert line.kind == "lines" and (line.grids[0]["x"], line.grids[0]["y"]) == ([4.0, 8.0], [3.0, 1.0])
    assert line.roles["x"].title == "number of loops"
    bars = heat_map(Grid(torch.tensor([3.0, 1.0]), ("part",), {"part": ["attn", "mlp"]}))
    assert bars.kind == "bars" and bars.grids[0]["y"] == [3.0, 1.0] and bars.roles["x"].labels == ["attn", "mlp"]
    with pytest.raises(LoopedError, match="single number, 2"):
        heat_map(Grid(torch.tensor(2.0), (), {}))


SCHEDULE = Schedule(2, 3, n_prelude=1, n_coda=1)  # layers 0, then 1 to 6 in three loops, then 7
VALUES = [10.0, 1, 2, 3, 4, 5, 6, 20]


def test_layers_are_grouped_in_three_ways() -> None:
    options: dict[str, Any] = {"layers": range(8), "name": "norm"}
    depth, recurrence, layer = (
        {line["name"]: (line["x"], line["y"]) for line in grouped(VALUES, SCHEDULE, group_by=by, **options).grids}
        for by in ("depth", "recurrence", "layer")
    )
    assert depth == {"norm": (list(range(8)), VALUES)}
    assert recurrence["loop 1"] == ([pytest.approx(100 / 3), pytest.approx(200 / 3)], [3, 4])
    assert recurrence["prelude"] == ([0], [10]) and recurrence["coda"] == ([100], [20])
    assert layer["layer 1"] == ([0, 1, 2], [2, 4, 6]) and layer["coda layer 0"] == ([2], [20])
    marks = grouped(VALUES, SCHEDULE, group_by="depth", **options).marks
    assert [(mark.x, mark.text, mark.look) for mark in marks] == [
        ((-0.5, 0.5), "prelude", "none"),
        ((0.5, 2.5), "loop 0", "line"),
        ((2.5, 4.5), "1", "line"),
        ((4.5, 6.5), "2", "line"),
        ((6.5, 7.5), "coda", "line"),
    ]


def test_ranks_paths_and_curves_keep_their_numbers() -> None:
    lines = rank_trajectories({"a": [0.0, 9.0]}, Schedule(1, 2), layers=range(2))
    assert lines.grids[0]["y"] == [0.0, 9.0] and lines.roles["y"].scale == "rank"
    plane = paths({"p": [(1.0, 2.0), (3.0, 4.0)]}, [0, 1], hover=["h", "i"], axes=("PC1", "PC2"))
    assert plane.grids == [{"name": "p", "x": [1.0, 3.0], "y": [2.0, 4.0], "colour": [0, 1], "text": ["h", "i"]}]
    grid = Grid(torch.tensor([1.0, 2.0]), ("loop",), {"loop": [0, 1]}, "loss")
    found = curves([grid, grid], title="t", mark=1)
    assert [panel.caption for panel in found] == ["t", ""] and all(p.marks == [Mark(x=1, look="dotted")] for p in found)


def test_a_floorplan_puts_every_pattern_in_the_row_of_its_pass() -> None:
    labels = {"layer": [*range(8)], "query": [0, 1], "key": [0, 1]}
    grid = Grid(torch.arange(32.0).reshape(8, 2, 2), ("layer", "query", "key"), labels)
    panel = floorplan(grid, SCHEDULE.sites)
    z = torch.tensor(panel.grids[0]["colour"])
    assert z.shape == (5 * 3, 2 * 3) and torch.equal(z[6:8, 3:5], grid.values[4])  # loop 1, layer 1
    assert bool(z[2].isnan().all() and z[:, 2].isnan().all()) and [m.look for m in panel.marks] == ["blue", "red"]
    assert [label for label in panel.roles["y"].labels if label] == ["prelude", "loop 0", "loop 1", "loop 2", "coda"]


def test_results_make_panels_without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, n_prelude=1), seed=0)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = fixed_points(model, tokens, n_loops=None, verbose=False)
    (panel,) = found.panels("successive", "l2", group_by="depth")
    assert panel.grids[0]["y"] == found.successive["l2"].values.flatten().tolist()
    assert [mark.text for mark in panel.marks] == ["loop 1", "2"] and panel.grids[0]["x"] == [3, 4, 5, 6]
    own = more_loops(model, tokens, n_loops=5, trained=3, verbose=False)
    assert all(p.marks == [Mark(x=3, look="dotted")] for p in own.panels()) and len(own.panels()) == 5
    assert own.panels()[0].grids[0]["y"] == own.loss.values.tolist()
    plan = looped_floorplan(model, tokens[:1])
    assert floorplan(plan, model.schedule.sites).kind == "floorplan"
    with pytest.raises(LoopedError, match="plotly, which is not installed"):
        found.plot()


def test_what_says_nothing_is_known() -> None:
    def lines(*ys: list[float]) -> Panel:
        return Panel("lines", [{"x": [*range(len(y))], "y": y} for y in ys], {"x": Axis(), "y": Axis()})

    assert not lines([3.0, 4.0]).says_something and not lines([0.0, 0.0, 0.0]).says_something
    assert lines([1.0, 2.0, 3.0]).says_something and not lines([1.0, 2.0, math.nan]).says_something
    cells = heat_map(Grid(torch.tensor([[1.0, 1.0], [1.0, 0.9999999]]), ("a", "b"), {"a": [0, 1], "b": [0, 1]}))
    assert not cells.says_something


def test_a_lens_and_answers_are_panels_too() -> None:
    model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    lens = logit_lens(model, "A b B a ? A", targets="a", top_k=2)
    (panel,) = lens.panels("tokens", colour="rank")
    (cells,) = panel.grids
    assert cells["colour"] == lens.ranks[:, 0, :, 0].tolist() and panel.roles["colour"].scale == "rank"
    assert cells["text"][2][-1] == lens.text(int(lens.top_tokens[2, 0, -1, 0])) and "rank of the target" in cells["said"][2][-1]
    assert panel.marks[:2] == [Mark(y=0.5, look="bold"), Mark(y=2.5)]  # after the prelude, and after loop 0
    (ranks,) = lens.panels(positions=-1)
    assert ranks.grids[0]["y"] == lens.ranks[:, 0, -1, 0].tolist()
    answers = model.answers("A b B a ? A")
    (panel,) = answers.panels()
    assert panel.grids[0]["text"] == [[top[0] for top in answers.texts[0]]] and panel.roles["x"].labels == list("012345")
    json.dumps(panel.to_dict(), allow_nan=False)
