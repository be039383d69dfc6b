"""Nothing depends on the default dtype, device or determinism of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor
from zoo import ZOO, random_bridge, random_tokens

from tl_looped import LoopedBridge
from tl_looped.analysis import (
    LocalStability,
    attention_distances,
    inference_stages,
    injection_effect,
    limiting_behaviour,
    step_geometry,
)
from tl_looped.toys.hop import hop_prompts


@contextmanager
def a_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic_and_filled() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which also fills memory that nothing was written to with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


GLOBAL_SETTINGS = pytest.mark.parametrize(
    "setting",
    [
        lambda: a_default_dtype(torch.float64),
        lambda: a_default_dtype(torch.bfloat16),
        lambda: torch.device("meta"),
        deterministic_and_filled,
    ],
    ids=["float64", "bfloat16", "meta", "deterministic"],
)


@GLOBAL_SETTINGS
def test_no_global_setting_moves_what_is_drawn_from_a_seed(setting: Callable[[], AbstractContextManager[None]]) -> None:
    # Drawn here by hand: fp32, a generator for all matrices in the order of their names, and one for each row of noise.
    cfg = ZOO["retrofit_llama"]
    model = LoopedBridge.from_config(cfg, seed=3)
    drawn = torch.Generator().manual_seed(3)
    matrices = {
        name: torch.zeros(shape).normal_(0, 0.02, generator=drawn)
        for name, shape in sorted((n, p.shape) for n, p in model.original_model.canonical_parameters().items())
        if len(shape) == 2
    }
    noise = torch.stack(
        [
            torch.nn.init.trunc_normal_(
                torch.empty(24), std=0.1, a=-0.3, b=0.3, generator=torch.Generator().manual_seed(5 * 1_000_003 + pos)
            )
            for pos in range(7)
        ]
    )
    tokens = random_tokens()
    with setting():
        made = LoopedBridge.from_config(cfg, seed=3)
        short = made.original_model.noise(5, torch.arange(3, device="cpu")[None])
        seeded = made(tokens, initial_state=5)
    assert torch.equal(short[0], noise[:3])
    assert torch.equal(made.original_model.noise(5, torch.arange(7)[None])[0], noise)  # grown after the setting, too
    parameters = made.original_model.canonical_parameters()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32 and parameter.device.type == "cpu"
        assert torch.equal(parameter, matrices[name] if name in matrices else torch.full_like(parameter, 1.0))
    assert torch.equal(seeded, model(tokens, initial_state=noise.expand(2, 7, 24)))


@GLOBAL_SETTINGS
def test_no_global_setting_moves_prompts_and_measurements(setting: Callable[[], AbstractContextManager[None]]) -> None:
    # The mapping is the one that hop_prompts documents; all else is measured once without the setting, which is the number
    # that the tests of every analysis compare with their own formulas.
    def measured(model: LoopedBridge) -> list[Tensor]:
        stages = inference_stages(model, tokens, unit="bits", verbose=False)
        geometry = step_geometry(model, tokens, verbose=False)
        behaviour = limiting_behaviour(model, tokens, n_loops=6, period=3, window=6, keep_signal=True, verbose=False)
        effect = injection_effect(model, tokens, from_loop=1, verbose=False)
        exact = LocalStability((0.1,), (0.2,), (0.3,), (0.4,), ((0.7,),), 8, 1, 8)
        found = [stages.entropy, geometry.cka, geometry.turning_angle, effect.kl, effect.state_change]
        found += [behaviour.rotation_power, *exact.estimates().values()]
        return [*(each.values for each in found), *(b.signal for b in behaviour.examples if b.signal is not None)]

    model, tokens = random_bridge("retrofit_llama"), random_tokens()
    expected = measured(model)
    with setting():
        got = measured(model)
        prompt = hop_prompts(n_symbols=3, seed=1)
    assert prompt.texts == ["B g E b G e ? G B E"]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def test_every_unroll_reads_the_dtype_of_its_parameters() -> None:
    # Frobenius distances by hand from the cached patterns, in fp64; held in the dtype of before, they were up to 21 % off.
    model = random_bridge("ouro", torch.bfloat16)
    deep, tokens = model.unroll(4), random_tokens()
    model.to(torch.float64)
    assert deep.cfg.dtype == torch.float64 and deep.cfg.device == "cpu" and deep.accumulated_bias(3).dtype == torch.float64
    patterns = torch.stack([deep.run_with_cache(tokens)[1][f"blocks.{i}.attn.hook_pattern"] for i in range(8)])
    assert patterns.dtype == torch.float64
    by_hand = (patterns[:, None] - patterns[None]).square().sum((-3, -2, -1)).div(3 * 7).sqrt().mean(-1)
    found = attention_distances(deep, tokens, verbose=False).values
    assert torch.allclose(found, by_hand, atol=1e-7)  # the root of fp64's resolution: small ones are differences of squares
    deep.original_model.to(torch.float32)  # by another way than the bridge's own
    assert model.cfg.dtype == torch.float32 and model.accumulated_bias(2).dtype == torch.float32
