"""The bundled toys: what they know is measured again, on mappings drawn here."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import stages_on_text
import torch
import train_toys as training
from transformer_lens.hook_points import HookPoint

from tl_looped import LoopedBridge, toys
from tl_looped.analysis import inference_stages, output_neurons
from tl_looped.analysis.stage_order import as_one_pass, repetition, resemblance, spread
from tl_looped.bridge.cache import LoopedCache
from tl_looped.errors import CheckpointError, LoopedError
from tl_looped.toys import TOYS, _script, hop_accuracy, hop_prompts
from tl_looped.toys.hop import WORDS, HopPrompts
from tl_looped.toys.text import WINDOW, corpus, encode, held_out_windows, loss_by_loop, untrained, windows

CHECKPOINTS = Path(toys.__file__).parent / "checkpoints"


@pytest.fixture(scope="module")
def held_out() -> str:
    return corpus(held_out=True)


@pytest.fixture(scope="module")
def hop() -> LoopedBridge:
    return LoopedBridge.from_pretrained("toy:hop")


def chase(text: str, n_hops: int) -> list[list[str]]:
    """The answers to a prompt, [hop][query], by reading it."""
    pairs, queries = (part.split() for part in text.split("?"))
    value = dict(zip(pairs[::2], pairs[1::2], strict=True))
    answers = []
    for _ in range(n_hops):
        queries = [value[query.upper()] for query in queries]
        answers.append(queries)
    return answers


@pytest.mark.parametrize("name", TOYS)
def test_every_toy_is_small_and_loads_by_name(name: str) -> None:
    assert sum(file.stat().st_size for file in (CHECKPOINTS / name).iterdir()) <= 1_500_000
    model = LoopedBridge.from_pretrained(f"toy:{name}")
    assert model.looped_cfg == training.CONFIGS[name] and model.cfg.dtype == torch.float32
    assert len(model.tokenizer) == model.cfg.d_vocab  # TransformerLens added no special token that has no embedding
    assert model.to_tokens("A b")[0, 0] == model.tokenizer.bos_token_id == 0


def test_toys_are_the_directories() -> None:
    assert set(TOYS) == {path.name for path in CHECKPOINTS.iterdir()} == set(training.CONFIGS)


@pytest.mark.parametrize("name", ["toy:hopp", "toy:", "toy:..", "toy:hop/model.safetensors"])
def test_an_unknown_toy_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(CheckpointError, match="toy:hop, toy:hop-noinject, toy:text, toy:text-feedforward"):
        LoopedBridge.from_pretrained(name)


def test_a_toy_has_no_revision() -> None:
    with pytest.raises(CheckpointError, match="revisions belong to Hub ids"):
        LoopedBridge.from_pretrained("toy:hop", revision="main")


@pytest.mark.parametrize("kind", ["cycle", "function"])
@pytest.mark.parametrize("n_symbols", [2, 5, 8])
def test_prompts_and_answers_mean_what_they_say(hop: LoopedBridge, kind: str, n_symbols: int) -> None:
    prompts = hop_prompts(3, n_symbols, kind=kind, seed=5)
    assert torch.equal(hop.to_tokens(prompts.texts), prompts.tokens)
    answers = prompts.answers(n_hops=10)
    for row, text in enumerate(prompts.texts):
        assert [[WORDS[token] for token in hop_] for hop_ in answers[:, row].tolist()] == chase(text, 10)
    if kind == "cycle":
        assert all(len(set(column)) == n_symbols for column in answers[:n_symbols].flatten(1).T.tolist())


def test_prompts_follow_their_seed() -> None:
    assert hop_prompts(4, seed=1).texts == hop_prompts(4, seed=1).texts != hop_prompts(4, seed=2).texts
    assert len(set(hop_prompts(200, seed=3).texts)) == 200


@pytest.mark.parametrize(("name", "kind", "n_symbols"), [
    ("hop", "cycle", 8), ("hop", "function", 8), ("hop", "cycle", 4), ("hop-noinject", "cycle", 8),
])  # fmt: skip
def test_six_hops_on_fresh_mappings(name: str, kind: str, n_symbols: int) -> None:
    model = LoopedBridge.from_pretrained(f"toy:{name}")
    accuracy = hop_accuracy(model, hop_prompts(512, n_symbols, kind=kind, seed=20_261_124))
    assert accuracy.shape == (6,) and accuracy.min() >= 0.995


@pytest.mark.parametrize(("name", "best"), [("text", 3), ("text-feedforward", 0)])
def test_text_that_was_held_out(held_out: str, name: str, best: int) -> None:
    model = LoopedBridge.from_pretrained(f"toy:{name}")
    tokens = encode(model.tokenizer, held_out)
    losses = loss_by_loop(model, windows(tokens, torch.arange(1, len(tokens) - WINDOW, WINDOW))).mean(1)
    assert losses.argmin() == best and losses[best] < 3.75  # a uniform guess has ln 1024 = 6.93
    text = "Return the naïve 中 result.\n"
    assert model.tokenizer.decode(model.to_tokens(text)[0], skip_special_tokens=True) == text  # any text can be encoded


def answers_by_loop(model: LoopedBridge, prompts: HopPrompts, hooks: Sequence[tuple[str, Any]] = ()) -> torch.Tensor:
    """What the model answers after every loop, [loop, batch, query]."""
    found: list[torch.Tensor] = []
    model.run_with_hooks(
        prompts.tokens, fwd_hooks=hooks, on_loop=lambda _, logits: found.append(logits[:, prompts.query_pos].argmax(-1))
    )
    return torch.stack(found)


def transplant(cache: LoopedCache, positions: slice) -> Callable[[torch.Tensor, HookPoint], torch.Tensor]:
    """A hook that takes some positions from another run."""

    def hook_fn(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        value[:, positions] = cache[hook.name][:, positions]
        return value

    return hook_fn


def lookups(prompts: HopPrompts, answers: torch.Tensor) -> torch.Tensor:
    """Fraction of answers [loop, batch, query] that the mapping of the prompts gives for the answer one loop earlier."""
    value = torch.empty(len(prompts.keys), len(WORDS), dtype=torch.long)
    first_value = WORDS.index("a")
    value.scatter_(1, prompts.keys + first_value, prompts.values + first_value)
    expected = torch.stack([value.gather(1, before) for before in answers[:-1]])
    return (expected == answers[1:]).float().mean((1, 2))


@pytest.mark.parametrize("loop", range(5))
def test_the_state_at_a_query_is_the_symbol_reached(hop: LoopedBridge, loop: int) -> None:
    """With the states that the queries have in a run of another mapping, the answer becomes that run's, and the next ones are
    hops from there in the prompt's own mapping."""
    here, other = hop_prompts(64, seed=11), hop_prompts(64, seed=12)
    name = f"loops.{loop}.hook_out"
    _, cache = hop.run_with_cache(other.tokens, names_filter=name)
    found = answers_by_loop(hop, here, [(name, transplant(cache, here.query_pos))])
    assert torch.equal(found[:loop], answers_by_loop(hop, here)[:loop])
    assert (found[loop] == other.answers(loop + 1)[loop]).float().mean() > 0.99
    assert lookups(here, found[loop:]).min() > 0.99 > 0.3 > lookups(other, found[loop:]).max()


def test_the_mapping_is_held_by_the_state_at_the_pairs_and_restored_by_the_injection(hop: LoopedBridge) -> None:
    here, other = hop_prompts(64, seed=11), hop_prompts(64, seed=12)
    pairs, state, injections = slice(0, here.query_pos.start), "loops.0.hook_out", "loops.1:.hook_injection"
    _, cache = hop.run_with_cache(other.tokens, names_filter=[state, injections])
    found = answers_by_loop(hop, here, [(state, transplant(cache, pairs))])
    own = lookups(here, found)
    assert own[0] < 0.6 and own[-1] > 0.9 and (own.diff() > 0).all()  # the two contradict each other, then one prevails
    found = answers_by_loop(hop, here, [(name, transplant(cache, pairs)) for name in (state, injections)])
    assert torch.equal(found[:1], answers_by_loop(hop, here)[:1]) and lookups(other, found).min() > 0.99


def test_without_injection_the_state_carries_the_mapping_too() -> None:
    model = LoopedBridge.from_pretrained("toy:hop-noinject")
    here, other = hop_prompts(64, seed=11), hop_prompts(64, seed=12)
    _, cache = model.run_with_cache(other.tokens, names_filter="loops.2.hook_out")
    found = answers_by_loop(model, here, [("loops.2.hook_out", lambda state, hook: cache["loops.2.hook_out"])])
    assert torch.equal(found[2:], answers_by_loop(model, other)[2:])


def test_injection_keeps_the_chase_stable_beyond_the_trained_loops(hop: LoopedBridge) -> None:
    prompts = hop_prompts(256, seed=21)
    bare = LoopedBridge.from_pretrained("toy:hop-noinject")
    assert hop_accuracy(hop.unroll(16), prompts)[6:].min() > 0.99
    assert hop_accuracy(bare.unroll(16), prompts)[-1] < 0.5


def test_a_short_training_learns_that_an_answer_is_a_value(unchecked: None, capsys: pytest.CaptureFixture[str]) -> None:
    training.train_hop(training.CONFIGS["hop"].replace(n_loops=1), n_steps=60)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] > 2.8 and losses[-1] < 2.3  # a guess among all 18 words has ln 18 = 2.89, among the 8 values ln 8 = 2.08


@pytest.mark.slow
def test_the_full_training_learns_six_hops(unchecked: None, tmp_path: Path) -> None:
    """From another seed than the bundled one's."""
    model = training.save(training.train_hop(training.CONFIGS["hop"], seed=1), tmp_path)
    assert hop_accuracy(model, hop_prompts(512, seed=41)).min() >= 0.995


@pytest.mark.slow
def test_the_command_trains_saves_and_measures(unchecked: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With two seeds, of which the table shows the mean and its standard error."""
    assert training.main(["hop-noinject", "--steps", "1", "--seeds", "2", "--out", str(tmp_path / "toy")]) == 0
    table = capsys.readouterr().out.splitlines()[-16:]
    accuracies = torch.stack([training.measure(LoopedBridge.from_pretrained(tmp_path / d), 16) for d in ("toy", "toy-seed1")])
    assert [float(line.split()[1]) for line in table] == pytest.approx(accuracies.mean(0).tolist(), abs=0.01)
    error = (accuracies[0] - accuracies[1]).abs() / 2  # the standard error of a mean of two
    assert [float(line.split()[2]) for line in table] == pytest.approx(error.tolist(), abs=0.01)


def test_a_short_training_learns_how_frequent_words_are(
    unchecked: None, held_out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "corpus", lambda: held_out)
    cfg = training.CONFIGS["text"].replace(d_vocab=512, n_core=1)
    training.train_text(cfg, n_steps=40)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] > 6 and losses[-1] < 5.8  # a uniform guess has ln 512 = 6.24


def test_stages_on_text_are_as_the_page_says(unchecked: None) -> None:
    """The central figures of docs/stages_on_text.md, on every eighth window."""
    text, plain = (LoopedBridge.from_pretrained(name) for name in ("toy:text", "toy:text-feedforward"))
    tokens = held_out_windows(text, 8)
    looped, reference, start = (inference_stages(model, tokens, verbose=False) for model in (text, plain, untrained(text, 0)))
    colsum, mixing, entropy, norm = range(4)
    again, again_start = repetition(looped), repetition(start)
    assert again[0, 1:, :2].min() > 0.75 and again[0].amax(-1).amin() > -0.1  # attention repeats in passes 2 and 3
    assert (again[0, 1:, :, 0] >= again[1:, 1:, :, 0].max(0).values - 1e-3).all()  # in this order best
    assert again[5, 1:, :2, 0].min() > 0.95  # but hardly: with first and last layer exchanged three points look the same
    assert again[0, 0, colsum].abs().max() < 0.1  # but not in pass 1
    assert again[0, 1:, 2:, 0].min() > 0.95 and again[0, :, 2:, 1].max() < 0.2  # entropy and norm: in form, not in level
    assert again_start[0, 1:, [colsum, entropy, norm], 0].min() > 0.95  # a loop repeats itself before it is trained, too
    assert (spread(looped) / spread(start))[[colsum, mixing]].min() > 10  # but without layers that differ
    like = resemblance(looped, reference)[:, 1:, :, 0]  # [order, loop, metric]
    assert like[0, :, colsum].min() > 0.5 > 0.4 > like[1:, :, colsum].mean()
    assert like[0, :, mixing].mean() < like[1:, :, mixing].max(0).values.mean()  # not in this order in particular
    one = as_one_pass(looped).compare(reference)
    assert one.values[0, one.labels["metric"].index("colsum"), 0] < 0
    assert all(output_neurons(model).values.max() == 0 for model in (text, plain))


def test_the_tables_of_stages(unchecked: None, capsys: pytest.CaptureFixture[str]) -> None:
    """With two feed-forward models, over which there is a standard error."""
    assert stages_on_text.main(["--feedforward", "toy:text-feedforward", "toy:text", "--every", "60"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    titles, bodies = tables[1::2], tables[2::2]
    assert tables[0] == "3 windows; 1 looped models, 2 feed-forward" and len(bodies) == 8
    assert titles[0] == "Loss, nats per token" and "±" not in bodies[0].splitlines()[2] and "±" in bodies[0].splitlines()[-1]
    assert all(len({line.count("|") for line in body.splitlines()}) == 1 for body in bodies)


@pytest.mark.parametrize(("module", "script"), [("train", "train_toys.py"), ("stages", "stages_on_text.py")])
def test_a_script_runs_under_its_former_name_in_a_checkout(
    module: str, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    sys.modules.pop(f"tl_looped.toys.{module}", None)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"tl_looped.toys.{module}", run_name="__main__")
    assert f"usage: python experiments/{script}" in capsys.readouterr().out
    monkeypatch.setattr(_script, "_EXPERIMENTS", Path("elsewhere"))
    with pytest.raises(SystemExit, match=rf"experiments/{script} is not installed"):
        runpy.run_module(f"tl_looped.toys.{module}", run_name="__main__")


@pytest.mark.parametrize(("asked", "message"), [
    ({"n_symbols": 9}, "the toys know 8, A to H"), ({"n_symbols": 1}, "n_symbols=1"), ({"batch": 0}, "batch=0"),
    ({"kind": "bijection"}, "'cycle', 'function'"),
])  # fmt: skip
def test_prompts_that_cannot_be(asked: dict, message: str, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=message):
        hop_prompts(**asked)


@pytest.mark.parametrize("prompt", ["A z ? A", "A b?", ["A b", "Ab"]])
def test_words_that_the_toy_does_not_have_are_refused(hop: LoopedBridge, prompt: str) -> None:
    with pytest.raises(LoopedError, match="no token for a part of"):
        hop.to_tokens(prompt)
