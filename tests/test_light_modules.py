"""Modules without hooks share what PyTorch gives to each, and nobody notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from zoo import random_bridge, random_tokens

from tl_looped import LoopedError


def _size(module: nn.Module) -> int:
    """Bytes of a module, without its parameters and its children."""
    held = module.__dict__
    return sum(map(sys.getsizeof, (held, *(value for value in held.values() if isinstance(value, (dict, list, set))))))


def test_a_virtual_layer_is_small() -> None:
    model = random_bridge("ouro")
    deeper = [model.unroll(n) for n in (8, 16)]
    held = [sum(_size(module) for module in unrolled.modules()) for unrolled in deeper]
    layers = [unrolled.schedule.n_layers for unrolled in deeper]
    # 47 kB with the Python of 2026. With containers for hooks in every module it is 209 kB.
    assert (held[1] - held[0]) / (layers[1] - layers[0]) < 80_000


def _doubled(module: Any, args: Any, out: Any) -> Any:
    return 2 * out


def _doubled_by_keywords(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return 2 * out


def _doubles(module: Any, args: Any) -> Any:
    return 2 * args[0], *args[1:]


REGISTERED: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(_doubled),
    "with keywords": lambda m: m.register_forward_hook(_doubled_by_keywords, with_kwargs=True, prepend=True, always_call=True),
    "before": lambda m: m.register_forward_pre_hook(_doubles, prepend=True),
}


@pytest.mark.parametrize("place", ["blocks.3.attn.hook_z", "blocks.3.mlp", "blocks.3.attn.o.original_component"])
@pytest.mark.parametrize("registered", REGISTERED)
def test_a_hook_of_pytorch_acts_on_its_module_alone(place: str, registered: str) -> None:
    model, tokens = random_bridge("ouro"), random_tokens()
    right, cache = model.run_with_cache(tokens, names_filter="blocks.3.hook_resid_pre")
    handle = REGISTERED[registered](_module(model, place))
    hooked, changed = model.run_with_cache(tokens, names_filter="blocks.3.hook_resid_pre")
    assert not torch.equal(hooked, right)
    assert torch.equal(changed["blocks.3.hook_resid_pre"], cache["blocks.3.hook_resid_pre"])  # nothing before it
    assert torch.equal(deepcopy(model)(tokens), hooked)
    handle.remove()
    assert torch.equal(model(tokens), right)


def _module(model: nn.Module, place: str) -> Any:
    found: Any = model
    for part in place.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def test_gradient_hooks_and_those_of_states_act_on_their_module_alone() -> None:
    model = random_bridge("ouro")
    block, fired = model.blocks[3], list[str]()
    for when in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        getattr(block, when)(lambda *given: fired.append("gradient"))
    block.register_state_dict_post_hook(lambda *given: fired.append("state"))
    model(random_tokens(), return_type="loss").backward()
    block.state_dict()
    assert fired == ["gradient", "gradient", "state"]
    model.blocks[2].state_dict()
    assert len(fired) == 3


def test_a_hook_point_is_as_one_of_transformer_lens() -> None:
    model, other = random_bridge("ouro"), HookPoint()
    point = model.hook_dict["blocks.3.hook_in"]
    other.name, other.training = point.name, False
    assert isinstance(point, HookPoint) and repr(point) == repr(other)
    for name, value in vars(other).items():
        assert getattr(point, name) == value, name
    for each in (point, other):
        each.ctx["seen"] = 1
        each.remembered = nn.Linear(2, 3)  # type: ignore[assignment]
        each.register_buffer("counts", torch.ones(2), persistent=False)
        each.rate = nn.Parameter(torch.ones(()))  # type: ignore[assignment]
        each.add_hook(lambda tensor, hook: None, is_permanent=True)
        each.remove_hooks("both")
    assert point.ctx == {"seen": 1} and list(point.state_dict()) == list(other.state_dict())
    assert len(point.fwd_hooks) == len(other.fwd_hooks) == 1 and repr(point) == repr(other)
    untouched = model.hook_dict["blocks.2.hook_in"]
    assert not (untouched.ctx or untouched.fwd_hooks or list(untouched.state_dict()) or list(untouched.children()))
    model.clear_contexts()
    assert point.ctx == {} and untouched.ctx == {}
    with pytest.raises(ValueError, match="sideways"):
        untouched.remove_hooks("sideways")  # type: ignore[arg-type]


def test_a_hook_written_past_the_methods_is_refused_rather_than_in_all_modules() -> None:
    model, tokens = random_bridge("ouro"), random_tokens()

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return 2 * out

    with pytest.raises(LoopedError, match="which all modules without hooks share; use register_forward_hook"):
        model.blocks[3]._forward_hooks[0] = hook
    right = model(tokens)
    for module in model.modules():
        module._forward_hooks.clear()  # as some do to take all hooks off
    assert torch.equal(model(tokens), right)
