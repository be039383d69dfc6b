"""The bridge on models of every family's structure: hooks, names, passes, gradients, sharing."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from helpers import plain_model, storages
from switches import edit
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from zoo import FAMILIES, ZOO, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedBridge, LoopedError

TOKENS = random_tokens()


pytestmark = pytest.mark.usefixtures("no_grad")


@FAMILIES
def test_bridge_equals_the_plain_model_bit_for_bit(name: str) -> None:
    bridge = shared_bridge(name)
    assert isinstance(bridge, TransformerBridge)
    assert torch.equal(bridge(TOKENS), plain_model(bridge)(TOKENS).logits)


@FAMILIES
def test_stack_loops(name: str) -> None:
    bridge = shared_bridge(name)
    _, cache = bridge.run_with_cache(TOKENS)
    stack = bridge.schedule.core_stacks[-1]
    if len(bridge.schedule.core_stacks) > 1:
        with pytest.raises(LoopedError, match="stack="):
            cache.stack_loops("resid_post")
    streams = cache.stack_loops("resid_post", stack=stack)
    assert tuple(streams.shape) == (bridge.n_loops, bridge.looped_cfg.n_core, *TOKENS.shape, 24)
    patterns = cache.stack_loops("pattern", layer=-1, stack=stack, loops=[1])
    last = bridge.schedule.pass_of_loop(1).layers[-1]
    assert torch.equal(patterns, cache["pattern", last][None])
    assert torch.equal(streams[1, -1], cache["resid_post", last])
    with pytest.raises(LoopedError, match=r"layers in stack"):
        cache.stack_loops("pattern", layer=7, stack=stack)
    with pytest.raises(LoopedError, match=r"loops \(0"):
        cache.stack_loops("pattern", loops=[9], stack=stack)
    with pytest.raises(LoopedError, match="selects nothing"):
        cache.stack_loops("pattern", loops=[], stack=stack)
    states = cache.stack_loops("hook_state", stack=stack)
    assert torch.equal(states[1], cache[f"{bridge.schedule.pass_prefix(bridge.schedule.pass_of_loop(1))}.hook_state"])


@FAMILIES
def test_readout_equals_the_shorter_model_and_skips_the_rest(name: str) -> None:
    bridge = shared_bridge(name)
    seen = {}
    bridge(TOKENS, on_loop=lambda loop, logits: seen.update({loop: logits}))
    for loop in range(bridge.n_loops):
        calls: list[str] = []
        count = lambda t, hook, calls=calls: calls.append(hook.name)  # noqa: E731
        with bridge.hooks(fwd_hooks=[("blocks.*.hook_in", count)]):
            logits = bridge.readout(TOKENS, loop=loop)
        shorter = bridge.unroll(loop + 1)
        assert torch.equal(logits, shorter(TOKENS)) and torch.equal(logits, seen[loop])
        assert len(calls) == shorter.cfg.n_layers
    assert torch.equal(bridge.readout(TOKENS, loop=-1), bridge(TOKENS))


def test_readout_takes_an_initial_state() -> None:
    bridge = shared_bridge("huginn")
    state = torch.randn(2, 7, 24)
    assert torch.equal(bridge.readout(TOKENS, loop=1, initial_state=state), bridge.unroll(2)(TOKENS, initial_state=state))
    assert not torch.equal(bridge.readout(TOKENS, loop=1, initial_state=state), bridge.readout(TOKENS, loop=1))


@FAMILIES
def test_unroll_shares_every_parameter(name: str) -> None:
    bridge = shared_bridge(name)
    before = storages(bridge)
    deeper = bridge.unroll(9)
    assert storages(deeper) == before == storages(bridge)
    assert deeper.n_loops == 9 and deeper.cfg.n_layers == deeper.schedule.n_layers
    assert torch.equal(deeper.unroll(bridge.n_loops)(TOKENS), bridge(TOKENS))
    deeper.add_hook("blocks.0.hook_resid_pre", edit)
    assert not any(h.has_hooks() for h in bridge.hook_points())


@FAMILIES
def test_changing_the_dtype_keeps_the_sharing(name: str) -> None:
    bridge = random_bridge(name)
    n_parameters = len(storages(bridge))
    logits = bridge(TOKENS)
    assert bridge.to(torch.float64) is bridge and bridge.cfg.dtype == torch.float64
    assert len(storages(bridge)) == n_parameters
    assert {p.dtype for p in bridge.parameters()} == {torch.float64}
    torch.testing.assert_close(bridge(TOKENS).float(), logits, atol=1e-3, rtol=1e-3)


def test_unrolls_move_together_and_keep_the_switches() -> None:
    bridge = random_bridge("ouro")
    bridge.set_use_attn_result(True)
    deeper = bridge.unroll(5)
    assert "blocks.9.attn.hook_result" in deeper.run_with_cache(TOKENS)[1]
    bridge.double()
    assert deeper(TOKENS).dtype == torch.float64 and deeper.cfg.dtype == bridge.cfg.dtype == torch.float64


def test_a_deep_copy_stands_alone() -> None:
    bridge = random_bridge("looped_qwen")
    logits = bridge(TOKENS)
    twin = copy.deepcopy(bridge)
    twin.set_use_split_qkv_input(True)
    assert "blocks.1.hook_q_input" in twin.run_with_cache(TOKENS)[1]
    assert len(storages(twin)) == len(storages(bridge)) and not storages(twin) & storages(bridge)
    for parameter in bridge.parameters():
        parameter.zero_()
    del bridge
    gc.collect()
    torch.testing.assert_close(twin(TOKENS), logits, atol=2e-4, rtol=1e-4)


@FAMILIES
def test_virtual_layers_have_their_own_components_and_modes(name: str) -> None:
    bridge = shared_bridge(name)
    for parts in (list(bridge.blocks), list(bridge.passes)):
        modules = [{id(module) for module in part.modules()} for part in parts]
        assert len(set.union(*modules)) == sum(map(len, modules))
        hooks = [{id(hook) for hook in part._hook_registry.values()} for part in parts]
        assert all(own <= module for own, module in zip(hooks, modules, strict=True))
    assert len({id(block.config) for block in bridge.blocks} | {id(bridge.cfg)}) == len(bridge.blocks) + 1
    everything = [*bridge.modules(), *bridge.original_model.modules()]
    bridge.train()
    assert all(module.training for module in everything) and gc.isenabled()
    bridge.eval()
    assert not any(module.training for module in everything)


@FAMILIES
def test_weights_are_read_without_complaint(name: str, caplog: pytest.LogCaptureFixture) -> None:
    bridge = shared_bridge(name)
    for weights in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_E", "W_U"):
        assert torch.isfinite(getattr(bridge, weights)).all()
    assert not caplog.records


@FAMILIES
def test_start_and_stop_skip_the_work(name: str) -> None:
    bridge = shared_bridge(name)
    logits, cache = bridge.run_with_cache(TOKENS)
    schedule = bridge.schedule
    for layer in range(schedule.n_layers):
        stream = cache["resid_pre", layer]
        assert torch.equal(bridge(TOKENS, stop_at_layer=layer), stream)
        out, part = bridge.run_with_cache(TOKENS, stop_at_layer=layer)
        ran = {int(n.split(".")[1]) for n in part if n.startswith("blocks.")}
        assert torch.equal(out, stream) and ran == set(range(layer))
        p = schedule.pass_of_layer(layer)
        if p is not None and name in ("anchored", "loopus"):
            with pytest.raises(LoopedError, match=r"anchored|gated"):
                bridge(stream, start_at_layer=layer)
            continue
        extra = {"input_ids": TOKENS} if bridge.looped_cfg.value_embed_layers else {}
        if p is not None and bridge.looped_cfg.injection != "none":
            if p is not schedule.passes[-1]:
                with pytest.raises(LoopedError, match=r"hook_injection"):
                    bridge(stream, start_at_layer=layer, **extra)
            extra["injection"] = cache[f"{schedule.pass_prefix(p)}.hook_injection"]
        restarted, part = bridge.run_with_cache(stream, start_at_layer=layer, **extra)
        ran = {int(n.split(".")[1]) for n in part if n.startswith("blocks.")}
        assert torch.equal(restarted, logits) and ran == set(range(layer, schedule.n_layers))
    assert torch.equal(bridge(TOKENS, stop_at_layer=schedule.n_layers), cache["resid_post", -1])
    assert torch.equal(bridge(TOKENS, stop_at_layer=-1), cache["resid_pre", -1])


@FAMILIES
def test_gradients_of_every_pass_agree_with_finite_differences(name: str) -> None:
    bridge = random_bridge(name, torch.float64)
    with torch.enable_grad():
        loss, cache = bridge.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")
    generator = torch.Generator().manual_seed(5)
    schedule = bridge.schedule
    for p in schedule.passes:
        prefix = schedule.pass_prefix(p)
        hooks = [
            f"{prefix}.hook_state",
            f"{prefix}.hook_out",
            f"blocks.{p.first}.attn.hook_z",
            f"blocks.{p.first}.attn.hook_pattern",
        ]
        for hook_name in hooks + ([f"{prefix}.hook_injection"] if bridge.looped_cfg.injection != "none" else []):
            direction = torch.randn(cache[hook_name].shape, generator=generator, dtype=torch.float64)
            losses = []
            for step in (1e-5, -1e-5):
                nudge = lambda t, hook, step=step, d=direction: t + step * d  # noqa: E731
                losses.append(bridge.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(hook_name, nudge)]))
            slope = (losses[0] - losses[1]) / 2e-5
            torch.testing.assert_close((cache[f"{hook_name}_grad"] * direction).sum(), slope, rtol=1e-5, atol=1e-8)
    assert loss.dtype == torch.float64


@FAMILIES
def test_generation_with_and_without_cache_agrees(name: str) -> None:
    bridge = shared_bridge(name)
    common = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    cached = bridge.generate(TOKENS[:1], use_past_kv_cache=True, **common)
    assert torch.equal(cached, bridge.generate(TOKENS[:1], use_past_kv_cache=False, **common))
    tokens = TOKENS[:1]
    for _ in range(6):
        tokens = torch.cat([tokens, bridge(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, tokens)


@FAMILIES
def test_left_padded_rows_equal_the_rows_alone(name: str) -> None:
    bridge = shared_bridge(name)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[:1, :4]], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    logits = bridge(torch.cat([padded, TOKENS[1:]]), attention_mask=mask)
    torch.testing.assert_close(logits[:1, 3:], bridge(TOKENS[:1, :4]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], bridge(TOKENS[1:]), atol=1e-5, rtol=1e-5)


@FAMILIES
def test_embeddings_as_input_reproduce_the_run(name: str) -> None:
    bridge = shared_bridge(name)
    logits, cache = bridge.run_with_cache(TOKENS)
    extra = {"input_ids": TOKENS} if bridge.looped_cfg.value_embed_layers else {}
    assert torch.equal(bridge(cache["hook_embed"], **extra), logits)


@pytest.mark.slow
@FAMILIES
def test_transformer_lens_patching_equals_a_patch_by_hand(name: str) -> None:
    bridge = shared_bridge(name)
    _, clean_cache = bridge.run_with_cache(random_tokens(seed=1))
    metric = lambda logits: logits[0, -1, :5].sum()  # noqa: E731
    scores = patching.get_act_patch_resid_pre(bridge, TOKENS, clean_cache, metric)
    assert tuple(scores.shape) == (bridge.cfg.n_layers, 7)
    for layer in range(bridge.cfg.n_layers):

        def patch(tensor: torch.Tensor, hook: object, layer: int = layer) -> torch.Tensor:
            tensor[:, 4] = clean_cache["resid_pre", layer][:, 4]
            return tensor

        by_hand = bridge.run_with_hooks(TOKENS, fwd_hooks=[(bridge.schedule.name(layer, "hook_resid_pre"), patch)])
        torch.testing.assert_close(scores[layer, 4], metric(by_hand))


@FAMILIES
def test_weights_have_virtual_layers_as_leading_axis(name: str) -> None:
    bridge = shared_bridge(name)
    assert tuple(bridge.W_Q.shape) == (bridge.cfg.n_layers, 3, 24, 8)
    physical = bridge.schedule.physical
    for i, j in itertools.combinations(range(len(physical)), 2):
        assert torch.equal(bridge.W_Q[i], bridge.W_Q[j]) == (physical[i] == physical[j])


def test_the_cache_says_what_is_missing() -> None:
    bridge = shared_bridge("ouro")
    _, cache = bridge.run_with_cache(TOKENS, names_filter="loops.0.hook_out")
    with pytest.raises(KeyError, match="exists, but was not cached"):
        cache["loops.1.hook_out"]
    with pytest.raises(KeyError, match=r"no such hook point.*loops\.1\.hook_out"):
        cache["loops.1.hook_outt"]
    assert "loops.9.hook_out" not in cache and "loops.*.hook_out" not in cache and "loops.0.hook_out" in cache
    with pytest.raises(IndexError, match="3 loops"):
        cache["loops.3.hook_out"]
    with pytest.raises(LoopedError, match="stack_loops"):
        cache["loops.*.hook_out"]
    with pytest.raises(IndexError, match="6 virtual layers"):
        cache["z", 6]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: b.readout(TOKENS, loop=3), r"3 loops \(0\.\.2\)"),
        (lambda b: b(TOKENS, stop_at_layer=7), r"6 virtual layers"),
        (lambda b: b(TOKENS, start_at_layer=2), "residual-stream tensor"),
        (lambda b: b(TOKENS + 40), r"0\.\.30"),
        (lambda b: b(random_tokens(1, 33)), "n_ctx=32"),
        (lambda b: b(TOKENS, initial_state=torch.zeros(2, 7, 5)), r"\(2, 7, 24\)"),
        (lambda b: b(TOKENS, initial_state=3), "not random"),
        (lambda b: b.unroll(0), "n_loops=0"),
        (lambda b: b.unroll(-2), "n_loops=-2"),
        (lambda b: b.unroll(2.5), r"n_loops=2\.5"),
        (lambda b: b(TOKENS, token_type_ids=torch.ones_like(TOKENS)), "prefix"),
        (lambda b: b("text"), "no tokenizer"),
        (lambda b: b(TOKENS, attention_mask=torch.zeros(2, 7)), "attention_mask has 1"),
        (lambda b: b(TOKENS, attention_mask=torch.full((2, 7), -1e9)), "attention_mask has 1"),
        (lambda b: b(TOKENS, position_ids=torch.arange(30, 37)[None]), r"position_ids from 30 to 36.*0\.\.31"),
        (lambda b: b.run_with_hooks(TOKENS, [(5, edit)]), "hook name 5"),
        (lambda b: b.run_with_cache(TOKENS, names_filter=[3]), "names_filter holds 3"),
        (lambda b: b.run_with_cache(TOKENS, names_filter=3), "names_filter holds 3"),
        (lambda b: b.run_with_hooks(TOKENS, stop_at_layer=7), "6 virtual layers"),
        (lambda b: b.block_hooks(6), "6 virtual layers"),
        (lambda b: LoopedBridge.boot_transformers("ByteDance/Ouro-1.4B"), "from_pretrained"),
        (lambda b: LoopedBridge.boot_native({}), "from_config"),
        (lambda b: b.run_with_cache(TOKENS, names_filter="blocks.*.attn.hook_*"), "stands for an index only"),
    ],
)
def test_bad_input_is_explained(call, says: str, unchecked: None) -> None:
    bridge = shared_bridge("ouro")
    with pytest.raises(LoopedError, match=says):
        call(bridge)
    assert not any(h.has_hooks() for h in bridge.hook_points())
    assert torch.isfinite(bridge(TOKENS)).all()


def test_an_exception_in_a_hook_leaves_nothing_behind() -> None:
    bridge = shared_bridge("huginn")
    logits = bridge(TOKENS)

    def fail(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        raise RuntimeError("from the hook")

    hooks = [("loops.1.blocks.0.hook_mlp_out", fail)]
    with pytest.raises(RuntimeError, match="from the hook"):
        bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)
    with pytest.raises(RuntimeError, match="from the hook"), bridge.hooks(fwd_hooks=hooks):
        bridge(TOKENS)
    assert not any(h.has_hooks() for h in bridge.hook_points())
    assert torch.equal(bridge(TOKENS), logits)


def test_made_from_config_is_reproducible() -> None:
    one, two, other = (LoopedBridge.from_config(ZOO["ouro"], seed=s) for s in (0, 0, 1))
    assert torch.equal(one(TOKENS), two(TOKENS)) and not torch.equal(one(TOKENS), other(TOKENS))
