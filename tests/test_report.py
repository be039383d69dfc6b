"""The report: its numbers, its sentences, and the page as a browser shows it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import a_browser, browsing
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import GOLDEN, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped._writing import write_text
from tl_looped.analysis import fixed_points, more_loops
from tl_looped.cli import main
from tl_looped.explorer._packing import unpacked
from tl_looped.report import Report, report, sections
from tl_looped.report.drawing import over_positions
from tl_looped.report.pointer_chasing import example, right_answers
from tl_looped.report.question import Question
from tl_looped.report.section import Part, Section, Unmeasured, share
from tl_looped.results import Grid
from tl_looped.toys import hop_prompts

TINY = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=2, rope_theta=100.0)
TOKENS = [torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[9, 8, 7]])]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the command makes when it is told nothing, with its numbers beside it."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", "--out", str(file), "--json"]) == 0
    return file


@pytest.fixture(scope="module")
def numbers(page: Path) -> dict[str, Any]:
    return {section["name"]: section for section in json.loads(page.with_suffix(".json").read_text())["sections"]}


def test_a_page_is_light(page: Path) -> None:
    assert page.stat().st_size < 1_000_000


def test_every_section_is_there_and_none_refused(numbers: dict[str, Any]) -> None:
    assert list(numbers) == list(sections.SECTIONS)
    assert not [section["refused"] for section in numbers.values() if section["refused"]]
    assert all(section["reading"] for section in numbers.values())


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def figures(page: Path) -> list[list[dict[str, Any]]]:
    """The panels of every drawing."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    return [json.loads(one) for one in found]


def held(text: str) -> list[dict[str, Any]]:
    """What every grid of a page holds."""
    return [json.loads(one) for one in re.findall(r'<script class="tlx-data"[^>]*>(.*?)</script>', text, re.DOTALL)]


def test_grids_hold_the_numbers_of_the_json(page: Path, numbers: dict[str, Any]) -> None:
    """And say for every row and column of the patched states where they are, with the tokens of both prompts."""
    answers, entering, leaving = held(page.read_text(encoding="utf-8"))
    words, top = answers["grid"]["grid"]["words"], unpacked(answers["grid"]["grid"]["top"])[..., 0]
    assert [[words[str(i)] for i in row] for row in top.tolist()] == numbers["answers"]["numbers"]["answers"]
    found = numbers["patching"]["numbers"]
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


def test_the_json_holds_every_number_of_the_figures(page: Path, numbers: dict[str, Any]) -> None:
    known = torch.tensor(sorted({*leaves([section["numbers"] for section in numbers.values()])}), dtype=torch.float64)
    drawn = [
        *leaves([grid.get("y", grid.get("colour")) for one in figures(page) for panel in one for grid in panel["grids"]]),
        *leaves([g["x"] for one in figures(page) for p in one if p["kind"] == "trajectories" for g in p["grids"]]),
    ]
    assert len(drawn) > 1000
    values = torch.tensor(drawn, dtype=torch.float64)
    at = torch.searchsorted(known, values).clamp(max=len(known) - 1)
    nearest = torch.minimum((known[at] - values).abs(), (known[(at - 1).clamp(min=0)] - values).abs())
    assert bool((nearest <= 1e-6 * values.abs() + 1e-12).all())


def test_the_numbers_of_the_sentences_are_those_of_the_json(numbers: dict[str, Any]) -> None:
    """In the digits of the sentence; loops and counts up to 16, the scale of a cosine and the name of a policy apart."""
    free = {*map(str, range(17)), "−1", "5e-4"}
    seen = 0
    for name, section in numbers.items():
        forms = [f"{v:{form}}" for v in leaves(section["numbers"]) for form in (".3g", ".0%", ".1%", ".2%", ",.0f")]
        forms += [share(v) for v in leaves(section["numbers"])]
        if name == "model":
            forms += [f"{v / 1000:.3g}" for v in leaves(section["numbers"])]  # in thousands
        for sentence in [*section["reading"], section["headline"]]:
            found = {text.rstrip(".,") for text in re.findall(r"(?<![\w.])[-−]?\d[\d.,e-]*%?", sentence)}
            assert found <= free | set(forms), (name, sentence)
            seen += len(found - free)
    assert seen > 30


def test_the_causal_picture_of_pointer_chasing(numbers: dict[str, Any]) -> None:
    """A state after loop t that is transplanted from a run of another mapping moves the answers of loops >= t, and only these,
    to what the task demands."""
    found = numbers["patching"]["numbers"]
    changed, right = (torch.tensor(found[name]["values"]) for name in ("transplants_changed", "transplants"))
    loops = torch.arange(6)
    before = loops[None] < loops[:, None]  # the answer of an earlier loop
    assert changed.shape == right.shape == (6, 6)
    assert bool((changed[before] == 0).all()) and changed[~before].min() > 0.8
    assert right.min() > 0.99
    # In the sweep, the last query holds the answer at the end: its state leaving the last loop restores all of it.
    leaving = torch.tensor(found["leaving_loops_core"]["values"])
    assert leaving[-1, -1] == pytest.approx(1, abs=1e-4) and leaving[-1, :-1].abs().max() < 1e-6
    entering = torch.tensor(found["entering_layers"]["values"])
    assert entering[-1, -1] > 0.9 and entering[1, -1].abs() < 0.01  # before the loop a query has looked up nothing
    assert len(entering) == 13 and found["entering_layers"]["labels"]["virtual_layer"][0] == "prelude.blocks.0"


def test_no_patch_at_the_last_query_restores_the_answer_by_chance() -> None:
    tokenizer = LoopedBridge.from_pretrained("toy:hop", device="cpu").tokenizer
    words = [tokenizer.decode(tokens[0]).split()[1:] for tokens in example()[1]]  # without BOS
    steps = [dict(zip(map(str.lower, row[: row.index("?") : 2]), row[1 : row.index("?") : 2], strict=True)) for row in words]
    assert steps[0].keys() == steps[1].keys() and steps[0] != steps[1]

    def walk(n_clean: int) -> str:
        at = words[0][-1].lower()
        for hop in range(6):
            at = steps[hop >= n_clean][at]
        return at

    assert walk(6) not in {walk(n) for n in range(6)}


def test_accuracy_with_and_without_injection(numbers: dict[str, Any]) -> None:
    found = numbers["stability"]["numbers"]
    with_injection, without = (torch.tensor(found[name]["values"]) for name in ("toy:hop", "toy:hop-noinject"))
    assert found["toy:hop"]["count"] == 200 and len(with_injection) == len(without) == 16
    assert with_injection.min() > 0.99 and without[:6].min() > 0.99 and without[-1] < 0.2


def test_answers_and_fixed_points_are_those_of_the_model(numbers: dict[str, Any]) -> None:
    model = LoopedBridge.from_pretrained("toy:hop", n_loops=16, device="cpu")
    prompts = hop_prompts(32, seed=7)
    with torch.no_grad():
        last = model.readout(prompts.tokens[:1], loop=3)[0].softmax(-1).max(-1)
    shown = numbers["answers"]["numbers"]
    assert shown["answers"][3] == [model.tokenizer.decode([t]) for t in last.indices.tolist()]
    assert shown["probabilities"]["values"][3] == pytest.approx(last.values.tolist(), abs=1e-5)
    assert shown["right_by_loop"][:6] == [8] * 6
    found = fixed_points(model, prompts.tokens, n_loops=16, verbose=False)
    shown = torch.tensor(numbers["fixed_points"]["numbers"]["core"]["successive"]["relative"]["values"], dtype=torch.float64)
    torch.testing.assert_close(shown, found.successive["relative"].values, rtol=1e-4, atol=0)


def test_sentences_follow_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that settles is said to settle, one that does not is not: the same code, other numbers."""
    still = LoopedBridge.from_config(TINY.replace(injection="concat"), seed=0)
    with torch.no_grad():
        for name, weight in still.core_weights.items():
            if name.endswith(("o.weight", "out.weight")):
                weight.zero_()  # the layers write nothing, so the state is the injected one from the first loop on
        still.plain.set_parameter("inject.weight", torch.nn.Parameter(torch.cat((torch.zeros(8, 8), torch.eye(8)), 1)))
    moving = LoopedBridge.from_config(TINY, seed=0)
    said = {}
    for name, model in (("still", still), ("moving", moving)):
        found = report(model, TOKENS, n_loops=6, verbose=False)
        said[name] = {section.name: " ".join(section.reading) for section in found.sections}
    assert "it has settled" in said["still"]["fixed_points"] and "it has not settled" in said["moving"]["fixed_points"]
    assert "It says so from loop 0 on." in said["still"]["answers"]


def test_a_share_that_is_not_all_is_not_shown_as_all() -> None:
    assert [share(x) for x in (0.0, 0.5, 0.0123, -0.3, 0.994, 0.99996, 1.0, 1.2)] == [
        "0%", "50%", "1.2%", "-30%", "99%", "99.99%", "100%", "120%",
    ]  # fmt: skip


def test_right_answers_are_read_from_the_prompt() -> None:
    prompts = hop_prompts(3, seed=5)
    for tokens, answers in zip(prompts.tokens, prompts.answers(9).unbind(1), strict=True):
        right = right_answers(tokens, 9)
        assert right is not None and torch.equal(right[:, prompts.query_pos], answers)
        assert bool((right[:, : prompts.query_pos.start] == -1).all())
    tokenizer = LoopedBridge.from_pretrained("toy:hop", device="cpu").tokenizer

    def read(text: str) -> torch.Tensor | None:
        return right_answers(torch.tensor(tokenizer(text)["input_ids"]), 3)

    found = read("A b B c C a ? B")
    assert found is not None and tokenizer.decode(found[:, -1]).split() == ["c", "a", "b"]
    for other in ("A b B c", "A b B c ? A", "A b B a ?", "A b B a ? C", "A b A a ? A", "a B b A ? A", "A b B ? A", "? ?"):
        assert read(other) is None, other


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr("tl_looped.report.SECTIONS", {name: sections.SECTIONS[name] for name in names})


def test_own_prompts_of_pointer_chasing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are compared where the prompt has right ones; that of other prompts is never called wrong."""
    only(monkeypatch, "answers", "exits")
    toy = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    said = [
        {s.name: " ".join(s.reading) for s in report(toy, text, n_loops=8, verbose=False).sections}
        for text in ("A b B c C d D a ? A C", "A b B c")
    ]
    assert "right at 2 of 2 queries" in said[0]["answers"] and "no right answers to compare with" in said[1]["answers"]
    assert all("last query of 32 mappings" in one["exits"] and "100% of the cases" in one["exits"] for one in said)


def test_sentences_about_one_loop_and_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    once = LoopedBridge.from_config(TINY.replace(n_loops=1, n_core=1), seed=0)
    found = {section.name: section for section in report(once, TOKENS[1], n_loops=2, verbose=False).sections}
    text = " ".join(sentence for section in found.values() for sentence in [*section.reading, *section.refused])
    assert not re.search(r"\b1 loops|\b1 layers with|nan", text)
    assert "loops once" in found["stages"].refused[0] and "loops once" in found["exits"].refused[0]
    model = LoopedBridge.from_config(TINY, seed=0)
    only(monkeypatch, "trajectories", "attention", "stability")
    mixed = report(model, [TOKENS[0], torch.tensor([1])], n_loops=3, verbose=False)
    for section in mixed.sections:
        assert not section.refused and any("Left out: 1 prompt of fewer" in sentence for sentence in section.reading)
    same = {section.name: " ".join(section.reading) for section in report(model, TOKENS, n_loops=2, verbose=False).sections}
    assert "nothing lies beyond" in same["stability"] and "the last of" not in same["attention"]


def test_layers_are_compared_as_their_distances_say(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "attention")
    model = LoopedBridge.from_pretrained(GOLDEN / "ouro", device="cpu")
    (section,) = report(model, torch.tensor([5, 17, 3, 8, 2]), n_loops=4, verbose=False).sections
    near, far = section.numbers["same_layer_other_loop"], section.numbers["other_layer"]
    assert 0.8 * far < near < far and "about as much as it resembles other layers" in section.reading[0]


def test_an_unexpected_error_costs_one_part_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, "model", "attention", "exits")
    monkeypatch.setattr("tl_looped.report.sections.attention.attention_distances", lambda *_, **__: [][1])
    out = tmp_path / "report.html"
    assert main(["report", str(GOLDEN / "ouro"), "--prompt", "5,17,3", "--n-loops", "4", "--out", str(out), "--json"]) == 1
    assert "'Attention across loops' failed: IndexError" in capsys.readouterr().err.strip().splitlines()[-1]
    _, attention, exits = json.loads(out.with_suffix(".json").read_text())["sections"]
    assert attention["failed"] == ["IndexError: list index out of range"] and attention["reading"] and exits["reading"]
    assert "Failed: IndexError: list index out of range" in out.read_text(encoding="utf-8")


def test_an_interrupted_write_leaves_the_old_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "page", "old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_looped._writing.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "page", "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_other_models_are_measured_as_the_analyses_do(tmp_path: Path) -> None:
    model = LoopedBridge.from_pretrained(GOLDEN / "ouro", device="cpu")
    found = report(model, TOKENS, n_loops=6, clean=torch.tensor([5, 17, 3]), corrupted=torch.tensor([5, 18, 3]), verbose=False)
    measured = {section.name: section for section in found.sections}
    assert not measured["patching"].refused and not measured["exits"].refused
    reference = more_loops(model, TOKENS, n_loops=6, verbose=False)
    assert torch.allclose(measured["stability"].numbers["loss"].values, reference.loss.values, rtol=1e-5)
    assert "gate ≥ 0.5" in " ".join(measured["exits"].reading) and "gate_pdf" in measured["exits"].numbers
    head = found.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)', head[: head.index("<script>")] + head[head.rindex("</script>") :])


CLEAN, CORRUPTED = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 7, 4]])


def with_edges(n_loops: int = 2) -> LoopedBridge:
    return LoopedBridge.from_config(TINY.replace(n_loops=n_loops, n_prelude=1, n_coda=1), seed=3)


def test_the_answer_after_a_loop_is_that_of_a_model_of_so_many_loops() -> None:
    """Patched by hand: hooks on the unrolled model, one cell at a time, prelude and coda included."""
    model = with_edges()
    options: dict[str, Any] = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": 5, "wrong": 8, "verbose": False}
    (found,) = report(model, at_loop=2, n_loops=3, sections="patching", **options).sections
    assert not found.refused and (found.numbers["right"], found.numbers["wrong"]) == ("5", "8")
    deep = model.unroll(3)
    _, cache = deep.run_with_cache(CLEAN)

    def difference(logits: torch.Tensor) -> float:
        return float(logits[0, -1, 5] - logits[0, -1, 8])

    with torch.no_grad():
        clean, corrupted = difference(deep(CLEAN)), difference(deep(CORRUPTED))
    values = found.numbers["entering_layers"].values
    assert tuple(values.shape) == (8, 4)
    for layer in range(8):
        for position in range(4):

            def patch(state: torch.Tensor, hook: Any, position: int = position) -> torch.Tensor:
                state[:, position] = cache[hook.name][:, position]
                return state

            with torch.no_grad():
                logits = deep.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)])
            expected = (difference(logits) - corrupted) / (clean - corrupted)
            assert float(values[layer, position]) == pytest.approx(expected, abs=1e-4)


def test_prompts_that_are_answered_alike_are_compared_where_they_differ_most() -> None:
    model = with_edges()
    clean, corrupted = (model(tokens)[0, -1].detach().softmax(-1) for tokens in (CLEAN, CORRUPTED))
    assert int(clean.argmax()) == int(corrupted.argmax())
    (found,) = report(model, clean=CLEAN, corrupted=CORRUPTED, n_loops=3, sections="patching", verbose=False).sections
    change = (clean - corrupted).tolist()
    change[int(clean.argmax())] = 0
    assert found.numbers["right"] == str(change.index(max(change)))
    assert found.numbers["wrong"] == str(change.index(min(change)))
    assert "Both prompts are answered with" in found.reading[0]


@pytest.mark.parametrize(("options", "says"), [
    ({"at_loop": 3, "n_loops": 3}, "at_loop=3 was asked of 3 loops"),
    ({"at_loop": -1}, "at_loop=-1"),
    ({"sections": ["answers", "chapters"]}, "sections='chapters' was asked; there are model, answers"),
    ({"sections": []}, "sections is empty"),
    ({"answer": 10}, "the answer 10 was given, but the vocabulary of this model is 0..9"),
    ({"answer": " Paris"}, "has no tokenizer; pass the number of the token"),
    ({"answer": 3, "wrong": 3}, "are one token"),
    ({"wrong": 3}, "without an answer"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LoopedError, match=re.escape(says)):
        report(with_edges(), TOKENS, verbose=False, **options)


def test_an_answer_is_one_token() -> None:
    toy = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    options: dict[str, Any] = {"sections": "answers", "n_loops": 6, "verbose": False}
    with pytest.raises(LoopedError, match=re.escape("the answer 'a b' is 2 tokens, 'a', 'b'")):
        report(toy, answer="a b", **options)
    (found,) = report(toy, "A b B c C a ? A", answer="a", **options).sections
    chance, rank = found.numbers["answer_probability"], found.numbers["answer_rank"]
    assert chance.argmax() % 3 == 2 and rank[2] == 0 and rank[0] > 0  # three hops from A lead back to a


def test_the_first_screen() -> None:
    """Both prompts in full with their differences marked, the findings and one figure stand before anything else."""
    toy = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    clean, corrupted = "A b B c C d D a ? A", "A c B d C b D a ? A"
    found = report(toy, clean=clean, corrupted=corrupted, sections=["answers", "patching", "stability"], verbose=False)
    assert len(found.findings) == 3 and found.to_dict()["findings"] == found.findings
    text = found.html
    first = text[text.index("<body>") : text.index("<nav>")]
    tokens = re.findall(r'<span class="token( differs)?"><b>(.*?)</b><b>(.*?)</b></span>', first)
    assert [a for _, a, _ in tokens][1:] == clean.split() and [b for *_, b in tokens][1:] == corrupted.split()
    assert [bool(mark) for mark, *_ in tokens] == [a != b for _, a, b in tokens] and sum(mark != "" for mark, *_ in tokens) == 3
    assert first.count("<li>") == 3 and first.count("<figure") == 1
    assert first.index("prompts") < first.index("findings") < first.index("<figure")


def test_a_section_that_cannot_be_is_one_line_with_a_command_that_fills_it() -> None:
    toy = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    found = report(toy, "A b B a ? A", sections=["answers", "patching"], n_loops=6, verbose=False)
    (section,) = found.unmeasured
    assert section.name == "patching" and section.command.startswith("tl-looped report toy:hop --clean ")
    assert '<section id="patching"' not in found.html and "<h2>Not measured</h2>" in found.html
    words = dict(zip(["clean", "corrupted"], re.findall(r"'([^']*)'", section.command), strict=True))
    filled = report(toy, sections="patching", n_loops=6, verbose=False, **words)
    assert not filled.unmeasured
    once = LoopedBridge.from_config(TINY.replace(n_loops=1), seed=0)
    (section,) = report(once, TOKENS, sections="exits", verbose=False).unmeasured
    assert section.command == "report(model, at_loop=1)"
    assert not report(once, TOKENS, sections="exits", at_loop=1, verbose=False).unmeasured


def test_made_for_so_many_loops_is_said_only_of_models_that_were() -> None:
    """Not of a config with random weights, nor of a checkpoint that predicts hardly better than chance."""
    text_model = LoopedBridge.from_pretrained("toy:text", device="cpu")
    random_ouro = LoopedBridge.from_pretrained(GOLDEN / "ouro", device="cpu")
    for model, prompts, is_trained in (
        (LoopedBridge.from_config(TINY, seed=0), TOKENS, False),
        (random_ouro, TOKENS, False),
        (text_model, "Return the number of items in the list.", True),
        (text_model.unroll(5), "Return the number of items in the list.", True),
        (LoopedBridge.from_pretrained("toy:text", device="cpu", n_loops=3), "Return the number of items in the list.", True),
    ):
        assert not is_trained or model.made_for == text_model.n_loops != 5
        found = report(model, prompts, n_loops=6, sections=["model", "answers", "stability"], verbose=False)
        text = re.sub(r'<script type="module">.*?</script>', "", found.html[found.html.index("<body>") :], flags=re.DOTALL)
        assert ("made for" in text) == is_trained and ("it is set to" in text) == (not is_trained)
    assert "hardly better than chance" in " ".join(
        report(random_ouro, TOKENS, sections="model", verbose=False).sections[0].reading
    )


def test_figures_that_say_nothing_are_left_out() -> None:
    short = report(LoopedBridge.from_config(TINY, seed=0), TOKENS, n_loops=2, sections="fixed_points", verbose=False)
    assert short.sections[0].reading and len(short.sections[0].figures) < 3  # one step from loop to loop is no curve
    assert "of 1 prompt" not in short.html and "Means are over 3 prompts, too few" in short.html


def test_a_first_token_that_dominates_is_named_and_can_be_left_out() -> None:
    model = LoopedBridge.from_config(TINY, seed=0)
    with torch.no_grad():
        model.original_model.get_parameter("embed.weight")[1] *= 1000
    names = ["fixed_points", "trajectories", "stages"]
    whole, cut = (
        report(model, TOKENS[0][:1], n_loops=4, sections=names, skip_first_token=skip, verbose=False) for skip in (False, True)
    )
    for section in whole.sections:
        assert "skip_first_token=True leaves it out" in section.notes[0], section.name
        assert section.numbers["first_token_times_as_long"] > 100
    for section in cut.sections:
        assert not section.refused and "is left out" in section.notes[0]
    norms = [found.sections[0].numbers["core"]["norm_by_loop"][0] for found in (whole, cut)]
    assert norms[0] > 20 * norms[1]
    usual = report(LoopedBridge.from_config(TINY, seed=0), TOKENS[0], n_loops=4, sections=names, verbose=False)
    assert not any(section.notes for section in usual.sections)


def test_the_command_has_the_options_of_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.html"
    command = (
        "toy:hop --tokens --clean 0,2,11,3,10,1,2 --corrupted 0,2,10,3,11,1,2 --answer 11 --wrong 10 --at-loop 1 --n-loops 2"
    )
    assert (
        main(["report", *command.split(), "--sections", "patching, exits", "--skip-first-token", "--out", str(out), "--json"])
        == 0
    )
    found = {section["name"]: section for section in json.loads(out.with_suffix(".json").read_text())["sections"]}
    words = LoopedBridge.from_pretrained("toy:hop").tokenizer
    assert [*found] == ["patching", "exits"] and capsys.readouterr().err.count("not measured") == 0
    assert [found["patching"]["numbers"][name] for name in ("right", "wrong")] == [words.decode([11]), words.decode([10])]
    assert len(found["patching"]["numbers"]["entering_layers"]["values"]) == 5  # a prelude and two loops of two layers
    assert main(["report", str(GOLDEN / "ouro"), "--prompt", "5,17,3", "--sections", "patching", "--out", str(out)]) == 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("tl-looped: not measured: Where the answer is made.") and "--clean 5,17,3 --corrupted 5,18,3" in said


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hrm_text", "huginn", "parcae"])
def test_every_kind_of_loop_has_a_report(family: str) -> None:
    model = LoopedBridge.from_pretrained(GOLDEN / family, device="cpu")
    pair = {"clean": torch.tensor([[5, 17, 3, 9, 22]]), "corrupted": torch.tensor([[5, 18, 3, 9, 22]])}
    found = report(model, [torch.tensor([[5, 17, 3, 9, 22]])], n_loops=max(4, model.n_loops), **pair, verbose=False)
    refused = {section.name: section.refused for section in found.sections if section.refused}
    assert not refused and "nan" not in " ".join(sentence for section in found.sections for sentence in section.reading)


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on() -> None:
    model = LoopedBridge.from_config(TINY, seed=0)
    one = torch.tensor([[5]])
    found = {section.name: section for section in report(model, [one], n_loops=4, verbose=False).sections}
    for name in ("stages", "attention", "stability", "exits"):
        assert found[name].is_empty and found[name].refused == ["No prompt has 2 tokens."], name
        assert found[name].command == "report(model, prompts=torch.tensor([5,17,3]))"
    with pytest.raises(LoopedError, match="12 tokens, but the context of this model is n_ctx=8"):
        report(LoopedBridge.from_config(TINY.replace(n_ctx=8), seed=0), torch.tensor([1] * 12), verbose=False)
    assert found["fixed_points"].reading and not found["fixed_points"].refused
    same = report(model, TOKENS, n_loops=4, clean=one, corrupted=one, verbose=False)
    (patching,) = (section for section in same.sections if section.name == "patching")
    assert patching.is_empty and any("nothing for a patch to move" in reason for reason in patching.refused)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--out", "/no/such/place/report.html"], "no directory '/no/such/place'"),
    (["--out", "."], "it is a directory"),
    (["--out", "/proc/report.html"], "cannot be written"),
    (["--json", "/proc/numbers.json"], "'/proc/numbers.json' cannot be written"),
    (["--prompt", ""], "empty"),
    (["--prompt", " "], "nothing but whitespace"),
    (["--prompt", "A b Z y ? A"], "Z"),
    (["--prompts", "no-such-file"], "no-such-file.*cannot be read"),
    (["--clean", "A b B a ? A"], "only one of clean and corrupted"),
    (["--clean", "A b B a ? A", "--corrupted", "A b ? A"], "same number of tokens"),
    (["--n-loops", "1"], "n_loops=1"),
    (["toy:nothing"], "the bundled toys are"),
    ([str(GOLDEN / "ouro")], "no tokenizer"),
    ([str(GOLDEN / "ouro"), "--prompt", "hello"], "no tokenizer.*'hello' is no list of token ids"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line_before_the_work(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    unchecked: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(Section, "attempt", lambda *_: pytest.fail("the work began"))
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "report.html")]
    assert main(["report", *arguments, *out]) == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and re.search(says, error), error
    assert not list(tmp_path.iterdir())


def test_prompts_come_from_a_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_text("5,17,3\n\n9,2,4,4\n")
    out, beside = tmp_path / "r.html", tmp_path / "n.json"
    command = ["report", str(GOLDEN / "nanbeige"), "--prompt", "8,9,10", "--prompts", str(tmp_path / "prompts")]
    assert main([*command, "--n-loops", "3", "--out", str(out), "--json", str(beside)]) == 0
    model, answers = (s["numbers"] for s in json.loads(beside.read_text())["sections"][:2])
    assert model["examples"] == 3 and answers["prompt"] == ["8", "9", "10"] and len(answers["answers"]) == 3
    assert capsys.readouterr().out.split() == [str(out), str(beside)]


def test_an_interruption_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sections.SECTIONS, "trajectories", ("The path of the state", (Part(interrupt),)))
    out = tmp_path / "report.html"
    assert main(["report", str(GOLDEN / "ouro"), "--prompt", "5,17,3", "--n-loops", "4", "--out", str(out), "--json"]) == 130
    text, found = out.read_text(encoding="utf-8"), json.loads(out.with_suffix(".json").read_text())
    assert [section["name"] for section in found["sections"]] == ["model", "answers", "patching", "fixed_points"]
    assert found["missing"][0] == "The path of the state" and "Interrupted: The path of the state, Attention" in text
    assert "not done: The path of the state" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.slow
def test_ctrl_c_and_a_kill_keep_what_is_done(tmp_path: Path) -> None:
    for how, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        out = tmp_path / f"{how.name}.html"
        run = subprocess.Popen(
            [sys.executable, "-m", "tl_looped.cli", "report", "--n-loops", "64", "--out", str(out)], stderr=subprocess.PIPE
        )
        while not out.exists() and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(how)
        run.communicate(timeout=120)
        assert run.returncode == status and out.read_text(encoding="utf-8").rstrip().endswith("</html>")


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
def test_the_page_in_a_browser(page: Path, width: int, scheme: str) -> None:
    """Every figure drawn, no error, nothing requested, no sideways scrolling, readable contrast."""
    said: list[str] = []
    requests: list[str] = []
    options = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with browsing(*options) as browser:
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
        view.goto(page.as_uri())
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
    assert said == [] and requests == [page.as_uri()]
    assert found["overflow"] <= 0
    assert found["figures"] == len(figures(page)) >= 14 and found["empty"] == found["squeezed"] == 0
    restored = json.loads(page.with_suffix(".json").read_text())["sections"][2]["numbers"]["entering_layers"]["values"][-1][-1]
    assert patched == f"loop 5 · 1, position 25 ‘A’: {restored:.3f}"
    assert found["heads"] == 24 and found["diagrams"] == 1
    assert found["contrast"] >= 4.5 and found["smallest"] >= 12  # WCAG's AA for text


def test_an_error_of_the_page_is_no_traceback(tmp_path: Path) -> None:
    found = report(LoopedBridge.from_config(TINY, seed=0), TOKENS, n_loops=2, verbose=False)
    with pytest.raises(LoopedError, match="cannot be written"):
        found.save(tmp_path / "none" / "report.html")


def test_a_report_replaces_regular_files_only_and_keeps_their_permissions(tmp_path: Path) -> None:
    page, target, link = Report("title", "lead", "prompt"), tmp_path / "target.html", tmp_path / "link.html"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    page.save(link)
    assert link.is_symlink() and "lead" in target.read_text() and target.stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for place in (tmp_path / "pipe", Path(os.devnull), tmp_path / "nowhere", tmp_path):
        kind = place.lstat().st_mode
        with pytest.raises(LoopedError, match="cannot be written"):
            page.save(place)
        assert main(["report", "toy:hop", "--out", str(place)]) == 1  # before the work begins
        assert place.lstat().st_mode == kind


def test_the_report_numbers_positions_by_their_own_index() -> None:
    # Of a long prompt the last positions are shown; what the page says of the last one is what the model answers there.
    model, tokens = random_bridge("ouro", n_ctx=40), random_tokens(1, 40)
    (part,) = sections.answers.PARTS
    asked = Question(model, [tokens], 3, None, None)
    numbers, found = part.measure(asked)
    places = [int(label) for label in numbers["probabilities"].labels["pos"]]
    assert places == list(range(8, 40))
    chances = model.readout(tokens, loop=0).softmax(-1)[0]
    assert numbers["probabilities"].values[0].tolist() == pytest.approx([chances[i].max().item() for i in places], abs=1e-5)
    (grid,) = held(found.grid)  # which has every position
    assert unpacked(grid["grid"]["grid"]["top"])[0, :, 0].tolist() == chances.argmax(-1).tolist()


def test_the_steps_of_a_section_are_called_one_by_one() -> None:
    """Numbers without sentences, sentences from numbers that were changed, panels of what was measured."""
    model = LoopedBridge.from_config(TINY, seed=0)
    asked = Question(model, [TOKENS[0]], 5)
    measure, read, panels = sections.stability.PARTS[0]
    numbers, found = measure(asked)
    assert numbers["own"] == 2 and len(numbers["loss"].values) == 5
    said = read(asked, numbers | {"agreement_own_last": 0.25}, found)
    assert any("at 25% of the positions" in sentence for sentence in said.sentences) and "2 prompts" in said.headline
    curves, agreement = panels(asked, numbers, found)
    assert curves.content[0].grids[0]["y"] == numbers["loss"].values.tolist() and curves.content[0].marks[0].x == 2
    assert agreement.content[0].grids[0]["colour"] == numbers["agreement"].values.tolist()
    with pytest.raises(Unmeasured, match="Two prompts"):
        sections.patching.measure(asked)


def test_a_page_needs_no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    found = report(LoopedBridge.from_config(TINY, seed=0), TOKENS, n_loops=3, sections=["fixed_points"], verbose=False)
    assert found.sections[0].figures and not found.sections[0].failed and 'class="drawing"' in found.html
