"""The attention viewer: what it holds against the patterns of the run, and what a reader sees in a browser."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import a_browser, browsing
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.figures import attention_heads, attention_viewer
from tl_looped.figures.attention_viewer import AttentionViewer

PROMPT = "A b B c C d D a ? A"
HALF_STEP = 0.5 / 255 + 1e-6


def data(view: AttentionViewer) -> dict[str, Any]:
    """What the script is called with."""
    return json.loads(view.html[view.html.rindex('", {') + 3 : view.html.rindex(");</script>")])


def unpacked(view: AttentionViewer) -> dict[tuple[str, Any, int, int], torch.Tensor]:
    """Every pattern by (stack, loop, layer, head), [query, key], read without the package's help."""
    found = data(view)
    values = iter(np.frombuffer(base64.b64decode(found["values"]), dtype=np.uint8).tolist())
    n, patterns = len(found["tokens"]), {}
    for stack, loops, layers in found["stacks"]:
        for layer in layers:
            for loop in loops:
                for head in found["heads"]:
                    pattern = torch.zeros(n - found["first"], n)
                    for row, q in enumerate(range(found["first"], n)):
                        for k in range(q + 1 if found["causal"] else n):
                            pattern[row, k] = next(values) / 255
                    patterns[stack, loop, layer, head] = pattern
    assert next(values, None) is None
    return patterns


@pytest.mark.parametrize("family", ["huginn", "hrm_text", "looped_qwen"])
def test_it_holds_the_patterns_of_every_stack(family: str) -> None:
    bridge, tokens = random_bridge(family), random_tokens(2, 5)
    _, cache = bridge.run_with_cache(tokens)
    found = unpacked(attention_viewer(cache, tokens, example=1))
    assert len(found) == bridge.schedule.n_layers * bridge.cfg.n_heads
    for (stack, loop, layer, head), pattern in found.items():
        at = cache.at(None if loop == "" else loop, layer, stack=stack)["pattern"]
        assert (pattern - at[1, head]).abs().max() <= HALF_STEP
    a_prefix = torch.ones(1, 5, dtype=torch.long)
    if family == "hrm_text":  # its prompts may attend to what comes later
        _, cache = bridge.run_with_cache(tokens[:1], token_type_ids=a_prefix)
        view = attention_viewer(cache, tokens[:1], stack="H", loops="last", layers=0, heads=[2])
        ((key, pattern),) = unpacked(view).items()
        assert key == ("H", 1, 0, 2) and not data(view)["causal"]
        assert (pattern - cache["H.loops.1.blocks.0.attn.hook_pattern"][0, 2]).abs().max() <= HALF_STEP


def test_what_is_chosen_is_shown_in_the_order_of_the_run() -> None:
    bridge, tokens = random_bridge("huginn"), random_tokens(1, 4)
    view = attention_viewer(bridge, tokens, layers=[2, 0], loops=[2, 0], heads=1)
    assert view.sites[1] == ("core", 0, 2) and len(view.sites) == 4
    assert data(view)["stacks"] == [["core", [0, 2], [0, 2]]] and data(view)["heads"] == [1] and view.left_out == ""
    assert data(attention_viewer(bridge, tokens, stack="coda"))["stacks"] == [["coda", [""], [0]]]
    assert repr(view).startswith("AttentionViewer(stack core: 2 loops of 2 layers; 1 head, 4 positions;")
    assert len(view.html) - len(data(view)["values"]) < 20_000


def test_padding_is_left_out_whichever_side_it_is_on() -> None:
    toy = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    texts = [PROMPT, "A b B a ? A"]
    (alone,) = unpacked(attention_viewer(toy, texts[1], layers=1, heads=0, loops=2)).values()
    for side in ("left", "right"):
        _, cache = toy.run_with_cache(texts, padding_side=side)
        words = toy.to_str_tokens(texts[1])
        for tokens in (words, [toy.to_str_tokens(texts[0]), words], texts[1]):
            view = attention_viewer(cache, tokens, layers=1, heads=0, loops=2, example=1)
            assert data(view)["tokens"] == words and len(words) == 7
            ((_, pattern),) = unpacked(view).items()
            assert (pattern - alone).abs().max() <= 2 * HALF_STEP
    assert data(attention_viewer(toy, texts, example=1))["tokens"] == words


def test_the_tokens_may_be_given_in_any_form_or_are_those_of_the_run() -> None:
    toy = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    tokens = toy.to_tokens(PROMPT)
    _, cache = toy.run_with_cache(PROMPT)
    views = [attention_viewer(cache, given) for given in (None, PROMPT, tokens, tokens[0], toy.to_str_tokens(PROMPT))]
    assert len({view.html for view in views}) == 1 and data(views[0])["tokens"][:3] == ["<s>", "A", "b"]
    _, flat = toy.run_with_cache(PROMPT, remove_batch_dim=True)
    assert attention_viewer(flat).html == views[0].html


def test_what_does_not_fit_is_said() -> None:
    bridge, tokens = random_bridge("huginn"), random_tokens(1, 9)  # 2 + 9 + 1 layers of 3 heads of 45 weights
    assert attention_viewer(bridge, tokens, max_bytes=12 * 3 * 45).left_out == ""
    for max_bytes, stacks, first in (
        (1300, [["core", [0, 1, 2], [0, 1, 2]]], 0),
        (900, [["core", [0, 1, 2], [0, 2]]], 0),
        (405, [["core", [0, 1, 2], [0]]], 0),
        (300, [["core", [0, 2], [0]]], 0),
        (60, [["core", [0, 2], [0]]], 8),
    ):
        view = attention_viewer(bridge, tokens, max_bytes=max_bytes)
        found = data(view)
        assert found["stacks"] == stacks and found["first"] == first
        assert len(base64.b64decode(found["values"])) <= max_bytes
        assert found["note"] == view.left_out and "max_bytes=1620" in view.left_out
    assert "stack core: 2 loops of 1 layer; the last 1 of 9 queries." in view.left_out
    _, cache = bridge.run_with_cache(tokens)
    pattern = unpacked(view)["core", 2, 0, 1]
    assert (pattern[0] - cache["loops.2.blocks.0.attn.hook_pattern"][0, 1, -1]).abs().max() <= HALF_STEP


def test_what_is_not_there_is_refused_in_a_sentence(unchecked: None) -> None:
    bridge, tokens = random_bridge("huginn"), random_tokens(1, 4)
    _, cache = bridge.run_with_cache(tokens)
    _, some = bridge.run_with_cache(tokens, names_filter="loops.0.blocks.*.attn.hook_pattern")
    _, late = bridge.run_with_cache(tokens, pos_slice=-1)
    broken = cache.cache_dict | {"blocks.3.attn.hook_pattern": cache["pattern", 3] * float("nan")}
    nan = type(cache)(broken, bridge)
    refused: list[tuple[Any, str]] = [
        (lambda: attention_viewer(bridge), r"pass one: attention_viewer\(model, prompt\)"),
        (lambda: attention_viewer({}, tokens), "asked of a dict; pass the cache"),
        (
            lambda: attention_heads(bridge, tokens),
            r"asked of a LoopedBridge; pass the cache.*attention_viewer\(model, prompt\)",
        ),
        (lambda: attention_heads(cache, 7), "tokens=7 was given; pass the prompt"),
        (lambda: attention_viewer(cache, ["a"] * 3), "3 tokens were given for patterns over 4 positions"),
        (lambda: attention_viewer(cache, 1.5), "tokens=1.5 was given; pass the prompt"),
        (lambda: attention_viewer(cache, tokens, stack="H"), "stack='H' was asked; this model has 'core', 'prelude', 'coda'"),
        (lambda: attention_viewer(cache, tokens, stack="coda", loops=1), "runs once; leave loops= out"),
        (lambda: attention_viewer(cache, tokens, layers=9), "layers 9 is out of range"),
        (lambda: attention_viewer(cache, tokens, heads=3), "heads 3 is out of range"),
        (lambda: attention_viewer(cache, tokens, loops=3), "loop 3 is out of range"),
        (lambda: attention_viewer(cache, tokens, example=1), "example 1 is out of range"),
        (lambda: attention_viewer(cache, tokens, max_bytes=0), "max_bytes"),
        (lambda: attention_viewer(some, tokens, layers=0), "was not cached in this run"),
        (lambda: attention_viewer(late, tokens), "cache a whole run and all its positions"),
        (lambda: attention_viewer(nan, tokens), "holds NaN"),
    ]
    for ask, why in refused:
        with pytest.raises(LoopedError, match=why):
            ask()


def test_tokens_that_look_like_code_do_not_end_the_script() -> None:
    bridge = random_bridge("nanbeige")
    words = ["</script>", "<!--", "\u2028", "\"'\n"]
    view = attention_viewer(bridge.run_with_cache(random_tokens(1, 4))[1], words)
    assert view.html.count("</script>") == 1 and "<!--" not in view.html and "\u2028" not in view.html
    assert data(view)["tokens"] == words


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as launched:
        yield launched


class Reader:
    """A page with viewers, and what a reader does with the first."""

    def __init__(self, browser: Any, page: Path, width: int = 1000, scheme: str = "light"):
        self.said: list[str] = []
        self.requests: list[str] = []
        self.view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.view.on("console", lambda message: self.said.append(message.text))
        self.view.on("pageerror", lambda error: self.said.append(str(error)))
        self.view.on("request", lambda request: self.requests.append(request.url))
        self.view.goto(page.as_uri())
        self.view.wait_for_selector(".matrix svg text")

    def text(self, part: str) -> str:
        return self.view.locator(part).first.text_content()

    def head(self, name: str) -> Any:
        return self.view.locator(f'button[aria-label="{name}"]').first

    def point(self, q: int, k: int, n: int, click: bool = False) -> None:
        """Point at a cell of the large pattern."""
        box = self.view.locator(".matrix canvas").first.bounding_box()
        size = (box["width"] - 2) / n
        at = (box["x"] + 1 + (k + 0.5) * size, box["y"] + 1 + (q + 0.5) * size)
        self.view.mouse.click(*at) if click else self.view.mouse.move(*at)

    def number(self) -> float:
        return float(self.text(".said").rsplit(": ", 1)[1].replace("−", "-"))


@a_browser
def test_a_reader_sees_the_right_numbers(browser: Any, tmp_path: Path) -> None:
    toy = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    _, cache = toy.run_with_cache(PROMPT)
    reader = Reader(browser, attention_viewer(cache).save(tmp_path / "view.html"))

    def weight(loop: int, layer: int, head: int, q: int, k: int) -> float:
        return float(cache[f"loops.{loop}.blocks.{layer}.attn.hook_pattern"][0, head, q, k])

    def shows(expected: float) -> bool:
        return abs(reader.number() - expected) <= HALF_STEP * 2 + 0.005

    assert reader.text(".name") == "loop 5, layer 0, head 0"
    row = cache["loops.5.blocks.0.attn.hook_pattern"][0, 0, 10]
    assert reader.text(".said").startswith(f"Query 10 “A” → key {int(row.argmax())} “c”, its strongest: ")
    assert shows(float(row.max()))
    # Another head while it is pointed at, and for good once it is clicked.
    reader.head("loop 1, layer 0, head 2").hover()
    assert reader.text(".name") == "loop 1, layer 0, head 2"
    reader.head("loop 2, layer 0, head 3").click()
    reader.point(8, 3, 11)
    assert reader.text(".name") == "loop 2, layer 0, head 3" and reader.text(".said").startswith("Query 8 “a” → key 3 “B”:")
    assert shows(weight(2, 0, 3, 8, 3)) and reader.head("loop 2, layer 0, head 3").get_attribute("aria-pressed") == "true"
    reader.point(3, 8, 11)
    assert "cannot see key 8 “a”, which is later" in reader.text(".said")
    reader.point(9, 7, 11, click=True)
    reader.view.mouse.move(990, 890)
    assert shows(weight(2, 0, 3, 9, 7)) and reader.text(".said").startswith("Query 9 “?” → key 7 “D”:")
    for way, q, k in (("ArrowUp", 8, 7), ("ArrowLeft", 8, 6)):
        reader.view.locator(".matrix").press(way)
        assert reader.text(".said").startswith(f"Query {q} ") and shows(weight(2, 0, 3, q, k))
    # Another layer, and what the loop changes.
    reader.view.locator("select").first.select_option("layer 1")
    assert reader.text(".name") == "loop 2, layer 1, head 3" and shows(weight(2, 1, 3, 8, 6))
    reader.view.locator("input[type=checkbox]").first.check()
    assert reader.text(".name") == "loop 2, layer 1, head 3 minus loop 1"
    for q, k in ((10, 4), (10, 6), (5, 2)):
        reader.point(q, k, 11)
        assert shows(weight(2, 1, 3, q, k) - weight(1, 1, 3, q, k))
    assert reader.head("loop 0, layer 1, head 0").is_disabled()
    reader.view.locator("select").first.select_option("prelude layer 0")
    assert reader.text(".name") == "prelude, layer 0, head 0" and not reader.view.locator("input").first.is_visible()
    assert shows(float(cache["prelude.blocks.0.attn.hook_pattern"][0, 0, 5, 2]))
    assert reader.said == [] and len(reader.requests) == 1


@a_browser
def test_the_pixels_are_the_weights(browser: Any, tmp_path: Path) -> None:
    """Opacity is the root of the weight; of a difference, orange where it is negative."""
    bridge, tokens = random_bridge("nanbeige"), random_tokens(1, 6)
    _, cache = bridge.run_with_cache(tokens)
    reader = Reader(browser, attention_viewer(cache, list("abcdef")).save(tmp_path / "view.html"))
    read = """(button) => {
      const canvas = button.querySelector("canvas");
      return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
    }"""
    now, before = (cache[f"loops.{t}.blocks.0.attn.hook_pattern"][0, 1] for t in (2, 1))
    pixels = torch.tensor(reader.head("loop 2, layer 0, head 1").evaluate(read)).reshape(6, 6, 4)
    assert ((pixels[..., 3] / 255) ** 2 - now).abs().max() < 0.012
    reader.view.locator("input[type=checkbox]").check()
    pixels = torch.tensor(reader.head("loop 2, layer 0, head 1").evaluate(read)).reshape(6, 6, 4)
    sign = torch.where(pixels[..., 0] > pixels[..., 2], -1, 1)
    assert (sign * (pixels[..., 3] / 255) ** 2 - (now - before)).abs().max() < 0.016


@a_browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_viewers_live_together_and_fit_the_page(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    bridge = random_bridge("huginn")
    words = ["<b>", "</script>", "a\nb", *"defghijklmnopqrstuv"]
    tokens = random_tokens(1, len(words))
    _, cache = bridge.run_with_cache(tokens)
    first, other = attention_viewer(cache, words), attention_viewer(cache, words, loops=[0, 2], layers=1)
    page = tmp_path / "page.html"
    style = "body{color-scheme:light dark;background:Canvas;color:CanvasText} button,span{display:none} canvas{width:7px}"
    head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    page.write_text(f"{head}<style>{style}</style>{first.html}{other.html}{first.html}", encoding="utf-8")
    reader = Reader(browser, page, width, scheme)
    assert reader.said == []
    names = reader.view.locator(".name").all_text_contents()
    assert names == ["loop 2, layer 0, head 0", "loop 2, layer 1, head 0", "loop 2, layer 0, head 0"]
    assert reader.view.locator("label:visible").all_text_contents()[1] == "minus the row above"  # loop 1 is not shown
    reader.view.locator("button").last.click()
    assert reader.view.locator("button.kept").count() == 1  # the others stay as they were
    assert reader.view.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    sizes = reader.view.locator("button").evaluate_all("(all) => all.map((one) => one.getBoundingClientRect().width)")
    assert min(sizes) >= 24  # a finger finds it (WCAG 2.5.8)
    colour = "getComputedStyle(document.querySelector('div').shadowRoot.querySelector('text')).fill"
    light = sum(map(int, re.findall(r"\d+", reader.view.evaluate(colour)))) > 600
    assert light == (scheme == "dark")
    assert reader.text(".words") == "<b></script>a↵bdefghijklmnopqrstuv"


@a_browser
def test_it_is_drawn_where_a_notebook_puts_it(browser: Any) -> None:
    """As JupyterLab does: markup, then scripts made anew, then both into the page; a second view of an output draws too."""
    bridge = random_bridge("nanbeige")
    view = browser.new_page()
    view.set_content("<!doctype html><body><div class='cell'></div><div class='cell'></div></body>")
    view.evaluate(
        """(html) => {
          for (const cell of document.querySelectorAll(".cell")) {
            const output = document.createElement("div");
            output.innerHTML = html;
            for (const old of output.querySelectorAll("script")) {
              const script = document.createElement("script");
              script.textContent = old.textContent;
              old.replaceWith(script);
            }
            cell.append(output);
          }
        }""",
        attention_viewer(bridge, random_tokens(1, 4)).html,
    )
    assert view.locator(".name").all_text_contents() == ["loop 2, layer 0, head 0"] * 2


def test_a_token_that_looks_like_markup_does_not_end_a_script() -> None:
    bridge, tokens = random_bridge("nanbeige"), random_tokens(1, 3)
    _, cache = bridge.run_with_cache(tokens)
    shown = attention_heads(cache, ["</script>", "<!--", "\u2028"], loops=0, layers=0)
    for html in (shown.local_src, shown.cdn_src):
        assert html.count("</script>") == 1 and "<!--" not in html.rpartition("AttentionHeads")[2]
        assert "\\u003c/script>" in html and "\u2028" not in html.rpartition("AttentionHeads")[2]
