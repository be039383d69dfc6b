"""What every result can do: select, subtract, show itself, be added and be kept in a file."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from importlib import metadata
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import same

import tl_looped
from tl_looped import LoopedBridge, LoopedConfig, compare
from tl_looped.analysis import (
    attention_stability,
    exit_steps,
    fixed_points,
    inference_stages,
    injection_effect,
    limiting_behaviour,
    local_stability,
    looped_floorplan,
    more_loops,
    path_independence,
    random_init_sweep,
    step_geometry,
    trajectories,
)
from tl_looped.errors import LoopedError
from tl_looped.lenses import logit_lens
from tl_looped.patching import patch_sweep
from tl_looped.results import Estimate, Grid, Result, load_result, saving

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [2, 4, 6, 8]])
CFG: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_vocab": 11, "n_core": 2, "n_loops": 3, "n_prelude": 1}
QUIET: dict[str, Any] = {"verbose": False}


@pytest.fixture(scope="module")
def model() -> LoopedBridge:
    return LoopedBridge.from_config(LoopedConfig(**CFG), seed=0)


@pytest.fixture(scope="module")
def injected() -> LoopedBridge:
    return LoopedBridge.from_config(LoopedConfig(**CFG, injection="concat", initial_state="noise"), seed=0)


@pytest.fixture
def grid() -> Grid:
    values = torch.tensor([[[1.0, -9.0], [3.0, 4.0], [5.0, torch.nan]], [[-2.0, 8.0], [0.5, 6.0], [7.0, 2.0]]])
    return Grid(values, ("loop", "layer", "head"), {"loop": [1, 2], "layer": [0, 1, 2], "head": [0, 3]}, "effect")


def test_selecting_by_label_and_by_place(grid: Grid) -> None:
    assert grid.shape == (2, 3, 2)
    assert grid.sel(loop=2, layer=slice(0, 2), head=3).values.tolist() == [8.0, 6.0]
    assert grid.sel(loop=2, layer=0, head=3).item() == float(grid[1, 0, 1]) == 8.0
    assert grid.sel(loop=-1).values.tolist() == grid[-1].values.tolist() == grid.sel(loop=[2]).values[0].tolist()
    assert grid.sel(layer=slice(-2, None)).labels["layer"] == [1, 2]
    assert grid.sel(head=[3, 0]).labels == {"loop": [1, 2], "layer": [0, 1, 2], "head": [3, 0]}
    assert grid[[-1], ..., [1, -2]].values.tolist() == grid[[1], :, [1, 0]].values.tolist()
    last = grid[..., 1]
    assert (last.axes, last.labels) == (("loop", "layer"), {"loop": [1, 2], "layer": [0, 1, 2]})
    assert grid[:, [2, 0]].values[1].tolist() == [[7.0, 2.0], [-2.0, 8.0]]
    mixed = Grid(torch.arange(4.0), ("loop",), {"loop": ["prelude", 0, 1, "coda"]})
    assert mixed.sel(loop="coda").item() == 3.0 and mixed.sel(loop=-1).item() == 2.0
    assert mixed.sel(loop=slice(0, None)).labels["loop"] == [0, 1]
    assert mixed.sel(loop=["prelude", 1]).values.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("select", "says"),
    [
        (lambda grid: grid.sel(pos=0), r"^sel\(pos=\) was asked; this grid has the axes loop, layer, head"),
        (lambda grid: grid.sel(loop=0), r"^sel\(loop=0\) was asked; this axis has 1, 2"),
        (lambda grid: grid.sel(loop="1"), r"^sel\(loop='1'\) was asked"),
        (lambda grid: grid.sel(loop=True), r"^sel\(loop=True\)"),
        (lambda grid: grid[2], r"^\[2\] was asked of the axis 'loop', which has 2 entries"),
        (lambda grid: grid["1"], r"^\['1'\] was asked of the axis 'loop'; select by place"),
        (lambda grid: grid[0, 0, 0, 0], r"4 indices was asked of a grid with the axes"),
        (lambda grid: grid.item(), r"^item\(\) of 12 numbers"),
    ],
)
def test_what_cannot_be_selected_is_said(grid: Grid, select: Any, says: str) -> None:
    with pytest.raises(LoopedError, match=says):
        select(grid)


def test_labels_that_count_are_ints_in_tables(grid: Grid) -> None:
    frame = grid.to_dataframe()
    assert len(frame[frame.loop == 2]) == 6 and frame[(frame.loop == 2) & (frame["head"] == 3)].effect.tolist() == [
        8.0,
        6.0,
        2.0,
    ]
    top = grid.top(3)
    assert top.effect.tolist() == [-9.0, 8.0, 7.0] and top.loop.tolist() == [1, 2, 2]
    assert len(grid.top(99)) == 11  # NaN is no number
    array = grid.to_xarray()
    assert float(array.sel(loop=2, layer=1, head=3)) == 6.0 and array.dims == grid.axes and array.name == "effect"


def test_differences_and_ratios(grid: Grid) -> None:
    twice = Grid(grid.values * 2, grid.axes, grid.labels, grid.name)
    difference = twice - grid
    assert type(difference) is Grid and difference.name == "difference of effect"
    torch.testing.assert_close(difference.values, grid.values, equal_nan=True)
    assert (twice / grid).sel(loop=1, layer=0, head=0).item() == 2.0 and (grid / 2).sel(loop=1, layer=0, head=3).item() == -4.5
    with pytest.raises(LoopedError, match="axes must be the same"):
        grid - grid[0]
    with pytest.raises(LoopedError, match=r"loop 2 was subtracted from effect with loop 1, 2"):
        grid - grid.sel(loop=[2])


def test_a_difference_has_the_finer_of_two_kinds_of_number() -> None:
    counts = Grid(torch.tensor([1, 2]), ("loop",), {"loop": [0, 1]}, "count")
    halves = Grid(torch.tensor([0.5, 0.25], dtype=torch.float64), ("loop",), {"loop": [0, 1]}, "count")
    assert (counts - halves).values.tolist() == [0.5, 1.75] and (counts / halves).values.tolist() == [2.0, 8.0]


def test_an_estimate_stays_one_when_it_is_selected() -> None:
    examples = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = Estimate.of(examples, ("loop", "layer"), {"loop": [0, 1, 2], "layer": [0, 1]}, "norm")
    part = estimate.sel(loop=slice(1, 3), layer=1)
    assert isinstance(part, Estimate) and part.count == 6
    torch.testing.assert_close(part.values, examples[:, 1:, 1].mean(0))
    torch.testing.assert_close(part.stderr, examples[:, 1:, 1].std(0) / 6**0.5)
    halves = [Estimate.of(some, estimate.axes, estimate.labels, "norm") for some in examples.split(2)]
    whole: Any = sum(halves)
    torch.testing.assert_close(whole.stderr, examples.std(0) / 6**0.5)
    assert type(estimate - estimate) is Grid  # standard errors of a difference need the examples


def test_values_have_no_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not Grid(weight * 2, ("loop",), {"loop": [0, 1]}).values.requires_grad


def made(model: LoopedBridge, injected: LoopedBridge) -> dict[str, Any]:
    """A result of every kind, from a run."""
    _, cache = model.run_with_cache(TOKENS[:1])
    return {
        "fixed_points": fixed_points(model, TOKENS, n_loops=4, patterns=True, **QUIET),
        "attention_stability": attention_stability(model, TOKENS, **QUIET),
        "exit_steps": exit_steps(model, TOKENS, **QUIET),
        "inference_stages": inference_stages(model, TOKENS, **QUIET),
        "injection_effect": injection_effect(injected, TOKENS, from_loop=1, **QUIET),
        "limiting_behaviour": limiting_behaviour(model, TOKENS, n_loops=30, keep_signal=True, **QUIET),
        "local_stability": local_stability(injected, TOKENS[:1, :2], n_loops=4, n_exponents=1, iterations=3, **QUIET),
        "path_independence": path_independence(injected, TOKENS, n_loops=6, **QUIET),
        "random_init": random_init_sweep(n_layers=1, d_model=16, n_loops=4, seeds=2, **QUIET),
        "more_loops": more_loops(model, TOKENS, **QUIET),
        "step_geometry": step_geometry(model, TOKENS, **QUIET),
        "trajectories": trajectories(model, TOKENS, n_components=2, **QUIET),
        "patch_sweep": patch_sweep(model, TOKENS[1:2], cache, lambda logits: logits[0, -1, 3], **QUIET),
        "logit_lens": logit_lens(model, TOKENS, attention_mask=torch.tensor([[1, 1, 1, 0]] + [[1] * 4] * 2)),
        "floorplan": looped_floorplan(model, TOKENS[0]),
        "logit_attribution": cache.attribute_logits(3),
        "compare": compare(model, TOKENS, n_loops=(1, 2), **QUIET),
    }


@pytest.fixture(scope="module")
def results(model: LoopedBridge, injected: LoopedBridge) -> dict[str, Any]:
    return made(model, injected)


def test_every_result_comes_back_from_its_file(results: dict[str, Any], tmp_path: Any) -> None:
    classes = {type(result) for result in results.values()}
    kinds = {cls for cls in Result.__subclasses__() if cls.__module__.startswith("tl_looped.analysis")}
    assert kinds <= classes, f"no result of {kinds - classes} was made here"
    for name, result in results.items():
        file = result.save(tmp_path / f"{name}.safetensors")
        assert same(load_result(file), result), name


def test_every_result_shows_itself(results: dict[str, Any]) -> None:
    for name, result in results.items():
        line = repr(result)
        assert "\n" not in line and len(line) <= 160 and line.startswith(type(result).__name__), name
        html = result._repr_html_()
        assert html.count("<tr>") <= 14 and html.count("<table") == 1 and len(html) < 50_000, name
        assert isinstance(result.to_dataframe(), pd.DataFrame) and len(result.plot().data) > 0, name
        assert json.dumps([panel.to_dict() for panel in result.panels()], allow_nan=False), name


def test_a_table_says_what_it_leaves_out_and_takes_no_markup() -> None:
    values = torch.arange(40.0)[:, None] * torch.ones(2)
    html = Grid(values, ("pos", "loop"), {"pos": ["<s> 0", *range(1, 40)], "loop": [0, 1]}, "<b>")._repr_html_()
    assert "40 x 2 numbers" in html and "&lt;s&gt; 0" in html and "<s>" not in html and "&lt;b&gt;" in html


def test_results_of_other_settings_do_not_add_up(model: LoopedBridge, results: dict[str, Any]) -> None:
    whole = results["more_loops"]
    assert sum([whole, whole]).loss.count == 2 * whole.loss.count
    other = fixed_points(model, TOKENS, n_loops=4, reduction="matrix", **QUIET)
    with pytest.raises(LoopedError, match=r"reduction='token' was added to one with reduction='matrix'"):
        fixed_points(model, TOKENS, n_loops=4, **QUIET) + other
    with pytest.raises(LoopedError, match=r"loop 0, 1 was added to norm with loop 0, 1, 2"):
        fixed_points(model, TOKENS, n_loops=3, **QUIET) + fixed_points(model, TOKENS, n_loops=2, **QUIET)


def test_a_file_says_which_model_it_is_of(model: LoopedBridge, grid: Grid, tmp_path: Any) -> None:
    file = grid.save(tmp_path / "grid", model)
    assert same(load_result(file, model), grid)
    with pytest.raises(LoopedError, match="another model"):
        load_result(file, LoopedBridge.from_config(LoopedConfig(**CFG), seed=1))
    with pytest.raises(LoopedError, match="does not say which model"):
        load_result(grid.save(tmp_path / "other"), model)


def test_a_package_that_is_only_on_the_path_keeps_results(grid: Grid, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nothing can be installed: what is read of the package's metadata is not there."""
    found = metadata.distribution

    def of_others(name: str) -> metadata.Distribution:
        if name == "tl-looped":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "distribution", of_others)
    monkeypatch.delitem(vars(tl_looped), "__version__", raising=False)
    file = grid.save(tmp_path / "grid")
    monkeypatch.delitem(vars(tl_looped), "__version__")
    assert same(load_result(file), grid) and b"0+uninstalled" in file.read_bytes()


def test_files_that_are_no_results_are_refused(grid: Grid, tmp_path: Any) -> None:
    from safetensors.torch import load, save_file

    file = grid.save(tmp_path / "grid.safetensors")
    whole = file.read_bytes()
    text = json.dumps({"format": 1, "result": {"class": "Grid", "fields": {}}, "versions": {}})
    for content in (whole[: len(whole) // 2], b"", whole.replace(b"Grid", b"Path"), whole.replace(b'"tensor', b'"nonsor', 1)):
        file.write_bytes(content)
        with pytest.raises(LoopedError, match=re.escape(repr(str(file)))):
            load_result(file)
    for said in (None, {"tl_looped": "{"}, {"tl_looped": text}, {"tl_looped": text.replace("Grid", "os.system")}):
        save_file({"values": torch.ones(1)}, file, said)
        with pytest.raises(LoopedError, match="no result of this package"):
            load_result(file)
    save_file({"values": torch.ones(1)}, file, {"tl_looped": json.dumps({"format": 99, "versions": {"tl_looped": "9.0"}})})
    with pytest.raises(LoopedError, match=r"by tl_looped 9\.0, a later version"):
        load_result(file)
    with pytest.raises(LoopedError, match="cannot be read"):
        load_result(tmp_path / "nowhere")
    assert load(whole)  # the files are safetensors, which other tools read


def test_every_class_of_results_can_be_read() -> None:
    for module in pkgutil.walk_packages(tl_looped.__path__, "tl_looped."):
        if "__main__" not in module.name and ".toys." not in module.name:
            importlib.import_module(module.name)
    more: list[type] = [Result, Grid]
    while more:
        ours = {cls.__name__ for cls in more if cls.__module__.startswith("tl_looped.")}
        assert ours <= saving._classes().keys()
        more = [sub for cls in more for sub in cls.__subclasses__()]
