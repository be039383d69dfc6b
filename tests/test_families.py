"""Every family against its reference: golden activations, transformers' own classes, and formulas written out below."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_runs import FAMILIES, assert_close, edited, golden, inputs, load_run, logits, runs
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo import GOLDEN

from tl_looped import LoopedError, families
from tl_looped.checkpoints import MemoryCheckpoint, load_model, open_checkpoint
from tl_looped.errors import CheckpointError
from tl_looped.families import huginn, llama, ouro
from tl_looped.model import LoopedModel
from tl_looped.model.config import LoopedConfig
from tl_looped.schedule import Site


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
