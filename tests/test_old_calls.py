"""Calls as they were written for the release before."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tl_looped import LoopedBridge, LoopedConfig, analysis
from tl_looped._old_calls import accepts_old
from tl_looped.attribution import attribution_sweep, edge_sweep, path_patch
from tl_looped.errors import LoopedError
from tl_looped.exits import KL
from tl_looped.figures import floorplan
from tl_looped.interventions import ablate, freeze_attention, skip_layer, steer
from tl_looped.lenses import logit_lens
from tl_looped.patching import patch_sweep
from tl_looped.results import Grid, load_result
from tl_looped.toys.hop import hop_prompts

hops: Any = hop_prompts  # without the types that refuse calls of before


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


@pytest.mark.parametrize(
    "name",
    ["trajectories", "field", "floorplan", "title", "injection", "policies", "lens", "edges", "path", "plot", "stacks", "hops"],
)
def test_analyses_and_figures_take_calls_of_the_release_before(name: str, unchecked: None) -> None:
    model: Any = LoopedBridge.from_config(
        LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, injection="concat"), seed=0
    )
    tokens, other = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    _, cache = model.run_with_cache(tokens)
    edge = "loops.0.blocks.0.head.*", "loops.2.blocks.0.mlp_in"
    given: Any = (model, other, cache, lambda logits: logits[0, -1, 3])
    a: Any = analysis
    found = a.trajectories(model, tokens, positions=1, verbose=False)
    lens, sites = logit_lens(model, tokens, targets=[3]), model.schedule.sites
    plan = a.looped_floorplan(model, tokens, heads=1)
    floor: Any = floorplan
    rest: Any = {"edges": edge_sweep, "path": path_patch}
    quiet = {"verbose": False}
    old, now = {
        "trajectories": (lambda: a.trajectories(model, tokens, pos=1, **quiet).explained, lambda: found.explained),
        "field": (lambda: found.pos, lambda: 1),
        "floorplan": (lambda: a.looped_floorplan(model, tokens, head=1), lambda: plan),
        "title": (
            lambda: str(floor(plan, sites, "one").layout.title.text),
            lambda: floorplan(plan, sites, title="one").layout.title.text,
        ),
        "injection": (
            lambda: a.injection_effect(model, tokens, 1, "mean", **quiet).kl,
            lambda: a.injection_effect(model, tokens, from_loop=1, replacement="mean", **quiet).kl,
        ),
        "policies": (
            lambda: a.exit_steps(model, tokens, KL(0.1), **quiet).cost,
            lambda: a.exit_steps(model, tokens, policies=KL(0.1), **quiet).cost,
        ),
        "lens": (lambda: logit_lens(model, tokens, [3], "logit").log_probs, lambda: lens.log_probs),
        "edges": (
            lambda: rest["edges"](*given, *edge),
            lambda: edge_sweep(*given, sources=edge[0], receivers=edge[1]),
        ),
        "path": (lambda: rest["path"](*given, *edge), lambda: path_patch(*given, sources=edge[0], receivers=edge[1])),
        "plot": (
            lambda: found.plot(0, (1, 2)).layout.xaxis.title.text,
            lambda: found.plot(example=0, components=(1, 2)).layout.xaxis.title.text,
        ),
        "stacks": (lambda: cache.stack_loops("resid_post", 0, [1]), lambda: cache.stack_loops("resid_post", 0, loops=[1])),
        "hops": (lambda: hops(2, 3, "function", 4).texts, lambda: hop_prompts(2, 3, kind="function", seed=4).texts),
    }[name]
    with pytest.warns(FutureWarning, match="is given by name now|is now"):
        before = old()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        after = now()
    before, after = (x.values if isinstance(x, Grid) else x for x in (before, after))
    assert torch.equal(before, after) if isinstance(after, torch.Tensor) else before == after


def test_files_of_the_release_before_are_read(tmp_path: Path, unchecked: None) -> None:
    model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
    file = analysis.trajectories(model, torch.tensor([[1, 2, 3]]), positions=1, verbose=False).save(tmp_path / "now")
    with safe_open(file, "pt") as saved:
        text, tensors = saved.metadata()["tl_looped"], {key: saved.get_tensor(key) for key in saved.keys()}
    assert '"positions"' in text and text.startswith('{"sha256": ')  # which a file of before has not
    save_file(tensors, tmp_path / "before", {"tl_looped": "{" + text.partition(", ")[2].replace('"positions"', '"pos"')})
    assert load_result(tmp_path / "before").positions == 1
    file = analysis.more_loops(model, torch.tensor([[1, 2, 3]]), verbose=False).save(tmp_path / "now")
    with safe_open(file, "pt") as saved:
        text, tensors = saved.metadata()["tl_looped"], {key: saved.get_tensor(key) for key in saved.keys()}
    save_file(tensors, tmp_path / "before", {"tl_looped": "{" + text.partition(", ")[2].replace('"MoreLoops"', '"Stability"')})
    assert isinstance(load_result(tmp_path / "before"), analysis.MoreLoops)
