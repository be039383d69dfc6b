"""The report: its numbers, its sentences, and the page as a browser shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reporting import TINY, TOKENS, held, leaves, only
from zoo import GOLDEN, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import fixed_points, more_loops
from tl_looped.explorer._packing import unpacked
from tl_looped.report import report, sections
from tl_looped.report.pointer_chasing import example, right_answers
from tl_looped.report.question import Question
from tl_looped.report.section import Unmeasured, share
from tl_looped.toys import hop_prompts


def test_every_section_is_there_and_none_refused(report_numbers: dict[str, Any]) -> None:
    assert list(report_numbers) == list(sections.SECTIONS)
    assert not [section["refused"] for section in report_numbers.values() if section["refused"]]
    assert all(section["reading"] for section in report_numbers.values())


def test_the_numbers_of_the_sentences_are_those_of_the_json(report_numbers: dict[str, Any]) -> None:
    """In the digits of the sentence; loops and counts up to 16, the scale of a cosine and the name of a policy apart."""
    free = {*map(str, range(17)), "−1", "5e-4"}
    seen = 0
    for name, section in report_numbers.items():
        forms = [f"{v:{form}}" for v in leaves(section["numbers"]) for form in (".3g", ".0%", ".1%", ".2%", ",.0f")]
        forms += [share(v) for v in leaves(section["numbers"])]
        if name == "model":
            forms += [f"{v / 1000:.3g}" for v in leaves(section["numbers"])]  # in thousands
        for sentence in [*section["reading"], section["headline"]]:
            found = {text.rstrip(".,") for text in re.findall(r"(?<![\w.])[-−]?\d[\d.,e-]*%?", sentence)}
            assert found <= free | set(forms), (name, sentence)
            seen += len(found - free)
    assert seen > 30


def test_the_causal_picture_of_pointer_chasing(report_numbers: dict[str, Any]) -> None:
    """A state after loop t that is transplanted from a run of another mapping moves the answers of loops >= t, and only these,
    to what the task demands."""
    found = report_numbers["patching"]["numbers"]
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


def test_accuracy_with_and_without_injection(report_numbers: dict[str, Any]) -> None:
    found = report_numbers["stability"]["numbers"]
    with_injection, without = (torch.tensor(found[name]["values"]) for name in ("toy:hop", "toy:hop-noinject"))
    assert found["toy:hop"]["count"] == 200 and len(with_injection) == len(without) == 16
    assert with_injection.min() > 0.99 and without[:6].min() > 0.99 and without[-1] < 0.2


def test_answers_and_fixed_points_are_those_of_the_model(report_numbers: dict[str, Any]) -> None:
    model = LoopedBridge.from_pretrained("toy:hop", n_loops=16, device="cpu")
    prompts = hop_prompts(32, seed=7)
    with torch.no_grad():
        last = model.readout(prompts.tokens[:1], loop=3)[0].softmax(-1).max(-1)
    shown = report_numbers["answers"]["numbers"]
    assert shown["answers"][3] == [model.tokenizer.decode([t]) for t in last.indices.tolist()]
    assert shown["probabilities"]["values"][3] == pytest.approx(last.values.tolist(), abs=1e-5)
    assert shown["right_by_loop"][:6] == [8] * 6
    found = fixed_points(model, prompts.tokens, n_loops=16, verbose=False)
    shown = torch.tensor(
        report_numbers["fixed_points"]["numbers"]["core"]["successive"]["relative"]["values"], dtype=torch.float64
    )
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
