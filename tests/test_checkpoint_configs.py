"""Keys of config.json count, are known notes, or are refused with what to do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from zoo import CHECKPOINTS, GOLDEN, golden_tensors, with_config

from tl_looped import LoopedBridge
from tl_looped.analysis import exit_steps
from tl_looped.checkpoints import MemoryCheckpoint, load_model, make_plan
from tl_looped.errors import CheckpointError
from tl_looped.exits import Gate
from tl_looped.info import checkpoint_text


@torch.no_grad()
def config_logits(checkpoint: MemoryCheckpoint) -> Tensor:
    return load_model(checkpoint)(torch.tensor([[3, 1, 4, 1, 5]])).logits


def test_ouro_reads_the_last_loop_or_refuses() -> None:
    for threshold in (0.3, 0.999, 0, -1.0):
        with pytest.raises(
            CheckpointError, match=rf"early_exit_threshold={threshold:g}, .*Set 1.0 .*Gate\({max(threshold, 0):g}\)"
        ):
            load_model(with_config("ouro", early_exit_threshold=threshold))
    for step in (0, 1, 3):
        with pytest.raises(CheckpointError, match=rf"early_exit_step={step}, .*n_loops={step + 1}"):
            load_model(with_config("ouro", early_exit_step=step))
    # The published forward's own logits, with the released threshold and with none, are those of the last loop in fp32.
    golden = load_file(GOLDEN / "ouro" / "golden.safetensors")
    for changes in ({}, {"early_exit_threshold": None}, {"early_exit_threshold": 1.5, "early_exit_step": -1}):
        model = load_model(with_config("ouro", **changes))
        with torch.no_grad():
            found = model(golden["input_ids"]).logits
        torch.testing.assert_close(found, golden["R4/logits"], rtol=1e-5, atol=2e-4)
    # Where the sum rounds to 1: half-way between 1 and the number below it, which is 2^-8 away in bf16 and 2^-24 in fp32.
    assert torch.tensor(1 - 2**-9).bfloat16() == 1 and torch.tensor(1 - 2**-9 - 2**-12).bfloat16() < 1
    assert (
        torch.tensor(1 - 2**-25, dtype=torch.float64).float() == 1 and torch.tensor(1 - 2**-24, dtype=torch.float64).float() < 1
    )


def test_the_policy_that_ouros_refusal_names_reads_the_loops_that_the_published_forward_reads() -> None:
    golden = load_file(GOLDEN / "ouro" / "golden.safetensors")
    at_loop = torch.stack([golden[f"R4/logits_exit_at_step{t}"] for t in range(4)])
    distance = (
        (at_loop - golden["R4/logits_exit_threshold0.3"]).abs().amax(-1)
    )  # [loop, batch, pos]; 0 at the loop that was read
    assert distance.amin(0).max() == 0 and (distance == 0).sum() == 24
    found = exit_steps(LoopedBridge.from_pretrained(GOLDEN / "ouro"), golden["input_ids"], policies=Gate(0.3), verbose=False)
    assert (found.passes[0][0] - 1).tolist() == distance.argmin(0).tolist()


# Arithmetic that another decoder has under the key, and the value that means: none.
OTHER_ARITHMETIC = [
    ("logit_scale", 0.5, 1.0),
    ("logits_scaling", 8, 1),
    ("embedding_multiplier", 12.0, 1.0),
    ("residual_multiplier", 0.2, 1.0),
    ("attention_multiplier", 0.01, None),
    ("final_logit_softcapping", 30.0, None),
    ("attn_logit_softcapping", 50.0, 0),
    ("query_pre_attn_scalar", 256, None),
    ("partial_rotary_factor", 0.5, 1.0),
    ("is_causal", False, True),
    ("num_local_experts", 8, 0),
    ("attention_sinks", True, False),
    ("layer_types", ["sliding_attention"] * 3, ["full_attention"] * 3),
    ("no_rope_layers", [1, 0, 1], []),
    ("attention_chunk_size", 64, None),
    ("quantization_config", {"quant_method": "bitsandbytes"}, None),
    ("use_parallel_residual", True, False),
]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_arithmetic_that_no_family_has_is_refused_in_every_family(checkpoint: str) -> None:
    experts = ["layer_types", "final_logit_softcapping", "num_local_experts"]
    own = {"dory": ["layer_types"], "inkling2_loop": experts}.get(checkpoint, [])
    others = [row for row in OTHER_ARITHMETIC if row[0] not in own]
    for key, value, _ in others:
        with pytest.raises(CheckpointError, match=rf"{key}=.*not implemented"):
            make_plan(with_config(checkpoint, **{key: value}))
    off = {key: neutral for key, _, neutral in others}
    assert torch.equal(config_logits(with_config(checkpoint, **off)), config_logits(with_config(checkpoint)))


@pytest.mark.parametrize(
    ("checkpoint", "changes"),
    [
        ("huginn", {"init_values": {"std": 0.3}}),
        ("huginn", {"init_values": {"embed_scale": 1.0}}),
        *[(name, {key: "other"}) for name in ("huginn", "retrofit_olmo") for key in ("state_init", "injection_type")],
        *[(name, {key: "Other"}) for name in ("huginn", "retrofit_llama") for key in ("block_class_name", "norm_class_name")],
        ("huginn", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("parcae", {"state_init": "normal"}),
        ("parcae", {"simple_ops": True}),
        ("parcae", {"logit_scale": 2.0}),
        ("huginn", {"tie_word_embeddings": False}),
        ("parcae", {"mup_model_scaling_factor": True}),
        ("parcae", {"model_class_name": "Other"}),
        ("parcae", {"test_time_noise": 0.1}),
        ("ouro", {"use_weighted_exit": True}),
        ("ouro", {"rope_parameters": {"rope_theta": 10.0, "factor": 2.0}, "rope_scaling": {"rope_theta": 10.0, "factor": 4.0}}),
        ("nanbeige", {"enable_hyper_connection": True}),
    ],
)  # fmt: skip
def test_options_of_the_published_classes_are_implemented_or_refused(checkpoint: str, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        make_plan(with_config(checkpoint, **changes))


def test_options_of_the_published_classes_that_are_implemented_count() -> None:
    """The numbers of a retrofit's state, by the fields that they become; those of Huginn follow from the width (48)."""
    cfg = make_plan(with_config("retrofit_llama", init_values={"std": 0.3, "embed_scale": 2.0})).cfg
    assert (cfg.noise_std, cfg.noise_scale, cfg.embed_scale) == (0.3, 2.0, 2.0)
    cfg = make_plan(with_config("huginn", init_values={"std": math.sqrt(2 / 240), "embed_scale": math.sqrt(48)})).cfg
    assert (cfg.noise_std, cfg.noise_scale) == (math.sqrt(2 / 240), math.sqrt(48))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_key_that_nobody_knows_is_named_and_a_note_is_not(checkpoint: str) -> None:
    with pytest.warns(UserWarning, match=r"frobnicate=3.*does not read"):
        make_plan(with_config(checkpoint, frobnicate=3))
    make_plan(
        with_config(checkpoint, unsloth_version="2026.1", _commit_hash="0", use_cache=True, eos_token_id=[1, 2], dtype="x")
    )


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "adapters.safetensors"])
def test_an_adapter_beside_the_weights_is_refused(file: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "ouro", tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text("{}")
    for load in (LoopedBridge.from_pretrained, checkpoint_text):
        with pytest.raises(CheckpointError, match=rf"an adapter \({file}\).*merge_and_unload"):
            load(tmp_path)


def test_think_at_hard_is_not_read_as_the_decoder_of_its_first_iteration(tmp_path: Path) -> None:
    """Its config.json and weights are those of a plain Qwen3."""
    shutil.copytree(GOLDEN / "ouro", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tah_config.json").write_text("{}")
    for load in (LoopedBridge.from_pretrained, checkpoint_text):
        with pytest.raises(CheckpointError, match=r"a Think-at-Hard model \(tah_config.json\).*first iteration alone.*trace"):
            load(tmp_path)


WRONG_KINDS = [
    ("nanbeige", "skip_loop_final_norm", ["false", 0, 1]),
    ("nanbeige", "loop_loss_weights", [3, ["a"], {}]),
    ("huginn", "rope_base", [0, True, "7", -1.0, math.inf, math.nan]),
    ("retrofit_olmo", "rope_base", [0, True, "7"]),
    ("huginn", "qk_bias", ["false", 1]),
    ("parcae", "rope_settings", [{"rope_base": 0}, {"rope_base": True}, {"rope_base": "7"}, {"use_rope": "no"}, 7, []]),
    ("parcae", "logit_softcap", [0, -1.0, True, "9"]),
    ("parcae", "qk_norm", ["no", 2]),
    ("retrofit_llama", "init_values", [{"std": True, "embed_scale": 1.0}, {"std": 0, "embed_scale": 1.0}, "x", [1]]),
    ("retrofit_llama", "rope_scaling", [{"type": "linear", "factor": "2"}, {"rope_type": "llama3", "factor": 8.0}, "llama3"]),
    ("ouro", "rope_scaling", [{"rope_type": "linear", "factor": 0}, {"rope_type": "yarn", "factor": 2.0, "mscal": 1.0}, [2.0]]),
    ("ouro", "rms_norm_eps", [10**400, 10**5000, "1e-6", True, -1e-6, math.nan, [1e-6]]),
    ("ouro", "tie_word_embeddings", ["false", 0]),
    ("ouro", "total_ut_steps", [0, -1, 2.0, "4", True, [4], 10**30, 10**5000]),
    ("hrm_text", "prefix_lm", ["false", 1]),
    ("hrm_text", "embedding_scale", ["7", True, 10**400]),
    ("hrm_text", "initializer_range", [0, "a"]),
    *[(name, "norm_eps", [10**400, True, "0"]) for name in ("huginn", "parcae", "retrofit_olmo")],
]  # fmt: skip


@pytest.mark.parametrize(("checkpoint", "key", "values"), WRONG_KINDS)
def test_a_value_of_the_wrong_kind_is_refused(checkpoint: str, key: str, values: list[Any]) -> None:
    named = {"init_values": "std|init_values|embed_scale", "rope_settings": "rope_base|use_rope|rope_settings"}.get(key, key)
    for value in values:
        changes = {"embedding_scale": None} if key == "initializer_range" else {}
        with pytest.raises(CheckpointError, match=rf"({named}|mscal).*(must be|does not have)") as error:
            make_plan(with_config(checkpoint, **changes, **{key: value}))
        assert len(str(error.value)) < 500


WRAPPERS = {
    "_orig_mod.{}": r"'_orig_mod.' is left .* by torch.compile.*model._orig_mod",
    "module.{}": "DistributedDataParallel.*model.module",
    "module._orig_mod.{}": "torch.compile",
    "base_model.model.{}": "PEFT.*merge_and_unload",
    "_fsdp_wrapped_module.{}": "FullyShardedDataParallel",
    "net.{}": r"names begin with 'net.'.* wraps the model",
}


@pytest.mark.parametrize("checkpoint", ["ouro", "hrm_text", "huginn", "parcae"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_names_that_a_wrapper_left_are_explained(name: str, checkpoint: str) -> None:
    tensors = {name.format(at): tensor for at, tensor in golden_tensors(checkpoint).items()}
    config = json.loads((GOLDEN / checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError, match=WRAPPERS[name]):
        load_model(MemoryCheckpoint(config, tensors))


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default"])
def test_the_names_of_an_adapter_that_is_not_merged_are_explained(part: str) -> None:
    config = json.loads((GOLDEN / "ouro" / "config.json").read_text())
    at = "model.layers.0.self_attn.q_proj"
    tensors = golden_tensors("ouro") | {f"{at}.{part}.weight": torch.zeros(32, 32)}
    with pytest.raises(CheckpointError, match=r"q_proj.*by PEFT.*merge_and_unload"):
        load_model(MemoryCheckpoint(config, tensors))
