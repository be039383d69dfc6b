"""What tracing finds out about a module, what it is told, and what it refuses."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import looped_modules
import pytest
import torch
from looped_modules import VOCAB
from torch import Tensor, nn
from tracing import CLEAN, module_of, traced
from zoo import GOLDEN

from tl_looped import LoopedBridge, families
from tl_looped.errors import CheckpointError, LoopedError
from tl_looped.families import hrm_text
from tl_looped.lenses import logit_lens


def test_what_was_found_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    LoopedBridge.trace(module_of("NanoLoop"), CLEAN)
    table = capsys.readouterr().out
    assert "4 loops over one stack of 3 layers, 1 prelude and 0 coda layers" in table
    assert "transformer.ln_f" in table and "lm_head" in table and "attn.c_proj (input)" in table


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("Universal", "5 loops over one stack of 1 layer, "),
        ("Halting", "4 loops over one stack of 1 layer, "),
        ("Hierarchical", "3 loops over stacks L (6 x 2 layers) and H (3 x 1 layer), "),
        ("Capped", "3 loops over one stack of 2 layers, "),
        ("PerToken", "3 loops over one stack of 2 layers, "),
        ("Shuffled", "3 loops over stacks A (3 x 1 layer) and B (3 x 1 layer) and C (3 x 1 layer), "),
    ],
)
def test_structures(name: str, described: str) -> None:
    assert traced(name).schedule.describe().startswith(described)


@torch.no_grad()
def test_norm_and_head_can_be_named() -> None:
    with pytest.raises(LoopedError, match="norm= and head="):
        logit_lens(traced("Capped"), CLEAN)
    module: Any = module_of("Capped")
    model = LoopedBridge.trace(module, CLEAN, norm="norm", head=module.unembed, verbose=False)
    assert torch.allclose(model.readout(CLEAN, loop=-1), model(CLEAN), atol=1e-5)
    assert logit_lens(model, CLEAN, lens="native").labels[-1] == "loops.2.blocks.1"


class Softcap(nn.Module):
    """A module that is behind the unembedding."""

    def forward(self, x: Tensor) -> Tensor:
        return 5 * torch.tanh(x / 5)


@torch.no_grad()
def test_a_module_behind_the_unembedding_belongs_to_it() -> None:
    module: Any = module_of("Between")
    module.out = nn.Sequential(module.out, Softcap())
    model = LoopedBridge.trace(module, CLEAN, verbose=False)
    assert model.trace.out.names == ("norms.2", "out.0, out.1")
    assert torch.allclose(model.readout(CLEAN, loop=-1), model(CLEAN), atol=1e-5)


def test_an_encoder_of_transformers() -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes = {"embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = LoopedBridge.trace(
        AlbertForMaskedLM(AlbertConfig(vocab_size=VOCAB, num_hidden_layers=3, max_position_embeddings=32, **sizes)).eval(),
        CLEAN,
        verbose=False,
    )
    assert model.schedule.describe().startswith("3 loops over one stack of 1 layer")
    assert model.lacks("causal attention") is not None and "loops.1.blocks.0.attn.hook_q" in model.hook_dict
    assert "loops.1.blocks.0.hook_attn_out" not in model.hook_dict  # a norm follows what attention adds
    with pytest.raises(LoopedError, match="a lens was asked"):
        logit_lens(model, CLEAN)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: 3, "a int was given"),
        (lambda m: LoopedBridge.from_pretrained("toy:hop", device="cpu"), "has hooks of TransformerLens already"),
        (lambda m: Counted(m), "did not fire in a second run|layers that it ran when it was traced"),
        (lambda m: nn.DataParallel(m), "DataParallel, which hides the calls inside"),
        (lambda m: torch.compile(m, backend="eager"), "OptimizedModule, which hides the calls inside"),
        (lambda m: module_of("NanoLoop", n_loops=1), "no layer runs twice.*loop_layers"),
        (lambda m: m.train() and Dropping(m), "call module.eval"),
    ],
)
def test_what_cannot_be_traced(make: Any, says: str) -> None:
    with pytest.raises(LoopedError, match=says):
        LoopedBridge.trace(make(module_of("NanoLoop")), CLEAN, verbose=False)


class Counted(nn.Module):
    """Loops once more in every run, but says the same."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.emb, self.block, self.out, self.n = nn.Embedding(VOCAB, 16), looped_modules.Block(), nn.Linear(16, VOCAB), 2

    def forward(self, tokens: Tensor) -> Tensor:
        x, self.n = self.emb(tokens), self.n + 1
        for _ in range(self.n):
            self.block(x)
        return self.out(x)


class KeywordLayers(nn.Module):
    """Its layers are given a mask and a table before the stream, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layers = nn.Embedding(VOCAB, 16), nn.ModuleList([KeywordLayer() for _ in range(2)])
        self.out = nn.Linear(16, VOCAB)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.emb(tokens)
        for _ in range(3):
            for layer in self.layers:
                x = layer(mask=torch.zeros(1, 1, 6, 6), angles=torch.ones(6, 4), hidden_states=x)["hidden_states"]
        return {"logits": self.out(x)}


class KeywordLayer(nn.Module):
    """A layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = looped_modules.Block()

    def forward(self, *, mask: Tensor, angles: Tensor, hidden_states: Tensor) -> dict[str, Tensor]:
        return {"attentions": mask, "hidden_states": self.block(hidden_states)}


@torch.no_grad()
def test_layers_may_take_and_return_their_stream_by_name() -> None:
    torch.manual_seed(0)
    model = LoopedBridge.trace(KeywordLayers().eval(), CLEAN, layers="layers", verbose=False)
    (_, cache), expected = model.run_with_cache(CLEAN), []
    for _ in range(3):
        for layer in model.module.layers:
            expected.append(layer.block(expected[-1] if expected else model.module.emb(CLEAN)))
    for i, x in enumerate(expected):
        assert torch.equal(cache["resid_post", i], x)
    zeroed = model.run_with_hooks(CLEAN, [("loops.2.blocks.1.hook_resid_post", lambda x, hook: torch.zeros_like(x))])
    assert torch.allclose(zeroed, model.module.out.bias.expand_as(zeroed))


class Dropping(nn.Module):
    """With dropout."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.inner(tokens)[0])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layers": "transformer.none"}, "no such submodule"),
        ({"layers": ["transformer.h.0", "transformer.h.0.mlp"]}, "runs inside the first"),
        ({"norm": "nowhere"}, "norm='nowhere' was given"),
        ({"set_loops": "transformer"}, "no number of loops"),
        ({"prelude": 99}, "the run has 13 layers"),
        ({"parts": {"hook_attn_out": "nowhere"}}, "runs no 'nowhere'"),
    ],
)
def test_what_a_user_says_is_checked(given: dict[str, Any], says: str) -> None:
    with pytest.raises(LoopedError, match=says):
        traced("NanoLoop", **given)


def test_layers_can_be_named() -> None:
    module: Any = module_of("NanoLoop")
    for layers in ("transformer.h", module.transformer.h, ["transformer.h.0", module.transformer.h[1], "transformer.h.2"]):
        found = LoopedBridge.trace(module, CLEAN, layers=layers, verbose=False)
        assert found.schedule.describe() == "4 loops over one stack of 3 layers, 0 prelude and 0 coda layers: 12 virtual layers"
    named = traced("InPlace", parts={"hook_attn_out": "attn", "attn.hook_v": "attn.c_attn"})
    assert "loops.1.blocks.0.hook_attn_out" in named.hook_dict


@pytest.fixture
def without_hrm_text(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    others = [family for family in families._FAMILIES if family is not hrm_text]
    monkeypatch.setattr(families, "_FAMILIES", others)
    yield


def test_a_checkpoint_that_only_transformers_knows_is_traced(without_hrm_text: None) -> None:
    with pytest.warns(UserWarning, match="'hrm_text'.*HrmTextForCausalLM was traced"):
        model: Any = LoopedBridge.from_pretrained(GOLDEN / "hrm_text", device="cpu")
    assert torch.equal(model(CLEAN), model.module(CLEAN).logits)
    with pytest.raises(LoopedError, match=r"n_loops=5 was asked.*set_loops"), warnings.catch_warnings():
        LoopedBridge.from_pretrained(GOLDEN / "hrm_text", n_loops=5, device="cpu")


def test_an_ordinary_checkpoint_is_refused_as_before(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no family knows"):
        LoopedBridge.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "unheard_of", "auto_map": {"AutoModel": "m.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no family knows"):
        LoopedBridge.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
