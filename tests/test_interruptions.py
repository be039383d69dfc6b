"""Ctrl-C at any line leaves a model as it was."""

from __future__ import annotations

import copy
import gc
import os
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_looped import LoopedBridge, LoopedConfig, exits
from tl_looped.attribution import influence, weight_gradients_by_pass


class _InterruptedAt:
    """Ctrl-C at the n-th line that the package runs; one for `sys.settrace`, which switches itself off then."""

    def __init__(self, n: int):
        self.n, self.seen = n, 0

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        return self.line if f"{os.sep}tl_looped{os.sep}" in frame.f_code.co_filename else None

    def line(self, frame: Any, event: str, arg: Any) -> Any:
        self.seen += event == "line"
        if event == "line" and self.seen == self.n:
            raise KeyboardInterrupt
        return self.line

    def run(self, action: Callable[[], object]) -> bool:
        """Whether the action was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def _condition(model: LoopedBridge) -> dict[str, Any]:
    """All that an interruption might leave changed."""
    inside, points = model.original_model, list({id(point): point for point in model.hook_dict.values()}.values())
    parameters = inside.canonical_parameters()
    return {
        "hooks": [(p.name, len(p._forward_hooks), len(p._backward_hooks), len(p.fwd_hooks), len(p.bwd_hooks)) for p in points],
        "level": model.context_level,
        "names": sorted(model.hook_dict),
        "parameters": {name: (id(p), p.dtype, p.detach().double().sum().item()) for name, p in parameters.items()},
        "how many": len({id(p) for p in inside.parameters()}),
        "slots": {name: len(holders) for name, holders in inside.parameter_slots.items()},
        "mode": (model.compatibility_mode, model._weights_processed, hasattr(inside.embed, "unfold")),
        "generation": (model._given, model.__dict__.get("_capture_hf_cache", False), "_last_hf_cache" in model.__dict__),
        "modules": [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in inside.modules()],
        "collects": gc.isenabled(),
    }


def _same(x: Tensor, hook: Any) -> Tensor:
    return x


def _in_a_context(model: LoopedBridge, tokens: Tensor) -> None:
    with model.hooks(
        fwd_hooks=[("blocks.*.hook_resid_pre", _same)], bwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: None)]
    ):
        model(tokens)


# Whether the action changes the model when it is not interrupted, so that it is counted on a copy.
_ACTIONS: dict[str, tuple[bool, Callable[[LoopedBridge, Tensor], object]]] = {
    "weight_gradients_by_pass": (False, weight_gradients_by_pass),
    "influence": (False, lambda model, tokens: influence(model, tokens, tokens)),
    "run_with_cache": (False, lambda model, tokens: model.run_with_cache(tokens, incl_bwd=True, return_type="loss")),
    "run_with_hooks": (False, lambda m, tokens: m.run_with_hooks(tokens, fwd_hooks=[("blocks.*.hook_resid_pre", _same)])),
    "hooks": (False, _in_a_context),
    "generate": (False, lambda model, tokens: model.generate(tokens, 2, do_sample=False, stop_at_eos=False, verbose=False)),
    "unroll": (False, lambda model, tokens: model.unroll(2)),
    "add_hook": (True, lambda model, tokens: model.add_hook("blocks.*.hook_resid_pre", _same)),
    "to": (True, lambda model, tokens: model.to(torch.float64)),
    "process_weights": (True, lambda model, tokens: model.process_weights()),
    "enable_compatibility_mode": (True, lambda model, tokens: model.enable_compatibility_mode(disable_warnings=True)),
}


@pytest.mark.parametrize("what", _ACTIONS)
@pytest.mark.usefixtures("unchecked")
def test_an_interrupted_model_is_as_it_was(what: str) -> None:
    # The last lines are those that put things back; of the others, some.
    changes, act = _ACTIONS[what]
    cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=1, n_loops=2, pass_norm=True, final_norm=False, exit_gate=True)
    model, tokens = LoopedBridge.from_config(cfg), torch.tensor([[1, 2]])
    model.exit_policy = exits.KL(0.5) if what == "generate" else None
    before, right = _condition(model), model(tokens)
    for twin in [copy.deepcopy(model)] if changes else [model, model]:  # twice, for what is remembered after a first time
        _condition(twin)
        counter = _InterruptedAt(-1)
        assert not counter.run(lambda twin=twin: act(twin, tokens))
    model.zero_grad()
    lines = sorted(random.Random(0).sample(range(1, counter.seen - 10), 8)) + list(range(counter.seen - 10, counter.seen))
    interrupted = 0
    for line in lines:
        interrupted += _InterruptedAt(line).run(lambda: act(model, tokens))
        model.zero_grad()
        if changes and _condition(model) != before:  # after the last change
            break
        assert _condition(model) == before, line
    assert interrupted >= 9
    assert torch.allclose(torch.log_softmax(model(tokens), -1), torch.log_softmax(right, -1).to(model.cfg.dtype))
    act(model, tokens)
