"""Every family against its reference: golden activations, transformers' own classes, and formulas written out below."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo import GOLDEN

from tl_looped import LoopedError, families
from tl_looped.checkpoints import Checkpoint, MemoryCheckpoint, load_model, open_checkpoint
from tl_looped.errors import CheckpointError
from tl_looped.families import huginn, llama, ouro
from tl_looped.model import LoopedModel
from tl_looped.model.config import LoopedConfig
from tl_looped.schedule import Site

FAMILIES = ("ouro", "huginn", "retrofit_llama", "retrofit_olmo", "hrm_text", "nanbeige", "parcae")
TOLERANCE = 2e-4


@cache
def golden(family: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / family / "golden.safetensors")


def edited(family: str, **changes: Any) -> MemoryCheckpoint:
    """A golden checkpoint with some keys of its config.json changed; None removes one."""
    config = json.loads((GOLDEN / family / "config.json").read_text()) | changes
    return MemoryCheckpoint(
        {key: value for key, value in config.items() if key not in changes or value is not None},
        load_file(GOLDEN / family / "model.safetensors"),
    )


def load_run(family: str, run: str, checkpoint: Checkpoint | None = None) -> LoopedModel:
    """The model at the loop count of a golden run: "R4", or "H2L3"."""
    counts = [int(n) for n in re.findall(r"\d+", run)]
    return load_model(
        checkpoint or open_checkpoint(GOLDEN / family), n_loops=counts[0], l_cycles=counts[1] if len(counts) > 1 else None
    )


def inputs(family: str, run: str) -> dict[str, Any]:
    values = golden(family)
    start = values.get(f"{run}/initial_state")
    return {"input_ids": values["input_ids"]} | ({} if start is None else {"initial_state": start})


@torch.no_grad()
def logits(model: LoopedModel, **given: Any) -> Tensor:
    return model(**given).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=TOLERANCE)


def runs() -> list[tuple[str, str]]:
    keys = [(family, key.removesuffix("/logits")) for family in FAMILIES for key in golden(family) if key.endswith("/logits")]
    return [(family, run) for family, run in keys if re.fullmatch(r"R[1-9]|H\dL\d", run)]


@pytest.mark.parametrize(("family", "run"), runs())
def test_logits_at_every_loop_count(family: str, run: str):
    assert_close(logits(load_run(family, run), **inputs(family, run)), golden(family)[f"{run}/logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_says_how_often_to_loop(family: str):
    model = load_model(open_checkpoint(GOLDEN / family))
    run = {"hrm_text": "H2L3", "nanbeige": "R2"}.get(family, "R4")
    assert_close(logits(model, **inputs(family, run)), golden(family)[f"{run}/logits"])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("hrm_text", "nanbeige")])
def test_reading_out_an_earlier_loop(family: str):
    for key, expected in golden(family).items():
        if match := re.fullmatch(r"R([12])/logits", key):
            found = logits(load_run(family, "R4"), **inputs(family, f"R{match[1]}"), loop=int(match[1]) - 1)
            assert_close(found, expected)


def observe(model: LoopedModel) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """The input and the output of every module, filled by the next run."""
    before: dict[nn.Module, Tensor] = {}
    after: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor):
            before[module], after[module] = args[0], out

    for module in model.modules():
        module.register_forward_hook(hook)
    return before, after


def found_activation(
    model: LoopedModel, before: dict[nn.Module, Tensor], after: dict[nn.Module, Tensor], key: str
) -> Tensor | None:
    """The activation a golden key names, or None for keys that are no activations."""
    if match := re.fullmatch(r"(?:(prelude|core|coda|L|H)_)?(\w+)/layer(\d+)(?:/loop(\d+))?", key):
        stack, what, layer, loop = match.groups()
        if what in ("cache_k", "cache_v"):
            return None
        block = model.blocks[model.cfg.schedule.virtual(Site(stack or "core", None if loop is None else int(loop), int(layer)))]
        if what == "resid_pre":
            return before[block]
        places = {"resid_post": block, "attn_out": block.attn, "mlp_out": block.mlp, "resid_mid": block.hook_resid_mid}
        places |= {"attn_out_normed": block.ln1_post, "mlp_out_normed": block.ln2_post}
        return after[places[what]]
    if match := re.fullmatch(r"(?:(L|H)_)?(\w+)/loop(\d+)", key):
        stack, what, loop = match.groups()
        place = (stack or "core", int(loop))
        ends = model.passes[next(p.index for p in model.cfg.schedule.passes if (p.stack, p.loop) == place)]
        if what == "gate_logit":
            return after[ends.hook_exit_logit].unsqueeze(-1)
        names = {
            "state_before": "hook_state",
            "adapter_out": "hook_in",
            "in": "hook_in",
            "out": "hook_out",
            "loop_norm": "hook_out",
        }
        return after[getattr(ends, names[what])]
    if key in ("wte_unscaled", "embed_unscaled"):
        return after[model.embed] / model.cfg.embed_scale
    if key == "injected_embeds":
        return after[model.passes[0].hook_injection]
    places = {
        "embed": model.embed,
        "final_norm_out": model.ln_final,
        "C_in": model.passes[-1].hook_out,
        "C_out": model.after_loop,
    }
    places["latent_states"] = model.after_loop or model.passes[-1].hook_out
    return after[places[key]] if key in places else None


@pytest.mark.parametrize(
    ("family", "run"), [(f, {"hrm_text": "H2L3"}.get(f, "R4")) for f in FAMILIES if f != "nanbeige"] + [("nanbeige", "R3")]
)
def test_every_activation(family: str, run: str):
    model = load_run(family, run)
    before, after = observe(model)
    logits(model, **inputs(family, run))
    checked = 0
    for key, expected in golden(family).items():
        if (
            key.startswith(f"{run}/")
            and (found := found_activation(model, before, after, key.removeprefix(f"{run}/"))) is not None
        ):
            assert_close(found, expected)
            checked += 1
    assert checked >= (3 if family == "nanbeige" else 40)


@pytest.mark.parametrize("run", ["R1", "R2", "R4", "R6"])
def test_ouro_padding_and_exits(run: str):
    values, model = golden("ouro"), load_run("ouro", run)
    ids, mask = values["input_ids"], values[f"{run}/leftpad_attention_mask"]
    real = mask.bool()
    assert_close(logits(model, input_ids=ids, attention_mask=mask)[real], values[f"{run}/leftpad_logits"][real])
    default = torch.arange(ids.shape[1])[None]
    found = logits(model, input_ids=ids, attention_mask=mask, position_ids=default)
    assert_close(found[real], values[f"{run}/leftpad_logits_default_positions"][real])
    for loop in range(model.cfg.n_loops):
        assert_close(logits(model, input_ids=ids, loop=loop), values[f"{run}/logits_exit_at_step{loop}"])


def test_ouro_cache_slots():
    values, model = golden("ouro"), load_run("ouro", "R4")
    with torch.no_grad():
        cached = model(values["input_ids"], use_cache=True).past_key_values
    for key in values:
        if match := re.fullmatch(r"R4/cache_([kv])/layer(\d+)/loop(\d+)", key):
            layer = cached.layers[model.cfg.schedule.virtual(Site("core", int(match[3]), int(match[2])))]
            assert_close(layer.keys if match[1] == "k" else layer.values, values[key])


@pytest.mark.parametrize("file", ["model.safetensors", "model_unfused.safetensors"])
@pytest.mark.parametrize("run", ["H1L1", "H1L2", "H2L3", "H3L1"])
def test_hrm_text_fused_or_not_with_prefix_and_padding(run: str, file: str):
    values = golden("hrm_text")
    config = json.loads((GOLDEN / "hrm_text" / "config.json").read_text())
    model = load_run("hrm_text", run, MemoryCheckpoint(config, load_file(GOLDEN / "hrm_text" / file)))
    ids, mask = values["input_ids"], values[f"{run}/leftpad_attention_mask"]
    assert_close(logits(model, input_ids=ids), values[f"{run}/logits"])
    prefix = logits(model, input_ids=ids, token_type_ids=values[f"{run}/prefix_token_type_ids"])
    assert_close(prefix, values[f"{run}/prefix_logits"])
    padded = logits(model, input_ids=ids, attention_mask=mask)
    assert_close(padded[mask.bool()], values[f"{run}/leftpad_logits"][mask.bool()])


def test_huginn_from_the_zero_state():
    found = logits(load_run("huginn", "R4"), input_ids=golden("huginn")["input_ids"], initial_state="zero")
    assert_close(found, golden("huginn")["R4_scale0/logits"])


def test_nanbeige_without_inner_norms():
    model = load_model(edited("nanbeige", skip_loop_final_norm=True), n_loops=2)
    assert_close(logits(model, **inputs("nanbeige", "R2")), golden("nanbeige")["R2_skipnorm/logits"])


def test_parcae_as_published(tmp_path: Path):
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_bytes((GOLDEN / "parcae" / name).read_bytes())
    with pytest.warns(UserWarning, match="pickle"):
        model = load_model(open_checkpoint(tmp_path))
    assert_close(logits(model, **inputs("parcae", "R4")), golden("parcae")["R4/logits"])


def test_retrofit_rotary_frequencies():
    for family in ("retrofit_llama", "retrofit_olmo"):
        torch.testing.assert_close(
            next(iter(load_run(family, "R1").rotary.frequencies.values())), golden(family)["rope_inv_freq"]
        )


@torch.no_grad()
def redraw(model: nn.Module) -> nn.Module:
    """Replace all parameters, so that no norm gain is 1 and no bias 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 1.2 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.normal_(0 if name.endswith("bias") else 1, 0.3)
    return model.eval()


def of(hf: Any) -> MemoryCheckpoint:
    return MemoryCheckpoint(hf.config.to_dict(), hf.state_dict())


HRM = [
    {"num_hidden_layers": 1, "H_cycles": 1, "L_cycles": 1},
    {"num_hidden_layers": 3, "H_cycles": 3, "L_cycles": 2, "num_attention_heads": 3, "hidden_size": 24, "head_dim": 10},
    {"num_hidden_layers": 2, "embedding_scale": 3.0, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    {"num_hidden_layers": 2, "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
]


@pytest.mark.parametrize("changes", HRM)
def test_hrm_text_against_transformers(changes: dict[str, Any]):
    from transformers import HrmTextConfig, HrmTextForCausalLM

    base = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8}
    hf = redraw(HrmTextForCausalLM(HrmTextConfig(**base | changes)))
    model = load_model(of(hf))
    ids = torch.randint(0, 61, (2, 9))
    types = torch.tensor([[1] * 4 + [0] * 5, [1] * 2 + [0] * 7])
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    with torch.no_grad():
        assert_close(logits(model, input_ids=ids), hf(ids).logits)
        assert_close(logits(model, input_ids=ids, token_type_ids=types), hf(ids, token_type_ids=types).logits)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = hf(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(logits(model, input_ids=ids, attention_mask=mask)[mask.bool()], expected[mask.bool()])


def test_hrm_text_without_num_layers_per_stack():
    checkpoint = edited("hrm_text", num_layers_per_stack=None, num_hidden_layers=2, embedding_scale=None)
    assert_close(logits(load_model(checkpoint), **inputs("hrm_text", "H2L3")), golden("hrm_text")["H2L3/logits"])


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DECODERS = [
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 16}, "rms_norm_eps": 1e-5}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": YARN, "hidden_act": "gelu_pytorch_tanh"}),
    ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    ("qwen2", {"sliding_window": 3, "tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 10, "attention_bias": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ("smollm3", {"no_rope_layers": [1] * 4, "pad_token_id": 0}),
]


def decoder(model_type: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    base = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return redraw(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **base | changes)))


@pytest.mark.parametrize(("model_type", "changes"), DECODERS)
@pytest.mark.parametrize(("start", "stop"), [(1, 3), (0, 4)])
def test_an_ordinary_decoder_looped_once_is_itself(model_type: str, changes: dict[str, Any], start: int, stop: int):
    hf = decoder(model_type, **changes)
    checkpoint = of(hf)
    cfg = llama.looped_config(checkpoint.config, checkpoint.shapes, start=start, stop=stop)
    model = load_model(checkpoint, cfg=cfg)
    ids = torch.randint(0, 61, (2, 11))
    with torch.no_grad():
        assert_close(logits(model, input_ids=ids), hf(ids).logits)
    assert model.canonical_parameters()["embed.weight"].data_ptr() == hf.get_input_embeddings().weight.data_ptr()


def test_looping_a_range_repeats_its_layers():
    hf = decoder("llama")
    checkpoint = of(hf)
    cfg = llama.looped_config(checkpoint.config, checkpoint.shapes, start=1, stop=3, n_loops=3)
    ids = torch.randint(0, 61, (2, 7))
    found = logits(load_model(checkpoint, cfg=cfg), input_ids=ids)
    hf.model.layers = nn.ModuleList(hf.model.layers[i] for i in (0, 1, 2, 1, 2, 1, 2, 3))
    hf.config.num_hidden_layers = hf.model.config.num_hidden_layers = 8
    with torch.no_grad():
        assert_close(found, hf(ids, use_cache=False).logits)


def test_anchored_looping_follows_its_formula():
    hf = decoder("qwen3")
    checkpoint = of(hf)
    options = {"start": 1, "stop": 3, "n_loops": 3, "strategy": "anchored", "beta": 0.25}
    model = load_model(checkpoint, cfg=llama.looped_config(checkpoint.config, checkpoint.shapes, **options))
    assert model.cfg.anchor_steps == 3
    once = load_model(checkpoint, cfg=llama.looped_config(checkpoint.config, checkpoint.shapes, start=1, stop=3))
    ids = torch.randint(0, 61, (2, 7))
    with torch.no_grad():
        h = first = once(ids, stop=1).logits
        for _ in range(3):
            h = h + (once(inputs_embeds=h, start=1, stop=3).logits - h) / 3
        out = 0.25 * once(inputs_embeds=first, start=1, stop=3).logits + 0.75 * h
        assert_close(logits(model, input_ids=ids), once(inputs_embeds=out, start=3).logits)


@pytest.mark.parametrize(("start", "stop"), [(2, 2), (3, 1), (0, 5), (-1, 2)])
def test_a_range_outside_the_decoder(start: int, stop: int):
    checkpoint = of(decoder("llama"))
    with pytest.raises(LoopedError, match=r"start|layers"):
        llama.looped_config(checkpoint.config, checkpoint.shapes, start=start, stop=stop)


def test_an_ordinary_decoder_is_not_looped_by_itself():
    with pytest.raises(CheckpointError, match="loop_layers"):
        load_model(of(decoder("llama")))


def rms(x: Tensor, gain: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if gain is None else gain * x


def rope(x: Tensor, theta: float, pairs: bool) -> Tensor:
    """Rotate [batch, pos, head, dim] as complex numbers."""
    n, half = x.shape[1], x.shape[-1] // 2
    angle = torch.arange(n)[:, None] * theta ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(n, half), angle.float())[:, None]
    real, imaginary = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
    turned = torch.complex(real.contiguous(), imaginary.contiguous()) * turn
    parts = (turned.real, turned.imag)
    return torch.stack(parts, -1).flatten(-2) if pairs else torch.cat(parts, -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [batch, pos, head, dim]; key head j serves query heads j*g .. j*g+g-1."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)


def heads(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (-1, dim))


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    def one(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape) * (1.2 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3) + (len(shape) == 1)

    return {name: one(shape) for name, shape in shapes.items()}


LLAMA_LIKE = [
    {"layers": 2, "d": 24, "heads": 3, "kv": 1, "dim": 8, "ff": 20, "loops": 3},
    {"layers": 1, "d": 20, "heads": 5, "kv": 5, "dim": 6, "ff": 33, "loops": 5},
    {"layers": 3, "d": 32, "heads": 6, "kv": 2, "dim": 4, "ff": 16, "loops": 2},
]


@pytest.mark.parametrize("sizes", LLAMA_LIKE)
@pytest.mark.parametrize("family", ["ouro", "nanbeige"])
@pytest.mark.parametrize("transformers_5", [False, True])
def test_ouro_and_nanbeige_from_their_formulas(family: str, sizes: dict[str, int], transformers_5: bool):
    d, dim, ff, vocab = sizes["d"], sizes["dim"], sizes["ff"], 31
    q, kv = sizes["heads"] * dim, sizes["kv"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d)}
    shapes["model.norm.weight"] = (d,)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "ouro":
        norms += ["input_layernorm_2", "post_attention_layernorm_2"]
        shapes |= {"model.early_exit_gate.weight": (1, d), "model.early_exit_gate.bias": (1,)}
    for i in range(sizes["layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{norm}.weight": (d,) for norm in norms}
        shapes |= {f"{at}self_attn.{p}_proj.weight": (n, d) for p, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"{at}self_attn.o_proj.weight": (d, q), f"{at}mlp.down_proj.weight": (d, ff)}
        shapes |= {f"{at}mlp.gate_proj.weight": (ff, d), f"{at}mlp.up_proj.weight": (ff, d)}
    w = draw(shapes)
    config = {
        "model_type": family,
        "hidden_size": d,
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv"],
        "head_dim": dim,
        "intermediate_size": ff,
        "vocab_size": vocab,
        "total_ut_steps" if family == "ouro" else "num_loops": sizes["loops"],
        **({"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}} if transformers_5 else {"rope_theta": 700.0}),
    }
    ids = torch.randint(0, vocab, (2, 6))
    h = w["model.embed_tokens.weight"][ids]
    for _ in range(sizes["loops"]):
        for i in range(sizes["layers"]):
            p = {name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): tensor for name, tensor in w.items()}
            a = rms(h, p["input_layernorm"])
            parts = [heads(a @ p[f"self_attn.{part}_proj"].T, dim) for part in "qkv"]
            out = attend(rope(parts[0], 700.0, False), rope(parts[1], 700.0, False), parts[2]) @ p["self_attn.o_proj"].T
            h = h + (rms(out, p["input_layernorm_2"]) if family == "ouro" else out)
            m = rms(h, p["post_attention_layernorm"])
            out = (F.silu(m @ p["mlp.gate_proj"].T) * (m @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
            h = h + (rms(out, p["post_attention_layernorm_2"]) if family == "ouro" else out)
        h = rms(h, w["model.norm.weight"])
    assert_close(logits(load_model(MemoryCheckpoint(config, w)), input_ids=ids), h @ w["lm_head.weight"].T)


RAVEN = [
    {"parts": (1, 2, 1), "d": 24, "heads": 3, "kv": 3, "ff": 20, "loops": 3},
    {"parts": (3, 1, 2), "d": 40, "heads": 5, "kv": 5, "ff": 17, "loops": 2},
    {"parts": (1, 3, 2), "d": 24, "heads": 6, "kv": 2, "ff": 30, "loops": 4},
]


@pytest.mark.parametrize("sizes", RAVEN)
@pytest.mark.parametrize("block", ["huginn", "llama", "olmo"])
def test_huginn_and_retrofits_from_their_formulas(block: str, sizes: dict[str, Any]):
    d, n_q, n_kv, ff, vocab = sizes["d"], sizes["heads"], sizes["kv"], sizes["ff"], 31
    dim, biased = d // n_q, block == "huginn" and n_q == n_kv
    stacks = dict(zip(("prelude", "core_block", "coda"), sizes["parts"], strict=True))
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, d), "transformer.ln_f.weight": (d,)}
    shapes |= {"transformer.adapter.weight": (d, 2 * d)} | ({} if block == "huginn" else {"lm_head.weight": (vocab, d)})
    for at in [f"transformer.{stack}.{j}." for stack, n in stacks.items() for j in range(n)]:
        shapes |= {f"{at}norm_{i}.weight": (d,) for i in range(1, 5 if block == "huginn" else 3)}
        shapes |= {f"{at}attn.Wqkv.weight": ((n_q + 2 * n_kv) * dim, d), f"{at}attn.proj.weight": (d, n_q * dim)}
        shapes |= {f"{at}mlp.fc.weight": (2 * ff, d), f"{at}mlp.proj.weight": (d, ff)}
        shapes |= {f"{at}attn.qk_bias": (2, 1, n_q, dim)} if biased else {}
        if block == "olmo":
            shapes |= {f"{at}attn.q_norm.weight": (n_q * dim,), f"{at}attn.k_norm.weight": (n_kv * dim,)}
    w = draw(shapes)
    config = {
        "model_type": "huginn_raven",
        "n_embd": d,
        "n_heads": n_q,
        "num_key_value_heads": n_kv,
        "intermediate_size": ff,
        "padded_vocab_size": vocab,
        "n_layers_in_prelude": sizes["parts"][0],
        "n_layers_in_recurrent_block": sizes["parts"][1],
        "n_layers_in_coda": sizes["parts"][2],
        "mean_recurrence": sizes["loops"],
        "norm_eps": 1e-5,
        "rope_base": 300,
        "rope_theta": 700.0,
        "qk_bias": biased,
        "tie_embeddings": block == "huginn",
        "init_values": None if block == "huginn" else {"std": 0.01, "embed_scale": 1.0},
    }

    def run(h: Tensor, at: str) -> Tensor:
        p = {name.removeprefix(at).removesuffix(".weight"): tensor for name, tensor in w.items()}

        def attention(x: Tensor) -> Tensor:
            q, k, v = (x @ p["attn.Wqkv"].T).split([n_q * dim, n_kv * dim, n_kv * dim], -1)
            if block == "olmo":
                q, k = rms(q, p["attn.q_norm"], 1e-5), rms(k, p["attn.k_norm"], 1e-5)
            q, k, v = heads(q, dim), heads(k, dim), heads(v, dim)
            if biased:
                q, k = q + p["attn.qk_bias"][0, 0], k + p["attn.qk_bias"][1, 0]
            theta = 300 if block == "huginn" else 700.0
            return attend(rope(q, theta, block == "huginn"), rope(k, theta, block == "huginn"), v) @ p["attn.proj"].T

        def mlp(x: Tensor) -> Tensor:
            gate, up = (x @ p["mlp.fc"].T).chunk(2, -1)
            return (F.silu(gate) * up) @ p["mlp.proj"].T

        gains = [p.get(f"norm_{i}") for i in range(1, 5)]
        if block == "huginn":
            h = rms(attention(rms(h, gains[0], 1e-5)) + h, gains[1], 1e-5)
            return rms(mlp(rms(h, gains[2], 1e-5)) + h, gains[3], 1e-5)
        if block == "llama":
            h = h + attention(rms(h, gains[0], 1e-5))
            return h + mlp(rms(h, gains[1], 1e-5))
        h = h + rms(attention(h), gains[0], 1e-5)
        return h + rms(mlp(h), gains[1], 1e-5)

    ids = torch.randint(0, vocab, (2, 6))
    state = s = torch.randn(2, 6, d)
    e = w["transformer.wte.weight"][ids] * (math.sqrt(d) if block == "huginn" else 1)
    for j in range(stacks["prelude"]):
        e = run(e, f"transformer.prelude.{j}.")
    for _ in range(sizes["loops"]):
        s = torch.cat([s, e], -1) @ w["transformer.adapter.weight"].T
        for j in range(stacks["core_block"]):
            s = run(s, f"transformer.core_block.{j}.")
    s = rms(s, w["transformer.ln_f.weight"], 1e-5) if block == "huginn" else s
    for j in range(stacks["coda"]):
        s = run(s, f"transformer.coda.{j}.")
    expected = (
        rms(s, w["transformer.ln_f.weight"], 1e-5) @ w["transformer.wte.weight" if block == "huginn" else "lm_head.weight"].T
    )
    model = load_model(MemoryCheckpoint(config, w))
    assert_close(logits(model, input_ids=ids, initial_state=state), expected)
    std = math.sqrt(2 / (5 * d)) if block == "huginn" else 0.01
    assert model.cfg.noise_std == pytest.approx(std)


@pytest.mark.parametrize("sizes", RAVEN)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("plain", [False, True])
def test_parcae_from_its_formulas(sizes: dict[str, Any], softcap: float | None, plain: bool):
    d, n_q, n_kv, ff, vocab, width = sizes["d"], sizes["heads"], sizes["kv"], sizes["ff"], 31, 7
    dim = d // n_q
    stacks = dict(zip(("prelude", "core_block", "coda"), sizes["parts"], strict=True))
    places = [f"transformer.{stack}.{j}." for stack, n in stacks.items() for j in range(n)]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, d), "transformer.C.weight": (d, d)}
    shapes |= {f"transformer.{norm}.weight": (d,) for norm in ("ln_f", *(() if plain else ("ln_prelude",)))}
    shapes |= {f"transformer.adapter.{name}": (d,) for name in ("A_log", "dt_bias")} | {"transformer.adapter.B": (d, d)}
    shapes |= {"lm_head.weight": (vocab, d)} if plain else {}
    for i, at in enumerate(places):
        shapes |= {f"{at}norm_{k}.weight": (d,) for k in (1, 2)}
        shapes |= {f"{at}attn.c_{p}.weight": (n * dim, d) for p, n in (("q", n_q), ("k", n_kv), ("v", n_kv))}
        shapes |= {f"{at}attn.c_proj.weight": (d, d), f"{at}mlp.fc.weight": (ff, d), f"{at}mlp.proj.weight": (d, ff)}
        if i % 2 == 0 or i == 1:  # layer 1 has a gate without a table
            shapes[f"{at}attn.ve_gate.weight"] = (n_kv, width)
        if i % 2 == 0 or i == 3:  # layer 3 has a table without a gate
            shapes[f"value_embeds.{i}.weight"] = (vocab, n_kv * dim)
    w = draw(shapes)
    config = {
        "_class_name": "ParcaeConfig",
        "n_embd": d,
        "num_attention_heads": n_q,
        "num_key_value_heads": n_kv,
        "intermediate_size": ff,
        "padded_vocab_size": vocab,
        "n_layers_in_prelude": sizes["parts"][0],
        "n_layers_in_recurrent_block": sizes["parts"][1],
        "n_layers_in_coda": sizes["parts"][2],
        "mean_recurrence": sizes["loops"],
        "logit_softcap": softcap,
        "rope_settings": {"rope_base": 300},
        **({"prelude_norm": False, "qk_norm": False, "tie_embeddings": False} if plain else {}),
    }
    ids = torch.randint(0, vocab, (2, 6))

    def run(h: Tensor, i: int) -> Tensor:
        p = {name.removeprefix(places[i]).removesuffix(".weight"): tensor for name, tensor in w.items()}
        a = rms(h, p["norm_1"], 1e-5)
        q, k, v = (heads(a @ p[f"attn.c_{part}"].T, dim) for part in "qkv")
        if i % 2 == 0:
            gate = 2 * torch.sigmoid(a[..., :width] @ p["attn.ve_gate"].T)
            v = v + gate[..., None] * heads(w[f"value_embeds.{i}.weight"][ids], dim)
        q, k = rope(q, 300, True), rope(k, 300, True)
        if not plain:
            q, k = (rms(x, eps=torch.finfo(x.dtype).eps) for x in (q, k))
        h = h + attend(q, k, v) @ p["attn.c_proj"].T
        return h + (0.5 * F.relu(rms(h, p["norm_2"], 1e-5) @ p["mlp.fc"].T) ** 2) @ p["mlp.proj"].T

    n_prelude, n_core, n_coda = sizes["parts"]
    e = w["transformer.wte.weight"][ids]
    for i in range(n_prelude):
        e = run(e, i)
    e = e if plain else rms(e, w["transformer.ln_prelude.weight"], 1e-5)
    state = s = torch.randn(2, 6, d)
    step = torch.log1p(w["transformer.adapter.dt_bias"].exp())
    for _ in range(sizes["loops"]):
        s = torch.exp(-step * w["transformer.adapter.A_log"].exp()) * s + step * (e @ w["transformer.adapter.B"].T)
        for i in range(n_prelude, n_prelude + n_core):
            s = run(s, i)
    s = s @ w["transformer.C.weight"].T
    for i in range(n_prelude + n_core, n_prelude + n_core + n_coda):
        s = run(s, i)
    expected = rms(s, w["transformer.ln_f.weight"], 1e-5) @ w["lm_head.weight" if plain else "transformer.wte.weight"].T
    expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
    assert_close(logits(load_model(MemoryCheckpoint(config, w)), input_ids=ids, initial_state=state), expected)


REFUSED = [
    ("parcae", {"clip_qkv": 8.0}),
    ("parcae", {"center_attention": True}),
    ("parcae", {"injection_type": "linear"}),
    ("parcae", {"recurrent_embedding_dimension": 32}),
    ("parcae", {"use_abacus": True}),
    ("parcae", {"init_strategy": "takase"}),
    ("parcae", {"mup_model_scaling_factor": 2}),
    ("parcae", {"mlp_class_name": "GatedMLP"}),
    ("parcae", {"rope_settings": {"rope_condense_ratio": 2}}),
    ("nanbeige", {"enable_mhc": True}),
    ("nanbeige", {"insert_ngram_layer_idx": [0]}),
    ("ouro", {"use_sliding_window": True}),
    ("ouro", {"hidden_act": "mish"}),
    ("ouro", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("ouro", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}),
    ("ouro", {"hidden_size": None}),
    ("ouro", {"num_attention_heads": 3}),
    ("huginn", {"bias": True}),
    ("huginn", {"test_time_noise": 0.1}),
    ("huginn", {"num_key_value_heads": 2}),
    ("huginn", {"n_embd": None}),
    ("retrofit_llama", {"init_values": None}),
    ("retrofit_llama", {"rope_theta": None}),
]


@pytest.mark.parametrize(("family", "changes"), REFUSED)
def test_options_that_are_not_implemented_are_refused_by_name(family: str, changes: dict[str, Any]):
    key, value = next(iter(changes.items()))
    named = {"hidden_size": "hidden_size", "num_attention_heads": "n_heads=3"}.get(key, key.split("_")[0])
    with pytest.raises(
        CheckpointError, match=named if value is None or key == "num_attention_heads" else "implemented|supported"
    ):
        load_model(edited(family, **changes))


def test_no_rope_layers_are_refused():
    checkpoint = of(decoder("smollm3", pad_token_id=0))
    with pytest.raises(CheckpointError, match="no_rope_layers"):
        llama.looped_config(checkpoint.config, checkpoint.shapes, start=0, stop=1)


def test_loop_counts_of_nanbeige():
    assert load_model(edited("nanbeige", loop_loss_weights=[0.5, 0.5])).cfg.n_loops == 3
    assert load_model(edited("nanbeige", enable_double_loop_split=True)).cfg.n_loops == 1
    assert load_model(edited("nanbeige", num_loops=None)).cfg.n_loops == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_detection(family: str):
    checkpoint = open_checkpoint(GOLDEN / family)
    module = families.detect(checkpoint.config, checkpoint.shapes)
    cfg = module.looped_config(checkpoint.config, checkpoint.shapes)
    assert cfg.family == family.split("_")[0] or cfg.family == family
    assert LoopedConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    with torch.device("meta"):
        assert set(module.sources(cfg, checkpoint.shapes)) == set(LoopedModel(cfg).parameter_slots)


def test_an_unknown_family():
    with pytest.raises(CheckpointError, match=r"'gpt2'.*Ouro.*loop_layers.*trace"):
        families.detect({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, {})


def test_detection_tells_huginn_from_retrofits_by_tensors():
    config = {"model_type": "huginn_raven"}
    assert families.detect(config, {"transformer.prelude.0.norm_3.weight": (4,)}) is huginn
    assert families.detect(config, {"transformer.prelude.0.norm_1.weight": (4,)}) is not huginn
    assert families.detect({"model_type": "ouro"}, {}) is ouro
