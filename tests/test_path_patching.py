"""Path patching: direct paths against runs in which hooks hold what every other head and MLP writes."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from helpers import near, per_row, run, tiny_llama, total
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from zoo import FAMILIES, FEW, random_bridge, random_tokens, shared_bridge, slow_but

from tl_looped import LoopedBridge, LoopedCache, LoopedError
from tl_looped.attribution import edge_sweep, path_patch
from tl_looped.bridge.processing import stream_break
from tl_looped.errors import UnknownNameError

CLEAN, CORRUPTED = random_tokens(pos=4), random_tokens(pos=4, seed=1)


READS = ("attn.hook_in", "mlp.hook_in", "unembed.hook_in")
WRITES = ("hook_embed", "attn.hook_z", "hook_mlp_out")


def written(bridge: LoopedBridge, clean: LoopedCache, corrupted: LoopedCache, source: str) -> tuple[str, Tensor]:
    """The hook that holds what a source writes, and its change; a head's is in its z, zero for other heads."""
    if ".head." not in source:
        name = bridge.schedule.names.expand(source.replace("mlp_out", "hook_mlp_out"))[0] if source != "embed" else "hook_embed"
        return name, clean[name] - corrupted[name]
    place, head = source.split(".head.")
    name = bridge.schedule.names.expand(f"{place}.attn.hook_z")[0]
    change = torch.zeros_like(corrupted[name])
    change[..., int(head), :] = (clean[name] - corrupted[name])[..., int(head), :]
    return name, change


def direct_runs(bridge: LoopedBridge, corrupted: LoopedCache, changes: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The change of every branch's input, [run, ...], where one source writes something else and all others what they did.

    Norms and injections run as they do. One batch holds all runs.
    """
    n = len(changes)

    def hold(x: Tensor, hook: object, name: str) -> Tensor:
        held = torch.stack([corrupted[name]] * n)
        for i, (where, change) in enumerate(changes):
            if where == name:
                held[i] += change
        return held.flatten(0, 1)

    seen: dict[str, Tensor] = {}

    def see(x: Tensor, hook: object, name: str) -> None:
        seen[name] = x.unflatten(0, (n, -1)) - corrupted[name]

    hooks = [(name, partial(hold, name=name)) for name in bridge.hook_dict if name.endswith(WRITES)]
    hooks += [(name, partial(see, name=name)) for name in bridge.hook_dict if name.endswith(READS)]
    with torch.no_grad():
        bridge.run_with_hooks(CORRUPTED.repeat(n, 1), hooks)
    return seen


def slopes(bridge: LoopedBridge, corrupted: LoopedCache, changes: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The derivatives of such changes at zero, from four steps each: off by about step^4, 1e-12, and 1e-13 of rounding."""
    step = 1e-3
    steps = [(name, k * step * change) for k in (1, -1, 2, -2) for name, change in changes]
    found = {}
    for name, value in direct_runs(bridge, corrupted, steps).items():
        up, down, far_up, far_down = value.unflatten(0, (4, -1))
        found[name] = (8 * (up - down) - (far_up - far_down)) / (12 * step)
    return found


def entering(bridge: LoopedBridge, changes: dict[str, Tensor], receiver: str) -> tuple[str, Tensor]:
    """The hook that a receiver's changes enter by, and the changes there, zero for other heads."""
    if receiver == "logits":
        return "unembed.hook_in", changes["unembed.hook_in"]
    if ".head." not in receiver:
        name = bridge.schedule.names.expand(receiver.replace("mlp_in", "mlp.hook_in"))[0]
        return name, changes[name]
    place, rest = receiver.split(".head.")
    head, letter = rest.split(".")
    layer = bridge.schedule.names.expand(f"{place}.attn")[0].removesuffix(".attn")
    linear = getattr(bridge.blocks[int(layer.removeprefix("blocks."))].attn, letter).original_component
    width = bridge.cfg.d_head
    projected = (changes[f"{layer}.attn.hook_in"] @ linear.weight.detach().T).unflatten(-1, (-1, width))
    only = torch.zeros_like(projected)
    only[..., int(head), :] = projected[..., int(head), :]
    return f"{layer}.attn.hook_{letter}", only


def patched(bridge: LoopedBridge, name: str, change: Tensor) -> Tensor:
    with torch.no_grad():
        return per_row(bridge.run_with_hooks(CORRUPTED, [(name, lambda x, hook: x + change)])) - per_row(bridge(CORRUPTED))


def gradients(bridge: LoopedBridge) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(g: Tensor, hook: object, name: str) -> None:
        found[name] = g.clone()

    names = [n for n in bridge.hook_dict if n.endswith((*READS[1:], "attn.hook_q", "attn.hook_k", "attn.hook_v"))]
    total(bridge.run_with_hooks(CORRUPTED, bwd_hooks=[(n, partial(keep, name=n)) for n in names])).backward()
    return found


@FAMILIES
def test_every_edge_is_the_derivative_of_the_path(name: str) -> None:
    """All sources and receivers of all passes: the slope of a direct run at the receiver, times the receiver's gradient."""
    bridge = random_bridge(name, torch.float64)
    clean, corrupted = run(bridge, CLEAN), run(bridge, CORRUPTED)
    edges = edge_sweep(bridge, CORRUPTED, clean, total)
    n_layers, cfg = bridge.cfg.n_layers, bridge.looped_cfg
    assert edges.axes == ("source", "receiver") and edges.name == "edge attribution"
    assert edges.values.shape == (1 + n_layers * (cfg.n_heads + 1), n_layers * (cfg.n_heads + 2 * cfg.n_kv_heads + 1) + 1)
    grads = gradients(bridge)
    changes = slopes(bridge, corrupted, [written(bridge, clean, corrupted, source) for source in edges.labels["source"]])
    for j, receiver in enumerate(edges.labels["receiver"]):
        hook, change = entering(bridge, changes, receiver)
        expected = (grads[hook].view_as(change[0]) * change).flatten(1).sum(-1)
        torch.testing.assert_close(edges.values[:, j], expected, rtol=1e-6, atol=1e-7)


@FAMILIES
def test_a_patched_path_is_the_run_with_the_changed_receiver(name: str) -> None:
    bridge = shared_bridge(name, torch.float64)
    clean, corrupted = run(bridge, CLEAN), run(bridge, CORRUPTED)
    sources = ["embed", "blocks.1.head.2", "blocks.2.mlp_out"]
    receivers = ["blocks.2.head.0.q", "blocks.3.head.0.k", "blocks.3.head.0.v", "blocks.3.mlp_in", "logits"]
    found = path_patch(bridge, CORRUPTED, clean, per_row, sources=sources, receivers=receivers)
    assert found.axes == ("source", "receiver", "example") and found.values.shape == (3, 5, 2)
    assert found.labels["source"] == [bridge.schedule.loop_name(n) for n in sources]
    changes = direct_runs(bridge, corrupted, [written(bridge, clean, corrupted, source) for source in sources])
    for j, receiver in enumerate(receivers):
        hook, change = entering(bridge, changes, receiver)
        for i in range(len(sources)):
            torch.testing.assert_close(found.values[i, j], patched(bridge, hook, change[i]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", slow_but(FEW))
def test_edges_tend_to_patched_paths(name: str) -> None:
    bridge = shared_bridge(name, torch.float64)
    close = near(run(bridge, CLEAN), run(bridge, CORRUPTED), 1e-7)
    sources, receivers = ["embed", "blocks.*.head.0"], ["blocks.*.head.0.v", "logits"]
    if name != "ouro":  # one family over all pairs of passes
        sources[1], receivers[0] = "blocks.1.head.*", "blocks.3.head.*.q"
    edges = edge_sweep(bridge, CORRUPTED, close, per_row, sources=sources, receivers=receivers)
    paths = path_patch(bridge, CORRUPTED, close, per_row, sources=sources, receivers=receivers)
    assert edges.labels == paths.labels and torch.equal(edges.values == 0, paths.values == 0)
    assert (edges.values - paths.values).abs().max() < 1e-4 * paths.values.abs().max()


def test_a_source_that_runs_later_sends_nothing() -> None:
    bridge = random_bridge("ouro", torch.float64)
    clean = run(bridge, CLEAN)
    edges = edge_sweep(bridge, CORRUPTED, clean, total)
    for i, source in enumerate(edges.labels["source"][1:], start=1):
        layer = (i - 1) // 4  # three heads and an MLP for each layer
        is_mlp = source.endswith("mlp_out")
        for j, receiver in enumerate(edges.labels["receiver"][:-1]):
            reads = j // 10  # three queries, keys and values and an MLP
            earlier = layer < reads or (layer == reads and not is_mlp and receiver.endswith("mlp_in"))
            assert bool(edges.values[i, j] != 0) == earlier, (source, receiver)
    late, early = "loops.2.blocks.0.head.1", "loops.1.blocks.0.head.1.q"
    with pytest.raises(LoopedError, match=rf"from {late} to {early} .* runs after the receiver"):
        path_patch(bridge, CORRUPTED, clean, total, sources=late, receivers=early)
    both = path_patch(bridge, CORRUPTED, clean, total, sources=[late, "embed"], receivers=early)
    assert both.labels["source"] == ["embed", late] and both.values[0, 0] != 0 == both.values[1, 0]


def test_chunks_and_examples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = random_bridge("huginn", torch.float64)
    clean = run(bridge, CLEAN)
    whole = edge_sweep(bridge, CORRUPTED, clean, total)
    monkeypatch.setattr("tl_looped.attribution.paths.CHUNK", 7 * 2 * 4 * 24)
    rows = edge_sweep(bridge, CORRUPTED, clean, per_row)
    assert rows.axes == ("source", "receiver", "example")
    torch.testing.assert_close(rows.values.sum(-1), whole.values)


def test_few_activations_suffice_and_precision_may_be_low() -> None:
    bridge = random_bridge("parcae", torch.bfloat16)
    names = ["hook_embed", "loops.*.blocks.*.attn.hook_z"]
    with torch.inference_mode():
        _, clean = bridge.run_with_cache(CLEAN, names_filter=names)
        heads = edge_sweep(
            bridge, CORRUPTED, clean, total, sources=["embed", "loops.*.blocks.*.head.*"], receivers="loops.2.blocks.1.head.*.?"
        )
    assert heads.values.dtype == torch.float32 and heads.values.shape == (19, 9)
    reference = random_bridge("parcae")
    _, clean = reference.run_with_cache(CLEAN)
    expected = edge_sweep(
        reference, CORRUPTED, clean, total, sources=["embed", "loops.*.blocks.*.head.*"], receivers="loops.2.blocks.1.head.*.?"
    )
    assert (heads.values - expected.values).abs().max() < 0.1 * expected.values.abs().max()


def test_bad_input_is_explained(unchecked: None) -> None:
    bridge = random_bridge("huginn")
    clean = run(bridge, CLEAN)
    for sources, receivers, message in (
        ("loops.0.blocks.0.head.3", "logits", r"source 'loops.0.blocks.0.head.3' was asked.*prelude.blocks.0.head.0"),
        ("embed", "loops.0.blocks.0.head.0", r"receiver 'loops.0.blocks.0.head.0' was asked.*prelude.blocks.0.head.0.*logits"),
        ("embed", "loops.3.blocks.0.mlp_in", "3 loops"),
    ):
        with pytest.raises(LoopedError, match=message):
            path_patch(bridge, CORRUPTED, clean, total, sources=sources, receivers=receivers)
    few = run(bridge, CLEAN, names_filter="loops.1.blocks.*.attn.hook_z")
    with pytest.raises(UnknownNameError, match=r"lacks hook_embed, prelude.blocks.0.attn.hook_z"):
        edge_sweep(bridge, CORRUPTED, few, total)
    with pytest.raises(LoopedError, match="equally many rows"):
        edge_sweep(bridge, CORRUPTED[:, :3], clean, total)
    with pytest.raises(LoopedError, match="another initial state"):
        path_patch(bridge, CORRUPTED, clean, total, sources="embed", receivers="logits", initial_state=1)
    with pytest.raises(LoopedError, match="one number, or one per row"):
        edge_sweep(bridge, CORRUPTED, clean, lambda logits: logits[0])
    assert not any(hook.fwd_hooks for hook in bridge.hook_dict.values())


def looped_and_plain() -> tuple[LoopedBridge, TransformerBridge]:
    """Layers 1 and 2 of a Llama run twice, and TransformerLens's own bridge of the Llama with these layers copied."""
    hf, twin = tiny_llama(4), tiny_llama(6)
    generator = torch.Generator().manual_seed(1)
    for parameter in hf.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if parameter.ndim == 1 else 1.2 * noise / parameter.shape[-1] ** 0.5
    twin.load_state_dict(hf.state_dict(), strict=False)
    for layer, copied in enumerate((0, 1, 2, 1, 2, 3)):
        twin.model.layers[layer].load_state_dict(hf.model.layers[copied].state_dict())
    theirs = build_bridge_from_module(twin, "LlamaForCausalLM", hf_config=twin.config, dtype=torch.float32, device="cpu")
    return LoopedBridge.loop_layers(hf, 1, 3, n_loops=2), theirs


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].sum() - logits[:, -1, 6].sum()


def test_paths_on_a_model_of_one_running_sum_are_those_of_the_papers() -> None:
    """Wang et al. as TransformerLens runs it on the copied layers; Syed et al. from its split inputs and autograd."""
    ours, theirs = looped_and_plain()
    clean, corrupted, layer, head = random_tokens(pos=4), random_tokens(pos=4, seed=1), 1, 2
    with torch.no_grad():
        (_, cache), (_, their_clean), (_, their_corrupted) = (
            model.run_with_cache(tokens) for model, tokens in ((ours, clean), (theirs, clean), (theirs, corrupted))
        )
        baseline = difference(theirs(corrupted))
        expected = {
            letter: patching.get_act_patch_direct_path(
                theirs, corrupted, their_clean, their_corrupted, difference, layer, head, letter, verbose=False
            )
            - baseline
            for letter in "qkv"
        }
    source = f"blocks.{layer}.head.{head}"
    for letter, scores in expected.items():
        found = path_patch(
            ours, corrupted, cache, difference, sources=source, receivers=f"blocks.2:.head.*.{letter}"
        ).values.view(4, 3)
        assert found.abs().max() > 0.1
        torch.testing.assert_close(found, scores[2:].to(found), atol=1e-4, rtol=1e-4)

    theirs.set_use_split_qkv_input(True)
    slopes: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any, name: str) -> None:
        slopes[name] = gradient.clone()

    inputs = [f"blocks.{i}.hook_{letter}_input" for i in range(2, 6) for letter in "qkv"]
    difference(theirs.run_with_hooks(corrupted, bwd_hooks=[(name, partial(keep, name=name)) for name in inputs])).backward()
    change = (their_clean["z", layer] - their_corrupted["z", layer])[..., head, :] @ theirs.blocks[layer].attn.W_O[head]
    for letter in "qkv":
        found = edge_sweep(
            ours, corrupted, cache, difference, sources=source, receivers=f"blocks.2:.head.*.{letter}"
        ).values.view(4, 3)
        by_hand = [torch.einsum("bphd,bpd->h", slopes[f"blocks.{i}.hook_{letter}_input"], change) for i in range(2, 6)]
        torch.testing.assert_close(found, torch.stack(by_hand), atol=1e-4, rtol=1e-4)


@FAMILIES
def test_a_path_into_an_mlp_or_the_logits_computes_their_norm_anew(name: str) -> None:
    """By hand: hold what every head and MLP writes but the source, run on, and take what the receiver then reads."""
    bridge = random_bridge(name, torch.float64)
    clean, corrupted = random_tokens(pos=4), random_tokens(pos=4, seed=1)
    with torch.no_grad():
        (_, cache), (logits, other) = (bridge.run_with_cache(tokens) for tokens in (clean, corrupted))
    last = bridge.cfg.n_layers - 1
    receivers = {f"blocks.{last}.mlp_in": f"blocks.{last}.mlp.hook_in", "logits": "unembed.hook_in"}
    held = [n for n in bridge.hook_dict if n.endswith(("attn.hook_z", "hook_mlp_out", "hook_embed"))]
    read: dict[str, Tensor] = {}

    def write(x: Tensor, hook: Any, value: Tensor) -> Tensor:
        return value.clone()

    def keep(x: Tensor, hook: Any, name: str) -> None:
        read[name] = x.clone()

    hooks: list[Any] = [(n, partial(write, value=(cache if n == "blocks.0.hook_mlp_out" else other)[n])) for n in held]
    hooks += [(n, partial(keep, name=n)) for n in receivers.values()]
    found = path_patch(
        bridge, corrupted, cache, difference, sources="blocks.0.mlp_out", receivers=list(receivers)
    ).values.flatten()
    with torch.no_grad():
        bridge.run_with_hooks(corrupted, hooks)
        for entry, effect in zip(receivers.values(), found.tolist(), strict=True):
            expected = bridge.run_with_hooks(corrupted, [(entry, partial(write, value=read[entry]))])
            assert effect == pytest.approx((difference(expected) - difference(logits)).item(), rel=1e-8, abs=1e-10)


def test_a_path_through_an_edited_stream_or_norm_is_refused() -> None:
    """The weights no longer say what a receiver reads; an edit of what a component writes is part of the run."""
    bridge, tokens = random_bridge("ouro"), random_tokens(pos=4)
    _, cache = bridge.run_with_cache(tokens)
    for name in ("blocks.1.hook_resid_post", "loops.1.hook_out", "blocks.3.ln1.hook_scale", "ln_final.hook_normalized"):
        for sweep in (path_patch, edge_sweep):
            with bridge.hooks([(name, lambda x, hook: 1.5 * x + 1)]), pytest.raises(LoopedError, match="was edited"):
                sweep(bridge, tokens.flip(1), cache, difference, sources="embed", receivers=["blocks.3.head.0.q", "logits"])
    with bridge.hooks([("blocks.2.hook_attn_out", lambda x, hook: 0 * x)]):
        assert (
            edge_sweep(bridge, tokens.flip(1), cache, difference, sources="embed", receivers="logits").values.abs().item()
            > 1e-3
        )


def test_one_input_for_query_key_and_value_needs_as_many_keys_as_heads() -> None:
    """TransformerLens wires head h to the input of group h there."""
    bridge = random_bridge("looped_qwen")
    for switch in (lambda: bridge.set_use_attn_in(True), lambda: setattr(bridge.cfg, "use_attn_in", True)):
        with pytest.raises(LoopedError, match=r"3 heads .* share 1 .*set_use_split_qkv_input\(True\)"):
            switch()
    bridge.blocks[0].attn.config.use_attn_in = True  # past every setter
    with pytest.raises(LoopedError, match="share 1"):
        bridge(random_tokens())
    even = random_bridge("looped_qwen", n_kv_heads=3)
    even.set_use_attn_in(True)
    assert even.run_with_cache(random_tokens())[1]["blocks.1.hook_attn_in"].shape == (2, 7, 3, 24)


def test_split_inputs_of_grouped_keys_are_those_of_the_groups() -> None:
    """By hand: key head 1 of 2, read by query heads 2 and 3 of 4, projects the edited stream; and so does its gradient."""
    sizes = {"n_heads": 4, "d_head": 6, "n_kv_heads": 2}
    bridge, tokens = random_bridge("looped_qwen", torch.float64, **sizes), random_tokens()
    gradients: dict[str, Tensor] = {}
    shift = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, 1] += shift
        return x

    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    block = bridge.original_model.blocks[2]
    for letter in "kv":
        linear = getattr(block.attn, letter)
        stream = (cache["resid_pre", 2] + shift).requires_grad_()
        normed = stream / (stream.square().mean(-1, keepdim=True) + bridge.looped_cfg.norm_eps).sqrt() * block.ln1.weight
        projected = (normed @ linear.weight.T + linear.bias).unflatten(-1, (2, 6))[:, :, 1]

        def replace(x: Tensor, hook: Any, projected: Tensor = projected) -> Tensor:
            return torch.stack((x[:, :, 0], projected), dim=2)

        expected = difference(bridge.run_with_hooks(tokens, [(f"blocks.2.attn.hook_{letter}", replace)]))
        (by_hand,) = torch.autograd.grad(expected, stream)
        bridge.set_use_split_qkv_input(True)
        keep = [(f"blocks.2.hook_{letter}_input", lambda g, hook: gradients.update({"g": g.clone()}))]
        found = difference(bridge.run_with_hooks(tokens, [(f"blocks.2.hook_{letter}_input", edit)], keep))
        found.backward()
        bridge.set_use_split_qkv_input(False)
        assert found.item() == pytest.approx(expected.item(), rel=1e-10)
        torch.testing.assert_close(gradients["g"][:, :, 1], by_hand, rtol=1e-8, atol=1e-10)


@FAMILIES
def test_edge_attribution_by_others_is_warned_of_where_the_stream_is_no_running_sum(name: str) -> None:
    """Whoever computes edges splits the inputs; one warning for each model, none where the sum is right."""
    bridge = random_bridge(name)
    breaks = [i for i in range(bridge.cfg.n_layers) if stream_break(bridge.looped_cfg, i) is not None]
    assert bool(breaks) == (name != "looped_qwen")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bridge.set_use_split_qkv_input(True)
        assert bridge.unroll(2).cfg.use_split_qkv_input  # not asked for by the user, and told before
        bridge.set_use_split_qkv_input(False)
        bridge.cfg.use_split_qkv_input = True
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(told) == bool(breaks)
    assert all(f"from layer {breaks[0]} " in message and "edge_sweep" in message for message in told)
