"""Dory: the three layouts of its tensors, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from zoo import GOLDEN, golden_tensors, with_config

from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError


def check(tensors: dict[str, Tensor]) -> None:
    data = load_file(GOLDEN / "dory" / "golden.safetensors")
    model = load_model(MemoryCheckpoint(with_config("dory").config, tensors))
    with torch.no_grad():
        torch.testing.assert_close(model(data["input_ids"]).logits, data["R2/logits"], atol=2e-4, rtol=0)


def test_tensors_named_by_layers_as_transformers_saves_them() -> None:
    check(load_file(GOLDEN / "dory" / "model_saved.safetensors"))


def test_tensors_named_as_in_the_state_dict() -> None:
    saved = load_file(GOLDEN / "dory" / "model_saved.safetensors")
    names = {name: name.replace("backbone.embeddings", "model.embed_tokens").replace("backbone.", "model.") for name in saved}
    check({ours.replace("self_attn.g_proj", "self_attn.gate_proj"): saved[name] for name, ours in names.items()})


def test_counts_may_be_those_of_layers() -> None:
    """A config.json whose layer_types has no "mlp" counts layers, not blocks."""
    config = dict(with_config("dory").config)
    counts = ("num_hidden_layers", "n_input_layers", "n_recurrent_layers", "n_output_layers")
    config |= {key: config[key] // 2 for key in counts} | {"layer_types": config["layer_types"][::2]}
    tensors = golden_tensors("dory")
    by_blocks, by_layers = (load_model(MemoryCheckpoint(c, tensors)).cfg for c in (with_config("dory").config, config))
    assert by_blocks == by_layers and by_layers.n_core == 3


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"recurrent_kv_cache_mode": "last_loop"}, "recurrent_kv_cache_mode='last_loop'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"n_output_layers": 4}, "they must agree"),
        ({"hybrid_layer_pattern": "S-S-"}, "format 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}, "rope_type='yarn'"),
        ({"rope_parameters": {"chunked_attention": {}}}, "chunked_attention"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        load_model(with_config("dory", **changes))
