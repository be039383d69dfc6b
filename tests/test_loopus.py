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


@torch.no_grad()
def test_a_llama_base_computes_what_its_own_layers_do_behind_the_gate() -> None:
    """The layers are those of transformers; the gate and the order of passes are written here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 53}
    base = LlamaConfig(**sizes, num_hidden_layers=6, max_position_embeddings=32, rms_norm_eps=1e-5, attn_implementation="eager")
    llama = LlamaForCausalLM(base).double().eval()
    parts = [("encoder", range(2)), ("reasoning", range(2, 5)), ("decoder", range(5, 6))]
    tensors = {"encoder.embed_tokens.weight": llama.model.embed_tokens.weight, "decoder.norm.weight": llama.model.norm.weight}
    tensors |= {"decoder.lm_head.weight": llama.lm_head.weight}
    for part, layers in parts:
        for j, i in enumerate(layers):
            tensors |= {f"{part}.layers.{j}.{name}": p for name, p in llama.model.layers[i].named_parameters()}
    down, up = torch.randn(2, 24, dtype=torch.float64), torch.randn(24, 2, dtype=torch.float64)
    bias, a_log = torch.randn(24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    gate = {"dt_input_proj.weight": down, "delta_proj.weight": up, "delta_proj.bias": bias, "A_log": a_log}
    tensors |= {f"reasoning.gate.{name}": tensor for name, tensor in gate.items()}
    config = {"model_type": "lds", "base_config_dict": base.to_dict(), "N": 3, "hidden_size": 24, "vocab_size": 53}
    config |= {f"{part}_layer_indices": [*layers] for part, layers in parts}
    tokens = torch.randint(53, (2, 7))

    positions = torch.arange(7)[None]
    rope = llama.model.rotary_emb(llama.model.embed_tokens(tokens), positions)
    causal = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]

    def run(h: torch.Tensor, layers: range) -> torch.Tensor:
        for i in layers:
            h = llama.model.layers[i](h, attention_mask=causal, position_ids=positions, position_embeddings=rope)
        return h

    h = run(llama.model.embed_tokens(tokens), parts[0][1])
    for _ in range(3):
        u = run(h, parts[1][1])
        alpha = torch.exp(-torch.nn.functional.softplus((u - h) @ down.T @ up.T + bias) * a_log.exp())
        h = alpha * u + (1 - alpha) * h
    expected = llama.lm_head(llama.model.norm(run(h, parts[2][1])))
    model = load_model(MemoryCheckpoint(config, {name: t.detach().clone() for name, t in tensors.items()}))
    # transformers norms in fp32, whatever the dtype
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)


def test_layers_in_another_order_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"all of its layers in their order"):
        load_model(with_config("loopus", reasoning_layer_indices=[1, 3, 2]))
