"""A store of activations: what is in it, how it is read, and what stops it."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from collecting import LENGTHS, PROMPTS, SIZES, TINY, content, quiet, same, stack_of, tiny
from helpers import run, with_words
from looped_modules import NanoLoop
from safetensors import safe_open
from torch import Tensor
from zoo import FEW, GOLDEN, random_tokens, shared_bridge, slow_but

from tl_looped import LoopedBridge, LoopedError, exits, load_activations
from tl_looped.activations import collecting


@pytest.mark.parametrize("name", slow_but(FEW))
def test_a_store_has_what_each_prompt_computes_alone(name: str, tmp_path: Path) -> None:
    model = shared_bridge(name)
    stack = stack_of(model)
    store = quiet(model, PROMPTS, ["resid_post", "z", "out", "q"], tmp_path, stack=stack, shard_bytes=9000)
    assert len(store.shards) > 1 and store.n_rows == sum(LENGTHS) and store.prompts == [0, 1, 2, 3, 4]
    for number, prompt in enumerate(PROMPTS):
        alone = run(model, prompt[None])
        for activation in store.names:
            found = store.of_prompt(activation, number)
            torch.testing.assert_close(found, alone[activation][0], atol=2e-5, rtol=1e-4)
        assert torch.equal(store.prompt(number).tokens, prompt)


def test_shards_are_ordinary_safetensors_and_name_every_row(tmp_path: Path) -> None:
    store = quiet(tiny(), PROMPTS, "mlp_out", tmp_path, layers=0, loops=[0, 2])
    with safe_open(store.shards[0].path, "pt") as file:
        values = file.get_tensor("loops.2.blocks.0.hook_mlp_out")
        prompt, position, token = (file.get_tensor(f"index.row.{name}") for name in ("prompt", "position", "token"))
    assert values.shape == (sum(LENGTHS), 8)
    rows = {(int(p), int(q)): int(t) for p, q, t in zip(prompt, position, token, strict=True)}
    assert rows == {(p, q): int(t) for p, tokens in enumerate(PROMPTS) for q, t in enumerate(tokens)}
    frame = store.to_dataframe()
    assert len(frame) == sum(LENGTHS) and not frame["generated"].any()


def test_padding_is_not_stored_and_texts_come_back(tmp_path: Path) -> None:
    model = with_words()
    texts = ["t3 t4 t5", "t6", "t7 t8 t9 t10 t11"]
    store = quiet(model, texts, "loops.*.hook_out", tmp_path, dtype=torch.bfloat16)
    lengths = [len(model.to_tokens(text)[0]) for text in texts]
    assert store.n_rows == sum(lengths) and store.dtype == torch.bfloat16
    for number, text in enumerate(texts):
        assert text in store.prompt(number).text
        alone = run(model, model.to_tokens(text))["loops.1.hook_out"][0]
        torch.testing.assert_close(store.of_prompt("loops.1.hook_out", number).float(), alone, atol=1e-4, rtol=2**-8)


def test_numbers_are_rounded_once(tmp_path: Path) -> None:
    model, tokens = tiny(), random_tokens(3, 6)
    name = "loops.1.blocks.1.hook_resid_post"
    store = quiet(model, tokens, name, tmp_path, dtype=torch.bfloat16)
    expected = run(model, tokens)[name].bfloat16()
    assert all(torch.equal(store.of_prompt(name, number), expected[number]) for number in range(3))


def test_positions_are_those_of_each_prompt(tmp_path: Path) -> None:
    model = tiny()
    name = "loops.2.blocks.0.hook_resid_pre"
    store = quiet(model, PROMPTS, name, tmp_path / "last", positions=-1)
    assert sorted(content(store)) == [(p, n - 1) for p, n in enumerate(LENGTHS)]
    assert torch.allclose(store.of_prompt(name, 2)[0], run(model, PROMPTS[2][None])[name][0, -1], atol=1e-6)
    with pytest.raises(LoopedError, match="prompt 4 failed: positions 2 is out of range"):
        quiet(model, PROMPTS, name, tmp_path / "two", positions=2)
    store = quiet(model, PROMPTS, name, tmp_path / "skipped", positions=2, on_error="skip")
    assert list(store.failed) == [4] and sorted(content(store)) == [(p, 2) for p in range(4)]
    whole = quiet(model, PROMPTS, name, tmp_path / "whole")
    chosen = whole.select(name, positions=-1, prompts=[0, 2])
    assert torch.equal(chosen[0].values, whole.of_prompt(name, 0)[-1]) or torch.equal(
        chosen[1].values, whole.of_prompt(name, 0)[-1]
    )
    assert {(int(b.prompt), int(b.position)) for b in (chosen[0], chosen[1])} == {(0, 4), (2, 6)} and len(chosen) == 2


def test_a_run_ends_after_the_last_layer_that_is_asked_for(tmp_path: Path) -> None:
    model, ran = tiny(), list[int]()
    for layer in range(model.cfg.n_layers):
        model.add_hook(f"blocks.{layer}.hook_resid_pre", lambda x, hook, layer=layer: ran.append(layer))
    quiet(model, PROMPTS[:1], "resid_post", tmp_path, loops=1, layers=0)
    assert set(ran) == {0, 1, 2, 3}


def test_hooks_on_the_model_act_and_are_left_there(tmp_path: Path) -> None:
    model, tokens = tiny(), random_tokens(2, 4)
    model.add_hook("loops.0.blocks.0.hook_resid_post", lambda x, hook: 2 * x)
    store = quiet(model, tokens, "resid_post", tmp_path)
    expected = run(model, tokens)["loops.2.blocks.1.hook_resid_post"]
    assert torch.allclose(store.of_prompt("loops.2.blocks.1.hook_resid_post", 1), expected[1], atol=1e-6)
    assert {id(point) for point in model.hook_dict.values() if point.has_hooks()} == {
        id(model.hook_dict["blocks.1.hook_resid_post"])
    }
    with pytest.raises(LoopedError, match="is a collection with hooks="):
        quiet(tiny(), tokens, "resid_post", tmp_path)


# Generation


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "dory"])
def test_generated_tokens_have_what_a_run_of_the_whole_text_computes(name: str, tmp_path: Path) -> None:
    model = shared_bridge(name)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    store = quiet(model, prompts, ["resid_post", "out"], tmp_path, stack=stack_of(model), max_new_tokens=5, stop_at_eos=False)
    for number, prompt in enumerate(prompts):
        text = store.prompt(number)
        alone = model.generate(prompt[None], 5, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens")
        assert torch.equal(text.tokens, alone[0]) and text.n_prompt == len(prompt)
        whole = run(model, text.tokens[None, :-1])
        for activation in store.names:
            torch.testing.assert_close(store.of_prompt(activation, number), whole[activation][0], atol=1e-4, rtol=1e-3)
    assert store.to_dataframe()["generated"].sum() == 3 * 4


def test_what_follows_the_end_of_a_text_is_not_stored(tmp_path: Path) -> None:
    model = with_words("ouro")
    prompts = [PROMPTS[0], PROMPTS[2]]
    new = [
        model.generate(p[None], 6, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens")[0, len(p) :]
        for p in prompts
    ]
    ends = int(new[0][2])  # the first text ends early, where this token comes first
    n_new = [(row == ends).nonzero().flatten().tolist()[0] + 1 if ends in row else 6 for row in new]
    store = quiet(model, prompts, "resid_post", tmp_path, max_new_tokens=6, eos_token_id=ends)
    keys = content(store).keys()
    assert [sum(key[0] == number for key in keys) for number in (0, 1)] == [
        len(p) + n - 1 for p, n in zip(prompts, n_new, strict=True)
    ]
    assert n_new[0] < 6 and [len(store.prompt(k).tokens) for k in (0, 1)] == [
        len(p) + n for p, n in zip(prompts, n_new, strict=True)
    ]


def test_loops_that_a_token_did_not_run_are_not_stored(tmp_path: Path) -> None:
    model = LoopedBridge.from_config(TINY.replace(n_loops=6), seed=0)
    model.exit_policy = exits.StateChange(0.9)
    prompts = [PROMPTS[0], PROMPTS[2]]
    ran: dict[tuple[int, int], int] = {}
    for number, prompt in enumerate(prompts):
        counts = Counter[int]()

        def count(x: Tensor, hook: Any, counts: Counter[int] = counts) -> None:
            counts[int(hook.name.split(".")[1])] += x.shape[1]

        with model.hooks(fwd_hooks=[("loops.*.hook_state", count)]):
            model.generate(prompt[None], 4, do_sample=False, stop_at_eos=False, verbose=False)
        ran |= {(number, loop): counts[loop] for loop in range(6)}
    store = quiet(model, prompts, ["resid_post", "state"], tmp_path, max_new_tokens=4, stop_at_eos=False)
    found = {(p, t): len(store.of_prompt(f"loops.{t}.hook_state", p)) for p in (0, 1) for t in range(6)}
    assert found == ran and 0 < sum(n == 0 for n in ran.values()) < len(ran)
    for number in (0, 1):
        full = run(model, store.prompt(number).tokens[None, :-1])["loops.0.blocks.1.hook_resid_post"][0]
        assert torch.allclose(store.of_prompt("loops.0.blocks.1.hook_resid_post", number), full, atol=1e-5)
    samples = store.select("resid_post", layers=0)
    batch = samples.read(torch.arange(len(samples)))
    assert Counter(batch.loop.tolist()) == {t: n for t in range(6) if (n := ran[0, t] + ran[1, t])}
    for row in range(0, len(samples), 7):
        rows = store.of_prompt(samples.names[int(batch.activation[row])], int(batch.prompt[row]))
        assert torch.equal(rows[int(batch.position[row])], batch.values[row])  # positions that ran a loop are the first ones
    with pytest.raises(LoopedError, match="runs what follows the loops once for every loop"):
        quiet(model, prompts, "resid_post", tmp_path / "coda", stack="coda", max_new_tokens=4, stop_at_eos=False)


def test_layers_that_a_router_sends_a_token_past_are_not_stored(tmp_path: Path) -> None:
    model = LoopedBridge.from_pretrained(GOLDEN / "mor_token")
    prompts = [row[:n] for row, n in zip(random_tokens(4, 9), (9, 6, 9, 4), strict=True)]
    store = quiet(model, prompts, ["mlp_out", "loops.*.hook_out"], tmp_path)
    n_rows = Counter[int]()
    for number, prompt in enumerate(prompts):
        alone = run(model, prompt[None])
        for loop in range(model.n_loops):
            runs_here = alone[f"loops.{loop}.hook_active"][0, :, 0].bool()
            n_rows[loop] += int(runs_here.sum())
            name = f"loops.{loop}.blocks.0.hook_mlp_out"
            torch.testing.assert_close(store.of_prompt(name, number), alone[name][0, runs_here], atol=1e-5, rtol=1e-4)
            assert len(store.of_prompt(f"loops.{loop}.hook_out", number)) == len(prompt)
    assert n_rows[model.n_loops - 1] < n_rows[0] == sum(map(len, prompts))
    assert Counter(b for batch in store.select("mlp_out", layers=0).batches(7) for b in batch.loop.tolist()) == n_rows


def test_a_traced_module_is_collected_by_its_names(tmp_path: Path) -> None:
    model = LoopedBridge.trace(NanoLoop().eval(), torch.arange(6)[None], verbose=False)
    prompts = [torch.arange(n) for n in (5, 3, 5)]  # of different lengths, and the module takes no mask
    own = "loops.2.blocks.0.mlp.c_fc.hook_out"
    states, inner = (quiet(model, prompts, site, tmp_path / site) for site in ("resid_post", own))
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            _, alone = model.run_with_cache(prompt[None])
        for store, name in ((states, states.names[-1]), (inner, own)):
            torch.testing.assert_close(store.of_prompt(name, number), alone[name][0], atol=1e-5, rtol=1e-4)
    with pytest.raises(LoopedError, match=r"TracedBridge, .*without a cache.* model.generate\(tokens, 2\), and collect"):
        quiet(model, prompts, "resid_post", tmp_path / "written", max_new_tokens=2)
    texts = model.generate(prompts[0][None], 2, do_sample=False)
    assert quiet(model, texts, "resid_post", tmp_path / "written").n_rows == len(prompts[0]) + 2


def test_the_same_call_goes_on_and_more_prompts_are_added(tmp_path: Path) -> None:
    model, prompts = tiny(), list(random_tokens(12, 5))
    whole = quiet(model, prompts, "resid_post", tmp_path / "whole", **SIZES)
    part = quiet(model, iter(prompts[:7]), "resid_post", tmp_path / "part", **SIZES)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("shard-*")}
    part = quiet(model, prompts, "resid_post", tmp_path / "part", **SIZES)
    kept = [path for path, at in before.items() if path.stat().st_mtime_ns == at]
    assert same(part, whole) and len(kept) == len(before) - 1  # the last one was not full
    (lost,) = [shard.path for shard in part.shards if shard.path.name == "shard-000001.safetensors"]
    lost.unlink()
    part.shards[0].path.write_bytes(part.shards[0].path.read_bytes()[:-5])
    with pytest.raises(LoopedError, match=r"shard-000000.* is damaged"):
        load_activations(tmp_path / "part")
    assert same(quiet(model, prompts, "resid_post", tmp_path / "part", **SIZES), whole)
    lost.unlink()
    assert load_activations(tmp_path / "part").missing == [1]


def test_another_collection_is_refused_with_the_difference(tmp_path: Path) -> None:
    model, prompts = tiny(), list(random_tokens(6, 5))
    quiet(model, prompts, "resid_post", tmp_path, **SIZES)
    other = [*prompts[:4], prompts[4].flip(0), prompts[5]]
    for asked, message in (
        ((model, prompts, "mlp_out", {}), "with names=loops.0.blocks.0.hook_resid_post, .*, not loops.0.blocks.0.hook_mlp_out"),
        ((model, prompts, "resid_post", {"positions": -1}), "with positions=None, not -1"),
        ((model, prompts, "resid_post", {"dtype": torch.bfloat16}), "with dtype=torch.float32, not torch.bfloat16"),
        ((model, prompts, "resid_post", {"initial_state": 3}), "with initial_state=None, not 3"),
        ((model, other, "resid_post", {}), "of other prompts: prompt 4 differs"),
        ((model, prompts[:3], "resid_post", {}), "holds more prompts than were given"),
        ((LoopedBridge.from_config(TINY, seed=1), prompts, "resid_post", {}), "of another model"),
        ((model.unroll(4), prompts, "resid_post", {"loops": slice(3)}), "schedule=Schedule"),
    ):
        with pytest.raises(LoopedError, match=message):
            quiet(*asked[:3], tmp_path, **{**SIZES, **asked[3]})


def test_the_slower_of_two_collections_into_one_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, tried = list(random_tokens(6, 5)), collecting._tried

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(collecting, "_tried", tried)
        quiet(LoopedBridge.from_config(TINY, seed=1), prompts, "resid_post", tmp_path, **SIZES, shard="1/2")
        return tried(*given)

    monkeypatch.setattr(collecting, "_tried", meanwhile)
    with pytest.raises(LoopedError, match="of another model"):
        quiet(tiny(), prompts, "resid_post", tmp_path, **SIZES, shard="2/2")
    whole = quiet(LoopedBridge.from_config(TINY, seed=1), prompts, "resid_post", tmp_path, **SIZES)
    assert same(whole, quiet(LoopedBridge.from_config(TINY, seed=1), prompts, "resid_post", tmp_path / "whole", **SIZES))


def test_several_processes_share_the_work(tmp_path: Path) -> None:
    model, prompts = tiny(), list(random_tokens(12, 5))
    whole = quiet(model, prompts, "resid_post", tmp_path / "whole", **SIZES)
    for share in (3, 1, 2):
        shared = quiet(model, prompts, "resid_post", tmp_path / "shared", shard=f"{share}/3", **SIZES)
    assert same(shared, whole) and not shared.missing
    with pytest.raises(LoopedError, match="the share '4/3' was asked"):
        quiet(model, prompts, "resid_post", tmp_path / "shared", shard="4/3", **SIZES)


def test_a_prompt_that_fails_is_named_or_noted(tmp_path: Path) -> None:
    model = LoopedBridge.from_config(TINY.replace(n_ctx=8), seed=0)
    prompts: list[Any] = [*random_tokens(3, 5), random_tokens(1, 9)[0], torch.tensor([99]), *random_tokens(2, 4)]
    with pytest.raises(LoopedError, match=r"prompt 3 failed: the prompt has 9 positions.*shorten it"):
        quiet(model, prompts[:4], "resid_post", tmp_path / "raised", **SIZES)
    store = quiet(model, prompts, "resid_post", tmp_path / "skipped", on_error="skip", **SIZES)
    assert list(store.failed) == [3, 4] and "context of this model is n_ctx=8" in store.failed[3]
    assert sorted({p for p, _ in content(store)}) == [0, 1, 2, 5, 6] == store.prompts
    good = quiet(model, [p for k, p in enumerate(prompts) if k not in (3, 4)], "resid_post", tmp_path / "good")
    assert torch.equal(store.of_prompt(store.names[3], 6), good.of_prompt(store.names[3], 4))


def test_a_full_disk_is_said_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny(), list(random_tokens(12, 5))
    whole = quiet(model, prompts, "resid_post", tmp_path / "whole", **SIZES)
    room, write = [9000], os.pwrite

    def pwrite(file: int, content: Any, at: int) -> int:
        room[0] -= len(content)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(LoopedError, match=r"cannot be written: No space left on device.*make room"):
        quiet(model, prompts, "resid_post", tmp_path / "full", on_error="skip", **SIZES)
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert not [name for name in names if name.startswith(".")] and 1 < len(names) < len(whole.shards)
    store = quiet(model, prompts, "resid_post", tmp_path / "full", on_error="skip", **SIZES)
    assert same(store, whole) and not store.failed


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from collecting import SIZES, quiet, tiny
from zoo import random_tokens
from pathlib import Path
quiet(tiny(), list(random_tokens(60, 9)), "resid_post", Path(sys.argv[1]), **SIZES)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed by a signal that this system does not have")
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_store_that_was_killed_is_that_of_one_run(tmp_path: Path, kills: int) -> None:
    generator = random.Random(0)
    place = tmp_path / "killed"
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(place), str(Path(__file__).parent)])
        n = len(list(place.glob("shard-*"))) if place.is_dir() else 0
        while child.poll() is None and (not place.is_dir() or len(list(place.glob("shard-*"))) < n + 3):
            time.sleep(0.01)
        time.sleep(generator.random() / 20)
        child.send_signal(signal.SIGKILL)
        child.wait()
    model, prompts = tiny(), list(random_tokens(60, 9))
    assert 3 * kills <= len(list(place.glob("shard-*"))) < 60
    store = quiet(model, prompts, "resid_post", place, **SIZES)
    assert same(store, quiet(model, prompts, "resid_post", tmp_path / "whole", **SIZES))
    assert not [path.name for path in place.iterdir() if path.name.startswith(".")]


# What is refused


def test_what_cannot_be_stored_is_refused_in_a_sentence(tmp_path: Path, unchecked: None) -> None:
    model, prompts = tiny(), PROMPTS
    for sites, settings, message in (
        ("resid_post", {"loops": 3}, "loop 3 is out of range"),
        ("residual", {}, "site='residual' was asked; choose one of"),
        ("loops.0.hook_nothing", {}, "hook_nothing"),
        ("pattern", {}, "keeps rows of one width"),
        ("blocks.0.attn.hook_pattern", {}, "keeps rows of one width"),
        ([], {}, r"sites=\[\] was asked"),
        ("loops.*.hook_out", {"layers": 1}, "which says its own"),
        ("loops.0.hook_out", {"loops": 1}, "but it names other loops"),
        ("out", {"layers": 1}, "belongs to a pass"),
        ("resid_post", {"dtype": torch.int32}, "dtype=torch.int32 was asked"),
        ("resid_post", {"initial_state": torch.zeros(1, 2, 8)}, "belongs to one prompt"),
        ("resid_post", {"temperature": 1.0}, "which generate takes"),
        ("resid_post", {"on_error": "ignore"}, "on_error='ignore'"),
    ):
        with pytest.raises(LoopedError, match=message):
            quiet(model, prompts, sites, tmp_path / "out", **settings)
    for wrong, message in (
        ([], "no prompts"),
        (3, "was asked of a int"),
        ([{"input_ids": 1}], "is a dict"),
        ({"text": ["a"]}, "asked of a dict with 'text'"),
    ):
        with pytest.raises(LoopedError, match=message):
            quiet(model, wrong, "resid_post", tmp_path / "out")
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(LoopedError, match="cannot be made a directory"):
        quiet(model, prompts, "resid_post", tmp_path / "file")
