"""Every activation of the reference data, by loop-indexed name."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from zoo import CHECKPOINTS, GOLDEN, golden_tensors, with_config

from tl_looped import LoopedBridge
from tl_looped.checkpoints import MemoryCheckpoint, load_model

ATOL = 2e-4  # fp32, logits of order 10

# Reference name -> hook of the layer. The reference's attn_out is the attention module's output, before any norm of the branch.
LAYER_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_out",
    "mlp_out": "mlp.hook_out",
    "attn_z": "attn.hook_z",
    "mlp_post": "mlp.hook_post",
    "attn_in": "attn.hook_in",
    "mlp_in": "mlp.hook_in",
    "modulation": "modulation.hook_out",
    "z": "attn.hook_z",
    "attn_gate": "attn.hook_source_gate",
    "attn_global": "attn.hook_first_z",
    "attn_local": "attn.hook_own_z",
    **{f"{reader}_in": f"hook_{reader}_in" for reader in "qkv"},
    **{f"{reader}_gated": f"{reader}_message.hook_out" for reader in ("q", "k", "v", "mlp")},
    **{f"{reader}_{part}": f"{reader}_message.hook_{part}" for reader in ("v", "mlp") for part in ("forget", "gain")},
    "messages": "message.hook_out",
    "attn_mix": "attn_mix.hook_out",
    "mlp_mix": "mlp_mix.hook_out",
    "attn_out_conv": "hook_attn_out",
    "mlp_out_conv": "hook_mlp_out",
    "expert_weights": "mlp.hook_expert_weights",
    "attn_out_normed": "hook_attn_out",
    "mlp_out_normed": "hook_mlp_out",
}
PASS_HOOKS = {
    "loop_norm": "hook_out",
    "gate_logit": "hook_exit_logit",
    "state_before": "hook_state",
    "state_normed": "hook_state",
    "state_after": "hook_out",
    "halt_logit": "hook_exit_logit",
    "adapter_out": "hook_in",
    "in": "hook_in",
    "out": "hook_out",
    "time_embed": "conditioning.hook_time",
    "dt_embed": "conditioning.hook_step",
    "shifted_state": "shift.hook_shifted",
    "conditioning": "conditioning.hook_out",
    "message_sources": "hook_sources",
}
OTHER_HOOKS = {
    "embed": "hook_embed",
    "embed_normed": "hook_embed",
    "injected_embeds": "loops.*.hook_injection",
    "C_in": "after_loop.hook_in",
    "C_out": "after_loop.hook_out",
    "final_norm_out": "ln_final.hook_out",
    "initial_state": "loops.0.hook_state",
    "prelude_out": "loops.0.entry_norm.hook_in",
    "final_norm_in": "ln_final.hook_in",
    "router_logit": "loops.0.router.hook_logit",
    "depth": "loops.0.router.hook_depth",
    "final_sources": "final_mix.hook_sources",
    "final_mix": "final_mix.hook_out",
}
CONDITIONS = ("modulation", "time_embed", "dt_embed", "conditioning")  # the same at every position
# What a pass of one family holds elsewhere: Dory norms the state on its way in, LoopUS gates what the layers return.
OWN_HOOKS = {("dory", "state_before"): "entry_norm.hook_in", ("loopus", "out"): "blocks.2.hook_resid_post"}
OWN_HOOKS |= {("looped_nanochat", "out"): "blocks.2.hook_resid_post"}


def hook_of(family: str, what: str) -> str | None:
    """The loop-indexed name of a reference tensor, or None if it is no activation at a hook point."""
    if what in OTHER_HOOKS:
        return OTHER_HOOKS[what]
    match = re.fullmatch(r"(?:(prelude|core|coda|L|H)_)?(\w+?)(?:/layer(\d+))?(?:/loop(\d+))?", what)
    if match is None or (match[3] is None and match[4] is None):
        return None
    stack, kind, layer, loop = match.groups()
    prefix = f"{stack}." if stack in ("L", "H", "prelude", "coda") else ""
    prefix += f"loops.{loop}." if loop is not None else ""
    if layer is not None:
        return f"{prefix}blocks.{layer}.{LAYER_HOOKS[kind]}" if kind in LAYER_HOOKS else None
    place = OWN_HOOKS.get((family, kind), PASS_HOOKS.get(kind))
    return None if place is None else f"{prefix}{place}"


def runs(family: str) -> Iterator[tuple[str, dict[str, torch.Tensor], LoopedBridge]]:
    """The reference's runs: their names, their tensors, and a bridge of the same loop counts."""
    data = load_file(GOLDEN / family / "golden.safetensors")
    names = sorted({key.split("/")[0] for key in data if "/" in key})
    for run in names:
        tensors = {key.split("/", 1)[1]: value for key, value in data.items() if key.startswith(f"{run}/")}
        if match := re.fullmatch(r"H(\d+)L(\d+)", run):
            counts = {"n_loops": int(match[1]), "l_cycles": int(match[2])}
        elif match := re.fullmatch(r"R([1-9]\d*)(_scale0)?", run):
            counts = {"n_loops": int(match[1])}
        elif run.startswith("S") and "steps" in tensors:
            changed = MemoryCheckpoint(with_config(family, steps=tensors["steps"].tolist()).config, golden_tensors(family))
            yield run, {"input_ids": data["input_ids"], **tensors}, LoopedBridge(load_model(changed), None, family)
            continue
        else:
            continue  # no loop at all, another config, or an unseeded initial state
        yield run, {"input_ids": data["input_ids"], **tensors}, LoopedBridge.from_pretrained(GOLDEN / family, **counts)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_every_reference_activation(family: str) -> None:
    checked = 0
    for run, tensors, bridge in runs(family):
        state = "zero" if run.endswith("scale0") else tensors.get("initial_state")
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(tensors["input_ids"], initial_state=state)
        torch.testing.assert_close(logits, tensors["logits"], atol=ATOL, rtol=0)
        for what, expected in tensors.items():
            name = hook_of(family, what)
            for hook in bridge.expand_name(name) if name else []:
                value = cache[hook].unsqueeze(-1) if what.startswith("gate_logit") else cache[hook]
                value = value[:, -1] if what.startswith("halt_logit") else value
                value = value[:, 0] if what.split("/")[0] in CONDITIONS else value.view_as(expected)
                torch.testing.assert_close(
                    value, expected.to(value.dtype), atol=ATOL, rtol=0, msg=lambda m, at=f"{run}/{what}": f"{at}: {m}"
                )
                checked += 1
    assert checked >= 15


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_no_reference_activation_is_left_out(family: str) -> None:
    data = load_file(GOLDEN / family / "golden.safetensors")
    readings = r"logits\w*|\w*logits[\w.]*|leftpad_\w+|prefix_\w+|exit_pdf|latent_states|\w+_unscaled|cache_(k|v|conv\d)/.*"
    readings += r"|selected_tokens/.*|router_logit/.*"  # of some positions: see test_mor.py
    readings += r"|grad_\w+|gate_low/.*|gate_delta_logit/.*|steps"
    left = [key for key in data if "/" in key and hook_of(family, key.split("/", 1)[1]) is None]
    assert [key for key in left if not re.fullmatch(readings, key.split("/", 1)[1])] == []


def test_ouro_key_value_cache_has_one_slot_per_virtual_layer() -> None:
    data = load_file(GOLDEN / "ouro" / "golden.safetensors")
    bridge = LoopedBridge.from_pretrained(GOLDEN / "ouro", n_loops=4)
    with torch.no_grad():
        _, cache = bridge(data["input_ids"], return_type="logits_and_cache", use_cache=True)
    for key, expected in data.items():
        if match := re.fullmatch(r"R4/cache_([kv])/layer(\d+)/loop(\d+)", key):
            slot = int(match[3]) * 3 + int(match[2])
            stored = cache.layers[slot].keys if match[1] == "k" else cache.layers[slot].values
            torch.testing.assert_close(stored, expected, atol=ATOL, rtol=0)


def test_ouro_exit_distribution_follows_from_the_gate_logits() -> None:
    for _, tensors, bridge in runs("ouro"):
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tensors["input_ids"], names_filter="loops.*.hook_exit_logit")
        gates = torch.stack([cache[f"loops.{t}.hook_exit_logit"] for t in range(bridge.n_loops)], dim=-1).sigmoid()
        alive = torch.cat([torch.ones_like(gates[..., :1]), (1 - gates).cumprod(-1)[..., :-1]], dim=-1)
        pdf = torch.cat([(gates * alive)[..., :-1], alive[..., -1:]], dim=-1)
        torch.testing.assert_close(pdf, tensors["exit_pdf"], atol=1e-5, rtol=0)


def test_readouts_equal_the_published_early_exits() -> None:
    for _, tensors, bridge in runs("ouro"):
        for loop in range(bridge.n_loops):
            with torch.no_grad():
                logits = bridge.readout(tensors["input_ids"], loop=loop)
            torch.testing.assert_close(logits, tensors[f"logits_exit_at_step{loop}"], atol=ATOL, rtol=0)


def test_left_padding_and_prefix_through_the_bridge() -> None:
    for _, tensors, bridge in runs("ouro"):
        mask = tensors["leftpad_attention_mask"]
        real = mask.bool()
        with torch.no_grad():
            logits = bridge(tensors["input_ids"], attention_mask=mask)
        torch.testing.assert_close(logits[real], tensors["leftpad_logits"][real], atol=ATOL, rtol=0)
    for _, tensors, bridge in runs("hrm_text"):
        with torch.no_grad():
            logits = bridge(tensors["input_ids"], token_type_ids=tensors["prefix_token_type_ids"])
        torch.testing.assert_close(logits, tensors["prefix_logits"], atol=ATOL, rtol=0)
