"""The sweep against its own models run one by one, and the paper's statement on a small case."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.analysis import random_init, random_init_sweep
from tl_looped.analysis.random_init import INJECTIONS, NORMS, draw
from tl_looped.cli import main

SMALL = {"n_layers": 2, "d_model": 16, "verbose": False}


def test_numbers_are_those_of_the_model_run_by_itself() -> None:
    """With all its loops, where the sweep runs one again and again."""
    found = random_init_sweep(**SMALL, n_loops=6, seeds=[4, 5], std=0.3, embed_std=0.6)
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    for norm, injection in itertools.product(NORMS, INJECTIONS):
        k = found.distance.labels["layout"].index(f"{norm}, {injection}")
        rows = []
        for seed in (4, 5):
            size = {"d_model": 16, "n_heads": 4, "d_vocab": 256, "n_core": 2, "n_loops": 6}
            layout = NORMS[norm] | INJECTIONS[injection]
            bridge = LoopedBridge.from_config(
                LoopedConfig(**size, rope_layout="none", noise_std=0.6, embed_scale=2.0, **layout)
            )
            draw(bridge.original_model, seed, 0.3)
            noise = {"initial_state": seed} if injection == "injection" else {}
            with torch.no_grad():
                x = bridge.run_with_cache(tokens, **noise)[1].stack_loops("resid_post").double()  # [loop, layer, batch, pos, d]
            cosine = torch.cosine_similarity(x, x[-1], dim=-1).mean((1, 2, 3))
            distance = ((x - x[-1]).norm(dim=-1) / x[-1].norm(dim=-1)).mean((1, 2, 3))
            between = torch.cosine_similarity(x[-1, 0], x[-1, 1], dim=-1).mean()
            rows.append((distance, cosine, x.norm(dim=-1).mean((1, 2, 3)), between))
        estimates = (found.distance, found.cosine, found.norm, found.degeneracy)
        for column, estimate in zip(zip(*rows, strict=True), estimates, strict=True):
            torch.testing.assert_close(estimate.values[k], torch.stack(column).mean(0), rtol=1e-4, atol=1e-6)
            assert estimate.count == 2


def test_standard_deviations() -> None:
    model = LoopedBridge.from_config(LoopedConfig(d_model=64, n_heads=4, d_vocab=256, n_core=1, n_loops=2)).original_model
    draw(model, 0, "fan_in")
    weights = model.canonical_parameters()
    assert weights["core.0.mlp.down.weight"].std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert weights["core.0.attn.q.weight"].std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert weights["core.0.ln1.weight"].eq(1).all()
    draw(model, 0, 0.02)
    assert model.canonical_parameters()["core.0.mlp.down.weight"].std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.slow
def test_seeds_add_up_and_the_small_case_settles_as_in_the_paper() -> None:
    whole = random_init_sweep(**SMALL, n_loops=16, seeds=2)
    merged = random_init_sweep(**SMALL, n_loops=16, seeds=[0]) + random_init_sweep(**SMALL, n_loops=16, seeds=[1])
    for a, b in ((whole.distance, merged.distance), (whole.norm, merged.norm), (whole.degeneracy, merged.degeneracy)):
        assert torch.equal(a.values, b.values) and torch.equal(a.stderr, b.stderr)
    verdicts = whole.verdicts
    assert verdicts["pre-norm, injection"] == "fixed point, one per layer"
    assert verdicts["pre-norm, none"] == "direction only, shared" and verdicts["Ouro norm, none"] == "does not settle"
    assert len(whole.plot().data) == 6 and len(whole.to_dataframe()) == 6 * 16


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = "--n-layers 1 --d-model 8 --n-loops 4 --seeds 1 --std fan_in --csv".split()
    assert main(["sweep-init", *arguments, str(tmp_path / "sweep.csv")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 layer of width 8, 4 loops, 1 seed, weights of std 1/sqrt(fan_in), embedding of std 1")
    assert all(f"{n}, {i} " in out for n in NORMS for i in INJECTIONS)
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 1 + 6 * 4
    assert main(["sweep-init", "--n-loops", "2"]) == 1 and "at least 4" in capsys.readouterr().err


def test_refusals(unchecked: None) -> None:
    with pytest.raises(LoopedError, match="no seeds"):
        random_init_sweep(**SMALL, seeds=[])
    for wrong in (0.0, -1.0, float("inf"), True):
        with pytest.raises(LoopedError, match="positive number"):
            random_init_sweep(**SMALL, std=wrong)
        with pytest.raises(LoopedError, match="embed_std"):
            random_init_sweep(**SMALL, embed_std=wrong)


def test_seeds_of_a_sweep_over_initialisations_draw_their_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights of one seed for all, only the initial noise is left to differ, where a layout has one."""
    draw = random_init.draw
    monkeypatch.setattr(random_init, "draw", lambda model, seed, std: draw(model, 0, std))
    found = random_init.random_init_sweep(n_layers=1, d_model=8, n_loops=4, seeds=3, std=0.3, verbose=False)
    for layout, error in zip(found.distance.labels["layout"], found.distance.stderr[:, 0].tolist(), strict=True):
        assert error > 1e-3 if layout.endswith(", injection") else error < 1e-6
