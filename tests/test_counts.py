"""Counts of a config are compared with the tensors before anything is built."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import CHECKPOINTS, FEW, GOLDEN, ZOO, golden_tensors, random_bridge, slow_but, with_config

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.checkpoints import MemoryCheckpoint, load_model, make_plan
from tl_looped.errors import CheckpointError
from tl_looped.info import checkpoint_text
from tl_looped.model import LoopedModel
from tl_looped.model.parameters import parameter_shapes

# Elsewhere mean_recurrence.
LOOP_COUNTS = {
    "ouro": "total_ut_steps",
    "nanbeige": "num_loops",
    "hrm_text": "H_cycles",
    "dory": "n_recurrent_loops",
    "loopus": "N",
}


COUNTS = {
    "ouro": "num_hidden_layers total_ut_steps hidden_size head_dim intermediate_size vocab_size num_attention_heads",
    "nanbeige": "num_hidden_layers num_loops hidden_size head_dim num_key_value_heads num_attention_heads",
    "hrm_text": "num_layers_per_stack num_hidden_layers H_cycles L_cycles head_dim intermediate_size vocab_size",
    "huginn": "mean_recurrence n_layers_in_prelude n_layers_in_recurrent_block n_layers_in_coda n_embd head_dim",
    "retrofit_llama": "mean_recurrence n_layers_in_prelude n_layers_in_recurrent_block n_layers_in_coda head_dim",
    "retrofit_olmo": "mean_recurrence n_layers_in_prelude n_layers_in_recurrent_block n_layers_in_coda n_embd",
    "dory": "n_recurrent_loops n_input_layers n_recurrent_layers n_output_layers hidden_size head_dim vocab_size",
    "loopus": "N",
    "parcae": "mean_recurrence n_layers_in_prelude n_layers_in_recurrent_block n_layers_in_coda n_embd padded_vocab_size",
}  # fmt: skip


@contextmanager
def few_resources() -> Iterator[None]:
    """2 seconds of the processor and 200 MB."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        assert time.process_time() - started < 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes on Linux


@pytest.mark.parametrize("checkpoint", COUNTS)
def test_counts_are_compared_with_the_tensors_before_anything_is_built(checkpoint: str) -> None:
    for key in COUNTS[checkpoint].split():
        for value in (1000, 2**31 - 1):
            if (key, value) == ("num_hidden_layers", value) and checkpoint == "hrm_text":
                continue  # counts attention invocations there, and decides nothing beside num_layers_per_stack
            with few_resources(), pytest.raises(CheckpointError) as error:
                load_model(with_config(checkpoint, **{key: value}))
            assert "cannot be understood" not in str(error.value) and len(str(error.value)) < 5000
    loops = LOOP_COUNTS.get(checkpoint, "mean_recurrence")
    changes = {loops: 10**9} | ({"L_cycles": 10**9} if checkpoint == "hrm_text" else {})
    asked = {"n_loops": 2} | ({"l_cycles": 2} if checkpoint == "hrm_text" else {})
    with pytest.raises(CheckpointError, match=r"n_loops=1000000000.* virtual layers.* Pass n_loops="), few_resources():
        load_model(with_config(checkpoint, **changes))
    with few_resources():
        assert load_model(with_config(checkpoint, **changes), **asked).cfg.n_loops == 2
        assert (
            make_plan(with_config(checkpoint, **changes)).cfg.schedule.n_loops_of("H" if "L_cycles" in changes else "core")
            == 10**9
        )
    if checkpoint == "hrm_text":
        with pytest.raises(CheckpointError, match="l_cycles=1000000000"), few_resources():
            load_model(with_config(checkpoint, **changes), n_loops=2)


def test_a_list_of_a_million_loops_and_a_config_that_says_so_are_described_at_once(tmp_path: Path) -> None:
    for length, says in ((1000, "n_loops=1001"), (10**6, "loop_loss_weights=.*at most")):
        with pytest.raises(CheckpointError, match=says), few_resources():
            load_model(with_config("nanbeige", loop_loss_weights=[0.5] * length))
    shutil.copytree(GOLDEN / "ouro", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"total_ut_steps": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with few_resources():  # 3 layers each
        assert "3000000000 virtual layers" in (found := checkpoint_text(tmp_path)) and "loops.{0..999999999}.blocks" in found
    schedule = LoopedConfig(d_model=8, n_heads=2, d_vocab=9, n_core=7, n_loops=10**9, n_prelude=3, n_coda=2).schedule
    with few_resources():
        assert schedule.n_layers == 7 * 10**9 + 5 and schedule.first_coda_layer == 7 * 10**9 + 3
        assert schedule.name(3 + 7 * 999 + 4, "hook_in") == "loops.999.blocks.4.hook_in"
        assert schedule.site(-1) == ("coda", None, 1) and schedule.pass_of_loop(-1).first == 3 + 7 * (10**9 - 1)
        assert (
            schedule.names.expand("loops.-1.blocks.6.x") == [f"blocks.{7 * 10**9 + 2}.x"]
            and schedule.site(2).stack == "prelude"
        )


def test_own_format_and_looped_decoders_count_too() -> None:
    model = random_bridge("huginn")
    tensors = {name: p.detach() for name, p in model.original_model.canonical_parameters().items()}
    for field in ("n_core", "n_prelude", "n_coda", "n_loops", "d_model", "d_head", "d_mlp", "d_vocab"):
        config = {"model_type": "tl_looped", "looped_config": model.looped_cfg.to_dict() | {field: 10**9}}
        with pytest.raises(CheckpointError), few_resources():
            load_model(MemoryCheckpoint(config, tensors))
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=3)
    )
    for key in ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim"):
        before = getattr(llama.config, key)
        setattr(llama.config, key, 10**9)
        with pytest.raises(CheckpointError), few_resources():
            LoopedBridge.loop_layers(llama, start=1, stop=2, n_loops=2)
        setattr(llama.config, key, before)
    llama.config.quantization_config = {"quant_method": "gguf"}  # as in a model that transformers has dequantised
    assert LoopedBridge.loop_layers(llama, start=1, stop=2, n_loops=2).n_loops == 2
    llama.config.logit_scale = 0.5
    with pytest.raises(CheckpointError, match=r"logit_scale=0\.5"):
        LoopedBridge.loop_layers(llama, start=1, stop=2, n_loops=2)


@pytest.mark.parametrize("structure", ZOO)
def test_the_shapes_that_are_compared_are_those_of_the_model(structure: str) -> None:
    for changes in ({}, {"biases": ("q", "k", "v", "o", "in", "out")}):
        cfg = ZOO[structure].replace(**changes)
        built = {name: tuple(p.shape) for name, p in LoopedModel(cfg).canonical_parameters().items()}
        assert dict(parameter_shapes(cfg)) == built


@pytest.mark.parametrize("total", [4, 2, 16, None])  # 2 layers in each of two stacks; 2 H and 3 L cycles
@pytest.mark.parametrize("file", ["model.safetensors", "model_unfused.safetensors"])
def test_hrm_text_counts_the_layers_in_the_tensors(total: int | None, file: str) -> None:
    config = json.loads((GOLDEN / "hrm_text" / "config.json").read_text()) | {"num_hidden_layers": total}
    del config["num_layers_per_stack"]
    golden = load_file(GOLDEN / "hrm_text" / "golden.safetensors")
    with torch.no_grad():
        found = load_model(MemoryCheckpoint(config, load_file(GOLDEN / "hrm_text" / file)))(golden["input_ids"]).logits
    torch.testing.assert_close(found, golden["H2L3/logits"], rtol=1e-5, atol=2e-4)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=7.*2 layers in model.L_module.*num_layers_per_stack"):
        load_model(MemoryCheckpoint(config | {"num_hidden_layers": 7}, load_file(GOLDEN / "hrm_text" / file)))


ANY_VALUE = st.one_of(
    st.none(), st.booleans(), st.sampled_from([0, 1, -1, 2, 3, 7, 1000, 10**6, 2**31 - 1, 2**63, 10**30, 10**400, 10**5000]),
    st.floats(), st.sampled_from(["", "7", "false", "silu", "linear", "x" * 5000]),
    st.lists(st.one_of(st.none(), st.integers(-2, 5), st.floats(), st.just("full_attention")), max_size=4),
    st.dictionaries(
        st.sampled_from("rope_type type factor rope_theta std embed_scale rope_base use_rope".split()),
        st.one_of(st.integers(-1, 10**30), st.floats(), st.sampled_from(["yarn", "linear", "llama3"]), st.none()),
        max_size=4,
    ),
)  # fmt: skip


MORE_KEYS = (
    "early_exit_step rope_parameters rope_scaling enable_double_loop_split embedding_scale partial_rotary_factor layer_types "
    "logit_scale frobnicate num_local_experts quantization_config"
).split()


@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, *slow_but(FEW, ZOO)])
@pytest.mark.filterwarnings("ignore:config.json has")
def test_any_config_loads_or_is_refused_in_time(checkpoint: str) -> None:
    if checkpoint in CHECKPOINTS:
        config = json.loads((GOLDEN / checkpoint / "config.json").read_text())
        keys, tensors = [*config, *MORE_KEYS], golden_tensors(checkpoint)
    else:
        config = ZOO[checkpoint].to_dict()
        keys = list(config)
        tensors = {name: torch.ones(shape) for name, shape in parameter_shapes(ZOO[checkpoint])}

    @settings(max_examples=60, derandomize=True, database=None)
    @given(st.dictionaries(st.sampled_from(keys), ANY_VALUE, min_size=1, max_size=2))
    def mutate(changes: dict[str, Any]) -> None:
        changed = config | changes
        if checkpoint in ZOO:
            changed = {"model_type": "tl_looped", "looped_config": changed}
        with few_resources():
            try:
                load_model(MemoryCheckpoint(changed, tensors))
            except CheckpointError as error:
                assert "cannot be understood" not in str(error) and len(str(error)) < 6000

    mutate()
