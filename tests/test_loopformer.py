"""LoopFormer: another configuration against its formulas, its steps, and what every family must pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from family_checks import check_family, random_model
from safetensors.torch import load_file
from torch import Tensor
from zoo import GOLDEN, with_config

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.analysis import local_stability
from tl_looped.attribution import path_patch
from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError
from tl_looped.interventions import repeat_loop

HELD = {"model_type": "loopformer", "block_size": 20, "vocab_size": 53, "n_layer": 2, "n_head": 3, "n_embd": 24, "bias": True,
        "intermediate_dim": 40, "steps": [0.5, 0.125, 0.5]}  # fmt: skip
CONFIG = LoopedConfig(
    d_model=24, n_heads=3, d_mlp=20, d_vocab=31, n_ctx=12, n_core=2, n_loops=3, loop="timed", norm_eps=None, mlp="plain",
    act_fn="gelu", rope_layout="none", learned_positions=True, options={"steps": [0.5, 0.25, 0.5]}, tied=True,
    biases=("q", "v", "o", "in", "out"), family="loopformer",
)  # fmt: skip


def stored_tensors() -> dict[str, Tensor]:
    generator, d, m = torch.Generator().manual_seed(5), 24, 40
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (53, d), "transformer.wpe.weight": (20, d)}
    shapes["transformer.norm_f.weight"] = (d,)
    for part in ("time_embedder", "dt_embedder"):
        shapes |= {f"{part}.mlp.0.weight": (d, 256), f"{part}.mlp.0.bias": (d,)}
        shapes |= {f"{part}.mlp.2.weight": (d, d), f"{part}.mlp.2.bias": (d,)}
    for j in range(2):
        at = f"transformer.h.blocks.{j}."
        matrices = {"adaLN_modulation.1": (4 * d, d), "attn.c_attn": (3 * d, d), "attn.c_proj": (d, d)}
        for name, shape in {**matrices, "mlp.c_fc": (m, d), "mlp.c_proj": (d, m)}.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) / s[-1] ** 0.5 for n, s in shapes.items()}
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}


def reference(p: dict[str, Tensor], tokens: Tensor, sizes: list[float]) -> Tensor:
    """The published forward, from its formulas."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def wave(x: float, part: str) -> Tensor:
        angle = torch.tensor(x).float() * 10000.0 ** (-torch.arange(128) / 128)
        phi = torch.cat((angle.cos(), angle.sin())).double()
        return linear(F.silu(linear(phi, f"{part}.mlp.0")), f"{part}.mlp.2")

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()

    n = tokens.shape[1]
    mask = torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1)
    h, time = p["transformer.wte.weight"][tokens] + p["transformer.wpe.weight"][:n], 0.0
    for size in sizes:
        c = wave(time, "time_embedder") + wave(size, "dt_embedder")
        for j in range(2):
            at = f"transformer.h.blocks.{j}."
            gain_a, gain_m, scale_a, scale_m = linear(F.silu(c), f"{at}adaLN_modulation.1").chunk(4)
            qkv = linear(rms(h) * (1 + scale_a), f"{at}attn.c_attn")
            q, k, v = (x.unflatten(-1, (3, 8)).transpose(1, 2) for x in qkv.chunk(3, -1))
            z = ((q @ k.mT / 8**0.5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
            h = h + gain_a * linear(z, f"{at}attn.c_proj")
            h = h + gain_m * linear(F.gelu(linear(rms(h) * (1 + scale_m), f"{at}mlp.c_fc")), f"{at}mlp.c_proj")
        time += size
    return rms(h) * p["transformer.norm_f.weight"] @ p["transformer.wte.weight"].T


@torch.no_grad()
def test_another_configuration_follows_the_formulas() -> None:
    tensors, tokens = stored_tensors(), torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(0))
    model = load_model(MemoryCheckpoint(HELD, tensors))
    for n_loops, sizes in ((3, [0.5, 0.125, 0.5]), (2, [0.5, 0.5]), (5, [0.2] * 5)):
        expected = reference(tensors, tokens, sizes)
        torch.testing.assert_close(model.unrolled(n_loops)(tokens).logits, expected, atol=1e-6, rtol=0)  # sizes are fp32
    cut = model(tokens, loop=1).logits
    torch.testing.assert_close(cut, reference(tensors, tokens, [0.5, 0.125]), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.unrolled(2, cut=True)(tokens).logits, cut)


def test_what_every_family_must_pass() -> None:
    bridge = random_model(CONFIG)
    check_family(bridge)


@torch.no_grad()
def test_paths_go_through_the_gains_of_the_loop() -> None:
    """Of a model without attention patterns that change, the direct effect of one head on the logits is its change alone."""
    bridge = random_model(CONFIG)
    clean, corrupted = torch.randint(0, 31, (2, 1, 6), generator=torch.Generator().manual_seed(2))
    cache = bridge.run_with_cache(clean)[1]
    found = path_patch(bridge, corrupted, cache, lambda x: x[0, -1, 4], sources="loops.1.blocks.0.head.2", receivers="logits")
    z = cache["loops.1.blocks.0.attn.hook_z"]
    base, seen = bridge.run_with_cache(corrupted)
    change = (z - seen["loops.1.blocks.0.attn.hook_z"])[0, :, 2] @ bridge.blocks[2].attn.W_O[2]
    change = change * seen["loops.1.blocks.0.ln1_post.hook_gain"][0]
    stream = bridge.plain.ln_final(seen["ln_final.hook_in"][0, -1] + change[-1])
    expected = stream @ bridge.W_U[:, 4]
    torch.testing.assert_close(found.values.squeeze(), expected - base[0, -1, 4], atol=1e-8, rtol=0)


def test_a_file_may_name_the_steps_and_keeps_them(tmp_path: Path) -> None:
    data = load_file(GOLDEN / "loopformer" / "golden.safetensors")
    bridge = LoopedBridge(load_model(with_config("loopformer", steps=data["Smixed/steps"].tolist())))
    bridge.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())
    again = LoopedBridge.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(again(data["input_ids"]), data["Smixed/logits"], atol=2e-4, rtol=0)


@torch.no_grad()
def test_the_conditioning_is_read_without_a_change_and_may_be_edited() -> None:
    bridge, tokens = random_model(CONFIG), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(logits, bridge(tokens)) and not [name for name in bridge.hook_dict if "rot_q" in name]
    conditioning = cache["loops.1.conditioning.hook_out"]
    assert conditioning.shape == (2, 4, 24) and bool((conditioning == conditioning[:, :1]).all())

    def one_position(x: Tensor, hook: object) -> Tensor:
        x[:, 2] = 0.0
        return x

    edited = bridge.run_with_hooks(tokens, [("loops.2.conditioning.hook_out", one_position)])
    same = torch.isclose(edited, logits, atol=1e-12).all(-1)
    assert same.tolist() == [[True, True, False, False]] * 2
    _, cut = bridge.run_with_cache(tokens, pos_slice=-1)
    torch.testing.assert_close(cut["loops.1.conditioning.hook_out"], conditioning[:, -1:])


def test_a_run_may_start_inside_a_loop() -> None:
    bridge, tokens = random_model(CONFIG), torch.tensor([[3, 1, 4, 1]])
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        torch.testing.assert_close(bridge(cache["resid_pre", 3], start_at_layer=3), logits)


def test_what_has_no_meaning_is_refused() -> None:
    bridge, tokens = random_model(CONFIG), torch.tensor([[3, 1, 4, 1]])
    with pytest.raises(LoopedError, match="the time and the size of the step"):
        local_stability(bridge, tokens)
    with pytest.raises(LoopedError, match="the time and the size of the step"):
        repeat_loop(bridge, 1)
    with pytest.raises(LoopedError, match="scales what every branch returns"):
        bridge.all_composition_scores("Q")
    with pytest.warns(UserWarning, match="take the residual stream"):
        bridge.set_use_split_qkv_input(True)
    with pytest.raises(LoopedError, match="conditions the loop"):
        bridge(tokens)
    with pytest.raises(CheckpointError, match="at least one"):
        load_model(with_config("loopformer", steps=[]))
