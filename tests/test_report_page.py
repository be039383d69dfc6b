"""The report's page: what it holds, that tokens stay text, and how a browser shows it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import a_browser, browsing
from reporting import TINY, TOKENS, held, leaves
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_looped import LoopedBridge
from tl_looped.explorer._packing import unpacked
from tl_looped.report import report, sections
from tl_looped.report.drawing import over_positions
from tl_looped.report.pointer_chasing import right_answers
from tl_looped.report.question import Question
from tl_looped.results import Grid
from tl_looped.toys import hop_prompts


def test_a_page_is_light(report_page: Path) -> None:
    assert report_page.stat().st_size < 1_000_000


def figures(page: Path) -> list[list[dict[str, Any]]]:
    """The panels of every drawing."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    return [json.loads(one) for one in found]


def test_grids_hold_the_numbers_of_the_json(report_page: Path, report_numbers: dict[str, Any]) -> None:
    """And say for every row and column of the patched states where they are, with the tokens of both prompts."""
    answers, entering, leaving = held(report_page.read_text(encoding="utf-8"))
    words, top = answers["grid"]["grid"]["words"], unpacked(answers["grid"]["grid"]["top"])[..., 0]
    assert [[words[str(i)] for i in row] for row in top.tolist()] == report_numbers["answers"]["numbers"]["answers"]
    found = report_numbers["patching"]["numbers"]
    for grid, name in ((entering, "entering_layers"), (leaving, "leaving_loops_core")):
        torch.testing.assert_close(unpacked(grid["values"]), torch.tensor(found[name]["values"]))
        assert [column["name"] for column in grid["columns"]] == found["clean"]
        assert [column["other"] or column["name"] for column in grid["columns"]] == found["corrupted"]
        assert sum(column["other"] is not None for column in grid["columns"]) == 5
    assert [row["name"] for row in entering["rows"]][:3] == ["prelude · 0", "loop 0 · 0", "loop 0 · 1"]
    assert [row["name"] for row in leaving["rows"]] == [f"loop {t}" for t in range(6)]


def test_wrong_answers_are_marked_where_they_are() -> None:
    model = LoopedBridge.from_pretrained("toy:hop-noinject", device="cpu")
    prompts = hop_prompts(1, seed=7)
    asked = Question(model, [prompts.tokens], 16, hops=prompts)
    numbers, found = sections.answers.PARTS[0].measure(asked)
    (grid,) = held(found.grid)
    right, top = right_answers(asked.shown[0], 16), unpacked(grid["grid"]["grid"]["top"])[..., 0]
    assert right is not None and grid["wrong"]
    wrong = {(t, p) for t in range(16) for p in range(len(right[t])) if 0 <= right[t, p] != top[t, p]}
    assert {(t, p) for t, p in grid["wrong"]} == wrong
    assert len(wrong) == 16 * numbers["queries"] - sum(numbers["right_by_loop"])


def test_the_json_holds_every_number_of_the_figures(report_page: Path, report_numbers: dict[str, Any]) -> None:
    known = torch.tensor(sorted({*leaves([section["numbers"] for section in report_numbers.values()])}), dtype=torch.float64)
    drawn = [
        *leaves(
            [grid.get("y", grid.get("colour")) for one in figures(report_page) for panel in one for grid in panel["grids"]]
        ),
        *leaves([g["x"] for one in figures(report_page) for p in one if p["kind"] == "trajectories" for g in p["grids"]]),
    ]
    assert len(drawn) > 1000
    values = torch.tensor(drawn, dtype=torch.float64)
    at = torch.searchsorted(known, values).clamp(max=len(known) - 1)
    nearest = torch.minimum((known[at] - values).abs(), (known[(at - 1).clamp(min=0)] - values).abs())
    assert bool((nearest <= 1e-6 * values.abs() + 1e-12).all())


EVIL = ["<!--", "<script>alert(1)</script>", "</script>", "<b>bold</b>", "&amp;", "%{z}", "\"q'", "\\\\", "שלום", "日本語"]


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a model whose tokens look like code."""
    words = ["<pad>", *EVIL]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = LoopedBridge.from_config(TINY.replace(d_vocab=len(words)), seed=0)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<pad>", eos_token="<pad>")
    model.cfg.model_name = EVIL[1]
    text = " ".join(EVIL)
    found = report(model, text, n_loops=2, clean=text, corrupted=" ".join(reversed(EVIL)), verbose=False)
    assert not [section.failed for section in found.sections if section.failed]
    return found.save(tmp_path_factory.mktemp("evil") / "report.html")


def test_long_tokens_are_cut_in_figures_and_quotes_stay() -> None:
    grid = Grid(torch.ones(1, 2), ("loop", "pos"), {"loop": [0], "pos": [0, 1]})
    assert over_positions(grid, ["a" * 60, '<b>"&'], [0, 1], "loop").roles["x"].labels == ["a" * 15 + "…", '<b>"&']


def test_tokens_that_look_like_code_stay_text(evil_page: Path) -> None:
    text = evil_page.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text and "&lt;script&gt;alert(1)" in text
    call = text[text.index(')("tl-looped-') :]
    assert "<!--" not in call and "\\u003c!--" in call


SETTINGS = [
    (390, "dark"),
    *(pytest.param(*at, marks=pytest.mark.slow) for at in ((390, "light"), (1280, "light"), (1280, "dark"))),
]
LOOK = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (c) => { const [r, g, b] = c.slice(0, 3).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const c = rgb(getComputedStyle(node).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const contrast = (front, back) => {
    const [light, dark] = [luminance(front), luminance(back)].sort((x, y) => y - x);
    return (light + 0.05) / (dark + 0.05);
  };
  const texts = [...document.querySelectorAll("h1, h2, p, figcaption, th, td, nav a")];
  const ticks = [...document.querySelectorAll(".tick, .axis-name")];
  const figures = [...document.querySelectorAll(".drawing")];
  const drawn = ".cells image, .line circle, .line .stroke, .line .bar";
  return {
    overflow: document.documentElement.scrollWidth - innerWidth,
    contrast: Math.min(
      ...texts.map((node) => contrast(rgb(getComputedStyle(node).color), behind(node))),
      ...ticks.map((node) => contrast(rgb(getComputedStyle(node).fill), behind(node.closest("figure"))))),
    smallest: Math.min(...texts.map((node) => parseFloat(getComputedStyle(node).fontSize))),
    figures: figures.length,
    empty: figures.filter((node) => !node.querySelector(drawn)).length,
    squeezed: figures.filter((node) => node.querySelector("svg").getBoundingClientRect().width < 250).length,
    heads: document.querySelector("[class^=tl-looped]").shadowRoot.querySelectorAll("button canvas").length,
    diagrams: document.querySelectorAll("svg.diagram").length,
  };
}"""


@a_browser
@pytest.mark.parametrize(("width", "scheme"), SETTINGS)
def test_the_page_in_a_browser(report_page: Path, width: int, scheme: str) -> None:
    """Every figure drawn, no error, nothing requested, no sideways scrolling, readable contrast."""
    said: list[str] = []
    requests: list[str] = []
    options = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with browsing(*options) as browser:
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
        view.goto(report_page.as_uri())
        view.wait_for_function("document.documentElement.dataset.drawn", timeout=60_000)
        view.wait_for_function("document.querySelectorAll('.tlx-scroll').length === 3")
        found = view.evaluate(LOOK)
        view.locator(".tlx-scroll").nth(1).focus()  # the patched states entering layers, at the last position
        for key in ("PageDown", "PageDown", "Enter"):
            view.keyboard.press(key)
        patched = view.locator(".tlx-host").nth(1).locator("p").inner_text()
        tick = "getComputedStyle(document.querySelector('.drawing .tick')).fill"
        before = view.evaluate(tick)
        view.emulate_media(color_scheme="dark" if scheme == "light" else "light")  # figures follow the page
        view.wait_for_function(f"{tick} !== {before!r}", timeout=60_000)
    assert said == [] and requests == [report_page.as_uri()]
    assert found["overflow"] <= 0
    assert found["figures"] == len(figures(report_page)) >= 14 and found["empty"] == found["squeezed"] == 0
    restored = json.loads(report_page.with_suffix(".json").read_text())["sections"][2]["numbers"]["entering_layers"]["values"][
        -1
    ][-1]
    assert patched == f"loop 5 · 1, position 25 ‘A’: {restored:.3f}"
    assert found["heads"] == 24 and found["diagrams"] == 1
    assert found["contrast"] >= 4.5 and found["smallest"] >= 12  # WCAG's AA for text


def test_a_page_needs_no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    found = report(LoopedBridge.from_config(TINY, seed=0), TOKENS, n_loops=3, sections=["fixed_points"], verbose=False)
    assert found.sections[0].figures and not found.sections[0].failed and 'class="drawing"' in found.html
