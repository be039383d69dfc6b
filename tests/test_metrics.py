"""Metrics ready made, against the same numbers by hand, in every tool that takes a metric."""

from __future__ import annotations

from functools import cache as once
from typing import Any

import pytest
import torch
import transformer_lens.patching
from helpers import word_tokenizer
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.attribution import attribution_sweep, edge_sweep, path_patch
from tl_looped.metrics import RowMetric, kl_to, logit, logit_diff, prob
from tl_looped.patching import patch_between_loops, patch_sweep

TOKENS, OTHER = random_tokens(3, 6, seed=1), random_tokens(3, 6)
RIGHT, WRONG = [4, 9, 5], [7, 3, 8]


@once
def bridge() -> LoopedBridge:
    made = random_bridge("looped_qwen", torch.float64)
    made.tokenizer = word_tokenizer()
    return made


@torch.no_grad()
def logits_of(tokens: Any, **inputs: Any) -> torch.Tensor:
    return bridge()(tokens, **inputs)


def by_hand(kind: str, row: torch.Tensor, right: int, wrong: int, clean: torch.Tensor) -> torch.Tensor:
    """The metric of one position of one row."""
    p, q = row.softmax(-1), clean.softmax(-1)
    return {
        "logit_diff": row[right] - row[wrong],
        "logit": row[right],
        "prob": p[right],
        "kl_to": (q * (q.log() - p.log())).sum(),
    }[kind]


def made(kind: str, right: Any, wrong: Any, clean: Any, **given: Any) -> RowMetric:
    if kind == "logit_diff":
        return logit_diff(right, wrong, **given)
    if kind == "kl_to":
        return kl_to(clean, **given)
    return {"logit": logit, "prob": prob}[kind](right, **given)


KINDS = ("logit_diff", "logit", "prob", "kl_to")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", None])
def test_every_row_is_read_at_its_own_last_token(kind: str, side: str | None) -> None:
    lengths = [6, 6, 6] if side is None else [4, 6, 3]
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    given = {} if side is None else {"attention_mask": mask}
    logits, clean = logits_of(TOKENS, **given), logits_of(OTHER, **given)
    ends = [5, 5, 5] if side == "left" else [n - 1 for n in lengths]
    expected = torch.stack([by_hand(kind, logits[i, ends[i]], RIGHT[i], WRONG[i], clean[i, ends[i]]) for i in range(3)])
    words = [f"t{i}" for i in RIGHT], [f"t{i}" for i in WRONG]
    for right, wrong in (words, (RIGHT, WRONG), (torch.tensor(RIGHT), torch.tensor(WRONG))):
        metric = made(kind, right, wrong, clean).bind(bridge(), given.get("attention_mask"))
        torch.testing.assert_close(metric(logits), expected)
    some = metric.rows([2, 0])
    torch.testing.assert_close(some(logits[[2, 0]]), expected[[2, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_several_positions_and_one_answer_for_all(kind: str) -> None:
    logits, clean = logits_of(TOKENS), logits_of(OTHER)
    metric = made(kind, "t4", "t7", clean, positions=[1, -1]).bind(bridge())
    expected = [sum(by_hand(kind, logits[i, p], 4, 7, clean[i, p]) for p in (1, 5)) / 2 for i in range(3)]
    torch.testing.assert_close(metric(logits), torch.stack(expected))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    everywhere = made(kind, 4, 7, clean, positions=None).bind(bridge(), mask)(logits)
    for i in range(3):
        real = [by_hand(kind, logits[i, p], 4, 7, clean[i, p]) for p in range(6) if mask[i, p]]
        torch.testing.assert_close(everywhere[i], torch.stack(real).mean())


def test_an_answer_for_every_position_that_is_read() -> None:
    logits, ids = logits_of(TOKENS), torch.tensor([[4, 5], [6, 7], [8, 9]])
    found = logit(ids, positions=[2, 3])(logits)
    torch.testing.assert_close(found, torch.stack([(logits[i, 2, ids[i, 0]] + logits[i, 3, ids[i, 1]]) / 2 for i in range(3)]))
    with pytest.raises(LoopedError, match="reads 3 positions"):
        logit(ids, positions=[1, 2, 3])(logits)


@pytest.mark.parametrize("kind", ["logit_diff", "kl_to"])
def test_every_tool_takes_them(kind: str) -> None:
    """Texts of different lengths in each tool, beside the metric written by hand."""
    model, texts, others = bridge(), ["t3 t4 t5", "t6 t7 t8 t9"], ["t9 t4 t5", "t6 t3 t8 t9"]
    with torch.no_grad():
        clean, cache = model.run_with_cache(texts, prepend_bos=True)
    ready = made(kind, ["t4", "t9"], ["t7", "t3"], texts)

    def hand(logits: torch.Tensor) -> torch.Tensor:  # the first text is one token shorter, and padded on the right
        rows = [by_hand(kind, logits[i, 3 + i], (4, 9)[i], (7, 3)[i], clean[i, 3 + i]) for i in range(2)]
        return torch.stack(rows)

    assert model.tokenizer.padding_side == "right"
    edge = ("loops.0.blocks.1.head.*", "loops.1.blocks.0.mlp_in")
    given = {"model": model, "corrupted_tokens": others, "clean_cache": cache}
    for tool in (
        lambda metric: patch_sweep(**given, metric=metric, verbose=False),
        lambda metric: attribution_sweep(**given, metric=metric),
        lambda metric: edge_sweep(**given, metric=metric, sources=edge[0], receivers=edge[1]),
        lambda metric: path_patch(**given, metric=metric, sources=edge[0], receivers=edge[1]),
        lambda metric: patch_between_loops(model, others, metric, site="out", verbose=False),
    ):
        found, expected = tool(ready), tool(hand)
        assert found.axes == expected.axes and found.axes[-1] == "example"
        torch.testing.assert_close(found.values, expected.values, atol=1e-9, rtol=1e-9, equal_nan=True)
        assert bool(found.values.nan_to_num().any())


def test_one_prompt_has_no_axis_of_examples() -> None:
    model = bridge()
    with torch.no_grad():
        _, cache = model.run_with_cache("t3 t4 t5")
    found = patch_sweep(model, "t3 t8 t5", cache, prob("t6"), verbose=False)
    assert found.axes == ("loop", "layer", "pos") and found.name == "probability" and found.baseline_clean is not None
    assert found.baseline_clean.ndim == 0 and 0 < float(found.baseline_clean) < 1
    assert attribution_sweep(model, "t3 t8 t5", cache, prob("t6")).axes == ("loop", "layer", "head")


def test_transformer_lens_takes_them_as_functions() -> None:
    model = random_bridge("ouro", torch.float64)
    tokens, other = TOKENS[:1], OTHER[:1]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        found = transformer_lens.patching.get_act_patch_resid_pre(model, other, cache, logit_diff(4, 7))
        swept = patch_sweep(model, other, cache, logit_diff(4, 7), axes=("virtual_layer", "pos"), verbose=False)
    torch.testing.assert_close(found.double(), swept.values, atol=1e-5, rtol=1e-5)  # TransformerLens keeps fp32


def test_what_is_no_metric_is_refused(unchecked: None) -> None:
    model, logits = bridge(), logits_of(TOKENS)
    toy = LoopedBridge.from_pretrained("toy:text", device="cpu")
    cases: list[tuple[str, Any]] = [
        (r"the answer 't4 t5' is 2 tokens, 't4', 't5'; pass one token, such as 't4'", lambda: prob("t4 t5").bind(model)),
        ("the answer '' is 0 tokens", lambda: prob("").bind(model)),
        ("has the answer 't4' as text, but no tokenizer", lambda: prob("t4")(logits)),
        ("vocabulary of this model is 0..30", lambda: prob(31).bind(model)),
        ("vocabulary of this model is 0..30", lambda: prob([1, 2, -1])(logits)),
        ("2 answers were given for 3 rows", lambda: prob([1, 2])(logits)),
        ("2 right and 3 wrong answers", lambda: logit_diff([1, 2], [1, 2, 3])),
        ("the answer None was given", lambda: prob(None)),
        ("the answer True was given", lambda: logit(True)),
        (r"the answer \[\] was given", lambda: logit([])),
        (r"answers of shape \(2,\) in torch.float32", lambda: logit(torch.ones(2))),
        ("kl_to\\(None\\) was asked", lambda: kl_to(None)),
        (r"kl_to\(\) was given a torch.float32 tensor of shape \(3, 31\)", lambda: kl_to(torch.ones(3, 31))),
        ("knows no model yet", lambda: kl_to(TOKENS)(logits)),
        (r"the clean run has \(3, 1, 31\)", lambda: kl_to(logits)(logits[..., :30])),
        (r"bound to a run of \(3, 6\)", lambda: prob(1).bind(model, torch.ones(3, 6))(logits[:, 1:])),
        ("metric='t4' was given; pass a function", lambda: patch_sweep(model, OTHER, model.run_with_cache(TOKENS)[1], "t4")),
        ("whose runs start from noise", lambda: kl_to(TOKENS).bind(random_bridge("huginn"))),
    ]
    for message, call in cases:
        with pytest.raises(LoopedError, match=message):
            call()
    with pytest.raises(LoopedError, match=r"is \d+ tokens, .*; pass one token"):
        prob("unfathomably").bind(toy)
