"""What several test files do with models: tokenizers, ordinary decoders, caches, states read by name."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from zoo import SMALL, random_bridge

from tl_looped import LoopedBridge, LoopedCache
from tl_looped.model import LoopedModel


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of "t3 t4 ... t30"."""
    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, 31))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def with_words(name: str = "huginn", tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> LoopedBridge:
    """A model of the zoo that reads text."""
    bridge = random_bridge(name, dtype)
    bridge.tokenizer = word_tokenizer() if tokenizer is None else tokenizer
    return bridge


def tiny_llama(n_layers: int = 4, **changes: Any) -> LlamaForCausalLM:
    """An ordinary decoder of the zoo's sizes."""
    sizes = {"vocab_size": SMALL["d_vocab"], "hidden_size": SMALL["d_model"], "intermediate_size": SMALL["d_mlp"]}
    heads = {"num_attention_heads": SMALL["n_heads"], "max_position_embeddings": SMALL["n_ctx"]}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "num_hidden_layers": n_layers, **changes})).eval()


def plain_model(bridge: LoopedBridge) -> LoopedModel:
    """The same parameters in a model of plain PyTorch, without hook points."""
    model = LoopedModel(bridge.looped_cfg).to(bridge.cfg.dtype)
    for key, parameter in bridge.plain.canonical_parameters().items():
        model.set_parameter(key, parameter)
    return model


def run(bridge: LoopedBridge, tokens: torch.Tensor, **kwargs: Any) -> LoopedCache:
    """The cache of a run, without gradients."""
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, **kwargs)
    assert isinstance(cache, LoopedCache)
    return cache


def states(bridge: LoopedBridge, tokens: torch.Tensor, name: str, **kwargs: Any) -> torch.Tensor:
    """What every hook point holds that a name or pattern stands for, [hook point, ...]."""
    cache = run(bridge, tokens, names_filter=name, **kwargs)
    return torch.stack([cache[bridge.schedule.loop_name(n)] for n in bridge.expand_name(name)])


def states_by_layer(
    bridge: LoopedBridge, tokens: torch.Tensor, name: str = "resid_post", stack: str | None = None, **kwargs: Any
) -> torch.Tensor:
    """An activation of every looped layer, [loop, layer, ...]."""
    hook = {"resid_post": "hook_resid_post", "pattern": "attn.hook_pattern"}[name]
    return run(bridge, tokens, names_filter=f"blocks.*.{hook}", **kwargs).stack_loops(name, stack=stack)


def storages(model: torch.nn.Module) -> set[int]:
    """Where the parameters of a model lie."""
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def metric(logits: torch.Tensor) -> torch.Tensor:
    """A metric of every row: some logits at the last position against some at the one before."""
    return logits[:, -1, :5].sum(-1) - logits[:, -2, 5:9].sum(-1)


def per_row(logits: torch.Tensor) -> torch.Tensor:
    """Another one, which reads an early position too."""
    return logits[:, -1, 5] - logits[:, -1, 6] + logits[:, 1, 7]


def total(logits: torch.Tensor) -> torch.Tensor:
    """Its sum over rows."""
    return per_row(logits).sum()


def near(clean: LoopedCache, corrupted: LoopedCache, eps: float) -> LoopedCache:
    """A clean run that is `eps` of the way from the corrupted one."""
    close = {name: value + eps * (clean[name] - value) for name, value in corrupted.items()}
    return LoopedCache(close, clean.model)


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, whatever it is made of."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, 12345.0), torch.nan_to_num(b, 12345.0))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return type(a) is type(b) and (a == b or (a != a and b != b))
