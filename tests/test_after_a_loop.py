"""What the model would answer after a loop: every way to ask says the same as the model that has no further loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import FAMILIES, GOLDEN, PUBLISHED, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedBridge, LoopedConfig, LoopedError

TOKENS = random_tokens(2, 7)
MASK = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])


def shift(value: Tensor, hook: object) -> Tensor:
    """An edit that no norm undoes."""
    return value + torch.linspace(-1, 1, value.shape[-1])


pytestmark = pytest.mark.usefixtures("no_grad")


@FAMILIES
def test_every_way_to_ask_agrees_with_the_shorter_model(name: str) -> None:
    model = shared_bridge(name)
    every, padded = model.readout(TOKENS, "all"), model.readout(TOKENS, "all", attention_mask=MASK)
    assert every.shape == (model.n_loops, 2, 7, 31)
    for loop in range(model.n_loops - 1):  # the last one is the whole model
        short = model.unroll(loop + 1)
        right = short(TOKENS)
        assert torch.equal(model(TOKENS, loop=loop), right)
        assert torch.equal(model.readout(TOKENS, loop - model.n_loops), right)
        torch.testing.assert_close(every[loop], right, atol=1e-5, rtol=1e-4)
        ask: dict[str, Any] = {"return_type": "both", "loss_per_token": True, "attention_mask": MASK}
        for ours, theirs in zip(model(TOKENS, loop=loop, **ask), short(TOKENS, **ask), strict=True):
            assert torch.equal(ours, theirs)
        logits, loss = model(TOKENS, return_type="both", loop=loop, attention_mask=MASK)
        torch.testing.assert_close(padded[loop], logits, atol=1e-5, rtol=1e-4)
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
        torch.testing.assert_close(loss, each[MASK[:, 1:].flatten().bool()].mean())


@pytest.mark.parametrize("name", PUBLISHED)
def test_reference_checkpoints_too(name: str) -> None:
    model = LoopedBridge.from_pretrained(GOLDEN / name, device="cpu")
    tokens = random_tokens(1, 5) % model.cfg.d_vocab
    if model.lacks("other depths"):
        assert torch.equal(model(tokens, loop=-1), model(tokens))
        return
    every = model.readout(tokens, "all")
    for loop in range(model.n_loops):
        right = model.unroll(loop + 1, cut=True)(tokens)
        assert torch.equal(model(tokens, loop=loop), right)
        torch.testing.assert_close(every[loop], right, atol=1e-4, rtol=1e-4)


@FAMILIES
def test_the_cache_holds_what_ran(name: str) -> None:
    model = shared_bridge(name)
    for loop in range(model.n_loops - 1)[-1:]:
        logits, cache = model.run_with_cache(TOKENS, loop=loop)
        short = model.unroll(loop + 1)
        right, theirs = short.run_with_cache(TOKENS)
        assert torch.equal(logits, right)
        last = f"{short.schedule.pass_prefix(short.schedule.passes[-1])}.norm."
        early = model.looped_cfg.pass_norm_is_final and loop < model.n_loops - 1
        assert len(cache.keys()) == len(theirs.keys())
        for key, value in theirs.items():
            where = key.replace("ln_final.", last) if early else short.schedule.loop_name(key)
            assert torch.equal(cache[where], value), where


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "looped_qwen", "anchored"])
def test_hooks_act_on_the_answer_after_a_loop(name: str) -> None:
    model, loop = shared_bridge(name), 0
    short, stack = model.unroll(1), model.schedule.core_stacks[-1]
    first = "H.loops.0.blocks.1.hook_mlp_out" if stack == "H" else "loops.0.blocks.1.hook_mlp_out"
    where = [(first, shift), *([("coda.blocks.0.hook_resid_pre", shift)] if model.schedule.n_coda else [])]
    with short.hooks(where):
        right = short(TOKENS)
    later = [("H.loops.1.hook_in" if stack == "H" else "loops.1.hook_in", shift)]
    with model.hooks([*where, *later]):
        assert torch.equal(model(TOKENS, loop=loop), right)
        assert torch.equal(model.readout(TOKENS, loop), right)
        torch.testing.assert_close(model.readout(TOKENS, "all")[loop], right, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model.readout(TOKENS, "all")[1], model.unroll(2)(TOKENS), atol=1e-3)
    assert not torch.allclose(right, short(TOKENS), atol=1e-3)


@pytest.mark.parametrize("name", ["huginn", "looped_qwen", "anchored", "parcae"])
def test_after_weight_processing(name: str) -> None:
    model = random_bridge(name)
    before = model.readout(TOKENS, "all").log_softmax(-1)
    model.enable_compatibility_mode(disable_warnings=True)
    torch.testing.assert_close(model.readout(TOKENS, "all").log_softmax(-1), before, atol=1e-4, rtol=1e-4)
    for loop in range(model.n_loops):
        torch.testing.assert_close(model(TOKENS, loop=loop).log_softmax(-1), before[loop], atol=1e-4, rtol=1e-4)


def test_what_weight_processing_took_away_is_refused() -> None:
    model = random_bridge("ouro")
    model.enable_compatibility_mode(disable_warnings=True)
    assert torch.equal(model.readout(TOKENS, -1), model(TOKENS))
    for loop in (0, "all"):
        with pytest.raises(LoopedError, match="weights were processed"):
            model.readout(TOKENS, loop)


def test_positions_of_rows_of_different_lengths() -> None:
    model = LoopedBridge.from_pretrained("toy:text", device="cpu")
    prompts = ["Return the number", "Return"]
    alone = [model.readout(prompt, "all", positions=[-1])[:, 0, 0] for prompt in prompts]
    both = model.readout(prompts, "all", positions=-1)
    torch.testing.assert_close(both[:, :, 0], torch.stack(alone, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.readout(prompts[0], 1, positions=-1)[0, 0], model(prompts[0], loop=1)[0, -1])
    with pytest.raises(LoopedError, match=r"tokens were given.*positions=-1"):
        model.readout(prompts, 1)
    ids = model.to_tokens(prompts)
    with pytest.raises(LoopedError, match=r"positions=-1 .*pad tokens"):
        model.readout(ids, 0, positions=-1)


def test_a_stopped_run_that_leaves_out_loops() -> None:
    model = shared_bridge("huginn")  # layers 0-1 prelude, three loops of three, layer 11 coda
    short = model.unroll(1)
    assert torch.equal(model(TOKENS, loop=0, stop_at_layer=11), short(TOKENS, stop_at_layer=5))
    assert torch.equal(model(TOKENS, loop=0, stop_at_layer=12), short(TOKENS, stop_at_layer=6))
    assert torch.equal(model(TOKENS, loop=0, stop_at_layer=4), model(TOKENS, stop_at_layer=4))
    with pytest.raises(LoopedError, match=r"stop=6 .*after loop 0 skips the layers 5 to 10"):
        model(TOKENS, loop=0, stop_at_layer=6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("loop", "says"), [(3, "loop 3 is out of range"), ("all", r"readout\(input, loop='all'\)"), (True, "an index is an int")]
)
def test_no_such_loop(loop: Any, says: str) -> None:
    model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=31, n_core=1, n_loops=3))
    with pytest.raises(LoopedError, match=says):
        model(TOKENS, loop=loop)


@pytest.mark.usefixtures("unchecked")
def test_the_arguments_of_a_readout_as_they_were() -> None:
    model = shared_bridge("ouro")
    with pytest.warns(FutureWarning) as caught:
        old = model.readout(TOKENS, 1, None, MASK)
    assert str(caught[1].message) == "readout(attention_mask=) is given by name now."
    assert torch.equal(old, model.readout(TOKENS, 1, attention_mask=MASK))
    with pytest.raises(LoopedError, match="'last'"):
        model.readout(TOKENS, "last")


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "looped_qwen", "anchored"])
def test_the_answer_after_a_loop_is_attributed(name: str) -> None:
    model = shared_bridge(name)
    logits, cache = model.run_with_cache(TOKENS, loop=0, attention_mask=MASK)
    last = logits[torch.arange(2), MASK.sum(1) - 1, 7]
    short = model.unroll(1)
    _, theirs = short.run_with_cache(TOKENS, attention_mask=MASK)
    found, right = (one.attribute_logits(7, unit="head") for one in (cache, theirs))
    torch.testing.assert_close(found.values.sum(0), last, atol=1e-4, rtol=1e-4)
    assert found.labels == right.labels
    torch.testing.assert_close(found.values, right.values, atol=1e-5, rtol=1e-4)
    whole, full = model.run_with_cache(TOKENS, loop=-1)
    torch.testing.assert_close(full.attribute_logits(7).values.sum(0), whole[:, -1, 7], atol=1e-4, rtol=1e-4)
