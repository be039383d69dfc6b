"""Bridges from checkpoints, from instantiated models and from ordinary decoders; saving and reading back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import storages, tiny_llama, word_tokenizer
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import HrmTextConfig, HrmTextForCausalLM, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from zoo import FEW, STRUCTURES, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError

TOKENS = random_tokens()


pytestmark = pytest.mark.usefixtures("no_grad")


llama = partial(tiny_llama, 5, num_key_value_heads=1, initializer_range=0.2)


def layers_of(hf: LlamaForCausalLM, x: torch.Tensor, layers: range) -> torch.Tensor:
    position = torch.arange(x.shape[1])[None]
    for i in layers:
        x = hf.model.layers[i](
            x, position_embeddings=hf.model.rotary_emb(x, position), attention_mask=None, position_ids=position
        )
    return x


def wrapped_llama() -> LlamaForCausalLM:
    hf = llama()
    build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config, dtype=torch.float32, device="cpu")
    return hf


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in STRUCTURES), *((name, torch.bfloat16) for name in FEW)]
)
def test_saved_and_read_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    bridge = random_bridge(name, dtype)
    bridge.unroll(5).save_pretrained(tmp_path)
    again = LoopedBridge.from_pretrained(tmp_path)
    saved = bridge.original_model.canonical_parameters()
    read = again.original_model.canonical_parameters()
    assert saved.keys() == read.keys() and all(torch.equal(saved[n], read[n]) for n in saved)
    assert again.n_loops == 5 and again.cfg.dtype == dtype
    assert torch.equal(again.unroll(bridge.n_loops)(TOKENS), bridge(TOKENS))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < sum(p.numel() * p.element_size() for p in saved.values()) + 20_000  # each tensor once


def test_the_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    bridge = random_bridge("ouro")
    bridge.tokenizer = word_tokenizer()
    bridge.save_pretrained(tmp_path)
    again = LoopedBridge.from_pretrained(tmp_path)
    tokens = again.to_tokens("t5 t17 t3", prepend_bos=False)
    assert tokens.tolist() == [[5, 17, 3]] and again.to_str_tokens("t5 t17", prepend_bos=False) == ["t5", "t17"]
    assert torch.equal(again("t5 t17 t3", prepend_bos=False), again(tokens))
    assert torch.equal(bridge.to_tokens("t5 t17", prepend_bos=False), torch.tensor([[5, 17]]))  # set after loading
    for other in (LoopedBridge.from_pretrained(tmp_path, tokenizer=word_tokenizer()), again.unroll(2)):
        assert torch.equal(other.to_tokens("t5 t17"), again.to_tokens("t5 t17"))
    with pytest.raises(LoopedError, match="n_ctx=32"):
        again(" ".join(["t3"] * 40), prepend_bos=False)
    padded = again(["t5 t17 t3", "t9"], prepend_bos=False, padding_side="left")
    torch.testing.assert_close(padded[1, -1], again("t9", prepend_bos=False)[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 3), (4, 5)])
def test_one_loop_is_the_ordinary_model(start: int, stop: int) -> None:
    hf = llama()
    for strategy in ("naive", "anchored"):
        bridge = LoopedBridge.loop_layers(hf, start, stop, n_loops=1, strategy=strategy)
        torch.testing.assert_close(bridge(TOKENS), hf(TOKENS).logits, atol=1e-5, rtol=1e-5)
        assert storages(bridge) <= storages(hf)


def test_naive_looping_equals_running_the_layers_again() -> None:
    hf = llama()
    x = layers_of(hf, hf.model.embed_tokens(TOKENS), range(0, 1))
    for _ in range(3):
        x = layers_of(hf, x, range(1, 4))
    expected = hf.lm_head(hf.model.norm(layers_of(hf, x, range(4, 5))))
    bridge = LoopedBridge.loop_layers(hf, start=1, stop=4, n_loops=3)
    torch.testing.assert_close(bridge(TOKENS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("steps", "n_loops", "beta"), [(6, None, 0.5), (3, 3, 0.25), (4, 2, 0.5)])
def test_anchored_looping_equals_its_formula(steps: int, n_loops: int | None, beta: float) -> None:
    hf = llama()
    h_in = layers_of(hf, hf.model.embed_tokens(TOKENS), range(0, 1))
    h = h_in
    for _ in range(n_loops or steps):
        h = h + (layers_of(hf, h, range(1, 4)) - h) / steps
    mixed = beta * layers_of(hf, h_in, range(1, 4)) + (1 - beta) * h
    expected = hf.lm_head(hf.model.norm(layers_of(hf, mixed, range(4, 5))))
    bridge = LoopedBridge.loop_layers(hf, 1, 4, n_loops=n_loops, strategy="anchored", beta=beta, K=steps)
    torch.testing.assert_close(bridge(TOKENS), expected, atol=1e-5, rtol=1e-5)
    assert bridge.n_loops == (n_loops or steps)


def test_anchored_looping_has_the_paper_s_defaults() -> None:
    cfg = LoopedBridge.loop_layers(llama(), 1, 4, strategy="anchored").looped_cfg
    assert (cfg.n_loops, cfg.anchor_steps, cfg.beta) == (6, 6, 0.5)


def test_other_decoders_can_be_looped() -> None:
    torch.manual_seed(0)
    fields = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 31}
    hf = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=3, intermediate_size=20, initializer_range=0.2, **fields)).eval()
    bridge = LoopedBridge.loop_layers(hf, 1, 2, n_loops=1)
    torch.testing.assert_close(bridge(TOKENS), hf(TOKENS).logits, atol=1e-5, rtol=1e-5)
    _, cache = bridge.run_with_cache(TOKENS)
    assert tuple(cache["q", 1].shape) == (2, 7, 4, 6) and "blocks.1.attn.hook_q_normed" in cache


@pytest.mark.parametrize(("h_cycles", "l_cycles"), [(2, 3), (1, 1), (3, 2)])
def test_an_instantiated_looped_model(h_cycles: int, l_cycles: int) -> None:
    torch.manual_seed(0)
    fields = {"hidden_size": 24, "num_attention_heads": 3, "head_dim": 8, "intermediate_size": 20, "vocab_size": 31}
    fields["num_key_value_heads"] = l_cycles  # which transformers does not read
    config = HrmTextConfig(num_hidden_layers=2, H_cycles=h_cycles, L_cycles=l_cycles, pad_token_id=0, **fields)
    hf = HrmTextForCausalLM(config).eval()
    hf.model.z_L_init.normal_()
    bridge = LoopedBridge.from_hf(hf)
    assert (bridge.n_loops, bridge.looped_cfg.l_cycles) == (h_cycles, l_cycles)
    torch.testing.assert_close(bridge(TOKENS), hf(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert storages(bridge) <= storages(hf)
    assert LoopedBridge.from_hf(hf, n_loops=4, l_cycles=1).schedule.n_layers == 4 * 2 * 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LoopedBridge.loop_layers(llama(), 3, 9, n_loops=2), "the model has 5"),
        (lambda: LoopedBridge.loop_layers(llama(), 3, 3, n_loops=2), "0 <= start < stop <= 5"),
        (lambda: LoopedBridge.loop_layers(llama(), 1, 3, n_loops=0), "n_loops=0"),
        (lambda: LoopedBridge.loop_layers(llama(), 1, 3, n_loops=2, strategy="ema"), "'naive' or 'anchored'"),
        (lambda: LoopedBridge.loop_layers(llama(), 1, 3), "needs n_loops"),
        (
            lambda: LoopedBridge.loop_layers(llama(), 1, 3, n_loops=2, K=4),
            "no K and no beta; they belong to strategy='anchored'",
        ),
        (lambda: LoopedBridge.from_hf(llama()), "loop_layers"),
        (lambda: LoopedBridge.from_hf(torch.nn.Linear(2, 2)), "without a config"),
        (lambda: LoopedBridge.loop_layers(random_bridge("ouro").original_model, 0, 1, n_loops=2), "has wrapped"),
        (lambda: LoopedBridge.loop_layers(wrapped_llama(), 1, 3, n_loops=2), "has wrapped"),
        (lambda: LoopedBridge.from_hf(wrapped_llama()), "LlamaForCausalLM was given that a TransformerBridge has wrapped"),
        (lambda: LoopedBridge.from_hf(random_bridge("ouro")), "has wrapped"),
    ],
)
def test_what_cannot_be_made_is_refused(make, says: str, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=says):
        make()
