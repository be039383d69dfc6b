"""Contributions to the residual stream: exact sums, and each one against a run with the component taken away."""

from __future__ import annotations

import pytest
import torch
from contributions import UNITS, chosen_logits, error
from helpers import run
from torch import Tensor
from zoo import FAMILIES, FEW, GOLDEN, PUBLISHED, ZOO, random_bridge, random_tokens, shared_bridge, slow_but

from tl_looped import LoopedBridge, LoopedCache, LoopedError
from tl_looped.bridge.decomposition import FINAL
from tl_looped.errors import UnknownNameError

TOKENS = random_tokens(pos=5)


pytestmark = pytest.mark.usefixtures("no_grad")


def in_loops(cache: LoopedCache, found: tuple[Tensor, list[str]]) -> tuple[Tensor, list[str]]:
    """What a method of TransformerLens's returned, its labels by loop and layer."""
    return found[0], [cache.model.schedule.loop_label(label) for label in found[1]]


def check_sums(cache: LoopedCache, tolerance: float) -> None:
    stream = cache[FINAL]
    wanted, other = (torch.randint(0, cache.model.cfg.d_vocab, stream.shape[:2]) for _ in range(2))
    logits, difference = chosen_logits(cache, wanted), chosen_logits(cache, wanted) - chosen_logits(cache, other)
    stacks = [
        cache.decompose_resid(),
        cache.stack_head_results(incl_remainder=True),
        cache.get_full_resid_decomposition(expand_neurons=False),
        cache.accumulated_resid().diff(dim=0, prepend=torch.zeros_like(stream)[None]),
    ]
    if cache.model.lacks("neurons") is None:
        stacks += [cache.stack_neuron_results(-1, incl_remainder=True), cache.get_full_resid_decomposition()]
    if cache.model.looped_cfg.injection != "none":
        stacks.append(cache.decompose_resid(injections=True))
    for stack in stacks:
        assert error(stack.sum(0), stream) < tolerance
        assert error(cache.logit_attrs(stack, wanted).sum(0), logits) < tolerance
        assert error(cache.logit_attrs(stack, wanted, other).sum(0), difference) < tolerance
    for unit in UNITS:
        assert error(cache.attribute_logits(wanted, other, unit=unit, positions=None).values.sum(0), difference) < tolerance
    applied = cache.decompose_resid(apply_ln=True)
    assert error(applied.sum(0), cache["unembed.hook_in"]) < tolerance


@FAMILIES
@pytest.mark.parametrize("n_loops", [1, 3])
def test_contributions_sum_to_the_stream_and_to_the_logits(name: str, n_loops: int) -> None:
    check_sums(run(random_bridge(name, n_loops=n_loops), TOKENS), 1e-4)
    check_sums(run(random_bridge(name, torch.float64, n_loops=n_loops), TOKENS), 1e-9)


@pytest.mark.parametrize("family", PUBLISHED)
def test_contributions_sum_in_the_golden_checkpoints(family: str) -> None:
    for n_loops in (3,) if family.startswith("mor") else (1, 3):
        bridge = LoopedBridge.from_pretrained(GOLDEN / family, n_loops=n_loops)
        tokens = torch.randint(0, bridge.cfg.d_vocab, (2, 6))
        check_sums(run(bridge, tokens), 1e-4)


@pytest.mark.parametrize("norm", ["pre", "branch", "sandwich", "stream"])
@pytest.mark.parametrize("ends", ["concat", "decay", "linear", "two norms", "anchored without coda", "no coda"])
def test_contributions_sum_in_other_configurations(norm: str, ends: str) -> None:
    changes = {
        "concat": {"injection": "concat", "n_prelude": 1},
        "decay": {"injection": "decay", "prelude_norm": True, "initial_state": "noise", "pass_norm": True},
        "linear": {"after_loop": "linear"},
        "two norms": {"pass_norm": True, "n_coda": 0, "n_prelude": 0},
        "anchored without coda": {"strategy": "anchored", "anchor_steps": 2, "beta": 0.3, "n_coda": 0},
        "no coda": {"after_loop": "final_norm", "n_coda": 0},
    }[ends]
    bridge = random_bridge("looped_qwen", torch.float64, norm=norm, windows=(), biases=("o", "out"), **changes)
    check_sums(run(bridge, TOKENS), 1e-9)


@FAMILIES
def test_half_precision(name: str) -> None:
    bridge = random_bridge(name, torch.bfloat16)
    cache = run(bridge, TOKENS)
    stack = cache.decompose_resid()
    assert stack.dtype == torch.float32
    assert error(stack.sum(0), cache[FINAL].float()) < 0.1


def frozen(bridge: LoopedBridge, cache: LoopedCache, edits: dict[str, Tensor], free: tuple[str, ...] = ()) -> Tensor:
    """The final stream of a run in which all norms' scales and branch outputs are those of the cache, but for `edits`."""
    ends = ("hook_scale", "hook_alpha", "hook_attn_out", "hook_mlp_out")
    kept = {n: cache[n] for n in cache if n.endswith(ends) and not n.endswith(free or ("\0",))} | edits
    hooks = [(n, lambda tensor, hook, n=n: kept[n].clone()) for n in kept]
    final: list[Tensor] = []
    bridge.run_with_hooks(TOKENS, fwd_hooks=[*hooks, (FINAL, lambda tensor, hook: final.append(tensor.clone()))])
    return final[0]


@pytest.mark.slow
@FAMILIES
def test_each_component_equals_a_run_without_it(name: str) -> None:
    bridge = shared_bridge(name, torch.float64)
    cache, schedule = run(bridge, TOKENS), bridge.schedule
    stack, labels = in_loops(cache, cache.decompose_resid(return_labels=True))
    first = schedule.pass_prefix(schedule.passes[0])
    hooks = {"embed": "hook_embed", "initial_state": f"{first}.hook_state"}
    for i in range(schedule.n_layers):
        hooks |= {schedule.name(i, f"{what}_out"): f"blocks.{i}.hook_{what}_out" for what in ("attn", "mlp")}
    assert set(labels) == set(hooks) - ({"initial_state"} if bridge.looped_cfg.initial_state == "embedding" else set())
    for label, contribution in zip(labels, stack, strict=True):
        hook = hooks[label]
        # with all else frozen the embedding of a noise-state model must not change the state, hence the state is held too
        held = {} if "initial_state" not in labels else {hooks["initial_state"]: cache[hooks["initial_state"]]}
        without = frozen(bridge, cache, held | {hook: torch.zeros_like(cache[hook])})
        assert error(contribution, cache[FINAL] - without) < 1e-9, label
        assert contribution.abs().max() > 1e-6, label


@pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].injection != "none"])
def test_each_injection_equals_a_run_without_it(name: str) -> None:
    bridge = shared_bridge(name, torch.float64)
    cache = run(bridge, TOKENS)
    stack, labels = in_loops(cache, cache.decompose_resid(return_labels=True, injections=True))
    parts = dict(zip(labels, stack, strict=True))
    prefixes = [bridge.schedule.pass_prefix(p) for p in bridge.schedule.passes]
    held = {f"{p}.hook_injection": cache[f"{p}.hook_injection"] for p in prefixes}
    assert [label for label in labels if label.endswith("injection")] == [f"{p}.injection" for p in prefixes]
    for prefix in prefixes:
        zero = {f"{prefix}.hook_injection": torch.zeros_like(held[f"{prefix}.hook_injection"])}
        change = cache[FINAL] - frozen(bridge, cache, held | zero)
        torch.testing.assert_close(parts[f"{prefix}.injection"], change, atol=1e-9, rtol=1e-9)
    assert any(parts[f"{prefix}.injection"].abs().max() > 1e-3 for prefix in prefixes)
    layer = bridge.schedule.n_layers - 1  # a component after the last injection contributes what it always does
    label = bridge.schedule.name(layer, "mlp_out")
    torch.testing.assert_close(parts[label], cache.decompose_resid()[-1])


def test_injections_are_refused_where_nothing_is_injected() -> None:
    with pytest.raises(LoopedError, match="nothing is injected"):
        run(shared_bridge("ouro"), TOKENS).decompose_resid(injections=True)


@FAMILIES
@pytest.mark.parametrize("result_is_cached", [False, True])
def test_heads_and_neurons_equal_runs_without_them(name: str, result_is_cached: bool) -> None:
    bridge = random_bridge(name, torch.float64)
    bridge.set_use_attn_result(result_is_cached)
    cache = run(bridge, TOKENS)
    heads = dict(zip(*reversed(in_loops(cache, cache.stack_head_results(return_labels=True))), strict=True))
    neurons = dict(
        zip(*reversed(in_loops(cache, cache.stack_neuron_results(None, neuron_slice=[0, 7], return_labels=True))), strict=True)
    )
    assert len(heads) == 3 * bridge.cfg.n_layers and len(neurons) == 2 * bridge.cfg.n_layers
    state = f"{bridge.schedule.pass_prefix(bridge.schedule.passes[0])}.hook_state"
    held = {state: cache[state]} if bridge.looped_cfg.initial_state != "embedding" else {}
    for i in (0, bridge.cfg.n_layers // 2, bridge.cfg.n_layers - 1):
        z, post = cache["z", i].clone(), cache["post", i].clone()
        z[:, :, 1], post[..., 7] = 0, 0
        without = frozen(bridge, cache, held | {f"blocks.{i}.attn.hook_z": z}, (f"blocks.{i}.hook_attn_out",))
        assert error(heads[bridge.schedule.name(i, "head.1")], cache[FINAL] - without) < 1e-9
        without = frozen(bridge, cache, held | {f"blocks.{i}.mlp.hook_post": post}, (f"blocks.{i}.hook_mlp_out",))
        assert error(neurons[bridge.schedule.name(i, "neuron.7")], cache[FINAL] - without) < 1e-9


@FAMILIES
def test_pulling_back_equals_carrying(name: str) -> None:
    bridge = shared_bridge(name)
    cache = run(bridge, TOKENS)
    tokens = torch.randint(0, 31, TOKENS.shape)
    components, labels = in_loops(cache, cache.decompose_resid(return_labels=True))
    heads, head_labels = in_loops(cache, cache.stack_head_results(incl_remainder=True, return_labels=True))
    for stack, names, unit in ((components, labels, "component"), (heads, head_labels, "head")):
        pulled = cache.attribute_logits(tokens, unit=unit, positions=None)
        assert list(pulled.labels) == names
        assert error(pulled.values, cache.logit_attrs(stack, tokens)) < 1e-5
    layers = cache.attribute_logits(tokens, unit="layer", positions=None)
    carried = cache.logit_attrs(components, tokens)
    for label, value in zip(layers.labels, layers.values, strict=True):
        rows = [i for i, other in enumerate(labels) if other.removesuffix(".attn_out").removesuffix(".mlp_out") == label]
        assert len(rows) == (2 if "blocks" in label else 1)
        torch.testing.assert_close(value, carried[rows].sum(0), atol=1e-4, rtol=1e-5)
    directions = torch.randn(24, 2)
    for apply_ln in (False, True):
        full = cache.get_full_resid_decomposition(apply_ln=apply_ln)
        projected = cache.get_full_resid_decomposition(apply_ln=apply_ln, project_output_onto=directions)
        assert error(projected, full @ directions) < 1e-5
        neurons = cache.stack_neuron_results(2, apply_ln=apply_ln, incl_remainder=True, mlp_input=True)
        one = cache.stack_neuron_results(
            2, apply_ln=apply_ln, incl_remainder=True, mlp_input=True, project_output_onto=directions[:, 0]
        )
        assert error(one, neurons @ directions[:, 0]) < 1e-5


@FAMILIES
def test_streams_inside_the_model(name: str) -> None:
    bridge = shared_bridge(name, torch.float64)
    cache = run(bridge, TOKENS)
    for layer in range(bridge.cfg.n_layers):
        for mlp_input, hook in ((False, "hook_resid_pre"), (True, "hook_resid_mid")):
            stack, labels = in_loops(cache, cache.decompose_resid(layer, mlp_input=mlp_input, return_labels=True))
            stream = cache[f"blocks.{layer}.{hook}"]
            assert error(stack.sum(0), stream) < 1e-9
            assert error(cache.get_full_resid_decomposition(layer, mlp_input=mlp_input).sum(0), stream) < 1e-9
            assert (bridge.schedule.name(layer, "attn_out") in labels) == mlp_input
            applied = cache.apply_ln_to_stack(stack, layer, mlp_input=mlp_input).sum(0)
            reads = f"blocks.{layer}.{'mlp' if mlp_input else 'attn'}.hook_in"
            torch.testing.assert_close(applied, cache[reads])
            accumulated, names = in_loops(cache, cache.accumulated_resid(layer, mlp_input=mlp_input, return_labels=True))
            assert len(names) == layer + 1 + mlp_input and error(accumulated[-1], stream) < 1e-9
        assert error(cache.stack_head_results(layer, incl_remainder=True).sum(0), cache["resid_pre", layer]) < 1e-9
    assert cache.stack_head_results(0).shape == (0, *TOKENS.shape, 24)


@FAMILIES
def test_accumulated_parts_are_sums_of_what_was_written_by_then(name: str) -> None:
    bridge = shared_bridge(name, torch.float64)
    cache = run(bridge, TOKENS)
    components, labels = in_loops(cache, cache.decompose_resid(return_labels=True))
    parts, names = in_loops(cache, cache.accumulated_resid(incl_mid=True, return_labels=True))
    streams, stream_names = in_loops(cache, cache.accumulated_resid(incl_mid=True, return_labels=True, carried=False))
    assert names == stream_names and len(set(names)) == 2 * bridge.cfg.n_layers + 1
    for i, name_of_stream in enumerate(names[:-1]):
        stop = labels.index(name_of_stream.replace("resid_pre", "attn_out").replace("resid_mid", "mlp_out"))
        torch.testing.assert_close(parts[i], components[:stop].sum(0))
        hook = "hook_resid_mid" if i % 2 else "hook_resid_pre"
        assert torch.equal(streams[i], cache[f"blocks.{i // 2}.{hook}"])
    assert torch.equal(streams[-1], cache[FINAL])
    # only where nothing is done to the stream between blocks are they the same, as in ordinary transformers
    assert torch.allclose(parts, streams) == (name == "looped_qwen")


@FAMILIES
def test_labels_are_unique_and_in_the_order_of_the_run(name: str) -> None:
    bridge = shared_bridge(name)
    cache = run(bridge, TOKENS)
    _, labels = in_loops(cache, cache.decompose_resid(return_labels=True))
    _, full = in_loops(cache, cache.get_full_resid_decomposition(return_labels=True))
    assert len(set(labels)) == len(labels) and len(set(full)) == len(full)
    order = [bridge.schedule.name(i, what) for i in range(bridge.cfg.n_layers) for what in ("attn_out", "mlp_out")]
    assert [label for label in labels if "blocks" in label] == order
    assert labels[0] == "embed" and labels.count("initial_state") == (bridge.looped_cfg.initial_state != "embedding")
    attention, names = in_loops(cache, cache.decompose_resid(mode="attn", incl_embeds=False, return_labels=True))
    everything = cache.decompose_resid()
    assert names == order[::2]
    assert torch.equal(attention, everything[[labels.index(name) for name in names]])
    _, names = in_loops(cache, cache.decompose_resid(mode="mlp", return_labels=True))
    assert names == [label for label in labels if not label.endswith("attn_out")]


@pytest.mark.parametrize("name", slow_but(FEW))
def test_positions_and_batch_axis(name: str) -> None:
    bridge = shared_bridge(name)
    both, alone = run(bridge, TOKENS), run(bridge, TOKENS[:1]).remove_batch_dim()
    assert isinstance(alone, LoopedCache)
    full, heads = both.decompose_resid(), both.stack_head_results(incl_remainder=True)
    for positions, index in ((-1, -1), ((1, 3), slice(1, 3)), ([0, 2], [0, 2])):
        sliced = both.decompose_resid(pos_slice=positions)
        torch.testing.assert_close(sliced, full[:, :, index], atol=1e-5, rtol=1e-5)
        sliced_heads = both.stack_head_results(incl_remainder=True, pos_slice=positions)
        torch.testing.assert_close(sliced_heads, heads[:, :, index], atol=1e-5, rtol=1e-5)
        logits = both["unembed.hook_out"][:, index, 4] - both["unembed.hook_out"][:, index, 9]
        assert error(both.logit_attrs(sliced, 4, 9, pos_slice=positions).sum(0), logits) < 1e-4
        assert error(both.attribute_logits(4, 9, positions=positions).values.sum(0), logits) < 1e-4
        one = alone.decompose_resid(pos_slice=positions)
        torch.testing.assert_close(one, full[:, 0, index], atol=1e-5, rtol=1e-5)
        attribution = alone.attribute_logits(4, 9, positions=positions, unit="head").values
        assert error(attribution.sum(0), logits[0]) < 1e-4
        attrs = alone.logit_attrs(one, 4, 9, pos_slice=positions, has_batch_dim=False)
        assert error(attrs.sum(0), logits[0]) < 1e-4
    accumulated = both.accumulated_resid(pos_slice=-1)
    torch.testing.assert_close(accumulated, both.accumulated_resid()[:, :, -1], atol=1e-5, rtol=1e-5)


def test_a_cache_that_lacks_something_is_told_what() -> None:
    bridge = shared_bridge("ouro")
    cache = run(
        bridge, TOKENS, names_filter=lambda name: "ln_final" in name or name.endswith(("hook_attn_out", "hook_mlp_out"))
    )
    with pytest.raises(UnknownNameError, match=r"lacks loops.0.hook_state, hook_embed|lacks hook_embed") as caught:
        cache.decompose_resid()
    assert "names_filter" in str(caught.value)
    whole = run(bridge, TOKENS)
    for missing in ("loops.1.norm.hook_scale", "blocks.3.hook_mlp_out", "blocks.2.attn.hook_z", "blocks.2.ln1_post.hook_scale"):
        kept = LoopedCache({n: v for n, v in whole.items() if not torch.equal(v, whole[missing])}, bridge)
        with pytest.raises(UnknownNameError, match=missing):
            kept.stack_head_results(incl_remainder=True)
    needed = ["hook_embed", "*hook_state", "loops.*.norm.hook_scale", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out", FINAL]
    names = [n for name in needed if not name.startswith("*") for n in bridge.expand_name(name)] + ["loops.0.hook_state"]
    kept = run(bridge, TOKENS, names_filter=names)
    assert torch.equal(kept.decompose_resid(), whole.decompose_resid())


def test_runs_of_a_part_of_the_model_are_refused() -> None:
    bridge = shared_bridge("huginn")
    with pytest.raises(UnknownNameError, match="lacks"):
        run(bridge, TOKENS, loop=1).decompose_resid()
    stopped = run(bridge, TOKENS, stop_at_layer=6)
    with pytest.raises(UnknownNameError, match="lacks"):
        stopped.decompose_resid()
    assert error(stopped.decompose_resid(5).sum(0), stopped["resid_pre", 5]) < 1e-4


@FAMILIES
def test_an_edited_stream_is_refused_and_an_edited_component_is_not(name: str) -> None:
    bridge = shared_bridge(name)
    middle = bridge.cfg.n_layers // 2
    with bridge.hooks(fwd_hooks=[(f"blocks.{middle}.hook_resid_mid", lambda tensor, hook: tensor + 1)]):
        cache = run(bridge, TOKENS)
    for method in (cache.decompose_resid, cache.accumulated_resid, lambda: cache.attribute_logits(3, positions=None)):
        with pytest.raises(LoopedError, match="edited"):
            method()
    with bridge.hooks(fwd_hooks=[(f"blocks.{middle}.hook_attn_out", lambda tensor, hook: tensor * 0)]):
        cache = run(bridge, TOKENS)
    stack, labels = in_loops(cache, cache.decompose_resid(return_labels=True))
    assert error(stack.sum(0), cache[FINAL]) < 1e-4
    assert not stack[labels.index(bridge.schedule.name(middle, "attn_out"))].any()


def test_an_initial_state_of_ones_own_is_a_component() -> None:
    bridge = shared_bridge("looped_qwen")
    state = torch.randn(*TOKENS.shape, 24)
    cache = run(bridge, TOKENS, initial_state=state)
    stack, labels = in_loops(cache, cache.decompose_resid(return_labels=True))
    assert labels.index("initial_state") == 3 and error(stack.sum(0), cache[FINAL]) < 1e-4
    assert not stack[:3].any()  # what came before never reaches the loop
    assert run(bridge, TOKENS, initial_state="zero").attribute_logits(3).labels[3] == "initial_state"


def test_gradients_and_inference_mode() -> None:
    bridge = shared_bridge("parcae")
    expected = run(bridge, TOKENS).attribute_logits(3, unit="head").values
    with torch.enable_grad():
        cache = run(bridge, TOKENS)
        parts = cache.attribute_logits(3, unit="head").values
        assert not parts.requires_grad and not cache.decompose_resid().requires_grad
        torch.testing.assert_close(parts, expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(run(bridge, TOKENS).attribute_logits(3, unit="head").values, expected)


@FAMILIES
def test_neurons_of_one_layer(name: str) -> None:
    bridge = random_bridge(name, torch.float64, biases=("out",))
    cache = run(bridge, TOKENS)
    direction = torch.randn(24, 3, dtype=torch.float64)
    for layer in (0, -1):
        neurons = cache.get_neuron_results(layer)
        gain = 1.0
        block = bridge.blocks[layer]
        if "ln2_post" in dict(block.named_children()):
            gain = cache[f"blocks.{layer}.ln2_post.hook_scale"].reciprocal()
            gain = gain if block.ln2_post.weight is None else gain * block.ln2_post.weight
        written = neurons.sum(-2) + block.mlp.b_out * gain
        torch.testing.assert_close(written, cache["mlp_out", layer])
        torch.testing.assert_close(cache.get_neuron_results(layer, 4, -1), neurons[:, -1, 4])
        torch.testing.assert_close(cache.get_neuron_results(layer, [4, 5]), neurons[:, :, [4, 5]])
        projected = cache.get_neuron_results(layer, project_output_onto=direction)
        torch.testing.assert_close(projected, neurons @ direction)
        torch.testing.assert_close(
            cache.get_neuron_results(layer, 4, project_output_onto=direction[:, 0]), projected[..., 4, 0]
        )


def test_bad_choices(unchecked: None) -> None:
    cache = run(shared_bridge("ouro"), TOKENS)
    with pytest.raises(LoopedError, match="mode='both'"):
        cache.decompose_resid(mode="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LoopedError, match="unit='neuron'"):
        cache.attribute_logits(3, unit="neuron")  # pyright: ignore[reportArgumentType]
