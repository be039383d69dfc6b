"""Contributions read as logits, and what a cache refuses to add up."""

from __future__ import annotations

import logging

import pytest
import torch
from contributions import UNITS, chosen_logits, error
from helpers import run
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens
from zoo import FAMILIES, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedError

TOKENS = random_tokens(pos=5)
pytestmark = pytest.mark.usefixtures("no_grad")


def test_kinds_of_tokens() -> None:
    bridge = shared_bridge("ouro")
    cache = run(bridge, TOKENS)
    stack, logits = cache.decompose_resid(), cache["unembed.hook_out"]
    per_row, per_position = torch.tensor([3, 8]), torch.randint(0, 31, TOKENS.shape)
    cases = [
        (5, logits[..., 5]),
        (torch.tensor(5), logits[..., 5]),
        (per_row, torch.stack([logits[0, :, 3], logits[1, :, 8]])),
        (per_position, chosen_logits(cache, per_position)),
    ]
    for tokens, expected in cases:
        assert error(cache.logit_attrs(stack, tokens).sum(0), expected) < 1e-4
        assert error(cache.attribute_logits(tokens, positions=None).values.sum(0), expected) < 1e-4
    last = cache.attribute_logits(per_row).values
    assert error(last.sum(0), torch.stack([logits[0, -1, 3], logits[1, -1, 8]])) < 1e-4
    bridge.to_single_token = lambda text: {"five": 5}[text]
    assert torch.equal(cache.logit_attrs(stack, "five"), cache.logit_attrs(stack, 5))
    assert torch.equal(cache.attribute_logits("five").values, cache.attribute_logits(5).values)
    with pytest.raises(LoopedError, match="same shape"):
        cache.attribute_logits(5, per_row)


def test_top_components() -> None:
    parts = run(shared_bridge("ouro"), TOKENS).attribute_logits(3, positions=-1)
    mean = parts.values.mean(-1)
    label, value = parts.top(2)[0]
    assert value == pytest.approx(mean[parts.labels.index(label)].item()) and abs(value) == pytest.approx(
        mean.abs().max().item()
    )
    assert len(parts.top(100)) == len(parts.labels)


@FAMILIES
def test_direct_logit_attribution(name: str) -> None:
    bridge = random_bridge(name)
    with pytest.raises(ValueError, match="compatibility mode"):
        direct_logit_attribution(bridge, TOKENS, answer_tokens=3)
    logging.disable(logging.WARNING)  # a tied unembedding stays uncentred
    try:
        bridge.enable_compatibility_mode()
    finally:
        logging.disable(logging.NOTSET)
    cache = run(bridge, TOKENS)
    bias = bridge.b_U if bridge.b_U is not None else torch.zeros(31)
    logits = cache["unembed.hook_out"] - bias
    for unit in UNITS:
        for answer, other, expected in ((3, None, logits[..., 3]), (3, 8, logits[..., 3] - logits[..., 8])):
            result = direct_logit_attribution(bridge, TOKENS, answer_tokens=answer, incorrect_tokens=other, unit=unit, pos=None)
            total = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
            assert error(total, expected) < 1e-4
            assert len(set(result.labels)) == len(result.labels) == len(result.attribution)
    component = direct_logit_attribution(bridge, TOKENS, answer_tokens=3)
    assert error(cache.attribute_logits(3).values, component.attribution) < 1e-5
    layer = direct_logit_attribution(bridge, TOKENS, answer_tokens=3, unit="layer", cache=cache)
    attention = component.attribution[component.labels.index("1_attn_out")]
    at = layer.labels.index("1_mid")
    torch.testing.assert_close(layer.attribution[at] - layer.attribution[at - 1], attention, atol=1e-4, rtol=1e-4)


@FAMILIES
def test_logit_lens_reads_the_streams_as_they_are(name: str) -> None:
    bridge = shared_bridge(name)
    cache = run(bridge, TOKENS)
    results = [logit_lens(bridge, TOKENS, positions=None), cache.logit_lens(positions=None)]
    results.append(logit_lens(bridge, cache=cache, positions=None))
    streams = cache.accumulated_resid(apply_ln=True)
    for result in results:
        for i in range(bridge.cfg.n_layers):
            expected = bridge.ln_final(cache["resid_pre", i]) @ bridge.W_U
            torch.testing.assert_close(streams[i] @ bridge.W_U, expected, atol=1e-4, rtol=1e-4)
            cap = bridge.looped_cfg.logit_softcap
            expected = expected if cap is None else cap * torch.tanh(expected / cap)
            torch.testing.assert_close(result.values[i], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.values[-1], bridge(TOKENS), atol=1e-4, rtol=1e-4)


def test_streams_as_they_are_are_no_contributions() -> None:
    cache = run(shared_bridge("ouro"), TOKENS)
    streams = cache.accumulated_resid(carried=False)
    with pytest.raises(LoopedError, match="carried=True"):
        cache.logit_attrs(streams, 3)
    with pytest.raises(LoopedError, match="belongs to ln_final"):
        cache.apply_ln_to_stack(streams, 2, recompute_ln=True)
    with pytest.raises(LoopedError, match="no MLP reads"):
        cache.decompose_resid(mlp_input=True)
    with pytest.raises(IndexError, match="out of range"):
        cache.decompose_resid(7)


def test_one_axis_of_tokens_that_fits_rows_and_positions_is_refused() -> None:
    """What each reading gives is compared with the logits themselves: nothing is left of these but a sum of parts."""
    bridge = shared_bridge("huginn", torch.float64)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(random_tokens(batch=5, pos=5))
        _, other = bridge.run_with_cache(random_tokens(batch=5, pos=7))
    tokens, stack = torch.arange(5), cache.decompose_resid()
    for wrong in (
        lambda: cache.attribute_logits(tokens, positions=None),
        lambda: cache.attribute_logits(tokens, tokens + 1, positions=None),
        lambda: cache.logit_attrs(stack, tokens),
        lambda: other.attribute_logits(tokens, positions=slice(2, None)),
        lambda: other.logit_attrs(other.decompose_resid(pos_slice=slice(2, None)), tokens, pos_slice=slice(2, None)),
    ):
        with pytest.raises(LoopedError, match=r"5 tokens .* 5 rows of 5 positions.*tokens\[:, None\] or tokens\[None\]"):
            wrong()
    for axis, named in ((0, tokens[:, None]), (1, tokens[None])):
        expected = torch.stack([logits.select(axis, i)[:, i] for i in range(5)], dim=axis)
        torch.testing.assert_close(cache.attribute_logits(named, positions=None).values.sum(0), expected)
        torch.testing.assert_close(cache.logit_attrs(stack, named).sum(0), expected)
    torch.testing.assert_close(cache.attribute_logits(tokens).values.sum(0), logits[range(5), -1, range(5)])  # one position
    with pytest.raises(LoopedError, match=r"shape \(4,\) were given for logits at \(5, 5\)"):
        cache.attribute_logits(tokens[:4], positions=None)
