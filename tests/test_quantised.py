"""Quantised tensors, against what the libraries that wrote them make of them, and checkpoints made of them.

`quantised.safetensors` holds small tensors written by compressed-tensors 0.20 (`ct_`), ModelOpt 0.47 (`mo_`), bitsandbytes 0.50
(`nf4_`, `fp4_`, `int8`) and transformers' Inkling-2 loop 5.24 (`inkling_`), each with what the same library dequantises.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import GOLDEN, golden_tensors, with_config

from tl_looped import LoopedBridge
from tl_looped.checkpoints import MemoryCheckpoint, load_model, open_checkpoint, quantised
from tl_looped.errors import CheckpointError
from tl_looped.info import checkpoint_text

STORED = load_file(Path(__file__).parent / "quantised.safetensors")
FORMATS = sorted({name.split(".")[0] for name in STORED})
TOKENS = torch.tensor([[5, 17, 3, 60]])


def held(kind: str) -> dict[str, Tensor]:
    return {name: t for name, t in STORED.items() if name.startswith(f"{kind}.") and "expected" not in name}


@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_are_those_of_the_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, from any element on, and piece by piece; nothing that helps to store them is left among the tensors."""
    checkpoint = MemoryCheckpoint({"quantization_config": {}}, held(kind))
    (name,) = checkpoint.shapes
    expected = STORED[f"{kind}.expected"]
    assert name == f"{kind}.weight" and checkpoint.shapes[name] == tuple(expected.shape)
    assert checkpoint.dtypes[name] == torch.float32 and checkpoint.config == {} and checkpoint.quantised is not None
    assert torch.equal(checkpoint.read(name), expected)
    for start, count in ((0, 1), (3, 50), (expected.numel() - 5, 5), (65, 0)):
        assert torch.equal(checkpoint.read(name, start, (count,)), expected.reshape(-1)[start : start + count])
    monkeypatch.setattr(quantised, "_AT_ONCE", 150)
    assert torch.equal(checkpoint.read(name), expected)
    assert torch.equal(checkpoint.read(name, 77, (250,)), expected.reshape(-1)[77:327])


def test_four_bits_round_to_the_dtype_as_the_library_does() -> None:
    checkpoint = MemoryCheckpoint({}, held("nf4_plain"))
    assert torch.equal(checkpoint.read("nf4_plain.weight").bfloat16(), STORED["nf4_plain.expected_bfloat16"])


def modelopt(name: str, shape: torch.Size, seed: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """A random tensor in NVFP4, and its numbers one by one."""
    codes = torch.randint(0, 16, shape, generator=seed)
    scales = (torch.rand((*shape[:-1], shape[-1] // 16), generator=seed) + 0.5).to(torch.float8_e4m3fn)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    numbers = [
        [
            (-1 if codes[i, j] > 7 else 1) * values[int(codes[i, j]) % 8] * float(scales[i, j // 16]) * 0.03
            for j in range(shape[1])
        ]
        for i in range(shape[0])
    ]
    stored = {
        name: (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8),
        f"{name}_scale": scales,
        f"{name}_scale_2": torch.tensor(0.03),
        f"{name.removesuffix('weight')}input_scale": torch.tensor(0.1),
    }
    return stored, torch.tensor(numbers)


def quantised_ouro(directory: Path) -> dict[str, Tensor]:
    """The golden Ouro with its MLPs in NVFP4, in two files; the tensors it stands for."""
    plain, seed = dict(golden_tensors("ouro")), torch.Generator().manual_seed(0)
    stored = dict(plain)
    for name in [name for name in plain if name.endswith(("gate_proj.weight", "up_proj.weight"))]:
        parts, plain[name] = modelopt(name, plain[name].shape, seed)
        stored |= parts
    stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.2)
    shards = {"a.safetensors": [n for n in stored if n.endswith("scale")]}
    shards["b.safetensors"] = [n for n in stored if n not in shards["a.safetensors"]]
    for file, names in shards.items():
        save_file({name: stored[name].contiguous() for name in names}, directory / file)
    index = {name: file for file, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((GOLDEN / "ouro" / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    return plain


def test_a_quantised_checkpoint_is_the_plain_one(tmp_path: Path) -> None:
    plain = quantised_ouro(tmp_path)
    expected = load_model(MemoryCheckpoint(json.loads((tmp_path / "config.json").read_text()), plain))
    with pytest.warns(UserWarning, match=r"holds [\d.]+ kB, in NVFP4; dequantised, its parameters take [\d.]+ kB in float32"):
        model = LoopedBridge.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), expected(TOKENS).logits, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="in bfloat16, and activations are not quantised"):
        narrow = load_model(open_checkpoint(tmp_path), dtype=torch.bfloat16)
    for name, parameter in narrow.canonical_parameters().items():
        assert torch.equal(parameter, model.plain.canonical_parameters()[name].bfloat16()), name


def blocks_of_eight_bits(weight: Tensor, seed: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random float8 numbers in the place of a weight, a power of two for 32 of them, and their products."""
    codes = torch.randn(weight.shape, generator=seed).mul(0.3).to(torch.float8_e4m3fn)
    powers = torch.randint(122, 129, (*weight.shape[:-1], -(-weight.shape[-1] // 32)), generator=seed).to(torch.uint8)
    by_entry = 2.0 ** (powers.double() - 127).repeat_interleave(32, dim=-1)[..., : weight.shape[-1]]
    return codes, powers, (codes.double() * by_entry).float()


def test_published_names_of_other_families(tmp_path: Path) -> None:
    """Dory's released matrices in NVFP4, and experts of the Inkling-2 loop in MXFP8, which its family takes apart."""
    seed = torch.Generator().manual_seed(4)
    plain = {name: dict(golden_tensors(name)) for name in ("dory", "inkling2_loop")}
    stored = {name: dict(tensors) for name, tensors in plain.items()}
    for name in [n for n in plain["dory"] if n.endswith(("q_proj.weight", "gate_proj.weight"))]:
        parts, plain["dory"][name] = modelopt(name, plain["dory"][name].shape, seed)
        stored["dory"] |= parts
    for name in [n for n in plain["inkling2_loop"] if n.endswith(("w13_weight", "w2_weight"))]:
        codes, powers, plain["inkling2_loop"][name] = blocks_of_eight_bits(plain["inkling2_loop"][name], seed)
        stored["inkling2_loop"] |= {name: codes, f"{name}_scale": powers}
    for family, tensors in stored.items():
        config = with_config(family).config
        expected = load_model(MemoryCheckpoint(config, plain[family]))
        with pytest.warns(UserWarning, match={"dory": "NVFP4", "inkling2_loop": "MXFP8"}[family]):
            found = load_model(MemoryCheckpoint(config, tensors))
        with torch.no_grad():
            torch.testing.assert_close(found(TOKENS).logits, expected(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_what_is_saved_of_it_is_plain(tmp_path: Path) -> None:
    source, target = tmp_path / "quantised", tmp_path / "plain"
    source.mkdir()
    quantised_ouro(source)
    with pytest.warns(UserWarning, match="NVFP4"):
        model = LoopedBridge.from_pretrained(source, device="cpu")
    model.save_pretrained(target)
    assert torch.equal(LoopedBridge.from_pretrained(target, device="cpu")(TOKENS), model(TOKENS))


def test_info_tells_it_without_reading_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = quantised_ouro(tmp_path)
    monkeypatch.setattr("tl_looped.checkpoints.files.InSafetensors.read", lambda *_: pytest.fail("a tensor was read"))
    text, usual = checkpoint_text(tmp_path), checkpoint_text(GOLDEN / "ouro")
    rows = [line for line in text.splitlines()[1:] if not line.startswith("stored")]
    assert rows == usual.splitlines()[1:]  # shapes and parameters are those of the model
    told = next(line for line in text.splitlines() if line.startswith("stored"))
    bytes_ = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert "NVFP4" in told and f"{4 * sum(t.numel() for t in plain.values()) / 1000:.0f} kB in float32" in told
    assert float(told.split("holds ")[1].split(" kB")[0]) * 1000 < bytes_


OTHERS: dict[str, tuple[dict[str, Any], Callable[[Tensor], dict[str, Tensor]], str]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        lambda w: {"qweight": torch.zeros(4, 80, dtype=torch.int32), "scales": torch.ones(1, 80)},
        r"quant_method='gptq'.*gate_proj.qweight \(torch.int32\)",
    ),
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        lambda w: {"weight": w.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
        "quant_method='fp8'",
    ),
    "blocks, as many as rows": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        lambda w: {"weight": w.to(torch.float8_e4m3fn), "weight_scale": torch.ones(len(w) // 8, 8)},
        r"compressed-tensors.*float8_e4m3fn",
    ),
    "columns": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        lambda w: {"weight": w.to(torch.float8_e4m3fn), "weight_scale": torch.ones(1, len(w))},
        r"compressed-tensors.*float8_e4m3fn",
    ),
    "integers": (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        lambda w: {"weight": w.to(torch.int8), "weight_scale": torch.ones(len(w), 1)},
        r"compressed-tensors.*torch.int8",
    ),
    "no word": ({}, lambda w: {"weight": w.to(torch.float8_e4m3fn)}, "unknown way.*float8_e4m3fn"),
    "rotated": (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        lambda w: {"weight": w.to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)},
        "transform_config",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused_by_name(kind: str) -> None:
    settings, make, message = OTHERS[kind]
    tensors = dict(golden_tensors("ouro"))
    stem = "model.layers.0.mlp.gate_proj"
    tensors |= {f"{stem}.{leaf}": tensor for leaf, tensor in make(tensors.pop(f"{stem}.weight")).items()}
    config = with_config("ouro").config | ({"quantization_config": settings} if settings else {})
    with pytest.raises(CheckpointError, match=f"(?s){message}.*Implemented are NVFP4"):
        MemoryCheckpoint(config, tensors)


def damaged(kind: str, **changes: Tensor) -> dict[str, Tensor]:
    return held(kind) | {f"{kind}.{leaf}": tensor for leaf, tensor in changes.items()}


def test_parts_that_do_not_fit_together() -> None:
    with pytest.raises(CheckpointError, match=r"scales of shape \[6, 8\]; \[6, 64\] numbers in groups of 16 have \[6, 4\]"):
        MemoryCheckpoint({}, damaged("mo_nvfp4", weight_scale=torch.zeros(6, 8).to(torch.float8_e4m3fn)))
    with pytest.raises(CheckpointError, match="absmax is missing"):
        MemoryCheckpoint({}, {name: t for name, t in held("nf4_plain").items() if not name.endswith("absmax")})
    with pytest.raises(CheckpointError, match="do not fit its 480 bytes and 7 scales"):
        MemoryCheckpoint({}, held("nf4_plain") | {"nf4_plain.weight.absmax": torch.zeros(7)})
    state = "nf4_plain.weight.quant_state.bitsandbytes__nf4"
    twice = torch.cat([STORED[state]] * 2)
    with pytest.raises(CheckpointError, match=r"not the description of one tensor.*joined when the model was saved"):
        MemoryCheckpoint({}, held("nf4_plain") | {state: twice})
    with pytest.raises(CheckpointError, match="layout 2"):
        MemoryCheckpoint({}, damaged("int8", weight_format=torch.tensor(2, dtype=torch.uint8)))
    with pytest.raises(CheckpointError, match="has 5 scales, neither one, nor one for each of its 3 parts or 48 rows"):
        MemoryCheckpoint({}, damaged("inkling_nvfp4", weight_amax=torch.ones(5)))
