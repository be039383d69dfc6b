"""Analyses that leave out some positions, against the same numbers taken from a cache by hand."""

from __future__ import annotations

import pytest
import torch

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.analysis import fixed_points, inference_stages, step_geometry, trajectories
from tl_looped.analysis.inference_stages import matrix_entropy
from tl_looped.errors import LoopedError, OutOfRangeError

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
KEPT = slice(1, None)


@pytest.fixture(scope="module")
def model() -> LoopedBridge:
    return LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=4), seed=0)


def states(model: LoopedBridge, name: str) -> torch.Tensor:
    """[loop, batch, pos, d_model] without the first token."""
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    return torch.stack([cache[f"loops.{t}.{name}"] for t in range(4)])[:, :, KEPT].double()


def test_fixed_points(model: LoopedBridge) -> None:
    found = fixed_points(model, TOKENS, n_loops=4, positions=KEPT, verbose=False)
    x = states(model, "blocks.1.hook_resid_post")
    torch.testing.assert_close(found.norm.values[:, 1], x.norm(dim=-1).mean((1, 2)), rtol=1e-5, atol=0)
    steps = (x[1:] - x[:-1]).norm(dim=-1).mean((1, 2))
    torch.testing.assert_close(found.successive["l2"].values[:, 1], steps, rtol=1e-5, atol=0)
    whole = fixed_points(model, TOKENS, n_loops=4, verbose=False)
    assert not torch.allclose(whole.norm.values, found.norm.values)


def test_step_geometry(model: LoopedBridge) -> None:
    found = step_geometry(model, TOKENS, positions=KEPT, verbose=False)
    x = states(model, "hook_out")
    torch.testing.assert_close(found.norm.values, x.norm(dim=-1).mean((1, 2)), rtol=1e-5, atol=0)
    centred = x - x.mean(2, keepdim=True)
    gram = (centred @ centred.mT).flatten(2)
    gram = gram / gram.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.cka.values, torch.einsum("sbi,tbi->st", gram, gram) / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(LoopedError, match="asked of 2 tokens"):
        step_geometry(model, TOKENS, positions=[0, 1], verbose=False)


def test_trajectories(model: LoopedBridge) -> None:
    found = trajectories(model, TOKENS, over="loop_ends", positions=KEPT, n_components=2, verbose=False)
    points = states(model, "hook_out")[:, 0]
    path = found.paths[0]
    assert [str(label) for label in path.coordinates.labels["pos"]] == ["1", "2", "3", "4"]
    flat = points.flatten(0, 1)
    variance = torch.linalg.svdvals(flat - flat.mean(0)).square()
    torch.testing.assert_close(path.explained.cpu(), variance[:2] / variance.sum(), rtol=1e-4, atol=0, check_dtype=False)
    with pytest.raises(LoopedError, match='over="layers", which follows one token'):
        trajectories(model, TOKENS, positions=KEPT, verbose=False)


def test_inference_stages(model: LoopedBridge) -> None:
    found, whole = (inference_stages(model, TOKENS, positions=at, verbose=False) for at in (KEPT, None))
    x = states(model, "blocks.1.hook_resid_post")
    torch.testing.assert_close(found.norm.values[1::2], x.norm(dim=-1).mean((1, 2)), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.entropy.values[1::2], matrix_entropy(x).mean(1), rtol=1e-5, atol=1e-8)
    assert torch.equal(found.colsum.values, whole.colsum.values)  # attention is over all tokens


def test_positions_that_are_not_there(model: LoopedBridge) -> None:
    with pytest.raises(OutOfRangeError):
        fixed_points(model, TOKENS, n_loops=4, positions=[7], verbose=False)
