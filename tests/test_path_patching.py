"""Path patching: direct paths against runs in which hooks hold what every other head and MLP writes."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from test_attribution import near, per_row, run, total
from torch import Tensor
from zoo import ZOO, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedCache, LoopedError
from tl_looped.errors import UnknownNameError
from tl_looped.path_patching import edge_sweep, path_patch

CLEAN, CORRUPTED = random_tokens(pos=4), random_tokens(pos=4, seed=1)
FAMILIES = pytest.mark.parametrize("name", ZOO)


@cache
def shared_bridge(name: str) -> LoopedBridge:
    """One bridge of a family for the tests that leave it as it was."""
    return random_bridge(name, torch.float64)


READS = ("attn.hook_in", "mlp.hook_in", "unembed.hook_in")
WRITES = ("hook_embed", "attn.hook_z", "hook_mlp_out")


def written(bridge: LoopedBridge, clean: LoopedCache, corrupted: LoopedCache, source: str) -> tuple[str, Tensor]:
    """The hook that holds what a source writes, and its change; a head's is in its z, zero for other heads."""
    if ".head." not in source:
        name = bridge.schedule.expand(source.replace("mlp_out", "hook_mlp_out"))[0] if source != "embed" else "hook_embed"
        return name, clean[name] - corrupted[name]
    place, head = source.split(".head.")
    name = bridge.schedule.expand(f"{place}.attn.hook_z")[0]
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
        name = bridge.schedule.expand(receiver.replace("mlp_in", "mlp.hook_in"))[0]
        return name, changes[name]
    place, rest = receiver.split(".head.")
    head, letter = rest.split(".")
    layer = bridge.schedule.expand(f"{place}.attn")[0].removesuffix(".attn")
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
    bridge = shared_bridge(name)
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
    bridge = shared_bridge(name)
    clean, corrupted = run(bridge, CLEAN), run(bridge, CORRUPTED)
    sources = ["embed", "blocks.1.head.2", "blocks.2.mlp_out"]
    receivers = ["blocks.2.head.0.q", "blocks.3.head.0.k", "blocks.3.head.0.v", "blocks.3.mlp_in", "logits"]
    found = path_patch(bridge, CORRUPTED, clean, per_row, sources, receivers)
    assert found.axes == ("source", "receiver", "example") and found.values.shape == (3, 5, 2)
    assert found.labels["source"] == [bridge.schedule.loop_name(n) for n in sources]
    changes = direct_runs(bridge, corrupted, [written(bridge, clean, corrupted, source) for source in sources])
    for j, receiver in enumerate(receivers):
        hook, change = entering(bridge, changes, receiver)
        for i in range(len(sources)):
            torch.testing.assert_close(found.values[i, j], patched(bridge, hook, change[i]), rtol=1e-8, atol=1e-10)


@FAMILIES
def test_edges_tend_to_patched_paths(name: str) -> None:
    bridge = shared_bridge(name)
    close = near(run(bridge, CLEAN), run(bridge, CORRUPTED), 1e-7)
    sources, receivers = ["embed", "blocks.*.head.0"], ["blocks.*.head.0.v", "logits"]
    if name != "ouro":  # one family over all pairs of passes
        sources[1], receivers[0] = "blocks.1.head.*", "blocks.3.head.*.q"
    edges = edge_sweep(bridge, CORRUPTED, close, per_row, sources, receivers)
    paths = path_patch(bridge, CORRUPTED, close, per_row, sources, receivers)
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
        path_patch(bridge, CORRUPTED, clean, total, late, early)
    both = path_patch(bridge, CORRUPTED, clean, total, [late, "embed"], early)
    assert both.labels["source"] == ["embed", late] and both.values[0, 0] != 0 == both.values[1, 0]


def test_chunks_and_examples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = random_bridge("huginn", torch.float64)
    clean = run(bridge, CLEAN)
    whole = edge_sweep(bridge, CORRUPTED, clean, total)
    monkeypatch.setattr("tl_looped.path_patching.CHUNK", 7 * 2 * 4 * 24)
    rows = edge_sweep(bridge, CORRUPTED, clean, per_row)
    assert rows.axes == ("source", "receiver", "example")
    torch.testing.assert_close(rows.values.sum(-1), whole.values)


def test_few_activations_suffice_and_precision_may_be_low() -> None:
    bridge = random_bridge("parcae", torch.bfloat16)
    names = ["hook_embed", "loops.*.blocks.*.attn.hook_z"]
    with torch.inference_mode():
        _, clean = bridge.run_with_cache(CLEAN, names_filter=names)
        heads = edge_sweep(bridge, CORRUPTED, clean, total, ["embed", "loops.*.blocks.*.head.*"], "loops.2.blocks.1.head.*.?")
    assert heads.values.dtype == torch.float32 and heads.values.shape == (19, 9)
    reference = random_bridge("parcae")
    _, clean = reference.run_with_cache(CLEAN)
    expected = edge_sweep(reference, CORRUPTED, clean, total, ["embed", "loops.*.blocks.*.head.*"], "loops.2.blocks.1.head.*.?")
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
            path_patch(bridge, CORRUPTED, clean, total, sources, receivers)
    few = run(bridge, CLEAN, names_filter="loops.1.blocks.*.attn.hook_z")
    with pytest.raises(UnknownNameError, match=r"lacks hook_embed, prelude.blocks.0.attn.hook_z"):
        edge_sweep(bridge, CORRUPTED, few, total)
    with pytest.raises(LoopedError, match="equally many rows"):
        edge_sweep(bridge, CORRUPTED[:, :3], clean, total)
    with pytest.raises(LoopedError, match="another initial state"):
        path_patch(bridge, CORRUPTED, clean, total, "embed", "logits", initial_state=1)
    with pytest.raises(LoopedError, match="one number, or one per row"):
        edge_sweep(bridge, CORRUPTED, clean, lambda logits: logits[0])
    assert not any(hook.fwd_hooks for hook in bridge.hook_dict.values())
