"""The explorer's session: every number is that of the library call it stands for, and no hook stays, whatever happens."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from zoo import FAMILIES, shared_bridge

from tl_looped import LoopedBridge, LoopedError, exits, interventions
from tl_looped.explorer import Session, unpacked
from tl_looped.explorer._progress import Progress
from tl_looped.lenses import logit_lens
from tl_looped.metrics import logit_diff
from tl_looped.patching import patch_sweep

PROMPT, OTHER = "A b B c C d D a ? A", "A c B d C b D a ? A"
STATE: dict[str, Any] = {"prompt": PROMPT, "other": OTHER}


@pytest.fixture(scope="module")
def toy() -> LoopedBridge:
    return LoopedBridge.from_pretrained("toy:hop", device="cpu")


@pytest.fixture
def session(toy: LoopedBridge) -> Session:
    return Session(toy)


def ask(session: Session, what: str, state: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The reply, through JSON and back; no hook is left on anything that ran."""
    message = {"ask": what, "state": STATE if state is None else state, **more}
    reply = json.loads(json.dumps(session.answer(json.loads(json.dumps(message))), allow_nan=False))
    left = [
        name for model in [session.model, *session._models.values()] for name, h in model.hook_dict.items() if h.has_hooks()
    ]
    assert left == []
    return reply


def close(message: dict[str, Any], expected: torch.Tensor) -> None:
    torch.testing.assert_close(unpacked(message), expected.float() if expected.is_floating_point() else expected.int())


@FAMILIES
def test_the_grid_is_the_lens(name: str) -> None:
    bridge = shared_bridge(name)
    session, tokens = Session(bridge), torch.tensor([[5, 17, 3, 9]])
    for lens in ("native", "logit"):
        found = logit_lens(bridge, tokens, lens=lens, top_k=10, targets=[7, 2])
        reply = ask(session, "grid", {"prompt": "5, 17 3,9", "lens": lens, "pins": [7, "2"]})
        grid = reply["grid"]
        close(grid["top"], found.top_tokens[:, 0])
        close(grid["top_log_probs"], found.top_log_probs[:, 0])
        close(grid["entropy"], found.entropy[:, 0])
        close(grid["kl"], found.kl[:, 0])
        close(grid["log_probs"], found.log_probs[:, 0])
        close(grid["ranks"], found.ranks[:, 0])
        assert [row["name"] for row in grid["rows"]] == list(found.labels) == [row["twin"] for row in grid["rows"]]
    grid = ask(session, "grid", {"tokens": [5, 17, 3, 9], "lens": "readout"})["grid"]
    log_probs = bridge.readout(tokens, loop="all")[:, 0].log_softmax(-1)
    top = log_probs.topk(10)
    close(grid["top_log_probs"], top.values)
    close(grid["entropy"], torch.distributions.Categorical(logits=log_probs).entropy())
    close(
        grid["kl"],
        torch.nn.functional.kl_div(log_probs, log_probs[-1:].expand_as(log_probs), reduction="none", log_target=True).sum(-1),
    )
    answer = log_probs[-1].argmax(-1)
    close(grid["log_probs"], log_probs.gather(-1, answer.expand(len(log_probs), -1)[..., None]))


@pytest.mark.parametrize("name", ["huginn", "hrm_text"])
def test_the_change_is_that_of_the_stream_at_the_same_layer(name: str) -> None:
    bridge = shared_bridge(name)
    _, cache = bridge.run_with_cache(torch.tensor([[5, 17, 3]]))
    change = unpacked(ask(Session(bridge), "grid", {"prompt": "5,17,3", "lens": "logit"})["grid"]["change"])
    for layer, site in enumerate(bridge.schedule.sites):
        if not site.loop:
            assert change[layer].isnan().all()
            continue
        now, before = (
            cache["resid_post", bridge.schedule.virtual(site._replace(loop=t))][0] for t in (site.loop, site.loop - 1)
        )
        torch.testing.assert_close(change[layer], (now - before).norm(dim=-1) / now.norm(dim=-1))


def test_more_loops_than_trained_are_marked(session: Session, toy: LoopedBridge) -> None:
    reply = ask(session, "grid", {**STATE, "loops": 8})
    assert [row["where"] for row in reply["grid"]["rows"] if row["beyond"]] == ["loop 6", "loop 6", "loop 7", "loop 7"]
    close(reply["grid"]["top_log_probs"], logit_lens(toy, PROMPT, lens="native", n_loops=8, top_k=10).top_log_probs[:, 0])


def test_what_long_prompts_say_is_read_in_parts(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ask(session, "grid")["grid"]
    monkeypatch.setattr("tl_looped.explorer._grids.LOGITS_AT_ONCE", 13 * 18 * 4)
    said: list[float] = []
    reply = Session(session.model).answer({"ask": "grid", "state": STATE}, lambda share, what: said.append(share))
    for key in ("top", "top_log_probs", "kl", "ranks", "change"):
        torch.testing.assert_close(unpacked(reply["grid"][key]), unpacked(whole[key]), equal_nan=True)
    assert said == sorted(said) and said[0] == 0 and len(said) == 3 * 13


EDITS: list[tuple[dict[str, Any], Any]] = [
    ({"kind": "ablate_head", "loops": "1:3", "layers": "0", "heads": "1,2"},
     lambda m: interventions.ablate(m, "head", loops=slice(1, 3), layers=0, heads=[1, 2])),
    ({"kind": "ablate_mlp", "stack": "prelude", "positions": "2:"},
     lambda m: interventions.ablate(m, "mlp", stack="prelude", positions=slice(2, None))),
    ({"kind": "ablate_layer", "loops": "last"}, lambda m: interventions.ablate(m, "layer", loops="last")),
    ({"kind": "skip_layer", "layers": "1"}, lambda m: interventions.skip_layer(m, layers=1)),
    ({"kind": "skip_loop", "loops": "2"}, lambda m: interventions.skip_loop(m, 2)),
    ({"kind": "freeze_attention", "from_loop": 1}, lambda m: interventions.freeze_attention(m, 1)),
    ({"kind": "drop_injection", "loops": "3:"}, lambda m: interventions.drop_injection(m, loops=slice(3, None))),
    ({"kind": "freeze_injection", "from_loop": 2}, lambda m: interventions.freeze_injection(m, 2)),
    ({"kind": "steer", "toward": "c", "away": "b", "scale": 0.5, "loops": "1,2", "positions": "-1"},
     lambda m: interventions.steer(
         m, m.W_U[:, m.to_single_token("c")] - m.W_U[:, m.to_single_token("b")], scale=0.5, loops=[1, 2], positions=-1,
         relative_to_rms=True)),
]  # fmt: skip


@pytest.mark.parametrize("edit, hooks", EDITS, ids=lambda e: e["kind"] if isinstance(e, dict) else "")
def test_an_edit_is_a_run_with_its_hooks(edit: dict[str, Any], hooks: Any, session: Session, toy: LoopedBridge) -> None:
    reply = ask(session, "grid", {**STATE, "edits": [edit, {"kind": "ablate_attn", "on": False}]})
    with toy.hooks(fwd_hooks=hooks(toy)):
        found = logit_lens(toy, PROMPT, lens="native", top_k=10)
        readouts = toy.readout(PROMPT, loop="all")
    close(reply["edited"]["top"], found.top_tokens[:, 0])
    close(reply["edited"]["top_log_probs"], found.top_log_probs[:, 0])
    close(reply["grid"]["top_log_probs"], logit_lens(toy, PROMPT, lens="native", top_k=10).top_log_probs[:, 0])
    reply = ask(session, "grid", {**STATE, "edits": [edit], "lens": "readout"})
    close(reply["edited"]["top_log_probs"], readouts[:, 0].log_softmax(-1).topk(10).values)
    if edit["kind"] != "freeze_injection":  # which changes nothing by itself
        assert unpacked(reply["edited"]["top_log_probs"]).sub(unpacked(reply["grid"]["top_log_probs"])).abs().max() > 1e-3


def test_a_repeated_loop_moves_what_follows_and_each_row_knows_its_twin(session: Session, toy: LoopedBridge) -> None:
    ablated = {"kind": "ablate_mlp", "loops": "3"}
    repeats = [{"kind": "repeat_loop", "loop": 1, "times": 2}, {"kind": "repeat_loop", "loop": 4}]
    edited = ask(session, "grid", {**STATE, "edits": [*repeats, ablated]})["edited"]
    by_hand = interventions.ablate(deeper := toy.unroll(9), "mlp", loops=5)
    with deeper.hooks(fwd_hooks=by_hand):
        close(edited["top_log_probs"], logit_lens(deeper, PROMPT, lens="native", top_k=10).top_log_probs[:, 0])
    layers = [row for row in edited["rows"] if row["layer"] == 1]
    wheres = ["loop 0", "loop 1", "loop 1 again", "loop 1 again (2)", "loop 2", "loop 3", "loop 4", "loop 4 again", "loop 5"]
    assert [row["where"] for row in layers] == wheres
    assert [row["twin"] for row in layers] == [f"loops.{t}.blocks.1" for t in (0, 1, 1, 1, 2, 3, 4, 4, 5)]


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "z", "state"])
def test_a_sweep_is_the_librarys_and_a_patched_cell_one_of_it(site: str, session: Session, toy: LoopedBridge) -> None:
    metric = logit_diff(*(int(toy(text)[0, -1].argmax()) for text in (OTHER, PROMPT)))
    _, cache = toy.run_with_cache(OTHER)
    more: dict[str, Any] = {"axes": ("loop", "pos")} if site == "state" else {"axes": ("virtual_layer", "pos")}
    more |= {"heads": 2} if site == "z" else {}
    expected = patch_sweep(toy, PROMPT, cache, metric, site=site, verbose=False, **more)
    reply = ask(session, "sweep", site=site, head=2)
    close(reply["values"], expected.normalised().values)
    torch.testing.assert_close(reply["first"], float(expected.baseline_corrupted))
    torch.testing.assert_close(reply["second"], float(expected.baseline_clean))
    row = 4 if site == "state" else 9
    pos = int(expected.values[row].sub(expected.baseline_corrupted).abs().argmax())
    patch = {"site": site, "head": 2, "cells": [[reply["rows"][row], pos]]}
    edited = ask(session, "grid", {**STATE, "patch": patch, "pins": list(metric.answers)})["edited"]
    right, wrong = unpacked(edited["log_probs"])[-1, -1]
    torch.testing.assert_close(right - wrong, expected.values[row, pos], atol=1e-3, rtol=1e-4)


def test_a_sweep_of_two_stacks_has_the_passes_of_both() -> None:
    bridge = shared_bridge("hrm_text")
    session, prompts = Session(bridge), {"prompt": "5,17,3", "other": "5,4,3"}
    reply = ask(session, "sweep", prompts, site="state", answer=3, wrong="4")
    assert reply["rows"] == [*(f"L.loops.{t}" for t in range(4)), "H.loops.0", "H.loops.1"]
    tokens, others = torch.tensor([[5, 17, 3]]), torch.tensor([[5, 4, 3]])
    _, cache = bridge.run_with_cache(others)
    expected = patch_sweep(bridge, tokens, cache, logit_diff(3, 4), site="state", stack="H", verbose=False)
    torch.testing.assert_close(unpacked(reply["values"])[4:], expected.normalised().values)


def test_attention_is_that_of_the_run(session: Session, toy: LoopedBridge) -> None:
    _, cache = toy.run_with_cache(PROMPT)
    reply = ask(session, "attention", {**STATE, "at": 9}, layer=1, head=3)
    close(reply["patterns"], cache.stack_loops("pattern", layer=1)[:, 0, 3])
    close(reply["looks_at"], cache.stack_loops("pattern", layer=1)[:, 0, 3, 9])
    frozen = {**STATE, "edits": [{"kind": "freeze_attention", "from_loop": 0}]}
    patterns = unpacked(ask(session, "attention", frozen, layer=1, head=3)["patterns"])
    assert bool((patterns == patterns[0]).all()) and torch.equal(patterns[0], cache["loops.0.blocks.1.attn.hook_pattern"][0, 3])
    reply = ask(session, "attention", {**STATE}, stack="prelude", layer=0, head=1)
    close(reply["patterns"], cache["prelude.blocks.0.attn.hook_pattern"][:, 1])


def test_generation_says_the_loops_that_were_spent(session: Session, toy: LoopedBridge) -> None:
    model = toy.unroll(6)
    model.exit_policy = exits.StateChange(0.3)
    text = model.generate(PROMPT, 3, do_sample=False, verbose=False, return_type="tokens")
    reply = ask(session, "generate", n=3, policy="change", threshold=0.3)
    assert reply["tokens"] == text[0, 11:].tolist()
    assert reply["loops"] == model.generation_report.loops_per_token[0].tolist()
    edits = {**STATE, "edits": [{"kind": "skip_loop", "loops": "1:"}]}
    with model.hooks(fwd_hooks=interventions.skip_loop(model, slice(1, None))):
        model.exit_policy = None
        text = model.generate(PROMPT, 3, do_sample=False, verbose=False, return_type="tokens")
    assert ask(session, "generate", edits, n=3)["tokens"] == text[0, 11:].tolist()
    assert ask(session, "generate", edits, n=3, unedited=True)["tokens"] != text[0, 11:].tolist()
    assert session.model.exit_policy is None


SCREENS: list[dict[str, Any]] = [
    {},
    {"lens": "readout", "loops": 9},
    {"lens": "logit", "pins": ["c"], "edits": [edit for edit, _ in EDITS[:3]]},
    {"edits": [edit for edit, _ in EDITS[3:]], "patch": {"site": "state", "cells": [["loops.1", 10], ["loops.2", 10]]}},
    {"lens": "readout", "edits": [{"kind": "repeat_loop", "loop": 2}],
     "patch": {"site": "z", "head": 3, "cells": [["loops.2.blocks.1", 10]]}},
]  # fmt: skip


@pytest.mark.parametrize("screen", SCREENS)
def test_the_script_gives_the_numbers_of_the_screen(screen: dict[str, Any], session: Session) -> None:
    reply = ask(session, "grid", STATE | screen)
    with torch.no_grad():  # which the script switches off for good
        found: dict[str, Any] = {}
        exec(ask(session, "script", STATE | screen)["script"], found)
    grid, found = reply["edited"] or reply["grid"], found["found"]
    if screen.get("lens") == "readout":
        close(grid["top_log_probs"], found[:, 0].log_softmax(-1).topk(10).values)
    else:
        close(grid["top_log_probs"], found.top_log_probs[:, 0])
        close(grid["log_probs"], found.log_probs[:, 0])


@pytest.mark.parametrize(
    "message, why",
    [
        (None, "a message is an object"),
        ({}, "ask=None"),
        ({"ask": "delete"}, "ask='delete'"),
        ({"ask": "grid"}, "the state of the screen is an object"),
        ({"ask": "grid", "state": {}}, "The prompt is empty"),
        ({"ask": "grid", "state": {"prompt": " \n"}}, "The prompt is empty"),
        ({"ask": "sweep", "state": {"prompt": "A b B c ? A"}}, "The second prompt is empty"),
        ({"ask": "grid", "state": {"prompt": 5}}, "prompt must be a str"),
        ({"ask": "grid", "state": {"prompt": "A \ud800"}}, "half of a character"),
        ({"ask": "grid", "state": {"prompt": "A zebra"}}, "zebra"),
        ({"ask": "grid", "state": {"prompt": "A " * 40}}, "41 tokens, and the context of this model is 32"),
        ({"ask": "grid", "state": {"tokens": [1, 99]}}, "tokens=99"),
        ({"ask": "grid", "state": {"tokens": "many"}}, "a list of at most"),
        ({"ask": "grid", "state": {**STATE, "loops": 0}}, "loops=0"),
        ({"ask": "grid", "state": {**STATE, "loops": 1e9}}, "loops=1000000000.0"),
        ({"ask": "grid", "state": {**STATE, "lens": "magic"}}, "lens='magic'"),
        ({"ask": "grid", "state": {**STATE, "pins": ["a b"]}}, "2 tokens"),
        ({"ask": "grid", "state": {**STATE, "edits": ["x"]}}, "its entries are objects"),
        ({"ask": "grid", "state": {**STATE, "edits": [{"kind": "explode"}]}}, "kind='explode'"),
        ({"ask": "grid", "state": {**STATE, "edits": [{"kind": "skip_loop", "loops": "9"}]}}, "6 loops"),
        ({"ask": "grid", "state": {**STATE, "edits": [{"kind": "skip_loop", "loops": "x"}]}}, "write all, last, 2, 1,3 or 2:4"),
        ({"ask": "grid", "state": {**STATE, "edits": [{"kind": "ablate_head", "heads": "7"}]}}, "heads 7 is out of range"),
        ({"ask": "grid", "state": {**STATE, "edits": [{"kind": "ablate_mlp", "positions": "20"}]}}, r"has 11 \(0..10\)"),
        ({"ask": "grid", "state": {**STATE, "edits": [{"kind": "steer", "toward": "a", "away": "a"}]}}, "no direction"),
        ({"ask": "grid", "state": {**STATE, "edits": [{"kind": "repeat_loop"}] * 2}}, "repeated by two"),
        ({"ask": "grid", "state": {**STATE, "patch": {"cells": [["loops.9.blocks.0", 1]]}}}, "loops.9.blocks.0"),
        ({"ask": "grid", "state": {**STATE, "patch": {"cells": [["loops.1.blocks.0"]]}}}, "no name and position"),
        ({"ask": "grid", "state": {**STATE, "patch": {"cells": [["loops.1.blocks.0", 50]]}}}, "positions 50 is out of range"),
        ({"ask": "sweep", "state": {**STATE, "other": "A b ? A"}}, r"has 5 tokens and the first 11: .*position 3"),
        ({"ask": "sweep", "state": {**STATE, "other": PROMPT}}, "the same answer"),
        ({"ask": "sweep", "state": {**STATE, "edits": [EDITS[0][0]]}}, "switch them off first"),
        ({"ask": "attention", "state": STATE, "layer": 5}, "layers 5 is out of range"),
        ({"ask": "attention", "state": STATE, "stack": "H"}, "stack='H'"),
        ({"ask": "generate", "state": STATE, "n": 30}, "the context of this model, which is 32"),
        ({"ask": "generate", "state": STATE, "policy": "gate"}, "does not have"),
        ({"ask": "token", "tokens": ["zebra"]}, "zebra"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(message: Any, why: str, session: Session) -> None:
    before = ask(session, "grid", {**STATE, "lens": "readout"})["grid"]
    reply = session.answer(message)
    assert list(reply) == ["error"]
    with pytest.raises(LoopedError, match=why):
        raise LoopedError(reply["error"])
    assert ask(session, "grid", {**STATE, "lens": "readout"})["grid"] == before


@pytest.mark.parametrize("ask_for", ["grid", "sweep", "attention", "generate"])
def test_what_is_cancelled_leaves_nothing(ask_for: str, session: Session) -> None:
    asked: list[None] = []

    def after_a_while() -> bool:
        asked.append(None)
        return len(asked) > 3

    edits = {} if ask_for == "sweep" else {"edits": [EDITS[0][0]]}
    assert session.answer({"ask": ask_for, "state": STATE | edits}, cancelled=after_a_while) == {"cancelled": True}
    assert len(asked) == 4
    assert "error" not in ask(session, "grid")


def test_a_second_question_waits_its_turn_and_is_told_so(session: Session) -> None:
    started, go_on, said = threading.Event(), threading.Event(), []
    replies: list[dict[str, Any]] = []

    def slow(share: float, what: str) -> None:
        started.set()
        assert go_on.wait(20)

    def told(share: float, what: str) -> None:
        said.append(what)
        go_on.set()

    first = threading.Thread(target=lambda: replies.append(session.answer({"ask": "grid", "state": STATE}, slow)))
    first.start()
    assert started.wait(20)
    assert "grid" in session.answer({"ask": "grid", "state": STATE}, told)
    first.join(20)
    assert said[0] == "waiting for another tab" and "grid" in replies[0]


def test_what_a_model_lacks_is_not_offered_and_the_reason_is_said(session: Session) -> None:
    found = Session(shared_bridge("ouro")).answer({"ask": "describe"})
    why = {edit["kind"]: edit["why"] for edit in found["edits"]}
    assert why["drop_injection"].startswith("In this ouro model nothing is injected in the passes") and why["ablate_head"] == ""
    assert [p["why"] for p in found["policies"]] == [""] * 5 and not found["has_tokenizer"]
    found = ask(session, "describe")
    assert {p["policy"]: p["why"] for p in found["policies"]}["gate"].startswith("This toy model has no exit gate; use")
    assert found["made_for"] == 6 and found["stacks"] == {"prelude": 1, "core": 2} and found["n_heads"] == 4
    hrm = {edit["kind"]: edit for edit in Session(shared_bridge("hrm_text")).answer({"ask": "describe"})["edits"]}
    assert hrm["skip_loop"]["stacks"] == ["L", "H"] and "stack" in hrm["skip_loop"]["fields"]


@pytest.mark.slow
@FAMILIES
def test_every_family_opens_with_its_own_first_prompt(name: str) -> None:
    session = Session(shared_bridge(name))
    first, second = ask(session, "describe")["prompts"]
    reply = ask(
        session, "grid", {"prompt": first, "other": second, "loops": 2, "edits": [{"kind": "ablate_layer", "loops": "0"}]}
    )
    assert len(reply["edited"]["rows"]) == session._models[2].schedule.n_layers
    assert "values" in ask(session, "sweep", {"prompt": first, "other": second, "loops": 2}, site="attn_out", answer=1, wrong=2)


def test_hooks_of_the_model_do_not_act_and_stay(toy: LoopedBridge) -> None:
    plain = ask(Session(toy), "grid")["grid"]
    with toy.hooks(fwd_hooks=[("loops.1.hook_state", lambda x, hook: 0 * x)]):
        session = Session(toy)
        assert "loops.1.hook_state" in session.answer({"ask": "describe"})["note"]
        assert session.answer({"ask": "grid", "state": STATE})["grid"] == plain
        assert toy.hook_dict["loops.1.hook_state"].has_hooks()


def test_parts_of_progress() -> None:
    said: list[float] = []
    half = Progress(lambda share, what: said.append(share)).part(0.5, 1.0).part(0.0, 0.5)
    half(0, "")
    half(1, "")
    assert said == [0.5, 0.75]
