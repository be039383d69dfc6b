"""Calls as they were written for the release before."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped._old_calls import accepts_old
from tl_looped.attribution import attribution_sweep
from tl_looped.errors import LoopedError
from tl_looped.interventions import ablate, freeze_attention, skip_layer, steer
from tl_looped.patching import patch_sweep


class Reader:
    @accepts_old("scale", "offset", pos="positions")
    def read(self, x: int, *, scale: int = 1, offset: int = 0, positions: int = -1) -> tuple[int, int]:
        """Read."""
        return x * scale + offset, positions


def test_old_spellings_mean_what_they_meant_and_are_named() -> None:
    reader = Reader()
    with pytest.warns(FutureWarning, match=r"^read\(pos=\) is now read\(positions=\)\.$"):
        assert reader.read(2, pos=3) == (2, 3)
    with pytest.warns(FutureWarning, match=r"^read\((scale|offset)=\) is given by name now\.$"):
        assert reader.read(2, 3, 4) == (10, -1)
    assert reader.read(2, scale=3, positions=0) == (6, 0)
    assert Reader.read.__doc__ == "Read."


def test_what_was_never_a_call_is_none_now() -> None:
    with pytest.raises(LoopedError, match="one argument"):
        Reader().read(2, pos=3, positions=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(LoopedError, match="twice"), pytest.warns(FutureWarning):
        Reader().read(2, 3, 4, offset=4)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError), pytest.warns(FutureWarning):
        Reader().read(2, 3, 4, 5)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        Reader().read(2, where=3)  # pyright: ignore[reportCallIssue]


def test_sweeps_and_interventions_take_calls_of_the_release_before(unchecked: None) -> None:
    model: Any = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
    tokens, push = torch.tensor([[1, 2, 3]]), torch.ones(8)
    old_ablate: Any = ablate
    old_skip: Any = skip_layer
    old_steer: Any = steer
    old_freeze: Any = freeze_attention
    calls: list[tuple[Any, Any, str]] = [
        (lambda: old_ablate(model, "head", 1, 0, 1), lambda: ablate(model, "head", loops=1, layers=0, heads=1), "heads="),
        (lambda: old_ablate(model, "head", units=1), lambda: ablate(model, "head", heads=1), r"now ablate\(heads="),
        (lambda: old_ablate(model, "neuron", units=1), lambda: ablate(model, "neuron", neurons=1), r"ablate\(neurons="),
        (lambda: old_skip(model, 1, 0), lambda: skip_layer(model, loops=1, layers=0), "layers="),
        (lambda: old_steer(model, push, 0.5, 1), lambda: steer(model, push, scale=0.5, loops=1), "scale="),
        (lambda: old_freeze(model, 0, 1), lambda: freeze_attention(model, 0, layers=1), "layers="),
    ]
    for old, new, says in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hooks = old()
        assert any(re.search(says, str(warning.message)) for warning in caught)
        with torch.no_grad():
            expected = model.run_with_hooks(tokens, fwd_hooks=new())
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), expected)
            assert not torch.equal(expected, model(tokens))
    with pytest.raises(LoopedError, match="one argument"):
        old_ablate(model, "head", units=1, heads=0)
    _, cache = model.run_with_cache(tokens)
    sweeps: list[Any] = [patch_sweep, attribution_sweep]
    for sweep in sweeps:
        with pytest.warns(FutureWarning, match="is given by name now|is now"):
            found = sweep(model, tokens, cache, lambda logits: logits[0, -1, 3], "out", ["loop"])
        assert found.axes == ("loop",)
