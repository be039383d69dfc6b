"""looped_nanochat: other configurations against its formulas, and what every family must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import check_family, random_model
from torch import Tensor
from zoo import with_config

from tl_looped import LoopedBridge
from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError
from tl_looped.families import looped_nanochat

D, HEAD, VOCAB = 24, 4, 53
HELD = {"model_type": "looped_nanochat", "sequence_len": 4, "vocab_size": VOCAB, "n_head": 6, "n_kv_head": 3, "n_embd": D,
        "window_pattern": "sl", "n_prelude": 2, "n_recur_block": 1, "n_coda": 1, "train_recur_mean": 2.5,
        "logit_softcap": 4.0}  # fmt: skip


def config(mode: str, gate: bool = False, **changes: Any) -> Any:
    shapes = {"exit_gate.proj.weight": (1, D)} if gate else {}
    return looped_nanochat.looped_config({**HELD, "input_injection": mode, **changes}, shapes)


def stored_tensors(mode: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (64, D), "lm_head.weight": (64, D)}
    shapes |= {name: (D,) for name in ("norm_emb.weight", "norm_recur.weight", "norm_final.weight")}
    if mode != "passthrough":
        shapes["inject.weight"] = (D, 2 * D)
    for at in ("prelude.0", "prelude.1", "recur.0", "coda.0"):
        at = f"transformer.{at}."
        shapes |= {f"{at}n{i}.weight": (D,) for i in (1, 2, 3, 4)}
        shapes |= {f"{at}attn.c_{part}.weight": (rows, D) for part, rows in (("q", D), ("k", D // 2), ("v", D // 2))}
        shapes |= {f"{at}attn.c_proj.weight": (D, D), f"{at}mlp.c_fc.weight": (4 * D, D), f"{at}mlp.c_proj.weight": (D, 4 * D)}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) / s[-1] ** 0.5 for n, s in shapes.items()}
    return {n: 1 + t if len(t.shape) == 1 else t for n, t in tensors.items()}


def reference(p: dict[str, Tensor], tokens: Tensor, n_loops: int, mode: str, state: Tensor | None = None) -> Tensor:
    """The published forward, from its formulas."""
    n = tokens.shape[1]
    angle = torch.arange(n)[:, None] * (1 / 10000.0 ** (torch.arange(0, HEAD, 2).float() / HEAD))
    cos, sin = (f(angle).bfloat16().double() for f in (torch.cos, torch.sin))
    back = torch.arange(n)[:, None] - torch.arange(n)

    def rms(x: Tensor, name: str = "") -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed * p[f"{name}.weight"] if name else normed

    def turned(x: Tensor) -> Tensor:  # by minus the angle
        a, b = x.chunk(2, -1)
        return rms(torch.cat((a * cos + b * sin, b * cos - a * sin), -1))

    def block(x: Tensor, at: str, left: int) -> Tensor:
        h = rms(x, f"{at}.n1")
        q, k, v = ((h @ p[f"{at}.attn.c_{part}.weight"].T).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in "qkv")
        q, k, v = turned(q), turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.mT / HEAD**0.5).masked_fill((back < 0) | (back > left), -torch.inf)
        z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = rms(x + z @ p[f"{at}.attn.c_proj.weight"].T, f"{at}.n2")
        neurons = (rms(x, f"{at}.n3") @ p[f"{at}.mlp.c_fc.weight"].T).relu().square()
        return rms(x + neurons @ p[f"{at}.mlp.c_proj.weight"].T, f"{at}.n4")

    e = rms(p["transformer.wte.weight"][tokens], "norm_emb")
    e = block(block(e, "transformer.prelude.0", 2), "transformer.prelude.1", 4)
    s = e if state is None else state
    for _ in range(n_loops):
        u = s if mode == "passthrough" else torch.cat((e, s), -1) @ p["inject.weight"].T
        s = rms(block(u, "transformer.recur.0", 2), "norm_recur")
    logits = rms(block(s, "transformer.coda.0", 4), "norm_final") @ p["lm_head.weight"][:VOCAB].T
    return 4.0 * torch.tanh(logits / 4.0)


@pytest.mark.parametrize("mode", ["inject_init_prelude", "inject_init_random", "passthrough"])
@torch.no_grad()
def test_other_configurations_follow_the_formulas(mode: str) -> None:
    tensors, tokens = stored_tensors(mode), torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    model = load_model(MemoryCheckpoint({**HELD, "input_injection": mode}, tensors))
    assert model.cfg.n_loops == 2
    is_random = mode == "inject_init_random"
    for n_loops in (1, 2, 4):
        asked = torch.Generator().manual_seed(7) if is_random else None
        drawn = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * D**-0.5
        expected = reference(tensors, tokens, n_loops, mode, drawn if is_random else None)
        torch.testing.assert_close(model.unrolled(n_loops)(tokens, initial_state=asked).logits, expected, atol=1e-9, rtol=0)


def test_what_every_family_must_pass() -> None:
    bridge = random_model(config("inject_init_prelude", gate=True, n_recur_block=2))
    assert "loops.1.hook_exit_logit" in bridge.hook_dict
    check_family(bridge)


def test_a_random_state_is_the_same_for_a_text_and_its_pieces() -> None:
    bridge = random_model(config("inject_init_random", n_recur_block=2))
    check_family(bridge)
    states = bridge.run_with_cache(torch.zeros(1, 30, dtype=torch.long))[1]["loops.0.hook_state"]
    assert float(states.std()) == pytest.approx(D**-0.5, rel=0.1)


def test_unknown_options_are_refused() -> None:
    for changes, match in (({"input_injection": "warm"}, "warm"), ({"window_pattern": "SLM"}, "made of L")):
        with pytest.raises(CheckpointError, match=match):
            load_model(with_config("looped_nanochat", **changes))
    with pytest.raises(CheckpointError, match=r"missing: .*inject"):
        passthrough = {n: t for n, t in stored_tensors("passthrough").items()}
        load_model(MemoryCheckpoint({**HELD, "input_injection": "inject_init_prelude"}, passthrough))


def test_a_long_text_leaves_the_windows_of_all_layers() -> None:
    bridge: LoopedBridge = random_model(config("passthrough", n_recur_block=1, n_prelude=0, n_coda=0))
    tokens = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 0] = (tokens[0, 0] + 1) % VOCAB
    with torch.no_grad():  # two loops look back four tokens each
        same = (bridge(tokens) == bridge(other)).all(-1)[0].tolist()
    assert same == [False] * 9 + [True] * 11
