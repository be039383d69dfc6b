"""Exit steps against the rules written out token by token, the gate's algebra, and generation."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from linear import linear_loop
from torch import Tensor
from zoo import FEW, STRUCTURES, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError, exits
from tl_looped.analysis import exit_steps, gate_pdf
from tl_looped.exits import LoopHistory

POLICIES = [exits.KL(0.05), exits.StateChange(0.8), exits.TwoHitAcceleration(30.0)]


def by_hand(bridge: LoopedBridge, tokens: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """For every policy and token after how many loops it leaves, and the logits after every loop."""
    schedule, n = bridge.schedule, bridge.n_loops
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        logits = [bridge.readout(tokens, t) for t in range(n)]
    ends = [schedule.pass_prefix(schedule.pass_of_loop(t)) for t in range(n)]
    states = [cache[f"{ends[0]}.hook_state"], *(cache[f"{end}.hook_out"] for end in ends)]
    steps: list[Any] = []
    for rule in ("kl", "change", "two hits"):
        rows = torch.full(tokens.shape, n)
        for b in range(tokens.shape[0]):
            for p in range(tokens.shape[1]):
                for t in range(n - 1):
                    now, before = (logits[s][b, p].log_softmax(-1) for s in (t, t - 1))
                    s = [x[b, p] for x in states[: t + 2]]
                    if rule == "kl":
                        leaves = t > 0 and (now.exp() * (now - before)).sum() < 0.05
                    elif rule == "change":
                        leaves = (s[-1] - s[-2]).norm() / s[-1].norm() < 0.8
                    else:
                        d = [y - x for x, y in pairwise(s)]
                        a = [(y - x).norm() for x, y in pairwise(d)]
                        leaves = len(a) > 1 and a[-1] < 30.0 and a[-2] < 30.0
                    if leaves:
                        rows[b, p] = t + 1
                        break
        steps.append(rows)
    return steps, logits


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "parcae", "anchored"])
def test_steps_costs_and_scores_are_those_of_the_rules(name: str) -> None:
    bridge, tokens = random_bridge(name, torch.float64, n_loops=4), random_tokens(3, 4)
    steps, logits = by_hand(bridge, tokens)
    found = exit_steps(bridge, tokens, policies=POLICIES, verbose=False)
    assert found.passes[0].tolist() == [rows.tolist() for rows in steps]
    rows = [*steps, *(torch.full(tokens.shape, n) for n in range(1, 5))]
    assert found.cost.labels["policy"] == [*map(repr, POLICIES), "1 loop", "2 loops", "3 loops", "4 loops"]
    for k, passes in enumerate(rows):
        right, loss = torch.zeros(3, 3), torch.zeros(3, 3)
        for b in range(3):
            for p in range(3):
                read, target = logits[int(passes[b, p]) - 1][b, p], int(tokens[b, p + 1])
                right[b, p], loss[b, p] = float(read.argmax() == target), -read.log_softmax(-1)[target]
        for estimate, expected in ((found.cost, passes[:, :-1].double()), (found.accuracy, right), (found.loss, loss)):
            per_example = expected.mean(1)
            assert estimate.values[k].item() == pytest.approx(per_example.mean().item(), abs=1e-6)
            assert estimate.stderr[k].item() == pytest.approx(per_example.std().item() / 3**0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "policy"), [("ouro", exits.Gate(0.6)), ("huginn", exits.StateChange(0.9)), ("hrm_text", exits.KL(0.3))]
)
def test_the_last_token_leaves_when_generation_reads_it(name: str, policy: exits.ExitPolicy) -> None:
    bridge, tokens = random_bridge(name, torch.float64, n_loops=5), random_tokens(4, 5)
    found = exit_steps(bridge, tokens, policies={"mine": policy}, answers=[1, 2, 3, 4], verbose=False)
    bridge.exit_policy = policy
    bridge.generate(tokens, max_new_tokens=1, do_sample=False, stop_at_eos=False, verbose=False)
    read = bridge.generation_report.loops_per_token[:, 0]
    assert found.passes[0][0, :, -1].tolist() == read.tolist() and len(set(read.tolist())) > 1
    assert found.cost.values[0].item() == pytest.approx(read.double().mean().item())
    assert len(found.plot().data) == 2 and found.to_dataframe()["policy"].tolist()[0] == "mine"


def test_gate_probabilities() -> None:
    bridge, tokens = random_bridge("ouro", torch.float64, n_loops=4), random_tokens()
    found = exit_steps(bridge, tokens, policies=[exits.Gate(q) for q in (0.2, 0.5, 0.9, 0.99)], verbose=False)
    with torch.no_grad():
        leave = bridge.run_with_cache(tokens)[1].stack_loops("hook_exit_logit").sigmoid()
    (pdf,), (cdf,) = found.pdf, found.cdf
    stay = 1.0
    for t in range(4):
        expected = stay * leave[t] if t < 3 else stay
        assert torch.allclose(pdf[t], torch.as_tensor(expected))
        stay = stay * (1 - leave[t])
        assert torch.allclose(cdf[t], 1 - stay if t < 3 else torch.ones_like(leave[0]))
    assert torch.allclose(pdf.sum(0), torch.ones_like(pdf[0]))
    # exit at min{m: CDF(m) >= q}, so later for a higher q
    for k, q in enumerate((0.2, 0.5, 0.9, 0.99)):
        assert torch.equal(found.passes[0][k], (cdf >= q - 1e-12).int().argmax(0) + 1)
    assert (found.passes[0].diff(dim=0) >= 0).all()
    assert gate_pdf(torch.tensor([0.0, 0.0, 5.0])).tolist() == [0.5, 0.25, 0.25]


def test_split_work_gives_the_same_as_one_process() -> None:
    bridge, prompts = random_bridge("ouro"), [random_tokens(2, 3), random_tokens(1, 5, seed=4)]
    whole = exit_steps(bridge, iter(prompts), policies=[exits.Gate(0.5)], n_loops=4, verbose=False)
    parts = [exit_steps(bridge, p, policies=[exits.Gate(0.5)], n_loops=4, verbose=False) for p in prompts]
    merged = parts[0] + parts[1]
    assert torch.allclose(whole.loss.values, merged.loss.values) and torch.allclose(whole.loss.stderr, merged.loss.stderr)
    assert [x.shape for x in whole.passes] == [(1, 2, 3), (1, 1, 5)]
    assert all(map(torch.equal, whole.passes, merged.passes)) and all(map(torch.equal, whole.pdf, merged.pdf))
    with pytest.raises(LoopedError, match=r"was added to .*; select the same|different questions"):
        parts[0] + exit_steps(bridge, prompts[1], policies=[exits.KL()], n_loops=4, verbose=False)


def test_refusals() -> None:
    bridge, tokens = random_bridge("huginn"), random_tokens()
    with pytest.raises(LoopedError, match="exit gates, which this model does not have"):
        exit_steps(bridge, tokens, policies=[exits.Gate(0.5)], verbose=False)
    with pytest.raises(LoopedError, match="same name"):
        exit_steps(bridge, tokens, policies=[exits.KL(), exits.KL()], verbose=False)
    with pytest.raises(LoopedError, match="name of a baseline"):
        exit_steps(bridge, tokens, policies={"1 loop": exits.KL()}, verbose=False)
    with pytest.raises(LoopedError, match="readout of loop 0"):
        exit_steps(bridge, tokens, policies=[lambda h: h.log_probs(0)[..., 0] > math.inf], n_loops=4, verbose=False)
    with pytest.raises(LoopedError, match="no prompts"):
        exit_steps(bridge, [], verbose=False)
    with pytest.raises(LoopedError, match="no next token"):
        exit_steps(bridge, tokens[:, :1], verbose=False)
    assert exit_steps(bridge, tokens[:, :1], answers=[3, 4], verbose=False).cost.values.tolist() == [1, 2, 3]


def test_half_precision_states_do_not_overflow_and_one_policy_needs_no_list() -> None:
    state = torch.full((1, 4096), 1000.0)
    history = exits.LoopHistory([x.half() for x in (state, 2 * state, 4 * state, 8 * state)], [], lambda loop: state)
    assert not exits.StateChange(0.03)(history).any() and not exits.TwoHitAcceleration(1e4)(history).any()
    history.states.append(8 * state.half())
    assert exits.StateChange(0.03)(history).all()
    bridge = random_bridge("ouro")
    one, listed = (exit_steps(bridge, random_tokens(), policies=p, verbose=False) for p in (exits.KL(), [exits.KL()]))
    assert torch.equal(one.cost.values, listed.cost.values) and one.cost.labels == listed.cost.labels


class Recorded:
    """A policy that keeps what it was shown of the last position at every loop, and leaves at a loop that depends on it."""

    def __init__(self, leaves: Callable[[LoopHistory], Tensor]):
        self.leaves = leaves
        self.seen: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, history: LoopHistory) -> Tensor:
        def last(x: Tensor, dims: int) -> Tensor:  # generate has no axis of positions
            return x[:, -1] if x.ndim > dims else x

        gate = last(history.exit_logits[-1], 1) if history.exit_logits else torch.zeros(0)
        readout = last(history.readout(history.loop), 2)
        states = (last(history.states[0], 2), last(history.states[-1], 2))
        self.seen.append((history.loop, *states, gate, readout))
        return self.leaves(history)


def has_grown(history: LoopHistory) -> Tensor:
    """Compares with the first state, however long ago that was."""
    return history.states[-1].norm(dim=-1) > 1.3 * history.states[0].norm(dim=-1)


@pytest.mark.parametrize(("name", "cached"), [*((name, True) for name in STRUCTURES), *((name, False) for name in FEW)])
def test_generate_and_exit_steps_show_a_policy_what_hooks_leave(name: str, cached: bool) -> None:
    # By hand from the activations of a whole hooked run, and from the readouts of that run after every loop.
    model, tokens = random_bridge(name, torch.float64, n_loops=6), random_tokens(3, 5)
    schedule, n_loops = model.schedule, model.n_loops
    ends = [schedule.pass_prefix(schedule.pass_of_loop(t)) for t in range(n_loops)]

    def add(size: float) -> Callable[[Tensor, object], Tensor]:
        return lambda x, hook: x + size * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype) if x.ndim == 3 else x + size

    def overwrite(x: Tensor, hook: object) -> None:  # in place, on the way into a layer: what a loop left is not the layer's
        x.mul_(0.7)

    hooks: list[Any] = [
        (f"{ends[0]}.hook_state", add(0.8)),
        (f"{ends[1]}.hook_out", add(-0.4)),
        (f"{ends[2]}.hook_state", add(0.3)),
        (f"{ends[3]}.blocks.0.hook_resid_pre", overwrite),
    ]
    if model.looped_cfg.exit_gate:
        hooks.append((f"{ends[1]}.hook_exit_logit", add(0.5)))
    first, rest = f"{ends[0]}.hook_state", [f"{end}.hook_out" for end in ends]
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept.setdefault(schedule.loop_name(hook.name), x.clone())

    gates = [f"{end}.hook_exit_logit" for end in ends] if model.looped_cfg.exit_gate else []
    watched = [(hook, keep) for hook in (first, *rest, *gates)]
    for leaves in (has_grown, lambda h: torch.zeros_like(h.states[-1][..., 0], dtype=torch.bool)):
        shown, generated = Recorded(leaves), Recorded(leaves)
        with model.hooks(fwd_hooks=hooks):
            found = exit_steps(model, tokens, policies={"mine": shown}, answers=[1, 2, 3], verbose=False)
            model.exit_policy = generated
            options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "use_past_kv_cache": cached}
            model.generate(tokens, 1, **options)
            model.exit_policy = None
            kept.clear()
            model.run_with_hooks(tokens, fwd_hooks=watched)
            readouts = [model.readout(tokens, loop=t)[:, -1] for t in range(n_loops)]
        states = [kept[hook][:, -1] for hook in (first, *rest)]
        for record in (shown, generated):
            assert leaves is has_grown or [at[0] for at in record.seen] == list(range(n_loops - 1))
            for loop, start, state, gate, readout in record.seen:
                assert torch.allclose(start, states[0]) and torch.allclose(state, states[loop + 1])
                assert torch.allclose(readout, readouts[loop])
                assert not gates or torch.allclose(gate, kept[gates[loop]][:, -1])
        leaving = [(states[t + 1].norm(dim=-1) > 1.3 * states[0].norm(dim=-1)).tolist() for t in range(n_loops)]
        by_hand = [
            next((t + 1 for t in range(n_loops) if leaving[t][row] and leaves is has_grown), n_loops) for row in range(3)
        ]
        assert found.passes[0][0, :, -1].tolist() == by_hand
        report = model.generation_report
        assert report is not None and report.loops_per_token[:, 0].tolist() == by_hand


def test_a_policy_that_looks_back_leaves_where_its_formula_says() -> None:
    # The state doubles in every loop: it is above 100 times the first one after 2^7 = 128 times, that is, after 7 loops.
    model, tokens = linear_loop(2 * torch.eye(24), n_loops=12), random_tokens()

    def far(history: LoopHistory) -> Tensor:
        return history.states[-1].norm(dim=-1) > 100 * history.states[0].norm(dim=-1)

    assert (exit_steps(model, tokens, policies=far, verbose=False).passes[0] == 7).all()
    model.exit_policy = far
    model.generate(tokens, 2, do_sample=False, stop_at_eos=False, verbose=False)
    report = model.generation_report
    assert report is not None and (report.loops_per_token == 7).all()


@pytest.mark.parametrize(
    "use",
    [
        lambda states: states[1],
        lambda states: states[-len(states) + 1],
        lambda states: states[:3],
        lambda states: list(states),
        lambda states: torch.stack(states),
        lambda states: sum(state.norm(dim=-1) for state in states),
        lambda states: list(reversed(states)),
    ],
    ids=["index", "negative", "slice", "iteration", "stack", "sum", "reversed"],
)
def test_a_state_that_is_no_longer_kept_is_refused_and_in_generate_it_is_there(use: Callable[[Any], Any]) -> None:
    model, tokens = random_bridge("nanbeige", n_loops=8), random_tokens()
    lengths: list[int] = []

    def policy(history: LoopHistory) -> Tensor:
        lengths.append(len(history.states))
        if history.loop == 6:
            use(history.states)
        return torch.zeros_like(history.states[-1][..., 0], dtype=torch.bool)

    with pytest.raises(LoopedError, match="no longer kept: exit_steps keeps the first state and the last 4"):
        exit_steps(model, tokens, policies=policy, verbose=False)
    assert lengths == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("ahead", [1, -5])
def test_a_readout_of_a_loop_that_has_not_run_is_refused(ahead: int) -> None:
    # Under a cache the states of such a loop are there, of earlier positions: their readout is not that of this token.
    model, tokens = random_bridge("huginn", n_loops=5), random_tokens()

    def policy(history: LoopHistory) -> Tensor:
        lengths.append(len(history.states))
        if len(lengths) > 4:  # the first token looped to the end
            history.log_probs(history.loop + ahead)
        return torch.zeros_like(history.states[-1][..., 0], dtype=torch.bool)

    lengths: list[int] = []
    model.exit_policy = policy
    with pytest.raises(LoopedError, match=rf"the readout of loop {ahead}; up to now there are those of 0..0"):
        model.generate(tokens, 2, do_sample=False, stop_at_eos=False, verbose=False)
    assert lengths == [2, 3, 4, 5, 2]
