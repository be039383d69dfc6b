"""The figures of a page, drawn by its own script: places, colours and what is said where a reader points."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from browsing import a_browser, browsing

from tl_looped.panels import Axis, Mark, Panel, curves, floorplan, grouped, heat_map, rank_trajectories
from tl_looped.report.page import page
from tl_looped.report.section import Figure, Section
from tl_looped.results import Grid
from tl_looped.schedule import Schedule

pytestmark = a_browser


def grid(values: torch.Tensor, *axes: str, name: str = "a_number") -> Grid:
    return Grid(values, axes, {axis: [*map(str, range(n))] for axis, n in zip(axes, values.shape, strict=True)}, name)


SIGNED = torch.tensor([[0.5, -1.0, float("nan")], [0.25, 0.0, 0.75]])
LINE = [0.001, 0.01, 0.1, 1.0]
BARS = Grid(torch.tensor([1.0, 3.0]), ("part",), {"part": ["<attn>", "mlp"]}, "share")
ERRORS = Panel(
    "lines",
    [{"name": "right", "x": [0, 1], "y": [0.5, 0.75], "band": [0.1, 0.0]}],
    {"x": Axis("loop"), "y": Axis("share", form="%")},
    [Mark(x=0.5, look="dotted")],
)
SCHEDULE = Schedule(1, 1, n_prelude=1)
PLAN = Grid(torch.eye(2).expand(2, 2, 2), ("layer", "query", "key"), {"layer": [0, 1], "query": [0, 1], "key": [0, 1]})
FIGURES: dict[str, list[Panel]] = {
    "heat": [heat_map(grid(SIGNED, "loop", "pos"))],
    "log": [grouped([*LINE, float("nan")], Schedule(5, 1), layers=range(5), group_by="depth", name="norm", log_y=True)],
    "bars": [heat_map(BARS)],
    "errors": [ERRORS],
    "panels": curves([grid(torch.tensor([1.0, 2.0, 4.0]), "loop"), grid(torch.tensor([3.0, 2.0, 1.0]), "loop", name="other")]),
    "lines": [grouped([1.0, 2.0, 3.0, 5.0], Schedule(2, 2), layers=range(4), group_by="recurrence", name="norm")],
    "ranks": [rank_trajectories({"a": [0.0, 9.0], "b": [99.0, 99.0]}, SCHEDULE, layers=range(2))],
    "plan": [floorplan(PLAN, SCHEDULE.sites)],
}


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    figures = [Figure(name, figure) for name, figure in FIGURES.items()]
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(
        page("a page", "", "", [], [Section("one", "One", reading=["said"], figures=figures)], ""), encoding="utf-8"
    )
    with browsing() as browser:
        opened = browser.new_page(viewport={"width": 800, "height": 4500})
        errors: list[str] = []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(file.as_uri())
        opened.wait_for_function("document.documentElement.dataset.drawn === '8'")
        yield opened
        assert errors == []


def part(view: Any, figure: str, selector: str) -> Any:
    return view.locator(f"figure:has(figcaption:text-is('{figure}')) {selector}")


def told(view: Any, x: float, y: float) -> str:
    view.mouse.move(x, y)
    tip = view.locator(".tip-box")
    return tip.text_content() if tip.is_visible() else ""


def test_cells_have_the_colours_and_the_words_of_their_values(view: Any) -> None:
    box = part(view, "heat", "image").bounding_box()
    at = [
        (box["x"] + (j + 0.5) * box["width"] / 3, box["y"] + (i + 0.5) * box["height"] / 2) for i in (0, 1) for j in (0, 1, 2)
    ]
    assert told(view, *at[0]) == "loop 0 · pos 0\n0.5" and told(view, *at[1]) == "loop 0 · pos 1\n−1"
    assert told(view, *at[2]) == "" and told(view, *at[5]) == "loop 1 · pos 2\n0.75"
    pixels = view.evaluate(
        """async (href) => {
          const image = Object.assign(new Image(), { src: href });
          await image.decode();
          const context = Object.assign(document.createElement("canvas"), { width: 3, height: 2 }).getContext("2d");
          context.drawImage(image, 0, 0);
          return [...context.getImageData(0, 0, 3, 2).data];
        }""",
        part(view, "heat", "image").get_attribute("href"),
    )
    cells = torch.tensor(pixels).reshape(2, 3, 4)
    assert cells[0, 2, 3] == 0 and bool((cells[..., 3] == 255).sum() == 5)  # what is not known is not drawn
    assert cells[0, 1, 0] > cells[0, 1, 2] and cells[0, 0, 0] < cells[0, 0, 2]  # red below zero, blue above
    assert cells[1, 1, :3].min() > 240  # and white in the middle
    assert part(view, "heat", ".key").text_content() == "a number−11"


def centres(view: Any, figure: str) -> list[tuple[float, float]]:
    circles = part(view, figure, "circle").evaluate_all(
        "(all) => all.map((one) => [one.cx.baseVal.value, one.cy.baseVal.value])"
    )
    return [(x, y) for x, y in circles]


def test_points_are_where_their_values_are(view: Any) -> None:
    (x0, y0), *_, (x3, y3) = found = centres(view, "log")
    for k, (x, y) in enumerate(found):  # four decades are four equal steps; what is missing has no point
        assert x == pytest.approx(x0 + k * (x3 - x0) / 3, abs=0.2) and y == pytest.approx(y0 + k * (y3 - y0) / 3, abs=0.2)
    labels = part(view, "log", ".tick").all_text_contents()
    assert [text for text in labels if text.startswith(("0.", "1"))][:4] == ["0.001", "0.01", "0.1", "1"]
    # A label stands beside the points of its value.
    read = "(all) => all.map((one) => [one.textContent, one.getBBox().y + one.getBBox().height / 2])"
    middle = dict(part(view, "log", ".tick").evaluate_all(read))
    assert middle["0.01"] == pytest.approx(found[1][1], abs=3)
    box = part(view, "log", "svg").bounding_box()
    assert told(view, box["x"] + found[2][0], box["y"] + found[2][1]) == "norm\nvirtual layer 2: 0.1"


def test_panels_share_the_axis_across_and_have_names(view: Any) -> None:
    found = centres(view, "panels")
    assert [x for x, _ in found[:3]] == [x for x, _ in found[3:]] and max(y for _, y in found[:3]) < min(
        y for _, y in found[3:]
    )
    assert found[0][1] > found[1][1] > found[2][1] and found[3][1] < found[5][1]
    assert {"a number", "other"} <= set(part(view, "panels", ".tick").all_text_contents())
    assert part(view, "panels", ".axis-name").all_text_contents() == ["loop"]


def test_bars_stand_on_zero_and_names_are_text(view: Any) -> None:
    one, three = part(view, "bars", ".bar").evaluate_all("(all) => all.map((one) => one.getBBox().height)")
    assert three == pytest.approx(3 * one, rel=0.01)
    assert "<attn>" in part(view, "bars", ".tick").all_text_contents()


def test_errors_are_drawn_and_said(view: Any) -> None:
    (x0, y0), (_, y1) = centres(view, "errors")
    whisker = part(view, "errors", ".stroke").nth(1).get_attribute("d")
    _, low, high = map(float, re.findall(r"[\d.]+", whisker))
    assert low - high == pytest.approx(0.8 * (y0 - y1), abs=0.2) and (low + high) / 2 == pytest.approx(y0, abs=0.2)
    box = part(view, "errors", "svg").bounding_box()
    assert told(view, box["x"] + x0, box["y"] + y0) == "right\nloop 0: 0.5 ± 0.1"
    assert "50 %" in part(view, "errors", ".tick").all_text_contents()


def test_a_line_is_hidden_and_shown_by_its_name(view: Any) -> None:
    names = part(view, "lines", ".key button")
    assert names.all_text_contents() == ["loop 0", "loop 1"] and len(centres(view, "lines")) == 4
    names.first.click()
    assert len(centres(view, "lines")) == 2 and names.first.get_attribute("aria-pressed") == "false"
    names.first.click()
    assert len(centres(view, "lines")) == 4


def test_ranks_have_the_best_on_top_and_logarithms_between(view: Any) -> None:
    (_, top), (_, nine), (_, low), _ = centres(view, "ranks")
    assert top < nine < low and nine - top == pytest.approx(low - nine, abs=0.3)  # 0, 9 and 99 are decades apart
    assert part(view, "ranks", ".mark").count() == 1  # where loop 0 begins
    assert [text for text in part(view, "ranks", ".tick").all_text_contents() if "loop" in text] == ["loop 0"]


def test_a_floorplan_has_a_box_around_the_prelude(view: Any) -> None:
    assert {"prelude", "loop 0", "layer 0"} <= set(part(view, "plan", ".tick").all_text_contents())
    box, cells = part(view, "plan", ".mark").bounding_box(), part(view, "plan", "image").bounding_box()
    below = cells["y"] + cells["height"] * 2.5 / 6  # in the empty row between two patterns of two rows
    assert part(view, "plan", ".mark").count() == 1 and box["y"] + box["height"] == pytest.approx(below, abs=5)
