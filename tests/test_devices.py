"""A model on another device than the prompts, and on several, on a machine that has one device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from zoo import GOLDEN, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.checkpoints.placement import planned
from tl_looped.model.parameters import parameter_shapes

SOME = (
    "forward", "masked", "deeper", "cache", "native lens", "sweep", "weight gradients", "generated", "fixed points",
)  # fmt: skip


# One of every kind of loop; `python tests/on_pretended_device.py several/NAME` tries any other of the zoo and the checkpoints.
KINDS = ("huginn", "hrm_text", "dory", "iquestpltcoder", "inkling2_loop", "mor_expert")


def on_pretended_devices(*arguments: str) -> None:
    script = Path(__file__).with_name("on_pretended_device.py")
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_model_on_one_device_or_several_answers_prompts_of_the_cpu() -> None:
    on_pretended_devices("one/ouro", "several/huginn", *SOME)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["one", "several"])
@pytest.mark.parametrize("name", KINDS)
def test_everything_a_user_does_with_it(name: str, place: str) -> None:
    on_pretended_devices(f"{place}/{name}")


PUBLISHED: dict[str, Any] = {"d_model": 2048, "n_heads": 16, "d_mlp": 5632, "d_vocab": 49152, "n_loops": 4}


def bytes_on(plan: dict[str, Any], cfg: LoopedConfig) -> dict[Any, int]:
    """How much of a model in bf16 a plan puts where."""
    found: dict[Any, int] = {}
    for name, shape in parameter_shapes(cfg):
        part = max((part for part in plan if name.startswith(f"{part}.")), key=len)
        found[plan[part]] = found.get(plan[part], 0) + 2 * torch.Size(shape).numel()
    return found


def test_a_plan_fills_the_devices_evenly_and_keeps_the_order_of_the_run() -> None:
    cfg = LoopedConfig(**PUBLISHED, n_core=24, n_prelude=2, n_coda=2, injection="concat")
    plan = planned(cfg, dict(parameter_shapes(cfg)), torch.bfloat16, {0: "20GB", 1: "20GB", 2: "20GB", "cpu": "50GB"})
    held = bytes_on(plan, cfg)
    assert sorted(held) == [0, 1, 2] and max(held.values()) < 2 * min(held.values())
    layers: list[Any] = [plan[f"{stack}.{j}"] for stack, n in cfg.schedule.stacks.items() for j in range(n)]
    assert layers == sorted(layers)
    assert plan["inject"] == plan["core.0"]  # where what it makes is read


def test_what_accelerators_cannot_hold_lies_on_the_cpu() -> None:
    cfg = LoopedConfig(**PUBLISHED, n_core=24)
    plan = planned(cfg, dict(parameter_shapes(cfg)), torch.bfloat16, {0: "1GB", "cpu": "50GB"})
    held = bytes_on(plan, cfg)
    assert held[0] < 1e9 < held["cpu"]


def test_a_plan_that_needs_the_disk_is_refused() -> None:
    cfg = LoopedConfig(**PUBLISHED, n_core=24)
    with pytest.raises(LoopedError, match=r"2\.\d+ GB in torch.bfloat16 .* does not fit: .* 0: 1\.00 GB, cpu: 1\.00 GB"):
        planned(cfg, dict(parameter_shapes(cfg)), torch.bfloat16, {0: "1GB", "cpu": "1GB"})


@pytest.mark.parametrize("name", ["hrm_text", "llama_rrt", "mor_expert", "parcae"])
def test_a_plan_places_every_part_of_every_family(name: str) -> None:
    model = LoopedBridge.from_pretrained(GOLDEN / name, device_map="auto", max_memory={"cpu": "10GB"})
    plan = planned(model.looped_cfg, dict(parameter_shapes(model.looped_cfg)), torch.float32, {"cpu": "10GB"})
    assert plan.keys() == model.device_map.keys()
    assert set(model.device_map.values()) == {torch.device("cpu")}
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), LoopedBridge.from_pretrained(GOLDEN / name, device="cpu")(tokens))


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "cpu", "cor": "cpu"}, "'cor', which is no part of this model. The parts .* are embed, .*core.0 to core.2"),
        ({"": "cpu", "core.0.attn": "cpu"}, "'core.0.attn', which lies inside core.0: a part lies on one device"),
        ({"core": "cpu"}, 'says no device for embed. .* "" is everything that is not named'),
        ({"": "disk"}, "every loop, and would be read from the disk each time"),
        ({"": "meta"}, "holds no values"),
        ({"": "cpu", "core": "cuda:7"}, "'cuda:7', was asked, which cannot be used here"),
        ({"": "cpu", "core": 7}, "7, was asked, which cannot be used here"),
        ({"": "cpu", "embed": "cpu", "unembed": "cuda"}, "cpu and cuda for embed, which is tied"),
        ("even", "device_map='even' was asked; choose 'auto' or 'balanced'"),
        ("cuda:0", "For the whole model on one device use device="),
        (0, "device_map=0 was asked; .* For the whole model on one device use device="),
        (torch.device("cpu"), "For the whole model on one device use device="),
        ({0: "cpu"}, "pass a dict of devices by the names of parts"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_maps_that_fit_no_model_are_refused(device_map: Any, message: str, tmp_path: Path) -> None:
    random_bridge("huginn").save_pretrained(tmp_path)
    with pytest.raises(LoopedError, match=message):
        LoopedBridge.from_pretrained(tmp_path, device_map=device_map)


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(LoopedError, match="each says where everything goes"):
        LoopedBridge.from_pretrained("toy:hop", device="cpu", device_map="auto")
    with pytest.raises(LoopedError, match="without a plan that it limits"):
        LoopedBridge.from_pretrained("toy:hop", max_memory={"cpu": "1GB"})
    with pytest.raises(LoopedError, match="says where everything goes"):
        LoopedBridge.from_pretrained("toy:hop", device_map={"": "cpu"}, max_memory={"cpu": "1GB"})


@pytest.mark.parametrize("limits", [{"cpu": "one banana"}, {"disk": "100GB"}, "1GB"])
@pytest.mark.usefixtures("unchecked")
def test_limits_that_cannot_be_read_are_refused(limits: Any) -> None:
    with pytest.raises(LoopedError, match=r"max_memory=.* was asked, which accelerate cannot read"):
        LoopedBridge.from_pretrained("toy:hop", device_map="auto", max_memory=limits)


def test_the_longest_name_counts_and_every_part_is_told() -> None:
    model = LoopedBridge.from_pretrained("toy:hop", device_map={"": "cpu", "core.1": torch.device("cpu"), "unembed": "cpu"})
    assert list(model.device_map) == ["embed", "prelude.0", "core.0", "core.1", "inject", "ln_final", "unembed"]
    assert model.cfg.device == "cpu" and model.cfg.n_devices == 1
    assert model.to("cpu").device_map == model.device_map


def test_a_model_in_memory_is_placed_and_one_that_is_offloaded_refused() -> None:
    llama = tiny_llama()
    looped = LoopedBridge.loop_layers(llama, 1, 3, n_loops=2)
    assert looped.device_map.keys() >= {"prelude.0", "core.0", "coda.0"}
    llama.model.layers[1].to("meta")
    with pytest.raises(LoopedError, match=r"no values here for model.layers.1.*: it is offloaded"):
        LoopedBridge.loop_layers(llama, 1, 3, n_loops=2)


def test_a_layer_that_lies_on_several_devices_is_refused() -> None:
    model = random_bridge("ouro")
    model.blocks[0].mlp.out.original_component.to("meta")
    with pytest.raises(LoopedError, match=r"core.0 lies on cpu and, with core.0.mlp.down.weight, on meta"):
        _ = model.device_map


def test_reading_the_devices_changes_no_number() -> None:
    model, tokens = random_bridge("huginn"), random_tokens()
    before = model(tokens)
    _ = model.device_map
    assert torch.equal(model(tokens), before)
