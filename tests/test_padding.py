"""Texts of different lengths answer as each alone, whatever tokenizer and padding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama, with_words
from torch import Tensor
from zoo import FAMILIES, GOLDEN, ZOO

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.attribution import influence, weight_gradients_by_pass
from tl_looped.interventions import ablate
from tl_looped.lenses import logit_lens
from tl_looped.patching import patch_sweep

WORDS = ["<s>", *(f"w{i}" for i in range(1, 31))]  # a token is its place in this list


TEXTS = ["w3 w7 w1 w20 w9", "w4", "<s> w5 w6", "w8 <s> w2 <s>"]  # two that begin or end with the token that pads


def words_tokenizer(words: list[str] = WORDS, post_processor: bool = False, **settings: Any) -> Any:
    """Words; the first of them begins, ends and pads texts unless told otherwise."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=settings.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{words[0]} $A", special_tokens=[(words[0], 0)])
    usual = {} if "unk_token" in settings else dict.fromkeys(("bos_token", "eos_token", "pad_token"), words[0])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**usual, **settings})


def ids_of(text: str, prepend_bos: bool = True) -> Tensor:
    """The tokens of a text by hand, [1, pos]."""
    return torch.tensor([[0] * prepend_bos + [WORDS.index(word) for word in text.split()]])


def own(values: Tensor, n: int, side: str) -> Tensor:
    """The last or first positions of a padded row: its own."""
    return values[len(values) - n :] if side == "left" else values[:n]


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


@FAMILIES
def test_texts_of_different_lengths_answer_as_each_alone(name: str) -> None:
    """Right is what each text's tokens, written down by hand, answer alone. Pad and beginning are one token."""
    model, hook = with_words(name, words_tokenizer()), "H.loops.1.hook_out" if name == "hrm_text" else "loops.1.hook_out"
    for side, prepend_bos in itertools.product(("left", "right"), (True, False)):
        model.tokenizer = words_tokenizer(post_processor=side == "left")  # which begins texts by itself
        ids, how = [ids_of(text, prepend_bos) for text in TEXTS], {"padding_side": side, "prepend_bos": prepend_bos}
        with torch.no_grad():
            alone = [model.run_with_cache(row, names_filter=hook) for row in ids]
            losses = [next_token_losses(logits, row) for (logits, _), row in zip(alone, ids, strict=True)]
            (logits, loss), cache = model.run_with_cache(TEXTS, return_type="both", names_filter=hook, **how)
            by_token = model.run_with_hooks(TEXTS, return_type="loss", loss_per_token=True, **how)
        torch.testing.assert_close(loss, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
        for i, (row, (answer, once)) in enumerate(zip(ids, alone, strict=True)):
            n = row.shape[1]
            torch.testing.assert_close(own(logits[i], n, side), answer[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(own(cache[hook][i], n, side), once[hook][0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(own(by_token[i], n - 1, side), losses[i], atol=1e-4, rtol=1e-4)
            assert by_token[i].count_nonzero() == n - 1  # padding has no loss


def test_the_loss_of_texts_leaves_padding_out() -> None:
    model, texts = (
        LoopedBridge.from_pretrained("toy:text", device="cpu"),
        ["Return the list of the names in the module", "Return a"],
    )
    losses = [next_token_losses(model(ids := model.to_tokens(text)), ids) for text in texts]
    assert torch.cat(losses).mean().item() == pytest.approx(3.556, abs=1e-3)
    assert model(texts, return_type="loss").item() == pytest.approx(3.556, abs=1e-3)
    assert model.run_with_cache(texts, return_type="loss")[0].item() == pytest.approx(3.556, abs=1e-3)
    weight = model.original_model.blocks[0].attn.q.weight
    right, found = (
        torch.autograd.grad(loss, weight)[0] for loss in (torch.cat(losses).mean(), model(texts, return_type="loss"))
    )
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)

    by_pass = weight_gradients_by_pass(model, texts)
    assert sum(g.norm() for g in by_pass.values()) > 0
    for name, parameter in model.core_weights.items():
        expected = torch.autograd.grad(model(texts, return_type="loss"), parameter)[0]
        torch.testing.assert_close(by_pass[name].sum(0), expected, atol=1e-5, rtol=1e-4)
        break
    model.enable_compatibility_mode(disable_warnings=True)
    assert model(texts, return_type="loss").item() == pytest.approx(3.556, abs=1e-3)
    mask = torch.tensor([[1] * 10, [1] * 3 + [0] * 7])  # tokens say by a mask what of them is real
    assert model(model.to_tokens(texts), return_type="loss", attention_mask=mask).item() == pytest.approx(3.556, abs=1e-3)


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "parcae"])
def test_texts_of_different_lengths_are_continued_as_each_alone(name: str) -> None:
    """Right is what each text's tokens, written down by hand, are continued with alone."""
    model = with_words(name, words_tokenizer())
    how: Any = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    for prepend_bos, use_past_kv_cache in ((True, False), (False, True)):
        alone = [model.generate(ids_of(text, prepend_bos), **how)[0, -4:] for text in TEXTS]
        more: Any = {"prepend_bos": prepend_bos, "use_past_kv_cache": use_past_kv_cache}
        assert torch.equal(model.generate(TEXTS, **how, **more)[:, -4:], torch.stack(alone))
        streamed = list(model.generate_stream(TEXTS, **how, **more))
        assert torch.equal(streamed[-1][:, -4:], torch.stack(alone))


def test_settings_of_a_tokenizer_in_memory_stay(tmp_path: Path) -> None:
    """Padding on the left, truncation on the left, a post-processor, by every way to make a model."""

    given = words_tokenizer(post_processor=True, padding_side="left", truncation_side="left", pad_token="w30")
    made = LoopedBridge.from_config(ZOO["ouro"], tokenizer=given)
    made.save_pretrained(tmp_path)
    set_later = LoopedBridge.from_config(ZOO["ouro"])
    set_later.tokenizer = given
    models = [
        made,
        set_later,
        set_later.unroll(2),
        LoopedBridge.from_pretrained(tmp_path, device="cpu"),
        LoopedBridge.from_pretrained(GOLDEN / "ouro", device="cpu", tokenizer=given),
        LoopedBridge.loop_layers(tiny_llama(3), 1, 2, n_loops=2, tokenizer=given),
    ]
    for model in models:
        assert (model.tokenizer.padding_side, model.tokenizer.truncation_side) == ("left", "left")
        assert model.to_tokens(["w3 w4", "w5"]).tolist() == [[0, 3, 4], [30, 0, 5]]
        assert model.to_tokens(["w3 w4", "w5"], prepend_bos=False).tolist() == [[3, 4], [30, 5]]
        assert model.tokenizer("w5")["input_ids"] == [0, 5]
    set_later.cfg.n_ctx = 3
    assert set_later.to_tokens("w3 w4 w5 w6", truncate=True).tolist() == [[0, 5, 6]]
    assert set_later.tokenizer is not given


def test_no_special_token_is_invented() -> None:
    """[UNK] and words: an invented beginning was read as [UNK], together with the first word."""
    words = ["[UNK]", "loop", "again"]
    model = LoopedBridge.from_config(ZOO["ouro"], tokenizer=words_tokenizer(words, unk_token="[UNK]"))
    assert model.to_tokens("loop again loop").tolist() == [[1, 2, 1]]
    assert model.tokenizer.bos_token is None and model.tokenizer.eos_token is None
    texts = ["loop again loop", "again"]
    logits = model(texts)
    torch.testing.assert_close(logits[1, 0], model(torch.tensor([[2]]))[0, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "anchored"])
def test_analyses_of_padded_rows_see_what_is_real(name: str, side: str) -> None:
    """The last position of a row is its last real token, and means leave padding out; right is each row alone."""

    model = with_words(name, words_tokenizer(padding_side=side))
    stack = model.schedule.core_stacks[-1]
    lens = logit_lens(model, TEXTS, targets=5, positions=[-2, -1], lens="native")
    ids = [ids_of(text) for text in TEXTS]
    with torch.no_grad():
        _, cache = model.run_with_cache(TEXTS)
        alone = [model.run_with_cache(row)[1] for row in ids]
    parts, hook = (
        cache.attribute_logits(7),
        model.schedule.name(model.schedule.passes_of(0, stack)[0].layers[0], "hook_mlp_out"),
    )
    for i, row in enumerate(ids):
        right = logit_lens(model, row, targets=5, positions=[-2, -1], lens="native").log_probs[:, 0]
        torch.testing.assert_close(lens.log_probs[:, i], right, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts.values[:, i], alone[i].attribute_logits(7).values[:, 0], atol=1e-4, rtol=1e-4)
    mean = torch.cat([run[hook][0] for run in alone]).mean(0)
    where: Any = {"loops": 0, "layers": 0, "stack": stack}
    hooks = ablate(model, "mlp", mode="mean", cache=cache, **where)
    found, wanted = (
        model.run_with_hooks(ids[0], fwd_hooks=h) for h in (hooks, [(hook, lambda x, hook: mean.expand_as(x).clone())])
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    last = ablate(model, "mlp", positions=-1, **where)
    logits = model.run_with_hooks(TEXTS, fwd_hooks=last)
    for i, row in enumerate(ids):
        right = model.run_with_hooks(row, fwd_hooks=last)[0]
        torch.testing.assert_close(own(logits[i], row.shape[1], side), right, atol=1e-4, rtol=1e-4)


def test_no_row_depends_on_the_padding_of_its_neighbours() -> None:
    """Pads are no exception: TransformerLens gives every row other positions once one of them is padded on the left."""
    model = LoopedBridge.from_config(LoopedConfig(d_model=16, n_heads=2, d_vocab=60, n_core=2, n_loops=2), seed=0)
    text, pads = torch.tensor([5, 6, 7, 8]), torch.zeros(3, dtype=torch.long)
    right, left, full = torch.cat((text, pads)), torch.cat((pads, text)), torch.arange(20, 27)
    masks = {"right": (torch.arange(7) < 4), "left": (torch.arange(7) >= 3), "full": torch.ones(7, dtype=torch.bool)}
    mixed = model(torch.stack((right, left, full)), attention_mask=torch.stack(tuple(masks.values())).long())
    alike = torch.stack((masks["right"], masks["right"], masks["full"])).long()
    others = model(torch.stack((right, right, full)), attention_mask=alike)
    torch.testing.assert_close(mixed[[0, 2]], others[[0, 2]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1, 3:], model(text[None])[0], atol=1e-5, rtol=1e-5)


def test_padding_that_nothing_says_is_refused() -> None:
    """Where a number would be one of padding: tokens without a mask, and one position for rows that end in different places."""
    from tl_looped.analysis import more_loops

    model, texts = with_words("ouro", words_tokenizer()), TEXTS[:2]
    right, left = (model.to_tokens(texts, padding_side=side) for side in ("right", "left"))
    _, cache = model.run_with_cache(texts)
    _, other = model.run_with_cache(["w3", "w3 w7 w1 w20 w9"])

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 5]

    refused = [
        lambda: model(right, return_type="loss"),
        lambda: model(left),
        lambda: model.generate(right, 2, verbose=False),
        lambda: model.generate(left, 2, verbose=False),
        lambda: model.generate_stream(right, 2, verbose=False),
        lambda: model.generate(right, 2, verbose=False, attention_mask=(right != 0).long()),
        lambda: more_loops(model, right, n_loops=4),
        lambda: logit_lens(model, right),
        lambda: influence(model, right, right),
        lambda: model.readout(texts, loop=0),
        lambda: logit_lens(model, texts, positions=4),
        lambda: cache.decompose_resid(pos_slice=-1),
        lambda: cache.accumulated_resid(layer=None, pos_slice=-1),
        lambda: model.run_with_cache(texts, pos_slice=-1),
        lambda: patch_sweep(model, texts, cache, metric, positions=-1, verbose=False),
        lambda: patch_sweep(model, texts, other, metric, verbose=False),
        lambda: model.run_with_hooks(texts, fwd_hooks=ablate(model, "mlp", mode="resample", cache=other)),
    ]
    for call in refused:
        with pytest.raises(LoopedError, match="pad"):
            call()
    assert model(right).shape == (2, 6, 31)  # padding on the right changes no real position
    same = torch.tensor([[0, 3, 0], [0, 0, 4]])  # a text may end with its last token, and hold it
    assert model(torch.tensor([[0, 3, 0], [0, 4, 5]]), return_type="loss").isfinite() and model(same[:1]).isfinite().all()
