"""Attention distances against cached patterns pair by pair, and the figures."""

from __future__ import annotations

import math

import pytest
import torch
from zoo import FAMILIES, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedError
from tl_looped.analysis import attention_distances, attention_stability, looped_floorplan
from tl_looped.figures import attention_heads, floorplan


@FAMILIES
def test_distances_are_those_of_the_cached_patterns(name: str) -> None:
    bridge, tokens = shared_bridge(name), random_tokens(3, 4)
    stack = "L" if name == "hrm_text" else None
    found = attention_stability(bridge, tokens, stack=stack, verbose=False)
    pairs = attention_distances(bridge, tokens, verbose=False)
    heads = attention_distances(bridge, tokens, per_head=True, verbose=False)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    patterns = cache.stack_loops("pattern", stack=stack).double()  # [loop, layer, batch, head, query, key]
    n_loops, n_layers = patterns.shape[:2]

    def apart(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
        rows = [math.sqrt((x - y).square().sum().item() / x.shape[-2]) for x, y in zip(a, b, strict=True)]
        mean = sum(rows) / len(rows)
        return mean, math.sqrt(sum((r - mean) ** 2 for r in rows) / (len(rows) - 1) / len(rows))

    for t in range(n_loops):
        for j in range(n_layers):
            for h in range(3):
                mean, error = apart(patterns[t, j, :, h], patterns[-1, j, :, h])
                assert found.distance.values[t, j, h].item() == pytest.approx(mean, abs=1e-6)
                assert found.distance.stderr[t, j, h].item() == pytest.approx(error, abs=1e-6)
                if t:
                    mean, _ = apart(patterns[t, j, :, h], patterns[t - 1, j, :, h])
                    assert found.successive.values[t - 1, j, h].item() == pytest.approx(mean, abs=1e-6)
    for i in range(bridge.schedule.n_layers):
        for k in range(bridge.schedule.n_layers):
            a, b = cache["pattern", i].double(), cache["pattern", k].double()
            # rounding of the fp64 products of equal patterns is up to 1e-15 of their squares, so 1e-7 of a distance
            expected = ((a - b).square().sum((1, 2, 3)) / 12).sqrt().mean().item()
            assert pairs.values[i, k].item() == pytest.approx(expected, abs=1e-6)
            expected = ((a - b)[:, 1].square().sum((1, 2)) / 4).sqrt().mean().item()
            assert heads.values[i, k, 1].item() == pytest.approx(expected, abs=1e-6)
    assert pairs.labels["layer"][-1] == bridge.schedule.name(bridge.schedule.n_layers - 1, "x")[:-2] and pairs.count == 3


@pytest.mark.parametrize("looking_ahead", [False, True])
def test_distances_over_several_runs(looking_ahead: bool) -> None:
    bridge, tokens, runs = (
        random_bridge("retrofit_llama", torch.float64, n_core=1, n_coda=1, n_loops=60),
        random_tokens(2, 8),
        [],
    )

    def spread(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        runs.append(1)
        return torch.full_like(pattern, 1 / 8) if looking_ahead else pattern

    def state() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    with bridge.hooks([("loops.7.blocks.0.attn.hook_pattern", spread)] if looking_ahead else []):
        pairs, heads = (
            attention_distances(bridge, tokens, per_head=per_head, initial_state=state(), verbose=False)
            for per_head in (False, True)
        )
        n_runs = len(runs)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern", initial_state=state())
    assert n_runs == (6 if looking_ahead else 0)
    x = torch.stack([cache["pattern", i] for i in range(bridge.schedule.n_layers)], 1)  # [batch, layer, head, query, key]
    torch.testing.assert_close(pairs.values, (torch.cdist(x.flatten(2), x.flatten(2)) / 24**0.5).mean(0), atol=1e-6, rtol=0)
    for h in range(3):
        one = x[:, :, h].flatten(2)
        torch.testing.assert_close(heads.values[..., h], (torch.cdist(one, one) / 8**0.5).mean(0), atol=1e-6, rtol=0)


def test_split_work_gives_the_same_as_one_process() -> None:
    bridge, prompts = shared_bridge("huginn"), [random_tokens(2, 3), random_tokens(1, 5, seed=4)]
    for analysis, fields in ((attention_stability, ("successive", "distance")), (attention_distances, (None,))):
        whole = analysis(bridge, iter(prompts), n_loops=4, initial_state=torch.Generator().manual_seed(5), verbose=False)
        generator = torch.Generator().manual_seed(5)
        parts = [analysis(bridge, p, n_loops=4, initial_state=generator, verbose=False) for p in prompts]
        merged = parts[0] + parts[1]
        for field in fields:
            a, b = (x if field is None else getattr(x, field) for x in (whole, merged))
            assert torch.allclose(a.values, b.values, atol=1e-7) and torch.allclose(a.stderr, b.stderr, atol=1e-7)
            assert a.count == 3


def test_floorplan_and_heads() -> None:
    bridge, tokens = shared_bridge("huginn"), random_tokens(1, 4)
    grid = looped_floorplan(bridge, tokens, n_loops=2)
    deep = bridge.unroll(2)
    with torch.no_grad():
        _, cache = deep.run_with_cache(tokens)
    assert torch.allclose(grid.values[3], cache["loops.0.blocks.1.attn.hook_pattern"][0].mean(0))
    one = looped_floorplan(bridge, tokens[0], n_loops=2, heads=2)
    assert torch.equal(one.values[0], cache["prelude.blocks.0.attn.hook_pattern"][0, 2])
    figure = floorplan(grid, deep.schedule.sites)
    assert list(figure.layout.yaxis.ticktext) == ["prelude", "loop 0", "loop 1", "coda"]
    assert [shape.line.color for shape in figure.layout.shapes] == ["blue", "red"]
    z = figure.data[0].z
    assert z[5 + 2][5 + 1] == pytest.approx(grid.values[3][2, 1].item())  # loop 0 is the second row, layer 1 the second column
    assert math.isnan(z[4][0])  # a gap between the rows
    html = str(attention_heads(cache, ["a", "b", "c", "d"], loops=[1, 0], layers=2))
    assert '"loop 1, layer 2, head 0"' in html and '"loop 0, layer 2, head 2"' in html and "layer 1" not in html
    hrm = shared_bridge("hrm_text")
    with torch.no_grad():
        _, cache = hrm.run_with_cache(tokens)
    assert '"L loop 3, layer 1, head 0"' in str(attention_heads(cache, ["a", "b", "c", "d"], loops="last", stack="L"))
    with pytest.raises(LoopedError, match="2 tokens were given"):
        attention_heads(cache, ["a", "b"], stack="L")
    assert len(attention_stability(bridge, tokens, verbose=False).plot().data) == 3


def test_refusals() -> None:
    bridge, tokens = random_bridge("huginn"), random_tokens()
    with pytest.raises(LoopedError, match="needs at least 2"):
        attention_stability(bridge, tokens, n_loops=1, verbose=False)
    with pytest.raises(LoopedError, match="pass one"):
        looped_floorplan(bridge, tokens)
    with pytest.raises(LoopedError, match=r"0\.\.2"):
        looped_floorplan(bridge, tokens[0], heads=3)
    for analysis in (attention_stability, attention_distances):
        with pytest.raises(LoopedError, match="no prompts"):
            analysis(bridge, [], verbose=False)
    with pytest.raises(LoopedError, match="pass stack="):
        attention_stability(random_bridge("hrm_text"), tokens, verbose=False)
    bridge.add_hook("loops.1.blocks.0.hook_resid_pre", lambda x, hook: x * torch.nan)
    with pytest.raises(LoopedError, match=r"loops\.1\.blocks\.0\.attn\.hook_pattern holds NaN"):
        attention_distances(bridge, tokens, verbose=False)
