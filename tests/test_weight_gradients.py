"""Weight gradients by pass, against autograd's and against outer products at the hooks of each pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import FAMILIES, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError
from tl_looped.attribution import influence, weight_gradients_by_pass
from tl_looped.errors import OutOfRangeError

TOKENS = random_tokens(pos=5)


def parameters(bridge: LoopedBridge) -> dict[str, torch.nn.Parameter]:
    return bridge.original_model.canonical_parameters()  # pyright: ignore[reportCallIssue]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].sum() - logits[:, 1, 7].sum()


@FAMILIES
def test_passes_sum_to_the_gradient_bit_for_bit(name: str) -> None:
    bridge = random_bridge(name, torch.float64)  # gets a hook
    exits: list[Tensor] = []
    if bridge.looped_cfg.exit_gate:  # the gates count too where the metric reads them
        bridge.add_hook("loops.*.hook_exit_logit", lambda x, hook: exits.append(x.square().sum()))

    def loss(logits: Tensor) -> Tensor:
        value = metric(logits) + sum(exits)
        exits.clear()
        return value

    before = parameters(bridge)
    found = weight_gradients_by_pass(bridge, TOKENS, loss)
    assert all(p is before[n] for n, p in parameters(bridge).items())  # put back, the same objects
    assert not any(p.grad is not None for p in before.values())
    looped = [n for n in before if n.split(".")[0] in ("core", "L", "H", "inject", "pass_norm", "exit_gate")]
    assert list(found) == looped and set(bridge.core_weights) <= set(found)
    expected = torch.autograd.grad(loss(bridge(TOKENS)), [before[n] for n in looped])
    for (key, by_pass), gradient in zip(found.items(), expected, strict=True):
        n_uses = bridge.schedule.n_loops_of(key[0]) if key[0] in "LH" else bridge.n_loops
        assert by_pass.shape == (n_uses, *gradient.shape)
        backwards = by_pass[-1]  # autograd adds the last pass first
        for earlier in by_pass.flip(0)[1:]:
            backwards = backwards + earlier
        assert torch.equal(backwards, gradient), key
        assert by_pass.flatten(1).abs().amax(1).all() or key.endswith("k.bias"), key


@FAMILIES
def test_each_pass_has_the_gradient_of_its_own_use(name: str) -> None:
    """For a linear map, the sum over positions of (gradient at its output) x (its input), both read in one pass."""
    bridge = random_bridge(name, torch.float64)
    found = weight_gradients_by_pass(bridge, TOKENS, metric)
    seen: dict[str, Tensor] = {}
    for p in bridge.schedule.passes:
        layer = p.first + 1
        names = [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.attn.o.hook_out", f"blocks.{layer}.mlp.in.hook_in"]
        names += [f"blocks.{layer}.mlp.in.hook_out"]
        fwd = [(n, lambda x, hook: seen.update({hook.name: x.detach()})) for n in (names[0], names[2])]
        bwd = [(n, lambda g, hook: seen.update({hook.name: g.clone()})) for n in (names[1], names[3])]
        metric(bridge.run_with_hooks(TOKENS, fwd, bwd)).backward()
        read = [seen[bridge.hook_dict[n].name].flatten(2) for n in names]
        for (x, gradient), weight in ((read[:2], "attn.o.weight"), (read[2:], "mlp.up.weight")):
            expected = torch.einsum("bpo,bpi->oi", gradient, x)
            torch.testing.assert_close(found[f"{p.stack}.1.{weight}"][p.loop], expected, rtol=1e-9, atol=1e-11)


def test_the_norm_of_the_last_pass_counts_for_it() -> None:
    bridge = random_bridge("ouro", torch.float64)
    found = weight_gradients_by_pass(bridge, TOKENS, metric)["pass_norm.weight"]
    seen: dict[str, Tensor] = {}
    hooks = [
        (f"{n}.hook_normalized", lambda x, hook: seen.update({hook.name: x.detach()})) for n in ("loops.1.norm", "ln_final")
    ]
    outs = [(f"{n}.hook_out", lambda g, hook: seen.update({hook.name: g.clone()})) for n in ("loops.1.norm", "ln_final")]
    metric(bridge.run_with_hooks(TOKENS, hooks, outs)).backward()
    for t, norm in ((1, "loops.1.norm"), (2, "ln_final")):
        torch.testing.assert_close(found[t], (seen[f"{norm}.hook_normalized"] * seen[f"{norm}.hook_out"]).sum((0, 1)))


def test_frozen_parameters_grad_modes_and_the_usual_loss(unchecked: None) -> None:
    bridge = random_bridge("huginn", torch.float64)
    bridge(TOKENS, return_type="loss").backward()
    expected = bridge.core_weights["core.2.mlp.down.weight"].grad
    assert expected is not None
    bridge.requires_grad_(False)
    with torch.inference_mode():
        found = weight_gradients_by_pass(bridge, TOKENS)["core.2.mlp.down.weight"]
    torch.testing.assert_close(found.sum(0), expected)
    assert not any(p.requires_grad for p in bridge.parameters())
    other = weight_gradients_by_pass(bridge, TOKENS, initial_state=3)["core.2.mlp.down.weight"]
    assert not torch.allclose(other, found)
    before = parameters(bridge)
    for wrong in (lambda logits: logits[0], lambda logits: metric(logits).detach(), lambda logits: metric(logits).item()):
        with pytest.raises(LoopedError, match="must return a scalar tensor"):
            weight_gradients_by_pass(bridge, TOKENS, wrong)
        assert all(p is before[n] for n, p in parameters(bridge).items())


@pytest.mark.parametrize(("name", "stack"), [("nanbeige", None), ("hrm_text", "L")])
def test_influence_is_tracin_by_loop(name: str, stack: str | None) -> None:
    bridge = random_bridge(name, torch.float64)  # its weights are changed
    train, query = random_tokens(2, 5, 1), random_tokens(3, 4, 2)
    found = influence(bridge, train, query, stack=stack)
    n_loops = bridge.schedule.n_loops_of(bridge.schedule.looped_stack(stack))
    assert found.axes == ("train", "query", "loop") and found.values.shape == (2, 3, n_loops)
    both = influence(bridge, train, query, stack=stack, by_train_loop=True)
    assert both.axes == ("train", "query", "train_loop", "loop")
    torch.testing.assert_close(both.values.sum(2), found.values)
    weights = [p for n, p in parameters(bridge).items() if n.startswith(("L.",) if stack else ("core.", "pass_norm."))]

    def loss(tokens: Tensor) -> Tensor:
        return bridge(tokens, return_type="loss")

    gradients = torch.autograd.grad(loss(train[1:]), weights)
    others = torch.autograd.grad(loss(query[2:]), weights)
    inner = sum((g * o).sum() for g, o in zip(gradients, others, strict=True))
    torch.testing.assert_close(found.values[1, 2].sum(), inner)
    rate = 1e-8
    with torch.no_grad():
        start = loss(query[2:])
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= rate * gradient
        torch.testing.assert_close((start - loss(query[2:])) / rate, inner, rtol=1e-3, atol=1e-5)


def test_influence_of_chosen_loops_and_another_loss() -> None:
    bridge = random_bridge("ouro", torch.float64)
    train, query = random_tokens(1, 5, 1), random_tokens(2, 5, 2)

    def last(logits: Tensor, tokens: Tensor) -> Tensor:
        return -logits[0, -1].log_softmax(-1)[tokens[0, 0]]

    full = influence(bridge, train, query, loss_fn=last, by_train_loop=True)
    some = influence(bridge, train, query, loss_fn=last, loops=[2, 0])
    assert some.labels["loop"] == [2, 0]
    torch.testing.assert_close(some.values, full.values.sum(2)[..., [2, 0]])
    with pytest.raises(OutOfRangeError, match="3 loops"):
        influence(bridge, train, query, loops=3)
    with pytest.raises(LoopedError, match="scalar"):
        influence(bridge, train, query, loss_fn=lambda logits, tokens: logits[0])
