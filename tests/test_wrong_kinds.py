"""What is no model, no prompt or no setting is refused in a sentence by everything that asks a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tl_looped import LoopedBridge, LoopedConfig, analysis, compare, interventions, run
from tl_looped.attribution import attribution_sweep, edge_sweep, influence, path_patch, weight_gradients_by_pass
from tl_looped.errors import LoopedError
from tl_looped.lenses import logit_lens
from tl_looped.patching import ablation_sweep, patch_between_loops, patch_sweep
from tl_looped.report import report

CFG: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_vocab": 10, "n_core": 2, "n_loops": 3, "injection": "concat"}
MODEL = LoopedBridge.from_config(LoopedConfig(**CFG), seed=0)
OTHER = LoopedBridge.from_config(LoopedConfig(**CFG), seed=1)
HOP = LoopedBridge.from_pretrained("toy:hop")
TOKENS = torch.tensor([[1, 2, 3]])
CACHE = MODEL.run_with_cache(TOKENS)[1]
EDGE: dict[str, Any] = {"sources": "embed", "receivers": "logits"}
PLAIN = SimpleNamespace(cfg=SimpleNamespace(n_layers=2, d_model=8, d_vocab=10, n_heads=2), blocks=[], tokenizer=None)


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 3]


ASK: dict[str, Callable[[Any, Any], Any]] = {
    "injection_effect": lambda model, prompts: analysis.injection_effect(model, prompts, from_loop=1),
    "patch_sweep": lambda model, prompts: patch_sweep(model, prompts, CACHE, metric),
    "patch_between_loops": lambda model, prompts: patch_between_loops(model, prompts, metric),
    "attribution_sweep": lambda model, prompts: attribution_sweep(model, prompts, CACHE, metric),
    "edge_sweep": lambda model, prompts: edge_sweep(model, prompts, CACHE, metric),
    "path_patch": lambda model, prompts: path_patch(model, prompts, CACHE, metric, **EDGE),
    "ablation_sweep": lambda model, prompts: ablation_sweep(model, prompts, metric),
    "weight_gradients_by_pass": weight_gradients_by_pass,
    "influence": lambda model, prompts: influence(model, prompts, prompts),
    "compare": lambda model, prompts: compare([OTHER, model], prompts),
    "report": lambda model, prompts: report(model, prompts),
    "run": lambda model, prompts: run(analysis.fixed_points, model, prompts, out="nowhere/run.safetensors", n_loops=24),
}
for name in ("fixed_points", "limiting_behaviour", "path_independence"):  # whose models of 128 loops take long to make
    ASK[name] = partial(getattr(analysis, name), n_loops=24)
ASK["path_independence"] = partial(ASK["path_independence"], initial_states=("zero", None))  # no seeds: they are refused here
# Of no prompts, or of none that the caller chooses.
OTHERS = ("random_init_sweep", "gate_pdf", "output_neurons")
for name in analysis.__all__:
    if inspect.isfunction(getattr(analysis, name)) and name not in OTHERS:
        ASK.setdefault(name, getattr(analysis, name))
HOOKS: dict[str, Callable[[Any], Any]] = {
    "ablate": lambda model: interventions.ablate(model, "head"),
    "drop_injection": interventions.drop_injection,
    "freeze_attention": lambda model: interventions.freeze_attention(model, 0),
    "freeze_injection": lambda model: interventions.freeze_injection(model, 0),
    "repeat_loop": lambda model: interventions.repeat_loop(model, 1),
    "replace_injection": lambda model: interventions.replace_injection(model, torch.zeros(8)),
    "set_initial_state": lambda model: interventions.set_initial_state(model, "zero"),
    "share_kv": lambda model: interventions.share_kv(model, "last"),
    "skip_layer": interventions.skip_layer,
    "skip_loop": lambda model: interventions.skip_loop(model, 1),
    "steer": lambda model: interventions.steer(model, torch.ones(8)),
    "output_neurons": analysis.output_neurons,
}


def test_every_intervention_is_asked_here() -> None:
    there = {name for name in interventions.__all__ if inspect.isfunction(getattr(interventions, name))}
    assert there <= HOOKS.keys()


@pytest.mark.parametrize("name", [*ASK, *HOOKS])
@pytest.mark.parametrize("model", ["toy:hop", PLAIN, None, LoopedBridge], ids=["name", "plain", "none", "class"])
def test_what_is_no_model_is_named(name: str, model: Any, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=rf"{type(model).__name__} was given|{type(model).__name__}.*LoopedBridge"):
        ASK[name](model, TOKENS) if name in ASK else HOOKS[name](model)


@pytest.mark.parametrize("name", ASK)
@pytest.mark.parametrize(
    "prompts", [5, [1, 2, 3], [[1, 2, 3]], torch.tensor([[0.5, 0.2]]), {"a": 1}, "hi"], ids=lambda prompts: str(prompts)[:9]
)
def test_what_is_no_prompt_is_refused(name: str, prompts: Any, unchecked: None) -> None:
    with pytest.raises(LoopedError):
        ASK[name](MODEL, prompts)


READ: dict[str, Callable[[LoopedBridge, Any], Any]] = {
    "forward": lambda model, prompts: model(prompts),
    "logit_lens": lambda model, prompts: logit_lens(model, prompts, targets="c"),
    "compare": lambda model, prompts: compare(model, prompts, n_loops=(2, 4)),
    "patch_between_loops": lambda model, prompts: patch_between_loops(model, prompts, metric),
    "weight_gradients_by_pass": weight_gradients_by_pass,
    "answers": lambda model, prompts: model.answers(prompts),
}
ODD = {"none": None, "int": 5, "bools": torch.ones(1, 3).bool(), "empty": torch.ones(1, 0).long(), "rows": [[1, 2]], "ids": [1]}


@pytest.mark.parametrize(
    ("name", "odd"), [(name, odd) for name in READ for odd in ODD if (name, odd) != ("answers", "rows")]
)  # answers reads lists of token ids
def test_a_model_with_a_tokenizer_refuses_what_is_no_prompt(name: str, odd: str, unchecked: None) -> None:
    with pytest.raises(LoopedError):
        READ[name](HOP, ODD[odd])


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("exit_steps", {"policies": 0.5}, r"policies=0\.5"),
        ("exit_steps", {"policies": "gate"}, "policies='gate'"),
        ("exit_steps", {"policies": [0.5]}, r"policies=\[0\.5\]"),
        ("more_loops", {"answers": 3}, "answers=3"),
        ("more_loops", {"answers": "a"}, "answers='a'"),
        ("injection_effect", {"from_loop": "a"}, "from_loop='a'"),
        ("injection_effect", {"from_loop": 1, "replacement": 3}, "replacement=3"),
        ("limiting_behaviour", {"rule": "strict"}, "rule='strict'"),
        ("inference_stages", {"tau": "a"}, "tau='a'"),
        ("fixed_points", {"n_loops": "a"}, "n_loops='a'"),
        ("fixed_points", {"positions": "a"}, "positions='a'"),
        ("trajectories", {"positions": "a"}, "positions=a"),
        ("looped_floorplan", {"heads": "a"}, "heads='a'"),
    ],
)
def test_settings_of_another_kind_are_named(name: str, settings: dict[str, Any], says: str, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=says):
        getattr(analysis, name)(MODEL, TOKENS, **settings)


@pytest.mark.parametrize("logits", [[0.0, 0.0], "x", CACHE, torch.tensor(1.0)])
def test_a_gate_has_logits_by_loop(logits: Any, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=r"pass a tensor \[loop, ...\]"):
        analysis.gate_pdf(logits)
