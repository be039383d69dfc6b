"""The explorer's page: who may ask it, and what a reader can do on it by mouse and by keyboard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import a_browser, browsing
from serving import PROMPT, hooked, served
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_looped import LoopedBridge, LoopedConfig, interventions
from tl_looped.explorer.server import Serving
from tl_looped.lenses import logit_lens


@pytest.fixture(scope="module")
def toy() -> LoopedBridge:
    return LoopedBridge.from_pretrained("toy:hop", device="cpu")


@pytest.fixture(scope="module")
def page(toy: LoopedBridge) -> Iterator[Serving]:
    with served(toy) as serving:
        yield serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as launched:
        yield launched


class Reader:
    """A tab with the page, and what a reader does there."""

    def __init__(self, browser: Any, page: Serving, width: int = 1280, scheme: str = "light", state: Any = None):
        self.page, self.said, self.asked = page, [], []
        self.context = browser.new_context(
            viewport={"width": width, "height": 1000}, color_scheme=scheme, accept_downloads=True
        )
        self.view = self.context.new_page()
        self.view.on("console", lambda message: self.said.append(message.text))
        self.view.on("pageerror", lambda error: self.said.append(str(error)))
        self.view.on("request", lambda request: self.asked.append(request.url))
        self.view.on("dialog", lambda dialog: self.said.append(dialog.message))
        hash = "" if state is None else "#" + json.dumps(state)
        self.view.goto(page.address + hash)
        self.view.wait_for_selector(".tlx-cell h3")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            here = f"http://127.0.0.1:{self.page.port}/"
            assert self.said == [] and [url for url in self.asked if not url.startswith((here, "data:", "blob:"))] == []
            wide = self.view.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"the page is {wide} pixels too wide"
        self.context.close()

    @property
    def state(self) -> dict[str, Any]:
        return self.view.evaluate("location.hash ? JSON.parse(decodeURIComponent(location.hash.slice(1))) : {}")

    def text(self, part: str) -> str:
        return self.view.locator(part).first.inner_text()

    def until(self, what: Callable[[], bool]) -> None:
        for _ in range(200):
            if what() and self.view.locator(".tlx").get_attribute("aria-busy") != "true":
                return
            self.view.wait_for_timeout(50)
        raise AssertionError(f"{self.state}\n{self.text('.tlx')}")

    def open(self, name: str, by_key: bool = False) -> None:
        summary = self.view.locator(f"summary:text-is('{name}')")
        if by_key:
            summary.focus()
            self.view.keyboard.press("Enter")
        else:
            summary.click()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.view.keyboard.press(key)

    def button(self, name: str) -> Any:
        return self.view.get_by_role("button", name=name, exact=True)

    def label(self, name: str) -> Any:
        return self.view.get_by_label(name, exact=True)

    def cell(self, row: int, column: int) -> tuple[float, float]:
        """Where a cell is, at the start of the scroll."""
        self.view.locator(".tlx-scroll").first.scroll_into_view_if_needed()
        box = self.view.locator(".tlx-scroll").first.bounding_box()
        return box["x"] + 117 + 72 * (column + 0.5), box["y"] + 39 + 21 * (row + 0.5)

    def probability(self) -> float:
        """Of the top token of the pinned cell."""
        return float(self.text(".tlx-top .tlx-p").replace("−", "-"))


def prob(lens: Any, row: int, pos: int) -> float:
    return float(lens.top_probs[row, 0, pos, 0])


def works_alone(browser: Any, file: Path, pinned: str) -> None:
    """The saved page shows the grid without Python, in a tab of its own, and a click pins another cell."""
    view = browser.new_page()
    said: list[str] = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page = file.with_suffix(".html")
    page.write_bytes(file.read_bytes())
    view.goto(page.as_uri())
    view.wait_for_selector(".tlx-cell h3")
    assert view.locator(".tlx-cell h3").inner_text() == pinned
    view.locator(".tlx-scroll").first.focus()
    view.keyboard.press("ArrowUp")
    view.keyboard.press("Enter")
    assert view.locator(".tlx-cell h3").inner_text().startswith("loop 5, layer 0")
    assert view.locator(".tlx-panels").count() == 0 and said == []
    view.close()


@a_browser
def test_everything_works_by_mouse(browser: Any, page: Serving, toy: LoopedBridge) -> None:
    lens = logit_lens(toy, PROMPT, lens="native")
    with Reader(browser, page) as reader:
        view = reader.view
        assert reader.text(".tlx-cell h3") == "loop 5, layer 1 after 10 ‘A’"
        view.mouse.click(*reader.cell(4, 3))
        reader.until(lambda: reader.text(".tlx-cell h3") == "loop 1, layer 1 after 3 ‘B’")
        assert reader.probability() == pytest.approx(prob(lens, 4, 3), abs=5e-4)
        view.mouse.move(*reader.cell(2, 10))
        assert (
            reader.text(".tlx-tip h3") == "loop 0, layer 1 after 10 ‘A’" and view.locator(".tlx-tip .tlx-top tr").count() == 10
        )
        # More loops: what is pinned stays, and those beyond the trained ones are marked.
        view.locator("input[type=range]").fill("9")
        reader.until(lambda: "beyond the 6" in reader.text(".tlx-legend"))
        assert reader.text(".tlx-cell h3") == "loop 1, layer 1 after 3 ‘B’" and reader.state["loops"] == 9
        reader.label("number of loops, typed").fill("6")
        reader.label("number of loops, typed").blur()
        reader.until(lambda: "beyond" not in reader.text(".tlx-legend"))
        # A token is followed by a click on it, and by its name.
        reader.button("follow c").click()
        reader.until(lambda: reader.state.get("pins") == [toy.to_single_token("c")])
        reader.label("token to follow").fill("a")
        reader.button("Follow").click()
        reader.until(
            lambda: "followed tokens" in reader.text(".tlx-curves h3") and view.locator(".tlx-curves path").count() == 2
        )
        for colour in ("entropy", "kl", "change", "p:1", "r:0", "prob"):
            view.get_by_label("Colour").select_option(colour)
        for lens_name in ("logit", "readout", "native"):
            view.get_by_label("Lens").select_option(lens_name)
            reader.until(lambda name=lens_name: reader.state.get("lens", "native") == name)
        # An intervention: on the screen, off, on, removed.
        reader.open("Interventions")
        reader.label("intervention").select_option("skip_loop")
        reader.label("loops").last.fill("4:")
        reader.button("Add").click()
        reader.until(lambda: "framed" in reader.text(".tlx-legend"))
        with toy.hooks(fwd_hooks=interventions.skip_loop(toy, slice(4, None))):
            skipped = logit_lens(toy, PROMPT, lens="native")
        view.mouse.click(*reader.cell(12, 10))
        reader.until(lambda: reader.text(".tlx-cell h3") == "loop 5, layer 1 after 10 ‘A’")
        assert reader.probability() == pytest.approx(prob(skipped, 12, 10), abs=5e-4)
        for shown in ("difference", "unedited"):
            view.get_by_label("Show").select_option(shown)
        assert reader.probability() == pytest.approx(prob(lens, 12, 10), abs=5e-4)
        view.locator(".tlx-panel .tlx-chips input").uncheck()
        reader.until(lambda: not view.get_by_label("Show").is_visible())
        reader.button("remove: skip a loop · loops 4:").click()
        reader.until(lambda: "edits" not in reader.state)
        # Patches: a drag, and a sweep.
        reader.open("Patch from a second prompt")
        reader.label("what a click on the grid does").select_option("patch")
        view.mouse.move(*reader.cell(1, 2))
        view.mouse.down()
        view.mouse.move(*reader.cell(2, 4), steps=4)
        view.mouse.up()
        reader.until(lambda: len(reader.state.get("patch", {}).get("cells", [])) == 6)
        assert reader.state["patch"]["cells"][0] == ["loops.0.blocks.0", 2]
        reader.button("Take patches out").click()
        reader.label("what is patched").select_option("state")
        reader.button("Sweep every cell").click()
        reader.until(lambda: reader.state.get("colour") == "sweep")
        assert "effect of a patch here" in reader.text(".tlx-facts")
        # Attention, text, and what is taken away.
        reader.open("Attention of one head, in all loops")
        reader.until(lambda: "looks at" in reader.text("[aria-live=polite].tlx-quiet"))
        reader.label("head").select_option("2")
        reader.label("layer of the head").select_option("1")
        reader.until(lambda: "with weight" in reader.text("[aria-live=polite].tlx-quiet"))
        reader.open("Generate")
        reader.label("tokens to generate").fill("2")
        reader.label("exit policy").select_option("kl")
        reader.button("Generate").click()
        reader.until(lambda: view.locator(".tlx-token").count() == 2)
        view.locator(".tlx-token").nth(1).click()
        reader.until(lambda: reader.state.get("at") == 12 and len(reader.state.get("tokens", [])) == 13)
        reader.open("Take it with you")
        reader.button("Copy as Python").click()
        reader.until(lambda: "logit_lens(model" in reader.label("the screen as Python").input_value())
        with view.expect_download() as json_file:
            reader.button("Save the numbers (JSON)").click()
        saved = json.loads(Path(json_file.value.path()).read_text())
        assert saved["tokens"] == reader.state["tokens"] and saved["state"]["at"] == 12
        with view.expect_download() as png_file:
            reader.button("Save the picture (PNG)").click()
        assert Path(png_file.value.path()).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        with view.expect_download() as html_file:
            reader.button("Save a page that works alone (HTML)").click()
        works_alone(browser, Path(html_file.value.path()), reader.text(".tlx-cell h3"))
        reader.button("Start over").click()
        reader.until(lambda: "tokens" not in reader.state and reader.label("prompt").input_value() == PROMPT)
    assert hooked(page) == []


@a_browser
def test_everything_works_by_keyboard_on_a_narrow_dark_screen(browser: Any, page: Serving) -> None:
    with Reader(browser, page, 390, "dark") as reader:
        view = reader.view
        assert view.locator(".tlx").get_attribute("data-theme") == "dark"
        reader.label("prompt").focus()
        reader.press("Control+a")
        view.keyboard.type("A c B d C b D a ? B")
        reader.press("Enter")
        reader.until(lambda: "‘B’" in reader.text(".tlx-cell h3"))
        view.locator(".tlx-scroll").first.focus()
        reader.press("ArrowUp", "ArrowLeft", "ArrowLeft")
        assert view.locator(".tlx-grid [aria-live]").first.text_content().startswith("loop 5, layer 0, position 8 ‘a’")
        reader.press("Enter")
        reader.until(lambda: reader.text(".tlx-cell h3") == "loop 5, layer 0 after 8 ‘a’")
        reader.press("Home", "PageUp", "PageUp", "ArrowDown", "Shift+ArrowRight", "Shift+ArrowDown", "p")
        reader.until(lambda: len(reader.state.get("patch", {}).get("cells", [])) == 4)
        reader.press("p")
        reader.until(lambda: not reader.state["patch"]["cells"])
        view.locator("input[type=range]").focus()
        reader.press("ArrowRight")
        reader.until(lambda: reader.state.get("loops") == 7)
        reader.label("token to follow").focus()
        view.keyboard.type("zebra")
        reader.press("Enter")
        reader.until(lambda: "zebra" in reader.text("[role=alert]"))
        assert reader.text(".tlx-cell h3") == "loop 5, layer 0 after 8 ‘a’"  # the old grid stays
        reader.press("Control+a")
        view.keyboard.type("d")
        reader.press("Enter")
        reader.until(lambda: bool(reader.state.get("pins")) and not view.locator("[role=alert]").is_visible())
        reader.open("Interventions", by_key=True)
        reader.button("Add").focus()
        reader.press("Enter")
        reader.until(lambda: len(reader.state.get("edits", [])) == 1)
        view.locator(".tlx-panel .tlx-chips input").focus()
        reader.press("Space")
        reader.until(lambda: reader.state["edits"][0]["on"] is False)
        reader.open("Patch from a second prompt", by_key=True)
        reader.button("Sweep every cell").focus()
        reader.press("Enter")
        reader.until(lambda: reader.state.get("colour") == "sweep" or view.locator("[role=alert]").is_visible())
        reader.open("Attention of one head, in all loops", by_key=True)
        reader.until(lambda: "looks at" in reader.text("[aria-live=polite].tlx-quiet"))
        view.locator(".tlx-tiles").focus()
        reader.press("[", "ArrowUp", "ArrowRight")
        assert reader.text("[aria-live=polite].tlx-quiet").startswith("loop 5: position 7 ‘D’ looks at ")
        reader.open("Generate", by_key=True)
        reader.button("Generate").focus()
        reader.press("Enter")
        reader.until(lambda: view.locator(".tlx-token").count() == 8)
    assert hooked(page) == []


@pytest.mark.slow
@a_browser
def test_the_address_holds_the_state_and_errors_leave_the_old_grid(browser: Any, page: Serving) -> None:
    state = {"prompt": "B c C a A b ? B", "loops": 3, "lens": "readout", "at": 2, "row": "loops.1.blocks.1", "core": True}
    with Reader(browser, page, state=state) as reader:
        assert reader.text(".tlx-cell h3") == "loop 1 after 2 ‘c’"
        for prompt, why in (("", "The prompt is empty"), ("A zebra", "zebra"), ("A " * 50, "context of this model is 32")):
            reader.label("prompt").fill(prompt)
            reader.button("Run").click()
            reader.until(
                lambda why=why: reader.view.locator("[role=alert]").is_visible() and why in reader.text("[role=alert]")
            )
            assert reader.text(".tlx-cell h3") == "loop 1 after 2 ‘c’"
        changed = state | {"at": 3, "edits": [{"kind": "ablate_mlp", "loops": "0", "layers": "1"}]}
        reader.view.evaluate(f"location.hash = encodeURIComponent({json.dumps(json.dumps(changed))})")
        reader.until(
            lambda: reader.text(".tlx-cell h3") == "loop 1 after 3 ‘C’" and reader.view.get_by_label("Show").is_visible()
        )
    for broken in ("#%", "#[1]", '#{"pins":7,"edits":"x","at":99,"colour":"no","patch":{}}'):
        reader = Reader(browser, page)
        reader.view.evaluate("() => 0")
        reader.view.goto("about:blank")
        reader.view.goto(page.address + broken)
        reader.view.wait_for_selector(".tlx-cell h3, .tlx-error:not([hidden])")
        assert reader.said == []
        reader.context.close()


NASTY = [
    "</script>",
    "<img src=x onerror=alert(1)>",
    "שלום",
    "\u200b",
    "\u202e",
    "a\u0301",
    "<!--",
    "&amp;",
    "\n",
    "$&",
    "x" * 90,
]


def nasty_model() -> LoopedBridge:
    """A model whose tokens are what could break a page."""
    spelled = [t.replace(" ", "_") if "img" not in t else t for t in NASTY]
    vocabulary = {t: i for i, t in enumerate(["[UNK]", *spelled])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[UNK]", eos_token="[UNK]")
    cfg = LoopedConfig(d_model=16, n_heads=2, d_vocab=len(vocabulary), n_core=2, n_loops=3, n_ctx=512)
    return LoopedBridge.from_config(cfg, seed=3, tokenizer=tokenizer)


@a_browser
def test_tokens_are_text(browser: Any) -> None:
    with (
        served(nasty_model()) as page,
        Reader(browser, page, state={"prompt": "|".join(NASTY), "pins": [*range(1, 12)]}) as reader,
    ):
        assert reader.view.locator(".tlx img, .tlx script").count() == 0
        said = reader.text(".tlx-curves")
        assert "</script>" in said and "<img src=x onerror=alert(1)>" in said and "\\u200b" in said and "\\u202e" in said
        reader.open("Generate")
        reader.button("Generate").click()
        reader.until(lambda: reader.view.locator(".tlx-token").count() > 0)
        assert reader.view.locator(".tlx img").count() == 0


@pytest.mark.slow
@a_browser
def test_a_long_prompt_and_many_loops_take_few_nodes(browser: Any) -> None:
    model = nasty_model()
    state = {"tokens": torch.arange(300).remainder(12).tolist(), "loops": 64}
    with served(model) as page, Reader(browser, page, state=state) as reader:
        assert reader.text(".tlx-cell h3").startswith("loop 63, layer 1 after 299")
        assert reader.view.evaluate("document.querySelectorAll('*').length") < 1500
        reader.view.locator(".tlx-scroll").first.focus()
        reader.press("Home", *["PageUp"] * 10, "Enter")
        reader.until(lambda: reader.text(".tlx-cell h3").startswith("loop 0, layer 0 after 0"))
        reader.view.get_by_label("Rows").select_option("2")
        reader.view.locator(".tlx-scroll").first.focus()
        reader.press("ArrowDown")
        assert reader.view.locator(".tlx-grid [aria-live]").first.text_content().startswith("loop 1, layer 1")
