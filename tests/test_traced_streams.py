"""Traced layers that take or return other tensors before their stream: hooks see the stream, and act on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import looped_modules
import pytest
import torch
from torch import Tensor, nn

from tl_looped import LoopedBridge

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


CASES = ["MaskFirst", "TableFirst", "MemoryFirst", "DataclassOutput", "AttentionFirst"]


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
