"""Several measures of one run, and cosines between all executed layers, against the whole cache."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers import same
from linear import model
from zoo import random_tokens

from tl_looped import LoopedError
from tl_looped.analysis import _streaming, state_similarity
from tl_looped.analysis.fixed_points import FixedPointsMeasure
from tl_looped.analysis.inference_stages import InferenceStagesMeasure
from tl_looped.analysis.limiting_behaviour import BehaviourRule, LimitingBehaviourMeasure
from tl_looped.analysis.state_similarity import StateSimilarityMeasure

TOKENS = random_tokens(2, 5)


@pytest.mark.parametrize("kept", [True, False])
def test_measures_of_one_run_find_what_each_finds_alone(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = model("huginn").unroll(24)
    fixed = FixedPointsMeasure(24, "token", True, None, "core", None)
    behaviour = LimitingBehaviourMeasure(BehaviourRule(), 6, 24, 0.1, False, "core", None)
    stages = InferenceStagesMeasure(0.3, False, "nats", None, None)
    alone = {"fixed": fixed(deep, TOKENS), "behaviour": behaviour(deep, TOKENS), "stages": stages(deep, TOKENS)}
    runs, visit = list[Any](), _streaming.visit
    if not kept:
        monkeypatch.setattr(_streaming, "KEPT", 0)
    monkeypatch.setattr(_streaming, "visit", lambda *args, **settings: (runs.append(settings), visit(*args, **settings))[1])
    plans: dict[str, Any] = {
        "fixed": fixed.plan(deep),
        "behaviour": behaviour.plan(deep, TOKENS),
        "stages": stages.plan(deep, TOKENS),
    }
    found, refused = _streaming.together(deep, TOKENS, plans)
    assert len(runs) == (1 if kept else 2) and refused == {} and found.keys() == alone.keys()
    assert all(same(found[name], alone[name]) for name in alone)


def test_a_measure_that_refuses_does_not_stop_the_others() -> None:
    deep, one = model("huginn"), TOKENS[:, :1]
    plans: dict[str, Any] = {
        "stages": InferenceStagesMeasure(0.3, False, "nats", None, None).plan(deep, one),  # needs two tokens
        "similarity": StateSimilarityMeasure(None).plan(deep, one),
    }
    found, refused = _streaming.together(deep, one, plans)
    assert found.keys() == {"similarity"} and refused.keys() == {"stages"} and "one token" in str(refused["stages"])
    broken = deep.unroll(2)
    plans = {name: StateSimilarityMeasure(None).plan(broken, TOKENS) for name in "ab"}
    with broken.hooks(fwd_hooks=[("loops.1.blocks.0.hook_resid_post", lambda x, hook: x / 0)]):
        found, refused = _streaming.together(broken, TOKENS, plans)
    assert found == {} and refused.keys() == {"a", "b"} and isinstance(refused["a"], LoopedError)


@pytest.mark.parametrize("name", ["huginn", "hrm_text", "ouro"])
def test_state_similarity_is_the_mean_cosine_of_every_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = model(name)
    _, cache = bridge.run_with_cache(TOKENS)
    states = torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in range(bridge.cfg.n_layers)], 1).double()
    cosines = torch.nn.functional.cosine_similarity(states[:, :, None], states[:, None], dim=-1).mean((0, 3))
    found = state_similarity(bridge, TOKENS, verbose=False)
    assert torch.allclose(found.values, cosines, atol=1e-5) and found.labels["layer"][-1] == found.labels["other"][-1]
    monkeypatch.setattr(sys.modules[state_similarity.__module__], "LOOPS_HELD", 1)  # run after run, a few positions at a time
    assert torch.allclose(state_similarity(bridge, TOKENS, verbose=False).values, found.values, atol=1e-6)
