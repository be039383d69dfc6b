"""What a model would say after every loop, against the softmax of the shorter model's logits, prompt by prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers import with_words, word_tokenizer
from zoo import random_bridge, random_tokens

import tl_looped.lenses.answers
from tl_looped import LoopedBridge, LoopedError
from tl_looped.errors import OutOfRangeError
from tl_looped.figures.tokens_shown import in_figure, token_texts, visible
from tl_looped.lenses import Answers

TEXTS = ["t5 t17 t3", "t9", "t1 t2 t3 t4"]


@cache
def shorter(model: LoopedBridge, n_loops: int) -> LoopedBridge:
    return model.unroll(n_loops)


def check(found: Answers, model: LoopedBridge, rows: list[Any], target: int | None = None) -> None:
    """Against the last logits of every prompt alone, in a model of fewer loops."""
    with torch.no_grad():
        for r, loop in enumerate(found.probs.labels["loop"]):
            short = shorter(model, loop + 1)
            for p, row in enumerate(rows):
                right = short(row)[0, -1].double().softmax(-1)
                best = right.sort(descending=True)
                n = found.probs.values.shape[-1]
                assert found.tokens.values[p, r].tolist() == best.indices[:n].tolist()
                torch.testing.assert_close(found.probs.values[p, r].double(), best.values[:n], atol=1e-5, rtol=1e-3)
                if target is not None and found.target_probs is not None and found.target_ranks is not None:
                    torch.testing.assert_close(found.target_probs.values[p, r].double(), right[target], atol=1e-5, rtol=1e-3)
                    assert int(found.target_ranks.values[p, r]) == best.indices.tolist().index(target)


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "parcae", "looped_qwen", "anchored"])
def test_texts_of_different_lengths_are_answered_each_at_its_end(name: str) -> None:
    model = with_words(name)
    found = model.answers(TEXTS, top_k=3, targets="t9")
    assert found.probs.values.shape == (3, model.n_loops, 3) and found.prompts == tuple(TEXTS)
    check(found, model, TEXTS, target=9)
    assert found.texts[1][0] == tuple(f"t{i}" for i in found.tokens.values[1, 0].tolist())


@pytest.mark.parametrize("many", [False, True])
def test_every_kind_of_prompt(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_bridge("retrofit_llama"), random_tokens(3, 5)
    if many:  # so that every prompt is a batch of its own
        monkeypatch.setattr(tl_looped.lenses.answers, "AT_ONCE", 1)
    check(model.answers(tokens, top_k=2, targets=[4, 4, 4]), model, list(tokens[:, None]), target=4)
    check(model.answers(tokens[0], top_k=2), model, [tokens[:1]])
    ragged = [tokens[0], tokens[1, :2], tokens[2, :4]]
    check(model.answers(ragged, loops=[2, 0]), model, [row[None] for row in ragged])
    found = model.answers([row.tolist() for row in ragged], loops=-1, top_k=31)
    check(found, model, [row[None] for row in ragged])
    assert found.prompts[1] == " ".join(map(str, ragged[1].tolist())) and found.texts[0][0][0].isdigit()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [1, 1, 1, 0, 0]])
    padded = model.answers(tokens, attention_mask=mask)
    check(padded, model, [tokens[:1, 2:], tokens[1:2], tokens[2:, :3]])


def test_another_number_of_loops_and_hooks() -> None:
    model = with_words()
    check(model.answers(TEXTS, n_loops=5, loops=[4]), model, TEXTS)
    where = [("loops.1.blocks.0.hook_mlp_out", lambda x, hook: -x)]
    with model.hooks(where):
        hooked = model.answers(TEXTS, loops=slice(0, 2))
        right = model(TEXTS[0], loop=1)[0, -1].softmax(-1).topk(5)
        assert hooked.tokens.values[0, 1].tolist() == right.indices.tolist()
        with pytest.raises(LoopedError, match="5 loops were asked of a model of 3 that has hooks"):
            model.answers(TEXTS, n_loops=5)
    plain = model.answers(TEXTS, loops=slice(0, 2))
    torch.testing.assert_close(hooked.probs.values[:, 0], plain.probs.values[:, 0])
    assert not torch.allclose(hooked.probs.values[:, 1], plain.probs.values[:, 1], atol=1e-3)


def test_the_inputs_of_the_run() -> None:
    model, tokens = random_bridge("hrm_text"), random_tokens(2, 5)
    prefix = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = model.answers(tokens, loops=0, top_k=31, token_type_ids=prefix)
    right = model.unroll(1)(tokens, token_type_ids=prefix)[:, -1].softmax(-1).sort(-1, descending=True)
    assert torch.equal(found.tokens.values[:, 0], right.indices)
    assert not torch.equal(found.tokens.values, model.answers(tokens, loops=0, top_k=31).tokens.values)
    noisy = random_bridge("huginn")
    seeded = noisy.answers(tokens, loops="last", initial_state=5, top_k=31)
    assert torch.equal(seeded.tokens.values[:, 0], noisy(tokens, initial_state=5)[:, -1].argsort(-1, descending=True))


def test_answers_add_up_and_are_a_table() -> None:
    model = with_words()
    whole, parts = model.answers(TEXTS, targets=["t1", "t2", 3]), []
    for text, target in zip(TEXTS, ["t1", "t2", 3], strict=True):
        parts.append(model.answers(text, targets=target))
    added = parts[0] + parts[1] + parts[2]
    assert added.prompts == whole.prompts and added.texts == whole.texts and added.targets == ("t1", "t2", 3)
    torch.testing.assert_close(added.probs.values, whole.probs.values, atol=1e-5, rtol=1e-4)
    assert added.probs.labels == whole.probs.labels and added.probs.labels["prompt"] == [0, 1, 2]
    frame = whole.to_dataframe()
    assert len(frame) == 9 and frame.columns[:5].tolist() == ["prompt", "text", "loop", "token_1", "prob_1"]
    row = frame[(frame.prompt == 1) & (frame.loop == 2)].iloc[0]
    assert whole.target_ranks is not None
    assert (row.text, row.target, row.target_rank) == ("t9", "t2", int(whole.target_ranks.values[1, 2]))
    assert row.token_2 == whole.texts[1][2][1] and row.prob_2 == float(whole.probs.values[1, 2, 1])
    with pytest.raises(LoopedError, match="top_k=5 and top_k=2 were added"):
        whole + model.answers(TEXTS, targets="t1", top_k=2)
    with pytest.raises(LoopedError, match="targets=True and targets=False"):
        whole + model.answers(TEXTS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompts", "asked", "says"),
    [
        ([], {}, r"prompts=\[\] were given"),
        (3, {}, "prompts=3 were given; pass a text"),
        (["t1", ""], {}, "prompt 1 is ''.*leave it out"),
        (["t1", 5], {}, "prompt 0 is 't1'; pass texts, or lists"),
        ([[1], []], {}, r"prompt 1 is \[\]"),
        ([[1], [2] * 40], {}, "prompt 1 has 40 tokens.*n_ctx=32"),
        ([[1, 99]], {}, r"token 99 .*0\.\.30"),
        ("t1", {"top_k": 32}, "top_k=32.*31 tokens"),
        ("t1", {"top_k": 0}, "top_k=0"),
        ("t1", {"targets": "t1 t2"}, "is 2 tokens"),
        ("t1", {"targets": 31}, r"31 .*0\.\.30"),
        ("t1", {"targets": [1, 2]}, "2 targets were given for 1 prompts"),
        ("t1", {"targets": 0.5}, "targets=0.5 were given"),
        ("t1", {"attention_mask": torch.ones(1, 1)}, "attention_mask= was given for prompts that are no tensor"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompts: Any, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(LoopedError, match=says):
        with_words().answers(prompts, **asked)


def test_loops_that_are_not_there() -> None:
    with pytest.raises(OutOfRangeError, match="loop 3 is out of range"):
        with_words().answers(TEXTS, loops=[0, 3])


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(LoopedError, match="no tokenizer"):
        random_bridge("ouro").answers("t1")


def test_processed_weights_answer_after_the_last_loop() -> None:
    model, tokens = random_bridge("ouro"), random_tokens(2, 5)
    before = model.answers(tokens, loops="last")
    model.enable_compatibility_mode(disable_warnings=True)
    assert torch.equal(model.answers(tokens, loops="last").tokens.values, before.tokens.values)
    with pytest.raises(LoopedError, match="weights were processed"):
        model.answers(tokens)


def test_logits_that_are_not_finite_are_named() -> None:
    model = random_bridge("ouro")
    with model.hooks([("loops.1.hook_in", lambda x, hook: x * float("nan"))]):
        assert model.answers(random_tokens(), loops=0).probs.values.isfinite().all()
        with pytest.raises(LoopedError, match="after loop 1 are not finite"):
            model.answers(random_tokens())


def test_the_figure_shows_text_as_it_is() -> None:
    model = with_words()
    found = model.answers([*TEXTS, "t3\nt4"], targets="t1")
    figure = found.plot()
    (cells,) = figure.data
    assert [row[0] for row in cells.text] == [prompt[0][0] for prompt in found.texts]
    torch.testing.assert_close(torch.tensor(cells.z), found.probs.values[..., 0].double().to(torch.tensor(cells.z).dtype))
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2"] and "\n" not in figure.layout.yaxis.ticktext[3]
    layout = figure.layout  # as wide as its place, and clear, whatever the theme there
    assert layout.width is None and layout.margin.l < 180 and layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
    ranks = found.plot("rank").data[0]
    assert found.target_ranks is not None
    torch.testing.assert_close(
        10 ** torch.tensor(ranks.z).double() - 1, found.target_ranks.values.double(), atol=1e-4, rtol=1e-4
    )
    assert "target t1: rank" in ranks.hovertext[0][0]


@pytest.mark.usefixtures("unchecked")
def test_colours_that_are_not_there() -> None:
    found: Any = with_words().answers(TEXTS)
    with pytest.raises(LoopedError, match="colour='heat' was asked; choose 'prob', 'rank'"):
        found.plot("heat")
    with pytest.raises(LoopedError, match="no targets"):
        found.plot("rank")


def test_tokens_are_shown_so_that_plotly_does_not_eat_them() -> None:
    assert in_figure(visible("<s>")) == "&lt;s&gt;" and in_figure(visible("$x$")) == "&#36;x&#36;"
    assert [visible(t) for t in (" a ", "\n", "  ", "\x00", "a b")] == ["␣a␣", "↵", "␣␣", "\\x00", "a b"]
    assert token_texts(None, [3, 5]) == ["3", "5"]
    assert token_texts(word_tokenizer(), torch.tensor([3, 5])) == ["t3", "t5"]


def test_one_line_says_what_it_would_answer() -> None:
    found = with_words().answers(TEXTS, targets="t9", loops=[0, 2])
    last = [prompt[-1][0] for prompt in found.texts]
    hit = last.count("t9")
    assert repr(found) == f"Answers(3 prompts, 2 loops, after loop 2 {' '.join(map(repr, last))}, its target in {hit} of 3)"
    assert "after loop 2 " in repr(found + found) and repr(found + found).count("…") == 1
