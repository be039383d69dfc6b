"""The loop sweep against separate unrolls, and the effect of the injection against runs edited one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import word_tokenizer
from zoo import ZOO, random_bridge, random_tokens

from tl_looped import LoopedError
from tl_looped.analysis import injection_effect, more_loops

MEASURES = ["loss", "accuracy", "margin", "kl", "overthinking", "loss_change", "agreement"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "with_answers"), [*((name, False) for name in ZOO), ("hrm_text", True), ("huginn", True)])
def test_every_count_is_what_the_model_with_so_many_loops_answers(name: str, with_answers: bool) -> None:
    bridge, tokens = random_bridge(name, torch.float64, n_loops=2), random_tokens(3, 5)
    answers = [4, 30, 7] if with_answers else None
    trained, n_loops = bridge.n_loops, bridge.n_loops + 2
    found = more_loops(bridge, tokens, n_loops=n_loops, answers=answers, verbose=False)
    with torch.no_grad():
        deep = bridge.unroll(n_loops)
        logits = [*(bridge.readout(tokens, t) for t in range(trained)), deep.readout(tokens, trained), deep(tokens)]
    logits = [x[:, -1:] if with_answers else x[:, :-1] for x in logits]
    targets = torch.tensor(answers)[:, None] if answers else tokens[:, 1:]
    at_trained = logits[trained - 1].softmax(-1)
    best = [x.argmax(-1) for x in logits]
    losses = []
    for t, x in enumerate(logits):
        loss = F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(1)
        losses.append(loss)
        assert found.loss.values[t].item() == pytest.approx(loss.mean().item(), abs=1e-9)
        assert found.loss.stderr[t].item() == pytest.approx(loss.std().item() / 3**0.5, abs=1e-9)
        assert found.accuracy.values[t].item() == pytest.approx((best[t] == targets).double().mean().item())
        margins = [
            x[b, p, y].item() - max(v for k, v in enumerate(x[b, p].tolist()) if k != y)
            for b in range(3)
            for p, y in enumerate(targets[b].tolist())
        ]
        assert found.margin.values[t].item() == pytest.approx(sum(margins) / len(margins), abs=1e-9)
        kl = F.kl_div(x.log_softmax(-1), at_trained, reduction="none").sum(-1)
        assert found.kl.values[t].item() == pytest.approx(kl.mean().item(), abs=1e-9)
        lost = (best[t] != targets) & torch.stack([best[s] == targets for s in range(t + 1)]).any(0)
        assert found.overthinking.values[t].item() == pytest.approx(lost.double().mean().item())
        for s in range(n_loops):
            agree = (best[t] == best[s]).double().mean().item()
            assert found.agreement.values[t, s].item() == pytest.approx(agree)
    change = torch.stack(losses) - losses[trained - 1]
    assert torch.allclose(found.loss_change.values, change.mean(1)) and found.loss_change.count == 3
    assert torch.allclose(found.loss_change.stderr, change.std(1) / 3**0.5)
    assert found.loss.labels["n_loops"] == list(range(1, n_loops + 1))
    assert found.kl.values[trained - 1].item() == pytest.approx(0, abs=1e-12)


def test_split_work_answers_in_order_and_text_answers() -> None:
    bridge = random_bridge("huginn", n_loops=2)
    bridge.tokenizer = word_tokenizer()
    prompts, answers = [random_tokens(2, 5), random_tokens(1, 4, seed=1)], [3, 5, 9]
    whole = more_loops(bridge, iter(prompts), answers=torch.tensor(answers), verbose=False)
    parts = [more_loops(bridge, p, answers=a, verbose=False) for p, a in zip(prompts, [answers[:2], answers[2:]], strict=True)]
    merged = parts[0] + parts[1]
    for measure in MEASURES:
        a, b = getattr(whole, measure), getattr(merged, measure)
        assert torch.allclose(a.values, b.values) and torch.allclose(a.stderr, b.stderr) and a.count == b.count == 3
    assert list(whole.to_dataframe()["n_loops"]) == [1, 2, 3, 4]
    assert len(whole.plot().data) == 5
    word = next(w for w in bridge.tokenizer.get_vocab() if bridge.to_tokens(w, prepend_bos=False).numel() == 1)
    text = more_loops(bridge, prompts[1], answers=[word], verbose=False)
    ids = more_loops(bridge, prompts[1], answers=bridge.to_tokens(word, prepend_bos=False)[0], verbose=False)
    assert torch.equal(text.loss.values, ids.loss.values)


def test_overthinks_when_later_loops_lose_the_answer() -> None:
    bridge = random_bridge("ouro", torch.float64)
    tokens = random_tokens(6, 4)
    with torch.no_grad():
        right = bridge(tokens)[:, -1].argmax(-1)  # the answers after three loops are right by construction
        late = bridge.unroll(6)(tokens)[:, -1].argmax(-1)
    found = more_loops(bridge, tokens, answers=right, verbose=False)
    assert found.accuracy.values[2] == 1 and found.overthinks
    lost = (right != late).double().mean().item()
    assert lost > 0 and found.overthinking.values[-1].item() == pytest.approx(lost)
    assert not more_loops(bridge, tokens, answers=late, verbose=False).overthinks
    with pytest.raises(LoopedError, match="several examples"):
        _ = more_loops(bridge, tokens[:1], verbose=False).overthinks


def test_refusals() -> None:
    bridge, tokens = random_bridge("ouro"), random_tokens()
    for match, options in {
        "around the trained number of 3": {"n_loops": 2},
        "at least 2": {"n_loops": 1, "trained": 1},
        "1 answers were given": {"answers": [3]},
        "3 answers were given": {"answers": [3, 4, 5]},
        "answer 31 was given": {"answers": [3, 31]},
    }.items():
        with pytest.raises(LoopedError, match=match):
            more_loops(bridge, tokens, verbose=False, **options)
    with pytest.raises(LoopedError, match="no prompts"):
        more_loops(bridge, [], verbose=False)
    with pytest.raises(LoopedError, match="no next token"):
        more_loops(bridge, tokens[:, :1], verbose=False)
    deeper = bridge.unroll(6)
    deeper.add_hook("loops.4.hook_out", lambda x, hook: x * torch.nan)
    with pytest.raises(LoopedError, match="the readout after loop 4 holds NaN"):
        more_loops(deeper, tokens, n_loops=6, trained=3, verbose=False)


@pytest.mark.parametrize(("name", "kind"), [("huginn", "tokens"), ("retrofit_olmo", "zero"), ("parcae", "mean")])
def test_injection_effect_is_an_edited_run(name: str, kind: str) -> None:
    bridge, tokens, other = random_bridge(name, torch.float64, n_loops=4), random_tokens(2, 5), random_tokens(1, 5, seed=3)
    found = injection_effect(bridge, tokens, from_loop=-2, replacement=other if kind == "tokens" else kind, verbose=False)
    assert found.from_loop == 2
    with torch.no_grad():
        _, donor = bridge.run_with_cache(other.expand_as(tokens))

        def edit(x: torch.Tensor, hook: object) -> torch.Tensor:
            means = {"zero": 0 * x, "mean": x.mean(1, keepdim=True).expand_as(x), "tokens": donor["loops.0.hook_injection"]}
            return means[kind]

        _, clean = bridge.run_with_cache(tokens)
        with bridge.hooks([("loops.2:.hook_injection", edit)]):
            _, edited = bridge.run_with_cache(tokens)
            after = [bridge.readout(tokens, t) for t in range(4)]
        for t in range(4):
            a, b = clean[f"loops.{t}.hook_out"], edited[f"loops.{t}.hook_out"]
            change = ((b - a).norm(dim=-1) / a.norm(dim=-1)).mean().item()
            assert found.state_change.values[t].item() == pytest.approx(change, abs=1e-6)
            kl = F.kl_div(after[t].log_softmax(-1), bridge.readout(tokens, t).softmax(-1), reduction="none").sum(-1)
            assert found.kl.values[t].item() == pytest.approx(kl.mean().item(), abs=1e-6)
    assert not found.state_change.values[:2].any() and found.state_change.values[2] > 0


def test_injection_of_two_stacks_and_refusals() -> None:
    hrm, tokens = random_bridge("hrm_text"), random_tokens()
    found = injection_effect(hrm, tokens, from_loop=2, stack="L", verbose=False)  # the third L pass opens the second loop
    assert found.state_change.values[0] == 0 and found.state_change.values[1] > 0
    with pytest.raises(LoopedError, match="pass stack="):
        injection_effect(hrm, tokens, from_loop=0, verbose=False)
    with pytest.raises(LoopedError, match="nothing is injected"):
        injection_effect(random_bridge("ouro"), tokens, from_loop=0, verbose=False)
    huginn = random_bridge("huginn")
    with pytest.raises(LoopedError, match="same length"):
        injection_effect(huginn, tokens, from_loop=0, replacement=tokens[:, :3], verbose=False)
    with pytest.raises(LoopedError, match="out of range"):
        injection_effect(huginn, tokens, from_loop=3, verbose=False)
    broken = random_bridge("retrofit_olmo")
    broken.original_model.canonical_parameters()["unembed.weight"].data[:] = torch.nan
    with pytest.raises(LoopedError, match="the readout after loop 0 holds NaN"):
        injection_effect(broken, tokens, from_loop=0, verbose=False)
    with pytest.raises(LoopedError, match="generator"):
        injection_effect(huginn, tokens, from_loop=0, initial_state=torch.Generator(), verbose=False)


@pytest.mark.parametrize(("name", "stack"), [("huginn", None), ("parcae", None), ("hrm_text", "L"), ("hrm_text", "H")])
def test_rows_that_round_differently_have_no_effect_before_the_edit(name: str, stack: str | None) -> None:
    """0 by definition: before the edit there is one computation. The hook stands for rows that round differently."""
    bridge, tokens = random_bridge(name, torch.float64, n_loops=4), random_tokens(2, 5)
    first = bridge.schedule.passes[0]
    bridge.add_hook(
        f"{bridge.schedule.pass_prefix(first)}.hook_out", lambda x, hook: x + 1e-6 * torch.arange(len(x)).view(-1, 1, 1)
    )
    n_passes = bridge.schedule.n_loops_of(bridge.schedule.looped_stack(stack))
    found = injection_effect(bridge, tokens, from_loop=n_passes // 2, stack=stack, verbose=False)
    assert found.state_change.values.tolist()[:2] == found.kl.values.tolist()[:2] == [0.0, 0.0]
    assert found.state_change.values[2:].min() > 1e-3 and found.kl.values[2:].min() > 1e-9
