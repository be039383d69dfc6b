"""LoopUS: its gate, other names and bases of its checkpoints, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from zoo import GOLDEN, golden_tensors, random_bridge, random_tokens, with_config

from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError


def test_an_open_gate_is_a_plain_loop_and_a_closed_one_no_loop() -> None:
    bridge = random_bridge("loopus", torch.float64)
    tokens = random_tokens()
    opened = bridge.run_with_hooks(tokens, fwd_hooks=[("loops.*.gate.hook_alpha", lambda alpha, hook: torch.ones_like(alpha))])
    plain = bridge.plain.cfg.replace(loop="repeat", options={}, exit_gate=False)
    naive = type(bridge).from_config(plain).to(torch.float64)
    for name, parameter in bridge.plain.canonical_parameters().items():
        if not name.startswith(("gate.", "exit_gate.")):
            naive.plain.set_parameter(name, parameter)
    torch.testing.assert_close(opened, naive(tokens), atol=1e-9, rtol=0)
    closed = [("loops.*.gate.hook_alpha", lambda alpha, hook: torch.zeros_like(alpha))]
    with bridge.hooks(fwd_hooks=closed):
        _, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(cache["loops.2.hook_out"], cache["loops.0.hook_state"], atol=0, rtol=0)


def test_older_checkpoints_call_the_loop_a_plateau() -> None:
    data = load_file(GOLDEN / "loopus" / "golden.safetensors")
    tensors = {name.replace("reasoning.", "plateau."): tensor for name, tensor in golden_tensors("loopus").items()}
    model = load_model(MemoryCheckpoint(with_config("loopus").config, tensors))
    with torch.no_grad():
        torch.testing.assert_close(model(data["input_ids"]).logits, data["R4/logits"], atol=2e-4, rtol=0)


def test_the_base_may_be_a_llama_with_a_config_of_transformers_4() -> None:
    config = dict(with_config("loopus").config)
    base = {key: value for key, value in config["base_config_dict"].items() if key not in ("rope_parameters", "layer_types")}
    config["base_config_dict"] = base | {"model_type": "llama", "rope_theta": 5000.0}
    tensors = {name: t for name, t in golden_tensors("loopus").items() if "q_norm" not in name and "k_norm" not in name}
    cfg = load_model(MemoryCheckpoint(config, tensors)).cfg
    assert (cfg.qk_norm, cfg.rope_theta, cfg.n_prelude, cfg.n_core, cfg.n_coda) == ("none", 5000.0, 1, 3, 1)


def test_layers_in_another_order_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"all of its layers in their order"):
        load_model(with_config("loopus", reasoning_layer_indices=[1, 3, 2]))
