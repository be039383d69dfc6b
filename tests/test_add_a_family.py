"""docs/add_a_family.md: its code as it stands there, against a looped_nanochat written from scratch below."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_looped import LoopedBridge, LoopedConfig, LoopedError, families
from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError
from tl_looped.families import Computed

PAGE = (Path(__file__).parent.parent / "docs" / "add_a_family.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python([^\n]*)\n(.*?)```", PAGE, flags=re.DOTALL)
STEP, D_HEAD = 40, 8
SETTINGS = {
    "sequence_len": 12,
    "vocab_size": 37,
    "n_embd": 24,
    "n_head": 3,
    "n_kv_head": 1,
    "n_prelude": 2,
    "n_recur_block": 3,
    "n_coda": 2,
    "window_pattern": "LsS",
    "train_recur_mean": 3.0,
    "input_injection": "inject_init_prelude",
    "logit_softcap": 15.0,
}
TOKENS = torch.randint(0, SETTINGS["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(5))


def random_tensors(**without: bool) -> dict[str, Tensor]:
    """A state dict of looped_nanochat, every parameter drawn at random; float64."""
    width, generator = SETTINGS["n_embd"], torch.Generator().manual_seed(2)
    kv_width = SETTINGS["n_kv_head"] * D_HEAD
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (64, width), "lm_head.weight": (64, width)}
    shapes |= {f"norm_{where}.weight": (width,) for where in ("emb", "recur", "final")}
    shapes |= {"inject.weight": (width, 2 * width), "exit_gate.proj.weight": (1, width), "exit_gate.proj.bias": (1,)}
    for stack, key in {"prelude": "n_prelude", "recur": "n_recur_block", "coda": "n_coda"}.items():
        for j in range(SETTINGS[key]):
            at = f"transformer.{stack}.{j}"
            shapes |= {f"{at}.n{i}.weight": (width,) for i in (1, 2, 3, 4)}
            shapes |= {f"{at}.attn.c_q.weight": (width, width), f"{at}.attn.c_proj.weight": (width, width)}
            shapes |= {f"{at}.attn.c_{part}.weight": (kv_width, width) for part in "kv"}
            shapes |= {f"{at}.mlp.c_fc.weight": (4 * width, width), f"{at}.mlp.c_proj.weight": (width, 4 * width)}
    noise = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: 0.5 + t.abs() if t.ndim == 1 else 1.5 * t / t.shape[-1] ** 0.5 for name, t in noise.items()}


class Reference:
    """looped_nanochat, position by position where that is clearer, from its stored tensors.

    Args:
        tensors: its state dict.
        coarse_angles: round sines and cosines to bfloat16, as the published code does.
    """

    def __init__(self, tensors: dict[str, Tensor], coarse_angles: bool = False):
        self.tensors, self.coarse_angles = tensors, coarse_angles

    def __call__(self, tokens: Tensor, n_loops: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and activations by the name they have here."""
        s, seen = SETTINGS, {}
        x = seen["hook_embed"] = self.norm(self.tensors["transformer.wte.weight"][tokens], "norm_emb")
        for j in range(s["n_prelude"]):
            x = self.block(x, f"transformer.prelude.{j}", j, f"prelude.blocks.{j}", seen)
        prelude = state = x
        for t in range(n_loops):
            seen[f"loops.{t}.hook_state"], seen[f"loops.{t}.hook_injection"] = state, prelude
            x = torch.cat([prelude, state], dim=-1) @ self.tensors["inject.weight"].mT
            seen[f"loops.{t}.hook_in"] = x
            for j in range(s["n_recur_block"]):
                x = self.block(x, f"transformer.recur.{j}", s["n_prelude"] + j, f"loops.{t}.blocks.{j}", seen)
            state = seen[f"loops.{t}.hook_out"] = self.norm(x, "norm_recur")
            gate = state @ self.tensors["exit_gate.proj.weight"][0] + self.tensors["exit_gate.proj.bias"]
            seen[f"loops.{t}.hook_exit_logit"] = gate
        x = state
        for j in range(s["n_coda"]):
            i = s["n_prelude"] + s["n_recur_block"] + j
            x = self.block(x, f"transformer.coda.{j}", i, f"coda.blocks.{j}", seen)
        logits = (self.norm(x, "norm_final") @ self.tensors["lm_head.weight"].mT)[..., : s["vocab_size"]]
        return s["logit_softcap"] * torch.tanh(logits / s["logit_softcap"]), seen

    def norm(self, x: Tensor, name: str | None = None) -> Tensor:
        weight = 1.0 if name is None else self.tensors[f"{name}.weight"]
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def block(self, x: Tensor, at: str, i: int, name: str, seen: dict[str, Tensor]) -> Tensor:
        seen[f"{name}.hook_resid_pre"] = x
        x = self.norm(x + self.attention(self.norm(x, f"{at}.n1"), f"{at}.attn", i, name, seen), f"{at}.n2")
        seen[f"{name}.hook_resid_mid"] = x
        hidden = (self.norm(x, f"{at}.n3") @ self.tensors[f"{at}.mlp.c_fc.weight"].mT).clamp(min=0) ** 2
        seen[f"{name}.hook_mlp_out"] = hidden @ self.tensors[f"{at}.mlp.c_proj.weight"].mT
        x = seen[f"{name}.hook_resid_post"] = self.norm(x + seen[f"{name}.hook_mlp_out"], f"{at}.n4")
        return x

    def attention(self, x: Tensor, at: str, i: int, name: str, seen: dict[str, Tensor]) -> Tensor:
        def heads(part: str) -> Tensor:  # [batch, pos, head, d_head]
            return (x @ self.tensors[f"{at}.c_{part}.weight"].mT).unflatten(-1, (-1, D_HEAD))

        q, k = (self.norm(self.turned(heads(part))) for part in "qk")
        v = heads("v")
        n_pos, is_short = x.shape[1], SETTINGS["window_pattern"].upper()[i % 3] == "S" and i < 6
        pattern = torch.zeros(x.shape[0], SETTINGS["n_head"], n_pos, n_pos, dtype=x.dtype)
        for p in range(n_pos):
            first = max(0, p - SETTINGS["sequence_len"] // 2) if is_short else 0
            scores = torch.einsum("bhd,bkd->bhk", q[:, p], k[:, first : p + 1, 0]) / math.sqrt(D_HEAD)
            pattern[:, :, p, first : p + 1] = scores.softmax(-1)
        seen[f"{name}.attn.hook_pattern"] = pattern
        z = seen[f"{name}.attn.hook_z"] = torch.einsum("bhqk,bkd->bqhd", pattern, v[:, :, 0])
        return z.flatten(-2) @ self.tensors[f"{at}.c_proj.weight"].mT

    def turned(self, x: Tensor) -> Tensor:
        """Every pair of a head turned by minus position times frequency, as one complex number."""
        frequency = 10000.0 ** (-torch.arange(0, D_HEAD, 2, dtype=torch.float32) / D_HEAD)
        angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        if self.coarse_angles:
            cos, sin = cos.bfloat16(), sin.bfloat16()
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.complex(cos.to(x.dtype), -sin.to(x.dtype))
        return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the page, importable under the name it has there; the families are put back afterwards."""
    (title, code), *others = [block for block in BLOCKS if block[0]]
    assert title == ' title="looped_nanochat.py"' and not others
    (tmp_path / "looped_nanochat.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    yield importlib.import_module("looped_nanochat")
    del importlib.sys.modules["looped_nanochat"]


def run_page(tmp_path: Path, tensors: dict[str, Tensor], reference: Reference) -> dict[str, Any]:
    """Run the page's other blocks in their order; what they defined."""
    source, target = tmp_path / "theirs", tmp_path / "ours"
    source.mkdir()
    target.mkdir()
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, source / f"model_{STEP:06d}.pt")
    (source / f"meta_{STEP:06d}.json").write_text(json.dumps({"model_config": SETTINGS, "step": STEP}))
    namespace: dict[str, Any] = {"source": source, "target": target, "step": STEP, "tokens": TOKENS, "reference": reference}
    for title, code in BLOCKS:
        if not title:
            exec(compile(code, "add_a_family.md", "exec"), namespace)
    return namespace


def test_the_page_gives_a_family_that_computes_what_its_reference_does(module: ModuleType, tmp_path: Path) -> None:
    names: set[str] = set()

    def reference(tokens: Tensor, n_loops: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits, seen = Reference(random_tensors())(tokens, n_loops)
        names.update(seen)
        return logits, seen

    model = run_page(tmp_path, random_tensors(), reference)["model"]
    assert model.looped_cfg.family == "looped_nanochat" and model.n_loops == 3
    assert set(model.looped_cfg.windows) == {None, 7}
    assert {"hook_embed", "loops.2.blocks.1.attn.hook_pattern", "coda.blocks.1.hook_resid_mid"} <= names and len(names) > 80


def test_the_example_is_short() -> None:
    code = BLOCKS[0][1]
    assert 50 <= len([line for line in code.splitlines() if line.strip()]) <= 80


def test_gradients_are_those_of_the_reference(module: ModuleType) -> None:
    families.register(module)
    tensors = {name: tensor.requires_grad_() for name, tensor in random_tensors().items()}
    Reference(tensors)(TOKENS, 3)[0].square().sum().backward()
    model = load_model(MemoryCheckpoint({"model_type": "looped_nanochat", **SETTINGS}, tensors))
    model(TOKENS).logits.square().sum().backward()
    parameters, checked = model.canonical_parameters(), 0
    for name, source in module.sources(model.cfg, {}).items():
        found, stored = parameters[name].grad, source.stored if isinstance(source, Computed) else [source.name]
        expected = [tensors[key].grad for key in stored]
        if name.endswith("mlp.down.weight"):
            found = 2 * found  # the parameter is twice the stored tensor
        elif name == "embed.weight":
            continue  # the stored table lies before a norm
        elif isinstance(source, Computed):  # rows or columns in another order
            expected = [source.compute(*expected)]
        torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        checked += 1
    assert checked == len(parameters) - 1


def test_hooks_reach_one_loop(module: ModuleType) -> None:
    families.register(module)
    model = LoopedBridge(load_model(MemoryCheckpoint({"model_type": "looped_nanochat", **SETTINGS}, random_tensors())))
    logits, cache = model.run_with_cache(TOKENS)
    name = "loops.1.blocks.1.attn.hook_z"
    same = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda z, hook: cache[name])])
    other = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda z, hook: 0 * z)])
    assert torch.equal(same, logits) and not torch.allclose(other, logits, atol=1e-3)
    parts = cache.decompose_resid()
    torch.testing.assert_close(parts.sum(0), cache["ln_final.hook_in"], rtol=1e-9, atol=1e-9)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    cached, uncached = (model.generate(TOKENS[:, :4], use_past_kv_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)


def test_rounding_the_angles_is_the_difference_that_the_page_names() -> None:
    exact, coarse = (Reference(random_tensors(), coarse_angles=coarse)(TOKENS, 3)[0] for coarse in (False, True))
    assert 1e-4 < (exact - coarse).abs().max() < 1


def test_options_and_tensors_that_do_not_fit_are_refused(module: ModuleType) -> None:
    families.register(module)
    config, tensors = {"model_type": "looped_nanochat", **SETTINGS}, random_tensors()
    with pytest.raises(CheckpointError, match="input_injection='passthrough'"):
        load_model(MemoryCheckpoint(config | {"input_injection": "passthrough"}, tensors))
    with pytest.raises(CheckpointError, match=r"missing: norm_emb.weight \[24\]"):
        load_model(MemoryCheckpoint(config, {name: t for name, t in tensors.items() if name != "norm_emb.weight"}))
    with pytest.raises(CheckpointError, match=r"wrong shape: inject.weight should be \[24, 48\].*d_model=24"):
        load_model(MemoryCheckpoint(config, tensors | {"inject.weight": torch.zeros(24, 24)}))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in .*norm_emb.weight"):
        load_model(MemoryCheckpoint(config, tensors | {"norm_emb.weight": torch.full((24,), torch.nan)}))


def test_dtypes(module: ModuleType) -> None:
    families.register(module)
    checkpoint = MemoryCheckpoint({"model_type": "looped_nanochat", **SETTINGS}, random_tensors())
    narrow = load_model(checkpoint, dtype=torch.float32)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}
    assert all(parameter.is_contiguous() for parameter in narrow.parameters())
    torch.testing.assert_close(narrow(TOKENS).logits.double(), load_model(checkpoint)(TOKENS).logits, rtol=0, atol=2e-3)


def test_a_wrong_computed_shape_names_the_parameter(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    families.register(module)
    right = module.sources
    wrong = {"unembed.weight": Computed(lambda head: head, {"lm_head.weight": (64, 24)})}
    monkeypatch.setattr(module, "sources", lambda cfg, shapes: right(cfg, shapes) | wrong)
    with pytest.raises(CheckpointError, match=r"unembed.weight from lm_head.weight as \[64, 24\].*needs \[37, 24\]"):
        load_model(MemoryCheckpoint({"model_type": "looped_nanochat", **SETTINGS}, random_tensors()))


def test_registering(module: ModuleType) -> None:
    config = {"model_type": "looped_nanochat"}
    assert families.detect(config, {}) is families.looped_nanochat
    with pytest.raises(CheckpointError, match=r"'spiral'.*looped_nanochat.*families.register"):
        families.detect({"model_type": "spiral"}, {})
    known = len(families._FAMILIES)
    families.register(module)
    families.register(module)
    assert families.detect(config, {}) is module and len(families._FAMILIES) == known + 1


def test_what_is_no_family_is_not_registered(unchecked: None) -> None:
    with pytest.raises(LoopedError, match="has no matches, looped_config, sources, TIED, IGNORED"):
        families.register(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("eps", [-1e-6, math.inf, True])
def test_qk_norm_eps_that_is_none(eps: Any, unchecked: None) -> None:
    with pytest.raises(LoopedError, match="qk_norm_eps"):
        LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, qk_norm="head", qk_norm_eps=eps)


@pytest.mark.parametrize(("kind", "default"), [("head", 1e-6), ("flat", 1e-6), ("after_rope", None)])
def test_qk_norm_eps(kind: Any, default: float | None) -> None:
    from tl_looped.model import LoopedModel

    for eps, expected in ((None, default), (0.25, 0.25)):
        cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=1, n_loops=1, qk_norm=kind, qk_norm_eps=eps)
        attention: Any = LoopedModel(cfg).blocks[0].attn
        assert attention.q_norm.eps == attention.k_norm.eps == expected
