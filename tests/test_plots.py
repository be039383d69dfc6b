"""What a reader of the figures relies on: labels, ticks that fit, marks of the passes, logarithms without zeros."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import pytest
import torch
from zoo import random_bridge, random_tokens

from tl_looped import LoopedError, exits
from tl_looped.analysis import attention_stability, exit_steps, fixed_points, looped_floorplan, more_loops, trajectories
from tl_looped.figures import attention_heads, floorplan, grouped, heat_map, panels, rank_trajectories
from tl_looped.lenses import logit_lens
from tl_looped.results import Estimate, Grid
from tl_looped.results.showing import Shown
from tl_looped.schedule import Schedule

pytest.importorskip("plotly")


def grid(*shape: int, axes: tuple[str, ...] = ("loop", "layer"), fill: float | None = None) -> Grid:
    values = torch.rand(shape) if fill is None else torch.full(shape, fill)
    return Grid(values, axes, {axis: [str(k) for k in range(n)] for axis, n in zip(axes, shape, strict=True)}, "a_number")


def notes(figure: Any) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_a_heat_map_of_many_rows_fits_on_a_page_and_its_ticks_do_not_touch() -> None:
    few, many = heat_map(grid(4, 3)), heat_map(grid(128, 6, 2, axes=("loop", "layer", "head")))
    assert list(few.layout.yaxis.ticktext) == ["0", "1", "2", "3"] and few.layout.title.text == "a number"
    assert many.layout.height <= 1000 and len(many.layout.yaxis.tickvals) <= 48 and many.data[0].ygap == 0
    every = many.layout.yaxis.tickvals[1]
    assert many.layout.yaxis.ticktext[1] == f"{every // 6} · {every % 6}"
    assert few.data[0].hovertext[2][1] == "loop 2" and few.data[0].customdata[2][1] == "layer 1"


def test_a_heat_map_of_one_number_or_of_none() -> None:
    flat = heat_map(grid(2, 2, fill=0.0)).data[0]
    assert (flat.zmin, flat.zmax) == (0, 1)
    assert heat_map(grid(2, 2, fill=math.nan)).data[0].zmax == 1
    signed = Grid(torch.tensor([[-1.0, math.nan], [0.5, 0.0]]), ("loop", "layer"), {"loop": ["0", "1"], "layer": ["0", "1"]})
    assert (heat_map(signed).data[0].zmin, heat_map(signed).data[0].zmax) == (-1, 1)


def test_one_axis_is_a_line_over_numbers_and_bars_over_names() -> None:
    assert heat_map(grid(5, axes=("loop",))).data[0].type == "scatter"
    named = Grid(torch.rand(2), ("pairs",), {"pairs": ["with layer 0", "all"]}, "cosine")
    assert heat_map(named).data[0].type == "bar"


def test_passes_are_marked_and_named_as_far_as_there_is_room() -> None:
    few, many = Schedule(2, 3, n_prelude=1, n_coda=1), Schedule(2, 128)
    figure = grouped([0.0] * few.n_layers, few, layers=range(few.n_layers), group_by="depth", name="x")
    assert notes(figure) == ["prelude", "loop 0", "1", "2", "coda"]
    assert [shape.x0 for shape in figure.layout.shapes] == [0.5, 2.5, 4.5, 6.5]
    assert len(notes(grouped([0.0] * many.n_layers, many, layers=range(many.n_layers), group_by="depth", name="x"))) == 16
    by_loop = grouped([0.0] * many.n_layers, many, layers=range(many.n_layers), group_by="recurrence", name="x")
    assert len(by_loop.data) == 128 and sum(line.showlegend for line in by_loop.data) == 16
    assert (
        by_loop.data[0].line.color == "rgb(26,152,80)" and by_loop.data[-1].line.color == "rgb(254,224,60)"
    )  # green to yellow
    by_layer = grouped([0.0] * few.n_layers, few, layers=range(few.n_layers), group_by="layer", name="x")
    assert (
        by_layer.data[0].line.color == "rgb(33,102,172)" and by_layer.data[-1].line.color == "rgb(102,189,99)"
    )  # blue to green


def test_logarithms_leave_zeros_out_and_have_ticks_that_can_be_read() -> None:
    three = Schedule(1, 3)
    narrow, broad = (
        grouped([0.0, *rest], three, layers=range(3), group_by="layer", name="x", log_y=True)
        for rest in ([1.0, 3.0], [1e-7, 1.0])
    )
    assert math.isnan(narrow.data[0].y[0]) and narrow.layout.yaxis.dtick == "D2" and broad.layout.yaxis.dtick is None


def test_ranks_from_zero_on_a_logarithmic_axis() -> None:
    bridge, tokens = random_bridge("huginn"), random_tokens(2, 5)
    result = logit_lens(bridge, tokens, targets=[3, 7])
    figure = result.plot(example=1)
    assert [line.name for line in figure.data] == ["3", "7"] and notes(figure)[:2] == ["prelude", "loop 0"]
    assert [y - 1 for y in figure.data[1].y] == result.ranks[:, 1, -1, 1].tolist()
    top = rank_trajectories({"a": [0.0, 9.0]}, Schedule(1, 2), layers=range(2))
    ticks = dict(zip(top.layout.yaxis.tickvals, top.layout.yaxis.ticktext, strict=True))
    assert ticks[1] == "0" and ticks[11] == "10" and top.layout.yaxis.autorange == "reversed"


def test_panels_say_their_units_and_mark_the_trained_loops() -> None:
    bridge, tokens = random_bridge("ouro"), random_tokens(2, 5)
    figure = more_loops(bridge, tokens, verbose=False).plot()
    assert notes(figure)[0] == "loss (nats)" and "KL from 3 loops (nats)" in notes(figure)
    assert {shape.x0 for shape in figure.layout.shapes} == {3} and len(figure.layout.shapes) == 5
    assert figure.layout.xaxis5.title.text == "number of loops"
    assert not panels([grid(3, axes=("loop",))]).layout.shapes


def test_policies_have_names_of_their_own() -> None:
    figure = exit_steps(random_bridge("ouro"), random_tokens(), policies=[exits.KL(0.1), exits.Gate(0.5)], verbose=False).plot()
    assert [line.name for line in figure.data] == ["fixed number of loops", repr(exits.KL(0.1)), repr(exits.Gate(0.5))]


def test_labels_are_text_and_no_tags() -> None:
    """Plotly would take `<s>`, the first token of many prompts, for a tag that strikes text through."""
    found = Grid(torch.rand(1, 2), ("loop", "pos"), {"loop": ["0"], "pos": ["<s>", "a"]}).plot()
    assert found.layout.xaxis.ticktext == ("&lt;s&gt;", "a") and "&lt;s&gt;" in found.data[0].customdata[0][0]


def test_what_is_not_there_is_not_drawn(unchecked: None) -> None:
    bridge = random_bridge("looped_qwen")
    lens = logit_lens(bridge, random_tokens(), targets=1)
    _, cache = bridge.run_with_cache(random_tokens())
    drawings = [
        (lambda: lens.plot(example=9), "example 9 is out of range"),
        (lambda: lens.plot(positions=9), "decoded positions 9"),
        (lambda: floorplan(looped_floorplan(bridge, random_tokens(1)), bridge.unroll(2).schedule.sites), "layers and .* sites"),
        (lambda: attention_heads(cache, ["a"] * 7, layers=9), "layers 9"),
        (lambda: attention_heads(cache, ["a"] * 7, example=9), "example 9 is out of range"),
        (lambda: trajectories(bridge, random_tokens(), verbose=False).plot(example=9), "example 9"),
        (lambda: trajectories(bridge, random_tokens(), verbose=False).plot(components=(0, 9)), "component 9"),
        (lambda: Estimate.of(torch.ones(2), (), {}, "one").plot(), "single number, 1"),
        (lambda: looped_floorplan(bridge, [torch.tensor([1, 2]), torch.tensor([1, 2])]), "2 prompts"),
    ]
    for draw, why in drawings:
        with pytest.raises(LoopedError, match=why):
            draw()
    assert Estimate.of(torch.tensor([1.0, 3.0]), (), {}, "one").to_dataframe().to_dict("records") == [
        {"one": 2.0, "one_stderr": 1.0, "count": 2}
    ]


@pytest.mark.parametrize(("name", "stack"), [("huginn", None), ("hrm_text", "L"), ("hrm_text", "H"), ("parcae", None)])
def test_figures_number_virtual_layers_by_their_own_index(name: str, stack: str | None) -> None:
    # Every figure says of a point which layer it is: that one's activation, fetched by that index, has the number drawn.
    model, tokens = random_bridge(name, torch.float64, n_loops=3), random_tokens()
    cache = model.run_with_cache(tokens)[1]
    resid = [cache[f"blocks.{i}.hook_resid_post"] for i in range(model.schedule.n_layers)]
    loops = [p for p in model.schedule.passes if p.stack == (stack or "core")]
    own = [i for p in loops for i in p.layers]  # virtual indices, prelude and the other stack left out
    options = {"n_loops": None, "stack": stack, "verbose": False}
    line = fixed_points(model, tokens, **options).plot("norm", group_by="depth").data[0]
    assert list(line.x) == own and own != list(range(len(own)))
    assert [float(y) for y in line.y] == pytest.approx([resid[i].norm(dim=-1).mean().item() for i in own])
    figure = fixed_points(model, tokens, **options).plot("successive", "l2", group_by="depth")
    moved = [(resid[i] - resid[i - loops[1].first + loops[0].first]).norm(dim=-1).mean().item() for i in loops[1].layers]
    assert list(figure.data[0].x) == own[loops[0].n_layers :]
    assert list(figure.data[0].y[: len(moved)]) == pytest.approx(moved)
    assert [shape.x0 for shape in figure.layout.shapes] == [p.first - 0.5 for p in loops[2:]]  # where a pass begins
    marks = {note.text.split()[-1]: note.x for note in figure.layout.annotations}
    assert marks == {str(p.loop): (p.first + p.layers[-1]) / 2 for p in loops[1:]}
    patterns = attention_stability(model, tokens, **options).plot("depth").data[0]
    assert list(patterns.x) == own[loops[0].n_layers :]
    path = trajectories(model, tokens, **{**options, "n_components": 2, "stack": stack or "core"}).plot().data[0]
    assert list(path.marker.color) == own
    # a lens on some loops, where the readout of a layer is that of the whole lens
    lens, whole = logit_lens(model, tokens, targets=3, loops=[-1]), logit_lens(model, tokens, targets=3)
    drawn = lens.plot(example=1, positions=2).data[0]
    passes = model.schedule.passes
    assert list(drawn.x) == [i for p in passes[-len(passes) // 3 :] for i in p.layers]  # a third of the passes is a loop
    assert [y - 1 for y in drawn.y] == [float(whole.ranks[i, 1, 2, 0]) for i in drawn.x]


def test_a_notebook_completes_the_arguments_of_every_figure() -> None:
    kinds = [Shown]
    for kind in kinds:
        kinds += [one for one in kind.__subclasses__() if one.__module__.startswith("tl_looped.")]
    given = {kind.__name__: [*signature(kind.plot).parameters] for kind in kinds[1:]}
    assert given["LogitLensResult"][:2] == ["self", "kind"] and given["Grid"] == ["self", "title"]
    # A base without a figure, several results together, and a run, whose figure is that of what it holds.
    assert {name for name, arguments in given.items() if "args" in arguments} - {"Findings"} == {"Result", "Run"}
