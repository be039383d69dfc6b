"""Compatibility mode: the same log-probabilities, the same sharing, and weights that equal a computation by hand."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from zoo import FAMILIES, FEW, STRUCTURES, ZOO, random_bridge, random_tokens, slow_but

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import step_geometry, trajectories
from tl_looped.attribution import weight_gradients_by_pass
from tl_looped.patching import patch_between_loops

TOKENS = random_tokens()
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in STRUCTURES),
    *((name, {"tied": not ZOO[name].tied}) for name in FEW),
    ("ouro", {"n_loops": 1}),
    ("nanbeige", {"biases": ("v",)}),
    ("looped_qwen", {"biases": ("q", "k", "v", "o", "gate", "in", "out")}),
    ("parcae", {"biases": ("v",), "value_gate_width": 24}),
    ("hrm_text", {"norm_weight": True}),
    ("nanbeige", {"n_coda": 1, "final_norm": True}),
]


pytestmark = pytest.mark.usefixtures("no_grad")


def processed(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> LoopedBridge:
    bridge = random_bridge(name, dtype, **changes)
    bridge.enable_compatibility_mode()
    return bridge


def n_numbers(bridge: LoopedBridge) -> int:
    tensors = [*bridge.original_model.parameters(), *bridge.original_model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.numel() for t in tensors}.values())


# Folding rounds every weight once more; fp64 shows that nothing else happens.
@pytest.mark.parametrize(
    ("name", "changes", "dtype"),
    [*((*case, torch.float64) for case in CASES), *((name, {}, torch.float32) for name in FEW)],
)
def test_log_probabilities_and_sharing_are_kept_and_norms_are_folded(
    name: str, changes: dict[str, object], dtype: torch.dtype
) -> None:
    bridge = random_bridge(name, dtype, **changes)
    before, size = log_softmax(bridge(TOKENS), -1), n_numbers(bridge)
    bridge.enable_compatibility_mode()
    atol = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(log_softmax(bridge(TOKENS), -1), before, atol=atol, rtol=0)
    assert n_numbers(bridge) <= 1.01 * size
    assert {p.dtype for p in bridge.parameters()} == {dtype}
    physical = bridge.schedule.physical
    for weight in ("attn.q.weight", "mlp.out.weight", "attn.o.weight"):
        pointers = [bridge.blocks[i].get_submodule(weight.rpartition(".")[0]).weight.data_ptr() for i in range(len(physical))]
        assert len(set(pointers)) == len(set(physical))
    folded = [bridge.ln_final] + [n for b in bridge.blocks for n in (getattr(b, "ln1", None), getattr(b, "ln2", None)) if n]
    for norm in folded:
        assert norm.weight is None or torch.equal(norm.weight, torch.ones(24, dtype=dtype))
    centred = not (bridge.looped_cfg.tied or bridge.looped_cfg.logit_softcap)
    assert torch.allclose(bridge.W_U.mean(-1), torch.zeros(24, dtype=dtype), atol=1e-6) == centred


@FAMILIES
def test_the_norms_on_the_stream_stay(name: str) -> None:
    raw, bridge = random_bridge(name), processed(name)
    stay = ("ln1_post", "ln2_post", "ln1_stream", "ln2_stream", "prelude_norm", "inject", "A_log", "value_embeds")
    old = raw.original_model.canonical_parameters()
    for key, parameter in bridge.original_model.canonical_parameters().items():
        if any(part in key for part in stay) or key.startswith("pass_norm"):
            assert torch.equal(parameter, old[key]), key


@FAMILIES
def test_states_before_the_last_norm_and_exit_logits_stay(name: str) -> None:
    bridge = random_bridge(name, torch.float64)
    _, before = bridge.run_with_cache(TOKENS)
    bridge.enable_compatibility_mode(fold_value_biases=False)
    _, after = bridge.run_with_cache(TOKENS)
    assert set(before) <= set(after)
    last_out = bridge.schedule.pass_prefix(bridge.schedule.passes[-1]) + ".hook_out"
    for key in before:
        stays = key.endswith(
            ("resid_pre", "resid_post", "hook_z", "pattern", "attn_out", "mlp_out", "hook_post", "exit_logit", "hook_embed")
        ) or (key.startswith(("loops", "H.loops", "L.loops")) and ".blocks." not in key and key != last_out)
        if stays:
            torch.testing.assert_close(after[key], before[key], atol=1e-9, rtol=1e-9, msg=key)


@pytest.mark.parametrize("name", slow_but(FEW))
def test_names_and_patching_work_in_compatibility_mode(name: str) -> None:
    for bridge in (processed(name), random_bridge(name)):
        bridge.enable_compatibility_mode(no_processing=True)
        logits, cache = bridge.run_with_cache(TOKENS)
        assert {n for n, h in bridge.hook_dict.items() if bridge._gated_hook_reason(h.name) is None} == set(cache)
        chosen = ("hook_resid_pre", "hook_z", "hook_mlp_out", "hook_normalized", "hook_state", "hook_injection", "hook_out")
        for hook_name in [n for n in cache if n.endswith(chosen)][::30]:
            patched = bridge.run_with_hooks(TOKENS, fwd_hooks=[(hook_name, lambda t, hook, n=hook_name, c=cache: c[n].clone())])
            assert torch.equal(patched, logits), hook_name
        layer = bridge.cfg.n_layers - 2
        loop_name = bridge.schedule.name(layer, "attn.hook_z")
        assert bridge.hook_dict[loop_name] is bridge.hook_dict[f"blocks.{layer}.attn.hook_z"]
        assert torch.equal(cache[loop_name], cache["z", layer])
        p = bridge.schedule.pass_prefix(bridge.schedule.passes[0])
        assert f"{p}.hook_state" in cache and f"{p}.hook_out" in cache


@FAMILIES
def test_no_processing_changes_no_weight(name: str) -> None:
    bridge, raw = random_bridge(name), random_bridge(name)
    bridge.enable_compatibility_mode(no_processing=True)
    assert torch.equal(bridge(TOKENS), raw(TOKENS)) and torch.equal(bridge.unroll(2)(TOKENS), raw.unroll(2)(TOKENS))


@FAMILIES
def test_other_unrolls_keep_their_weights(name: str) -> None:
    bridge = random_bridge(name)
    other = bridge.unroll(2)
    logits = other(TOKENS)
    bridge.enable_compatibility_mode()
    assert torch.equal(other(TOKENS), logits)
    with pytest.raises(LoopedError, match="before that"):
        bridge.unroll(2)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_earlier_readouts_are_right_or_refused(name: str, changes: dict[str, object]) -> None:
    bridge = random_bridge(name, torch.float64, **changes)
    loops = range(bridge.n_loops)
    before = [log_softmax(bridge.readout(TOKENS, loop=t), -1) for t in loops]
    bridge.enable_compatibility_mode()
    refuses = bridge.looped_cfg.pass_norm_is_final and bridge.looped_cfg.norm_weight
    for t in loops:
        if refuses and t < loops[-1]:
            with pytest.raises(LoopedError, match="fold_ln=False"):
                bridge.readout(TOKENS, loop=t)
        else:
            torch.testing.assert_close(log_softmax(bridge.readout(TOKENS, loop=t), -1), before[t], atol=1e-11, rtol=0)
    if refuses:
        with pytest.raises(LoopedError, match="fold_ln=False"):
            bridge(TOKENS, on_loop=lambda loop, logits: None)
    unfolded = random_bridge(name, torch.float64, **changes)
    unfolded.enable_compatibility_mode(fold_ln=False)
    for t in loops:
        torch.testing.assert_close(log_softmax(unfolded.readout(TOKENS, loop=t), -1), before[t], atol=1e-11, rtol=0)


def test_a_stream_that_goes_through_its_norms_keeps_their_weights() -> None:
    bridge = random_bridge("dory", torch.float64, norm_weight=True)
    before, norm = log_softmax(bridge(TOKENS), -1), bridge.blocks[1].ln1.weight.clone()
    bridge.enable_compatibility_mode()
    torch.testing.assert_close(log_softmax(bridge(TOKENS), -1), before, atol=1e-11, rtol=0)
    assert torch.equal(bridge.blocks[1].ln1.weight, norm)


def test_options_that_would_be_wrong_are_refused_before_anything_changes() -> None:
    bridge = random_bridge("ouro")
    logits = bridge(TOKENS)
    with pytest.raises(LoopedError, match="rotary"):
        bridge.enable_compatibility_mode(refactor_factored_attn_matrices=True)
    gated = random_bridge("hrm_text", biases=("v",))
    with pytest.raises(LoopedError, match="fold_value_biases=False"):
        gated.enable_compatibility_mode()
    with pytest.raises(LoopedError, match="a norm scales the values"):
        random_bridge("dory", attn_gate=False, biases=("v",)).enable_compatibility_mode()
    assert not bridge.compatibility_mode and not gated.compatibility_mode and torch.equal(bridge(TOKENS), logits)
    gated.enable_compatibility_mode(fold_value_biases=False)
    zero = random_bridge("huginn")
    zero.ln_final.weight[3] = 0
    with pytest.raises(LoopedError, match="fold_ln=False"):
        zero.process_weights()


def test_skipped_options_and_repeated_processing_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bridge = processed("parcae")
        logits = bridge(TOKENS)
        bridge.process_weights()
    assert "tied" in caplog.text and "processed already" in caplog.text
    assert torch.equal(bridge(TOKENS), logits)


def test_gradients_are_asked_for_as_before() -> None:
    bridge = random_bridge("ouro")
    bridge.requires_grad_(False)
    bridge.enable_compatibility_mode()
    assert not any(p.requires_grad for p in bridge.parameters())


@FAMILIES
@pytest.mark.parametrize("compatible", [False, True])
def test_weights_equal_a_computation_by_hand(name: str, compatible: bool) -> None:
    bridge = random_bridge(name, biases=("q", "k", "v", "o", "in", "out")) if not ZOO[name].attn_gate else random_bridge(name)
    raw = {key: p.clone() for key, p in bridge.original_model.canonical_parameters().items()}
    if compatible:
        bridge.enable_compatibility_mode()
    cfg = bridge.looped_cfg
    heads, kv, group = cfg.n_heads, cfg.n_kv_heads, cfg.n_heads // cfg.n_kv_heads
    stacks = {letter: getattr(bridge, f"W_{letter}") for letter in ("Q", "K", "V", "O", "in", "out", "gate")}
    assert (stacks["gate"] is None) == (cfg.mlp != "gated")
    ov, qk = bridge.OV.AB, bridge.QK.AB
    for layer, site in enumerate(bridge.schedule.sites):
        prefix = f"{site.stack}.{site.layer}"

        def folded(key: str, norm: str, prefix: str = prefix) -> torch.Tensor:
            weight = raw.get(f"{prefix}.{norm}.weight") if compatible else None
            return raw[f"{prefix}.{key}.weight"] * (1 if weight is None else weight)

        q, k, v = (folded(f"attn.{x}", "ln1").view(n, 8, 24).mT for x, n in (("q", heads), ("k", kv), ("v", kv)))
        o = raw[f"{prefix}.attn.o.weight"].T.reshape(heads, 8, 24)
        expected = {"Q": q, "K": k, "V": v, "O": o, "in": folded("mlp.up", "ln2").T, "out": raw[f"{prefix}.mlp.down.weight"].T}
        if cfg.mlp == "gated":
            expected["gate"] = folded("mlp.gate", "ln2").T
        for letter, value in expected.items():
            torch.testing.assert_close(stacks[letter][layer], value, msg=f"W_{letter}[{layer}]")
        for head in range(heads):
            torch.testing.assert_close(ov[layer, head], v[head // group] @ o[head])
            torch.testing.assert_close(qk[layer, head], q[head] @ k[head // group].T)
        if not cfg.attn_gate:
            b_v = raw[f"{prefix}.attn.v.bias"].view(kv, 8)
            b_o = raw[f"{prefix}.attn.o.bias"]
            moved = sum(b_v[h // group] @ o[h] for h in range(heads)) if compatible else 0
            torch.testing.assert_close(bridge.b_O[layer], b_o + moved)
            torch.testing.assert_close(bridge.b_V[layer], b_v * (not compatible))
            torch.testing.assert_close(bridge.b_Q[layer], raw[f"{prefix}.attn.q.bias"].view(heads, 8))
            torch.testing.assert_close(bridge.b_in[layer], raw[f"{prefix}.mlp.up.bias"])
            torch.testing.assert_close(bridge.b_out[layer], raw[f"{prefix}.mlp.down.bias"])
    torch.testing.assert_close(bridge.W_E, raw["embed.weight"])
    last = raw.get("pass_norm.weight" if cfg.pass_norm_is_final else "ln_final.weight")
    unembed = raw["embed.weight" if cfg.tied else "unembed.weight"] * (last if compatible and last is not None else 1)
    if compatible and not cfg.tied:
        unembed = unembed - unembed.mean(0)
    torch.testing.assert_close(bridge.W_U, unembed.T)
    torch.testing.assert_close(bridge.tokens_to_residual_directions(torch.tensor([3, 5])), unembed[[3, 5]])


@FAMILIES
@pytest.mark.parametrize("compatible", [False, True])
def test_parameters_under_transformer_lens_names_are_the_weights(name: str, compatible: bool) -> None:
    bridge = processed(name) if compatible else random_bridge(name)
    parameters = bridge.tl_parameters()
    torch.testing.assert_close(parameters["embed.W_E"], bridge.W_E)
    torch.testing.assert_close(parameters["unembed.W_U"], bridge.W_U)
    for layer in range(bridge.cfg.n_layers):
        for place, letter in (("attn", "Q"), ("attn", "O"), ("mlp", "in"), ("mlp", "out")):
            weight = getattr(bridge, f"W_{letter}")[layer]
            torch.testing.assert_close(parameters[f"blocks.{layer}.{place}.W_{letter}"], weight)
    assert bridge.n_params_total == sum(p.numel() for p in random_bridge(name).original_model.canonical_parameters().values())


def test_unusual_head_widths_keep_their_axes() -> None:
    bridge = random_bridge("ouro", d_head=4)
    assert tuple(bridge.W_Q.shape) == (6, 3, 24, 4) and tuple(bridge.W_O.shape) == (6, 3, 4, 24)
    assert tuple(bridge.OV.AB.shape) == (6, 3, 24, 24)
    with pytest.raises(AttributeError, match="bias-free"):
        _ = bridge.b_Q


@FAMILIES
@pytest.mark.parametrize("compatible", [False, True])
def test_core_weights_are_the_parameters_themselves(name: str, compatible: bool) -> None:
    bridge = processed(name) if compatible else random_bridge(name)
    weights, schedule = bridge.core_weights, bridge.schedule
    assert {key.rpartition(".attn.q")[0] for key in weights if key.endswith("attn.q.weight")} == {
        f"{stack}.{j}" for stack in schedule.core_stacks for j in range(schedule.n_core)
    }
    for layer, site in enumerate(schedule.sites):
        if site.loop is not None:
            own = bridge.blocks[layer].original_component
            for key, parameter in own.named_parameters():
                clean = key.replace("_original_component.", "")
                assert weights[f"{site.stack}.{site.layer}.{clean}"] is parameter
    counted = {id(p) for i, site in enumerate(schedule.sites) if site.loop is not None for p in bridge.blocks[i].parameters()}
    assert {id(p) for p in weights.values()} == counted


@FAMILIES
def test_state_dict_round_trip(name: str) -> None:
    bridge, other = random_bridge(name), LoopedBridge.from_config(ZOO[name], seed=3)
    logits = bridge(TOKENS)
    assert not torch.equal(other(TOKENS), logits)
    other.load_state_dict(bridge.state_dict())
    assert torch.equal(other(TOKENS), logits)
    assert len({p.data_ptr() for p in other.parameters()}) == len({p.data_ptr() for p in bridge.parameters()})
    with pytest.raises(RuntimeError, match="nonsense"):
        other.load_state_dict({**bridge.state_dict(), "nonsense": torch.zeros(1)})


def test_processed_weights_do_not_load_into_a_raw_model() -> None:
    for name in ("ouro", "huginn"):
        with pytest.raises((LoopedError, RuntimeError), match=r"one parameter|unfold"):
            random_bridge(name).load_state_dict(processed(name).state_dict())
    one, two = processed("ouro"), LoopedBridge.from_config(ZOO["ouro"], seed=3)
    two.process_weights()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(TOKENS), two(TOKENS))


@pytest.mark.parametrize("name", ["ouro", "hrm_text", "nanbeige"])
def test_passes_whose_norms_differ_are_not_compared(name: str) -> None:
    def asks(model: LoopedBridge) -> list[Any]:
        stack = "H" if name == "hrm_text" else None
        return [
            lambda: step_geometry(model, TOKENS, n_loops=model.n_loops, stack=stack, verbose=False),
            lambda: trajectories(model, TOKENS, over="loop_ends", n_components=2, stack=stack, verbose=False),
            lambda: patch_between_loops(model, TOKENS, lambda x: x[:, -1, 0], site="out", stack=stack, verbose=False),
            lambda: weight_gradients_by_pass(model, TOKENS),
        ]

    folded, unfolded = (random_bridge(name, n_loops=3, norm_weight=True) for _ in range(2))
    folded.enable_compatibility_mode()
    for ask in asks(folded):
        with pytest.raises(LoopedError, match="was asked, but the weights were processed"):
            ask()
    unfolded.enable_compatibility_mode(fold_ln=False)
    for ask in asks(unfolded):
        ask()
    with pytest.raises(LoopedError, match="after_norm=True was asked, but the weights of this model were processed"):
        trajectories(processed("huginn"), TOKENS, after_norm=True, verbose=False)
