"""Two models side by side, against the readout of every loop by hand."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import word_tokenizer
from torch import Tensor
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError, compare
from tl_looped.cli import main
from tl_looped.interventions import skip_loop, steer


def readouts(model: LoopedBridge, tokens: Tensor, hooks: Any = ()) -> list[Tensor]:
    """Log-probabilities after every loop, each from a run of its own, in fp64."""
    found = []
    for loop in range(model.n_loops):
        with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
            found.append(model.forward(tokens, loop=loop).double().log_softmax(-1))
    return found


def expect(found: Any, first: list[Tensor], second: list[Tensor], targets: Tensor) -> None:
    """Every number of a comparison, from log-probabilities [batch, target, d_vocab] of both sides by loop."""
    n = max(len(first), len(second))
    loss = torch.zeros(2, n, len(targets), dtype=torch.float64)
    for t in range(n):
        a, b = first[min(t, len(first) - 1)], second[min(t, len(second) - 1)]
        for k, side in enumerate((a, b)):
            for i, row in enumerate(targets):
                each = torch.stack([side[i, j, int(token)] for j, token in enumerate(row)])
                loss[k, t, i] = -each.mean()
                if i == 0:
                    total = each.exp().mean()
            if len(targets) == 1:
                torch.testing.assert_close(found.probability.values[k, t], total)
        kl = (a.exp() * (a - b)).sum(-1).mean(-1)
        torch.testing.assert_close(found.kl.values[t], kl.mean(), atol=1e-6, rtol=1e-4)
        same = (a.argmax(-1) == b.argmax(-1)).double().mean()
        torch.testing.assert_close(found.agreement.values[t], same)
    torch.testing.assert_close(found.loss.values, loss.mean(-1), atol=1e-5, rtol=1e-5)
    difference = loss[1] - loss[0]
    torch.testing.assert_close(found.loss_difference.values, difference.mean(-1), atol=1e-5, rtol=1e-4)
    if len(targets) > 1:  # of pairs
        stderr = difference.std(-1) / len(targets) ** 0.5
        torch.testing.assert_close(found.loss_difference.stderr, stderr, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("names", [("ouro", "nanbeige"), ("huginn", "parcae"), ("hrm_text", "anchored")])
def test_two_models_of_different_depth(names: tuple[str, str]) -> None:
    first, second = random_bridge(names[0], n_loops=2), random_bridge(names[1], n_loops=4)
    tokens = random_tokens(3, 5)
    found = compare({"one": first, "two": second}, tokens, verbose=False)
    a, b = (readouts(model, tokens) for model in (first, second))
    expect(found, [x[:, :-1] for x in a], [x[:, :-1] for x in b], tokens[:, 1:])
    assert found.sides == {"one": 2, "two": 4} and found.scored == "next tokens"
    assert found.loss.labels == {"side": ["one", "two"], "loop": [0, 1, 2, 3]}
    tops = [[x[:, -1].argmax(-1) for x in side] for side in (a, b)]
    for i in range(3):
        by_hand = [(int(tops[0][min(t, 1)][i]), int(tops[1][t][i])) for t in range(4)]
        assert [tuple(map(repr, map(str, pair))) for pair in by_hand] == list(zip(*found.top[i], strict=True))
        assert found.first[i] == next((t for t, (x, y) in enumerate(by_hand) if x != y), None)


def test_numbers_of_loops_and_answers() -> None:
    model, tokens = random_bridge("retrofit_llama"), random_tokens(4, 6)
    answers = [3, 1, 4, 1]
    found = compare(model, tokens, n_loops=(2, 5), answers=answers, verbose=False)
    a, b = ([x[:, -1:] for x in readouts(model.unroll(n), tokens)] for n in (2, 5))
    expect(found, a, b, torch.tensor(answers)[:, None])
    assert found.sides == {"2 loops": 2, "5 loops": 5} and all(t is None or t >= 2 for t in found.first)
    assert found.kl.values[:2].abs().max() < 1e-9 and found.kl.values[2:].min() > 1e-3


def test_one_answer_for_all() -> None:
    model, tokens = random_bridge("nanbeige"), random_tokens(3, 4)
    each, for_all = (compare(model, tokens, n_loops=(1, 3), answers=a, verbose=False) for a in ([7, 7, 7], 7))
    assert torch.equal(each.loss.values, for_all.loss.values) and for_all.scored == "the answers"
    with pytest.raises(LoopedError, match="answer 31 was given"):
        compare(model, tokens, n_loops=(1, 3), answers=31, verbose=False)


def test_with_hooks_and_without() -> None:
    model, tokens = random_bridge("ouro"), random_tokens(2, 4)
    hooks = steer(model, torch.ones(24), scale=0.5, loops=1)
    found = compare(model, tokens, hooks=hooks, verbose=False)
    a, b = ([x[:, :-1] for x in readouts(model, tokens, which)] for which in ((), hooks))
    expect(found, a, b, tokens[:, 1:])
    assert [*found.sides] == ["without hooks", "with hooks"] and found.kl.values[0] == 0 < found.kl.values[1]
    assert not model.hook_dict["blocks.2.hook_resid_pre"].has_hooks()


def test_corrupted_prompts_score_what_the_clean_run_answers() -> None:
    model, clean, corrupted = random_bridge("nanbeige"), random_tokens(3, 5), random_tokens(3, 7, seed=1)
    found = compare(model, clean, corrupted=corrupted, verbose=False)
    a, b = ([x[:, -1:] for x in readouts(model, tokens)] for tokens in (clean, corrupted))
    expect(found, a, b, a[-1].argmax(-1))
    assert [*found.sides] == ["clean", "corrupted"]


def test_prompt_by_prompt_and_in_parts_it_is_the_same() -> None:
    models = (random_bridge("ouro"), random_bridge("looped_qwen"))
    tokens = random_tokens(4, 5)
    whole = compare(models, tokens, verbose=False)
    for parts in (
        compare(models, iter(tokens), verbose=False),
        compare(models, tokens[:3], verbose=False) + compare(models, tokens[3:], verbose=False),
    ):
        for name in ("loss", "loss_difference", "kl", "agreement"):
            torch.testing.assert_close(getattr(parts, name).values, getattr(whole, name).values, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(getattr(parts, name).stderr, getattr(whole, name).stderr, atol=1e-6, rtol=1e-4)
        assert (parts.top, parts.first, parts.prompts) == (whole.top, whole.first, whole.prompts)


def other_words() -> Any:
    """The words of the other tokenizer in another order, and without their last."""
    tokenizer = word_tokenizer()
    words = [f"t{i}" for i in range(29, 2, -1)]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=tokenizer.bos_token, eos_token="</s>", pad_token="<pad>")


def test_models_of_different_vocabularies_are_compared_by_text() -> None:
    first, second = random_bridge("ouro"), random_bridge("nanbeige", d_vocab=30)
    first.tokenizer, second.tokenizer = word_tokenizer(), other_words()
    texts, answers = ["t5 t17 t3", "t4 t6"], ["t8", "t9"]
    found = compare((first, second), texts, answers=answers, verbose=False)
    assert found.kl is None and "KL" not in found.summary() and "kl" not in found.to_dataframe()
    for k, model in enumerate((first, second)):
        ids = [model.tokenizer.get_vocab()[word] for word in answers]
        by_hand = torch.stack(
            [
                torch.stack([-x[0, -1, i] for x in readouts(model, model.to_tokens(text))])
                for text, i in zip(texts, ids, strict=True)
            ]
        )
        torch.testing.assert_close(found.loss.values[k], by_hand.mean(0), atol=1e-5, rtol=1e-5)
        said = [
            [repr(model.tokenizer.decode([int(x[0, -1].argmax())])) for x in readouts(model, model.to_tokens(t))] for t in texts
        ]
        assert [list(top[k]) for top in found.top] == said
    same = [[x == y for x, y in zip(*top, strict=True)] for top in found.top]
    assert found.agreement.values.tolist() == [sum(column) / 2 for column in zip(*same, strict=True)]
    assert found.first == tuple(row.index(False) if False in row else None for row in same)
    for wrong in (None, [3, 4]):
        with pytest.raises(LoopedError, match="different vocabularies"):
            compare((first, second), texts, answers=wrong, verbose=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "the same loops, hooks and prompts"),
        ({"n_loops": (2, 2)}, "the same loops, hooks and prompts"),
        ({"n_loops": (2, 3, 4)}, "of two sides"),
        ({"n_loops": (0, 3)}, "n_loops=0"),
        ({"corrupted": torch.tensor([[1, 2, 3]])}, "no pairs"),
        ({"n_loops": (2, 4), "answers": [1]}, "1 answers were given"),
        ({"n_loops": (2, 4), "answers": [1, 2, 3]}, "3 answers were given for 2"),
        ({"n_loops": (2, 4), "prompts": []}, "no prompts"),
    ],
)
def test_questions_without_an_answer_are_refused(settings: dict[str, Any], says: str, unchecked: None) -> None:
    model = random_bridge("ouro")
    with pytest.raises(LoopedError, match=says):
        compare(model, **{"prompts": random_tokens(2, 4), "verbose": False, **settings})
    with pytest.raises(LoopedError, match="one LoopedBridge or two"):
        compare([model] * 3, random_tokens(), verbose=False)  # type: ignore[arg-type]


def test_the_table_the_figure_and_the_words() -> None:
    model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
    hooks = skip_loop(model, 3)
    found = compare(model, ["A b B c C a ? A", "A c C d D b B a ? A"], answers=["b", "c"], hooks=hooks, verbose=False)
    frame = found.to_dataframe()
    assert isinstance(frame, pd.DataFrame) and len(frame) == 2 * 6
    assert {"side", "loop", "loss", "loss_stderr", "loss_difference", "kl", "agreement"} <= {*frame}
    assert frame.loss_difference[frame.loop == 5].nunique() == 1 and len(found.examples()) == 2 * 6
    assert "first after:\n  loop 3: " in found.summary() and "without hooks (6 loops) beside with hooks" in found.summary()
    figure = found.plot()
    assert [trace.name for trace in figure.data[:2]] == ["without hooks", "with hooks"]
    assert list(figure.data[2].y) == found.loss_difference.values.tolist()
    assert list(figure.data[2].error_y.array) == (2 * found.loss_difference.stderr).tolist()


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    command = ["compare", "toy:hop", "toy:hop-noinject", "--prompt", "A b B c C a ? A", "--answer", "b"]
    assert main([*command, "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    models = [LoopedBridge.from_pretrained(name, device="cpu") for name in command[1:3]]
    found = compare(models, "A b B c C a ? A", answers=["b"], verbose=False)
    assert out.strip() == found.summary() and len(pd.read_csv(table)) == 12
    assert main(["compare", "toy:hop", "--prompt", "A b B c C a ? A", "--n-loops", "2,4"]) == 0
    assert re.search(r"2 loops beside 4 loops.*\n.*\n.*top of 2 loops", capsys.readouterr().out)
    assert main(["compare", "toy:hop", "--prompt", "A b B a ? A", "--corrupted", "A c C a ? A"]) == 0
    assert main(["compare", "toy:hop"]) == 1 and "no prompts" in capsys.readouterr().err
