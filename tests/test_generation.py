"""Generation: with and without cache, hooks per loop, exit policies and their reports."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from zoo import FAMILIES, random_bridge, random_tokens

from tl_looped import LoopedBridge, LoopedError, exits

TOKENS = random_tokens(2, 5)
GREEDY = {"do_sample": False, "stop_at_eos": False, "verbose": False}
GOLDEN = Path(__file__).parent / "golden" / "ouro"


class After:
    """Leave after loops that depend on the state, so that rows and tokens differ."""

    def __call__(self, history: exits.LoopHistory) -> torch.Tensor:
        return (history.states[-1][:, 0] * 7).floor().long() % 3 == 0


def deep(name: str) -> LoopedBridge:
    return random_bridge(name, n_loops=3 if name == "hrm_text" else 5)


def write(bridge: LoopedBridge, tokens: torch.Tensor = TOKENS, new: int = 5, **kwargs: object) -> tuple:
    out = bridge.generate(tokens, new, output_logits=True, **GREEDY, **kwargs)
    return out.sequences, torch.stack(out.logits, dim=1), bridge.generation_report


@FAMILIES
def test_a_token_read_early_has_the_logits_of_its_loop_with_and_without_cache(name: str) -> None:
    bridge = deep(name)
    bridge.exit_policy = After()
    tokens, logits, report = write(bridge)
    tokens_2, logits_2, report_2 = write(bridge, use_past_kv_cache=False)
    assert torch.equal(tokens, tokens_2) and torch.equal(report.loops_per_token, report_2.loops_per_token)
    torch.testing.assert_close(logits, logits_2, atol=1e-4, rtol=1e-5)
    assert len(report.loops_per_token.unique()) > 1  # or catching up was not needed
    for step in range(5):
        text = tokens[:, : TOKENS.shape[1] + step]
        for row, loops in enumerate(report.loops_per_token[:, step].tolist()):
            wanted = bridge.readout(text, loop=loops - 1)[row, -1]
            torch.testing.assert_close(logits[row, step], wanted, atol=1e-4, rtol=1e-5)


def brute_force(bridge: LoopedBridge, policy: exits.ExitPolicy, text: torch.Tensor) -> int:
    """Loops until exit at the last position, from whole runs and the formulas of the papers."""
    _, cache = bridge.run_with_cache(text)
    stack = "H." if bridge.looped_cfg.l_cycles else ""
    s = [cache[f"{stack}loops.0.hook_state"][0, -1].double()]
    s += [cache[f"{stack}loops.{t}.hook_out"][0, -1].double() for t in range(bridge.n_loops)]
    p = [bridge.readout(text, loop=t)[0, -1].double().softmax(-1) for t in range(bridge.n_loops)]
    step = [(b - a).norm().item() for a, b in pairwise(s)]
    accel = [(s[k + 1] - 2 * s[k] + s[k - 1]).norm().item() for k in range(1, len(s) - 1)]
    for t in range(bridge.n_loops - 1):
        if isinstance(policy, exits.KL):
            leave = t > 0 and (p[t] * (p[t] / p[t - 1]).log()).sum() < policy.threshold
        elif isinstance(policy, exits.StateChange):
            leave = step[t] / s[t + 1].norm() < policy.threshold
        elif isinstance(policy, exits.TwoHitAcceleration):
            leave = t > 1 and max(accel[t - 1], accel[t - 2]) < policy.threshold
        else:
            stay = 1.0
            for k in range(t + 1):
                stay *= 1 - cache[f"loops.{k}.hook_exit_logit"][0, -1].double().sigmoid().item()
            leave = 1 - stay >= policy.threshold
        if leave:
            return t + 1
    return bridge.n_loops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "anchored"])
def test_policies_leave_where_their_formulas_say(name: str) -> None:
    bridge = deep(name)
    policies = [
        exits.KL(0.3),
        exits.KL(4.0),
        exits.StateChange(0.6),
        exits.StateChange(1.2),
        exits.TwoHitAcceleration(3.0),
        exits.TwoHitAcceleration(8.0),
    ]
    chosen = set()
    for policy in policies + ([exits.Gate(0.55), exits.Gate(0.9)] if name == "ouro" else []):
        bridge.exit_policy = policy
        tokens, _, report = write(bridge, TOKENS[:1])
        for step, loops in enumerate(report.loops_per_token[0].tolist()):
            assert loops == brute_force(bridge, policy, tokens[:, : TOKENS.shape[1] + step])
            chosen.add(loops)
    assert len(chosen) > 1


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_the_gate_reads_what_the_published_code_reads(threshold: float) -> None:
    bridge = LoopedBridge.from_pretrained(GOLDEN, n_loops=4)
    golden = load_file(GOLDEN / "golden.safetensors")
    bridge.exit_policy = exits.Gate(threshold)
    tokens, wanted = golden["input_ids"], golden[f"R4/logits_exit_threshold{threshold}"]
    for pos in range(tokens.shape[1]):
        _, logits, report = write(bridge, tokens[:, : pos + 1], new=1)
        torch.testing.assert_close(logits[:, 0], wanted[:, pos], atol=2e-4, rtol=0)
        loops = (golden["R4/exit_pdf"][:, pos].cumsum(-1) >= threshold).int().argmax(-1) + 1
        assert torch.equal(report.loops_per_token[:, 0], loops.long())


@pytest.mark.parametrize(
    ("bias", "dtype", "loops"),
    [
        (2.1972246, torch.float32, 4),
        (2.1972246, torch.bfloat16, 3),
        (6.5, torch.float32, 3),
        (6.5, torch.bfloat16, 1),
    ],
)
def test_a_gate_threshold_of_one_is_not_never(bias: float, dtype: torch.dtype, loops: int) -> None:
    bridge = random_bridge("ouro", n_loops=4)
    gate = bridge.original_model.canonical_parameters()
    gate["exit_gate.weight"].data.zero_()
    gate["exit_gate.bias"].data.fill_(bias)
    bridge.to(dtype)
    bridge.exit_policy = exits.Gate(1.0)
    assert write(bridge, new=1)[2].loops_per_token.unique().tolist() == [loops]
    bridge.exit_policy = None
    assert write(bridge, new=1)[2].loops_per_token.unique().tolist() == [4]


@FAMILIES
@pytest.mark.parametrize("policy", [None, After()])
def test_hooks_of_a_loop_fire_in_it_once_for_every_position(name: str, policy: exits.ExitPolicy | None) -> None:
    bridge = deep(name)
    bridge.exit_policy = policy
    seen: dict[str, list[torch.Tensor]] = {}
    hook = lambda x, hook, where: seen.setdefault(where, []).append(x.clone())  # noqa: E731
    stack = "H." if name == "hrm_text" else ""
    where = [f"{stack}loops.{t}.blocks.0.hook_resid_pre" for t in range(bridge.n_loops)]
    with bridge.hooks(fwd_hooks=[(n, partial(hook, where=n)) for n in where]):
        tokens, _, report = write(bridge, TOKENS[:1], new=6)
    _, cache = bridge.run_with_cache(tokens[:, :-1])
    most = torch.cummax(report.loops_per_token.flip(-1), dim=-1).values.flip(-1)[0]  # loops of every position in the end
    for t, hook_name in enumerate(where):
        pieces = seen.get(hook_name, [])
        reached = int((most > t).sum())
        if policy is None:
            assert len(pieces) == 6
        length = 0 if not reached else TOKENS.shape[1] - 1 + reached
        assert sum(piece.shape[1] for piece in pieces) == length
        if length:
            torch.testing.assert_close(torch.cat(pieces, 1), cache[hook_name][:, :length], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ouro", "retrofit_llama"])
def test_an_edit_in_a_loop_reaches_the_exit_decision_and_later_tokens(name: str) -> None:
    bridge = deep(name)
    bridge.exit_policy = exits.StateChange(0.7)
    plain, _, report = write(bridge)
    freeze = lambda x, hook: x * 0 + 1.0  # noqa: E731
    edits = [("loops.1:3.hook_out", freeze)]
    with bridge.hooks(fwd_hooks=edits):
        tokens, _, edited = write(bridge)
        assert torch.equal(tokens, write(bridge, use_past_kv_cache=False)[0])
    assert (edited.loops_per_token <= 3).all() and not torch.equal(edited.loops_per_token, report.loops_per_token)
    again, _, report_2 = write(bridge)
    assert torch.equal(again, plain) and torch.equal(report.loops_per_token, report_2.loops_per_token)


@pytest.mark.parametrize("policy", [None, After()])
def test_an_exception_in_a_hook_leaves_nothing_behind(policy: exits.ExitPolicy | None) -> None:
    bridge = deep("huginn")
    logits = bridge(TOKENS)
    bridge.exit_policy = policy
    wanted = write(bridge)[0]
    calls = []

    def fail(x: torch.Tensor, hook: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in a hook")

    with pytest.raises(RuntimeError, match="in a hook"), bridge.hooks(fwd_hooks=[("loops.0.hook_in", fail)]):
        write(bridge, initial_state=3)
    assert bridge.generation_report is None
    assert torch.equal(bridge(TOKENS), logits) and torch.equal(write(bridge)[0], wanted)


@FAMILIES
def test_left_padded_rows_generate_like_the_rows_alone(name: str) -> None:
    bridge = deep(name)
    bridge.exit_policy = After()
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), TOKENS[:1, :3]], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    tokens, logits, report = write(bridge, torch.cat([padded, TOKENS[1:]]), attention_mask=mask)
    for row, alone in enumerate((TOKENS[:1, :3], TOKENS[1:])):
        tokens_1, logits_1, report_1 = write(bridge, alone)
        assert torch.equal(tokens[row, 5:], tokens_1[0, alone.shape[1] :])
        torch.testing.assert_close(logits[row], logits_1[0], atol=1e-4, rtol=1e-5)
        assert torch.equal(report.loops_per_token[row], report_1.loops_per_token[0])


def test_the_report_counts_rows_while_they_write() -> None:
    bridge = deep("ouro")
    bridge.exit_policy = exits.KL(0.3)
    free, _, _ = write(bridge, new=6)
    eos = int(free[0, TOKENS.shape[1] + 1])  # the second token of the first row ends it
    out = bridge.generate(TOKENS, 6, do_sample=False, verbose=False, eos_token_id=eos)
    report = bridge.generation_report
    ended = (out[0, TOKENS.shape[1] :] == eos).int().argmax() + 1
    assert (report.loops_per_token[0, :ended] > 0).all() and (report.loops_per_token[0, ended:] == 0).all()
    spent = report.loops_per_token[report.loops_per_token > 0].double()
    assert report.saved_fraction == pytest.approx(1 - spent.mean().item() / 5) and 0 < report.saved_fraction < 1
    assert f"{report.saved_fraction:.0%} saved" in str(report)


def test_computed_fraction_counts_what_ran() -> None:
    bridge = deep("ouro")
    rows = []
    hook = lambda x, hook: rows.append(x.shape[0] * x.shape[1])  # noqa: E731
    for kv in (True, False):
        rows.clear()
        bridge.exit_policy = After()
        with bridge.hooks(fwd_hooks=[("loops.*.hook_in", hook)]):
            report = write(bridge, use_past_kv_cache=kv)[2]
            spent = sum(rows)
            rows.clear()
            bridge.exit_policy = None
            assert write(bridge, use_past_kv_cache=kv)[2].saved_fraction == 0
        assert report.computed_fraction == pytest.approx(spent / sum(rows))


def test_initial_state_and_prefix_hold_for_every_token() -> None:
    huginn, hrm = deep("huginn"), deep("hrm_text")
    types = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    for policy in (None, After()):
        for bridge, extra in (
            (huginn, {"initial_state": 5}),
            (huginn, {"initial_state": "zero"}),
            (hrm, {"token_type_ids": types}),
        ):
            bridge.exit_policy = policy
            tokens, logits, report = write(bridge, **extra)
            tokens_2, logits_2, _ = write(bridge, use_past_kv_cache=False, **extra)
            assert torch.equal(tokens, tokens_2)
            torch.testing.assert_close(logits, logits_2, atol=1e-4, rtol=1e-5)
            full = {**extra, "token_type_ids": torch.cat([types, types.new_zeros(2, 4)], 1)} if bridge is hrm else extra
            last = bridge(tokens[:, :-1], loop=int(report.loops_per_token[0, -1]) - 1, **full)[0, -1]
            torch.testing.assert_close(logits[0, -1], last, atol=1e-4, rtol=1e-5)
            assert not torch.allclose(logits[:, 0], write(bridge)[1][:, 0])


def test_streaming_and_embeddings_follow_the_policy() -> None:
    bridge = deep("nanbeige")
    bridge.exit_policy = After()
    tokens, _, report = write(bridge)
    pieces = list(bridge.generate_stream(TOKENS, 5, max_tokens_per_yield=2, **GREEDY))
    assert torch.equal(torch.cat(pieces, dim=1), tokens)
    assert torch.equal(bridge.generation_report.loops_per_token, report.loops_per_token)
    from_embeddings = bridge.generate(bridge.original_model.embed(TOKENS), 5, **GREEDY)
    assert torch.equal(from_embeddings, tokens[:, TOKENS.shape[1] :])


def test_a_run_between_streamed_tokens_is_a_full_run() -> None:
    bridge = deep("ouro")
    wanted = bridge(TOKENS)
    bridge.exit_policy = After()
    for _ in bridge.generate_stream(TOKENS, 3, max_tokens_per_yield=1, **GREEDY):
        assert torch.equal(bridge(TOKENS), wanted)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_meant_is_refused() -> None:
    huginn, ouro = deep("huginn"), deep("ouro")
    with pytest.raises(LoopedError, match="exit gates, which this huginn model does not have"):
        huginn.exit_policy = exits.Gate(0.5)
    with pytest.raises(LoopedError, match="pass a policy such as"):
        huginn.exit_policy = exits.KL
    for wrong in (-0.1, 1.1, "much", True):
        with pytest.raises(LoopedError, match="must be a number from 0 to 1"):
            exits.Gate(wrong)
    with pytest.raises(LoopedError, match="where later tokens start"):
        huginn.generate(TOKENS, 2, initial_state=torch.zeros(2, 5, 24), **GREEDY)
    with pytest.raises(LoopedError, match="'loop'"):
        huginn.generate(TOKENS, 2, loop=1, **GREEDY)
    with pytest.raises(LoopedError, match="Use generate"):
        huginn.hf_generate(TOKENS)
    ouro.exit_policy = exits.KL()
    ouro.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(LoopedError, match="an exit policy"):
        ouro.generate(TOKENS, 2, **GREEDY)
    ouro.exit_policy = None
    assert ouro.generate(TOKENS, 2, **GREEDY).shape == (2, 7)


def test_an_unroll_keeps_the_policy() -> None:
    bridge = deep("ouro")
    bridge.exit_policy = exits.Gate(0.5)
    assert bridge.unroll(2).exit_policy == exits.Gate(0.5)
