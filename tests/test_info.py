"""Sizes against what torch counts in a run, and what `tl-looped info` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo import GOLDEN, ZOO, random_bridge

from tl_looped import LoopedBridge, families
from tl_looped.cli import compare, info, lens, main, report, sweep_init
from tl_looped.errors import CheckpointError
from tl_looped.facts import human
from tl_looped.info import checkpoint_text, hooks_text
from tl_looped.model.facts import order
from tl_looped.model.sizes import sizes
from tl_looped.report import report as make_report


def counted(bridge: LoopedBridge, n_loops: int, n_tokens: int) -> tuple[int, int]:
    """Floating-point operations of a run: of products with weights, and of attention."""
    deep = bridge.unroll(n_loops).requires_grad_(False)  # else the counter looks for gradient functions
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        deep.original_model(torch.arange(n_tokens)[None])
    by_operation = {str(name).split(".")[-1]: n for name, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for name, n in by_operation.items() if "attention" in name or "bmm" in name)
    return sum(by_operation.values()) - attention, attention


@pytest.mark.parametrize("structure", ZOO)
def test_costs_are_those_that_torch_counts(structure: str) -> None:
    bridge = random_bridge(structure)
    found = sizes(bridge.looped_cfg)
    assert found.n_parameters == sum(p.numel() for p in bridge.plain.canonical_parameters().values())
    few, more = (counted(bridge, n, n_tokens=4) for n in (2, 3))
    assert (more[0] - few[0]) // 4 == found.flops_per_loop
    assert few[0] // 4 == found.flops(2)


@pytest.mark.parametrize("structure", ZOO)
def test_the_cache_of_a_loop_is_what_generation_keeps(structure: str) -> None:
    bridge = random_bridge(structure).unroll(2)
    model, tokens = bridge.plain, torch.tensor([[5, 17, 3]])
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    held = [layer for layer in cache.layers if layer.keys is not None]
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in held) // tokens.numel()
    edge = sum(bridge.looped_cfg.schedule.stacks[s] for s in ("prelude", "coda"))
    cfg = bridge.looped_cfg
    assert numbers == 2 * sizes(cfg).cache_per_loop + 2 * edge * cfg.n_kv_heads * cfg.d_head


def test_counts_are_shown_in_three_digits() -> None:
    shown = [human(n) for n in (0, 7, 999, 1000, 999_600, 1_430_000_000)]
    assert shown == ["0", "7", "999", "1 k", "1 M", "1.43 B"]
    assert [human(n, "B") for n in (512, 2_860_000_000)] == ["512 B", "2.86 GB"]


def expand(line: str) -> list[str]:
    """All names that one such as "loops.{0..2}.blocks.{1,3}.hook_in" stands for."""
    if match := re.search(r"\{(.*?)\}", line):
        first, _, last = match[1].partition("..")
        indices = range(int(first), int(last) + 1) if last else match[1].split(",")
        return [name for k in indices for name in expand(f"{line[: match.start()]}{k}{line[match.end() :]}")]
    return [line]


@pytest.mark.parametrize("family", ["ouro", "huginn", "hrm_text", "parcae"])
def test_the_names_shown_are_those_of_the_loaded_model(family: str) -> None:
    """No more and no fewer than the hook points of the model."""
    bridge = LoopedBridge.from_pretrained(GOLDEN / family, device="cpu")
    shown: set[str] = set()
    places: list[str] = []
    for line in hooks_text(bridge.looped_cfg).splitlines():
        if line.startswith(" "):
            hooks = re.sub(r"^ +(\[.*?\]|other points)?", "", line).split()
            shown |= {bridge.expand_name(name)[0] for place in places for hook in hooks for name in expand(place + hook)}
        else:
            places = [] if not line else [""] if line == "outside the layers:" else line.split(", ")
    assert shown == set(bridge.hook_dict)


def test_shapes_shown_are_those_of_a_run() -> None:
    bridge = LoopedBridge.from_pretrained(GOLDEN / "nanbeige", device="cpu")  # grouped keys
    cfg = bridge.looped_cfg
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([[5, 17, 3]]))
    axes = {
        "batch": 1, "pos": 3, "query": 3, "key": 3, "d_model": cfg.d_model, "head": cfg.n_heads, "kv_head": cfg.n_kv_heads,
        "d_head": cfg.d_head, "d_mlp": cfg.d_mlp,
    }  # fmt: skip
    checked = 0
    for shape, hooks in re.findall(r"^  \[(.*?)\] +(.*)$", hooks_text(cfg), flags=re.MULTILINE):
        for hook in hooks.split():
            for name in (f"loops.0.blocks.1.{hook}", f"loops.0.{hook}", hook):
                if name in cache:
                    assert tuple(cache[name].shape) == tuple(axes[axis] for axis in shape.split(", ")), name
                    checked += 1
    assert checked >= 18


def test_info_of_a_toy_and_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "toy:hop"]) == 0
    out = capsys.readouterr().out
    assert "6 loops over one stack of 2 layers" in out and "134 k" in out and "loops.{0..5}.blocks.{0..1}." in out
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("Ouro", "Huginn", "HRM-Text", "Parcae", "Nanbeige", "retrofit", "toy:hop", "loop_layers")
    )


def test_info_reads_no_weights(tmp_path: Path) -> None:
    """A shard that is there by name only: its header is enough."""
    bridge = random_bridge("huginn")
    bridge.save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_looped.checkpoints.files.InSafetensors.read", lambda *_: pytest.fail("a tensor was read"))
        assert "huginn" in checkpoint_text(tmp_path) or "custom" in checkpoint_text(tmp_path)
    with pytest.raises(CheckpointError):
        checkpoint_text(tmp_path / "none")


def test_info_where_the_embedding_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_bridge("ouro", torch.bfloat16).save_pretrained(tmp_path)
    plain, right = checkpoint_text(tmp_path), families.canonical.sources
    computed = {"embed.weight": families.Computed(lambda weight: weight, {"embed.weight": (31, 24)})}
    monkeypatch.setattr(families.canonical, "sources", lambda cfg, shapes: right(cfg, shapes) | computed)
    assert checkpoint_text(tmp_path) == plain and "in bfloat16" in plain


def test_help_names_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for example in (command.EXAMPLE for command in (lens, compare, report, sweep_init, info)):
        name = example.split()[1]
        assert example in out and re.search(rf"^ +{name}\s+\w", out, flags=re.MULTILINE)
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert re.sub(r"\s+", " ", example) in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_order_of_a_run_is_told_from_its_schedule_and_parts() -> None:
    two = order(LoopedBridge.from_pretrained(GOLDEN / "hrm_text", device="cpu").looped_cfg)
    assert two.loop == [("L stack", "2 layers, 3 times"), ("H stack", "2 layers"), ("after every loop", "norm")]
    assert (
        two.is_injected and two.begins == "the states begin as a learned vector" and two.before == [("embedding", "the token")]
    )
    ouro = order(LoopedBridge.from_pretrained(GOLDEN / "ouro", device="cpu").looped_cfg)
    assert ouro.loop[1:] == [("after every loop", "norm, exit gate")] and not ouro.is_injected and not ouro.begins
    huginn = order(LoopedBridge.from_pretrained(GOLDEN / "huginn", device="cpu").looped_cfg)
    assert [name for name, _ in huginn.after] == ["after the loop", "coda", "answer"] and huginn.is_injected


def test_info_and_report_tell_the_same_facts() -> None:
    model = LoopedBridge.from_pretrained(GOLDEN / "ouro", device="cpu")
    page = make_report(model, torch.tensor([1, 2, 3]), sections="model", verbose=False).html
    rows = checkpoint_text(GOLDEN / "ouro").split("\n\n")[0].splitlines()[1:]
    told = dict(re.split(r" {2,}", row, maxsplit=1) for row in rows)
    assert {"family", "runs", "parameters", "one loop more"} <= told.keys()
    for name, text in told.items():
        if name != "memory":  # as it is stored, and as it was loaded
            assert f'<th scope="row">{name}</th><td>{text}</td>' in page
