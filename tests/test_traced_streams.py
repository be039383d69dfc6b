"""Traced layers that take or return other tensors before their stream: hooks see the stream, and act on it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, cast

import looped_modules
import pytest
import torch
from torch import Tensor, nn

from tl_looped import LoopedBridge
from tl_looped.attribution import attribution_sweep
from tl_looped.errors import LoopedError
from tl_looped.interventions import skip_loop, steer
from tl_looped.lenses import logit_lens
from tl_looped.patching import patch_sweep

N_LOOPS, N_LAYERS = 3, 2


class ByHand:
    """What every layer takes and returns, by hooks of PyTorch; and one call's stream doubled.

    Args:
        module: what runs.
        double: which call of a layer, and which side of it.
    """

    def __init__(self, module: Any, double: tuple[int, str] | None = None):
        self.module, self.double = module, double
        self.takes, self.gives = list[Tensor](), list[Tensor]()
        handles = [h for layer in module.layers for h in (self.before(layer), self.after(layer))]
        with torch.no_grad():
            self.logits: Tensor = module(tokens_of(module))
        for handle in handles:
            handle.remove()

    def changed(self, held: list[Tensor], x: Tensor, side: str) -> Tensor:
        held.append(x.clone())
        return 2 * x if self.double == (len(held) - 1, side) else x

    def before(self, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any) -> Any:
            at = self.module.takes
            return (*args[:at], self.changed(self.takes, args[at], "pre"), *args[at + 1 :])

        return layer.register_forward_pre_hook(hook)

    def after(self, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            at = self.module.gives
            new = self.changed(self.gives, self.module.stream(output), "post")
            if at is None:
                return new
            return replace(output, **{at: new}) if isinstance(at, str) else (*output[:at], new, *output[at + 1 :])

        return layer.register_forward_hook(hook)


def tokens_of(module: nn.Module, n: int = 6) -> Tensor:
    """As many as the state is wide, for those whose masks would have the shape of the stream."""
    torch.manual_seed(1)
    return torch.randint(0, looped_modules.VOCAB, (1, looped_modules.D if module.__dict__.get("is_long") else n))


CASES = ["MaskFirst", "TableFirst", "MemoryFirst", "OldFirst", "DataclassOutput", "AttentionFirst"]


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_hooks_see_the_stream_among_what_layers_take_and_return(name: str, is_long: bool) -> None:
    torch.manual_seed(0)
    module = cast(Any, getattr(looped_modules, name)().eval())
    module.is_long = is_long
    tokens, plain = tokens_of(module), ByHand(module)
    model = LoopedBridge.trace(module, tokens, verbose=False)
    assert model.schedule.describe().startswith("3 loops over one stack of 2 layers, 0 prelude and 0 coda layers")
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, plain.logits)
    for i in range(N_LOOPS * N_LAYERS):
        assert torch.equal(cache["resid_pre", i], plain.takes[i]) and torch.equal(cache["resid_post", i], plain.gives[i])
        assert torch.equal(model(tokens, stop_at_layer=i), plain.takes[i])
    assert torch.equal(cache["loops.1.hook_state"], plain.takes[2]) and torch.equal(cache["loops.1.hook_out"], plain.gives[3])
    for i, side in ((0, "pre"), (3, "pre"), (2, "post"), (5, "post")):
        doubled = model.run_with_hooks(tokens, [(f"blocks.{i}.hook_resid_{side}", lambda x, hook: 2 * x)])
        assert torch.equal(doubled, ByHand(module, (i, side)).logits), (i, side)
    assert not torch.equal(ByHand(module, (3, "pre")).logits, plain.logits)
    seen = list[Tensor]()
    model.run_with_hooks(tokens, [("blocks.3.hook_resid_pre", lambda x, hook: seen.append(x))], stop_at_layer=3)
    assert not seen  # what would run is not run, its first hook neither


TOKENS = torch.tensor([[2, 7, 1, 8, 4, 6]])


def traced(name: str) -> Any:
    torch.manual_seed(0)
    return LoopedBridge.trace(getattr(looped_modules, name)().eval(), TOKENS, verbose=False)


@torch.no_grad()
def test_what_is_added_to_the_stream_is_not_called_it() -> None:
    model, seen = traced("Added"), list[tuple[Tensor, Tensor]]()
    handles = [m.register_forward_hook(lambda m, args, out: seen.append((args[0], out))) for m in model.module.layers]
    model(TOKENS)
    for handle in handles:
        handle.remove()
    _, cache = model.run_with_cache(TOKENS)
    for i, (x, added) in enumerate(seen):
        assert torch.equal(cache["resid_pre", i], x) and torch.equal(cache[f"blocks.{i}.hook_out"], added)
    assert "blocks.0.hook_resid_post" not in model.hook_dict and "loops.0.hook_out" not in model.hook_dict
    with pytest.raises(LoopedError, match=r"Of layers\.0, layers\.1: what is returned is added to the stream"):
        model.run_with_hooks(TOKENS, [("blocks.1.hook_resid_post", lambda x, hook: None)])
    with pytest.raises(LoopedError, match="a lens was asked"):
        logit_lens(model, TOKENS)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WrittenOut", r"layers\.attn, layers\.mlp: what is taken and returned is not the stream"),
        ("Coupled", r"layers\.0, layers\.1: several tensors of one shape go from layer to layer"),
    ],
)
@torch.no_grad()
def test_layers_without_one_stream_have_no_names_of_it(name: str, says: str) -> None:
    model = traced(name)
    streams = ("hook_resid_pre", "hook_resid_post", "hook_state")
    assert not [hook for hook in (*model.hook_dict, *model.trace.places.also) if hook.endswith(streams)]
    _, cache = model.run_with_cache(TOKENS)
    assert "loops.2.blocks.1.hook_out" in cache
    for ask in (
        lambda: patch_sweep(model, TOKENS, cache, lambda logits: logits[0, -1, 3], verbose=False),
        lambda: skip_loop(model, 1),
        lambda: model.run_with_hooks(TOKENS, steer(model, torch.ones(16), loops=1)),
    ):
        with pytest.raises(LoopedError, match=says):
            ask()
    assert re.search(says, model.trace.table()) and "state entering a pass" not in model.trace.table()


@torch.no_grad()
def test_lists_before_and_after_the_loop_and_lists_of_experts_are_not_what_loops() -> None:
    model, seen = traced("OneBlock"), list[Tensor]()
    assert model.schedule.describe() == "4 loops over one stack of 1 layer, 2 prelude and 1 coda layer: 7 virtual layers"
    handle = model.module.core.register_forward_hook(lambda m, args, out: seen.append(out))
    model(TOKENS)
    handle.remove()
    _, cache = model.run_with_cache(TOKENS)
    for loop in range(4):
        assert torch.equal(cache[f"loops.{loop}.hook_out"], seen[loop])
    assert "loops.3.blocks.0.mlp.experts.2.hook_out" in model.hook_dict


def test_what_runs_without_hooks_or_again_for_gradients_refuses() -> None:
    with pytest.raises(LoopedError, match=r"ran none of its 9 layers where hooks see it\. Compiled code"):
        traced("Bypassing")
    model = traced("Checkpointed")
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(LoopedError, match="runs its layers again for gradients"):
        attribution_sweep(model, TOKENS, cache, lambda logits: logits[0, -1, 3])


@pytest.mark.parametrize("is_timed", [False, True])
@torch.no_grad()
def test_states_that_a_layer_does_not_add_to_are_streams_where_they_are_handed_on(is_timed: bool) -> None:
    torch.manual_seed(0)
    module = looped_modules.Equilibrium().eval()
    module.is_timed = is_timed
    model = LoopedBridge.trace(module, TOKENS, verbose=False)
    _, cache = model.run_with_cache(TOKENS)
    for loop in range(2):
        added = torch.linspace(-loop - 1, loop + 1, looped_modules.D) if is_timed else module.emb(TOKENS)
        then = cache["resid_pre", loop + 1]
        assert torch.allclose(cache[f"loops.{loop}.hook_out"] + added, then, atol=1e-6)
