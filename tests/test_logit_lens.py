"""The lenses against full logits computed by hand, the readouts of the model, and TransformerLens's own lens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import with_words
from peak_memory import PeakMemory
from transformer_lens.tools.analysis import logit_lens as transformer_lens_lens
from zoo import FAMILIES, GOLDEN, SMALL, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.errors import OutOfRangeError
from tl_looped.lenses import LogitLensResult, logit_lens

TOKENS = random_tokens()
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
LAST = 30  # the last token of the zoo's vocabulary
LENSES = pytest.mark.parametrize("lens", ["logit", "native"])


pytestmark = pytest.mark.usefixtures("no_grad")


def capped(bridge: LoopedBridge, logits: torch.Tensor) -> torch.Tensor:
    cap = bridge.looped_cfg.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logits_by_hand(bridge: LoopedBridge, tokens: torch.Tensor, layer: int, lens: str, cache: Any) -> torch.Tensor:
    """The full logits of one virtual layer, through the bridge's own components."""
    cfg, schedule = bridge.looped_cfg, bridge.schedule
    x, site = cache["resid_post", layer], schedule.site(layer)
    if lens == "logit":
        return capped(bridge, bridge.unembed(bridge.ln_final(x)))
    p = schedule.pass_of_layer(layer)
    first = schedule.first_coda_layer
    if site.stack == "coda":
        first = layer + 1
    elif site.stack == "L":
        assert p is not None
        h_pass = next(q for q in schedule.passes[p.index :] if q.stack == "H")
        z_h = cache[f"{schedule.pass_prefix(h_pass)}.hook_state"]
        once = bridge.unroll(1)  # where the H pass is the last one, and can be run alone
        return once(bridge.ln_final(x) + z_h, start_at_layer=once.schedule.passes[-1].first, input_ids=tokens)
    elif cfg.strategy == "anchored" and p is not None:
        state = cache[f"loops.{p.loop}.hook_state"]
        moved = state + (x - state) / cfg.anchor_steps
        anchor = x if p.loop == 0 else cache["resid_post", schedule.passes[0].layers[-1]]
        x = cfg.beta * anchor + (1 - cfg.beta) * moved
    elif cfg.loop == "gated" and p is not None:
        state = cache[f"loops.{p.loop}.hook_state"]
        weights = {name.removeprefix("gate."): w for name, w in bridge.plain.canonical_parameters().items()}
        delta = (x - state) @ weights["down.weight"].T @ weights["up.weight"].T + weights["up.bias"]
        alpha = torch.exp(-torch.nn.functional.softplus(delta) * weights["A_log"].exp())
        x = alpha * x + (1 - alpha) * state
    elif cfg.pass_norm:
        x = bridge.ln_final(x)
    if site.stack != "coda" and bridge.original_model.after_loop is not None:
        x = bridge.after_loop(x)
    for i in range(first, schedule.n_layers):
        x = block(bridge, x, i, tokens)
    return capped(bridge, bridge.unembed(x if cfg.pass_norm_is_final else bridge.ln_final(x)))


def block(bridge: LoopedBridge, x: torch.Tensor, i: int, tokens: torch.Tensor) -> torch.Tensor:
    """The output of one virtual layer."""
    caught: list[torch.Tensor] = []
    hooks = [(f"blocks.{i}.hook_resid_post", lambda t, hook: caught.append(t))]
    bridge.run_with_hooks(x, hooks, start_at_layer=i, stop=i + 1, input_ids=tokens)
    return caught[0]


def check_against_full_logits(result: LogitLensResult, row: int, logits: torch.Tensor, top_k: int) -> None:
    """Everything a row says, from logits [batch, pos, d_vocab] in fp64 by definition."""
    logits = logits[:, list(result.positions)]
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    close = {"atol": 1e-4, "rtol": 0.0}  # fp32 logits of order 1 to 10 through products of other shapes
    torch.testing.assert_close(result.log_probs[row].double(), log_probs.gather(-1, result.targets), **close)
    torch.testing.assert_close(result.probs[row].double(), log_probs.gather(-1, result.targets).exp(), **close)
    torch.testing.assert_close(result.entropy[row].double(), entropy, **close)
    best = log_probs.sort(-1, descending=True)
    torch.testing.assert_close(result.top_log_probs[row].double(), best.values[..., :top_k], **close)
    assert torch.equal(result.top_tokens[row], best.indices[..., :top_k])
    places = best.indices.argsort(-1)  # place of every token in the sorted vocabulary
    assert torch.equal(result.ranks[row], places.gather(-1, result.targets))


@FAMILIES
@LENSES
def test_every_row_equals_full_logits_by_hand(name: str, lens: Any) -> None:
    bridge = shared_bridge(name)
    _, cache = bridge.run_with_cache(TOKENS)
    result = logit_lens(bridge, TOKENS, targets=[0, 7, LAST], lens=lens, top_k=4)
    assert result.sites == bridge.schedule.sites and result.ranks.shape == (bridge.cfg.n_layers, 2, 7, 3)
    for layer in range(bridge.cfg.n_layers):
        check_against_full_logits(result, layer, logits_by_hand(bridge, TOKENS, layer, lens, cache), top_k=4)


@FAMILIES
def test_native_rows_at_the_ends_of_loops_are_the_readouts(name: str) -> None:
    bridge = shared_bridge(name)
    result = logit_lens(bridge, TOKENS, targets=[3, 11], lens="native", top_k=SMALL["d_vocab"])
    readouts = [bridge.readout(TOKENS, loop=t) for t in range(bridge.n_loops)]
    assert (readouts[0] - readouts[1]).abs().max() > 0.1
    for loop, logits in enumerate(readouts):
        end = bridge.schedule.pass_of_loop(loop)
        check_against_full_logits(result, end.layers[-1], logits, SMALL["d_vocab"])
        if end.stack == "H":  # the last L pass of a cycle is all that the H stack still waits for
            check_against_full_logits(result, end.first - 1, logits, SMALL["d_vocab"])
    check_against_full_logits(result, bridge.cfg.n_layers - 1, bridge(TOKENS), SMALL["d_vocab"])


@pytest.mark.parametrize("family", ["huginn", "hrm_text"])
@LENSES
def test_golden_checkpoints(family: str, lens: Any) -> None:
    bridge = LoopedBridge.from_pretrained(GOLDEN / family, n_loops=2)
    tokens = torch.randint(0, 101, (2, 6), generator=torch.Generator().manual_seed(2))
    _, cache = bridge.run_with_cache(tokens)
    result = logit_lens(bridge, tokens, targets=[0, 100], lens=lens)
    for layer in range(bridge.cfg.n_layers):
        check_against_full_logits(result, layer, logits_by_hand(bridge, tokens, layer, lens, cache), top_k=5)
    if lens == "native":
        end = bridge.schedule.pass_of_loop(0).layers[-1]
        check_against_full_logits(result, end, bridge.readout(tokens, loop=0), top_k=5)


def test_a_prelude_state_of_a_loop_without_injection_is_a_run_of_no_loops() -> None:
    bridge = shared_bridge("looped_qwen")
    result = logit_lens(bridge, TOKENS, targets=5, lens="native", top_k=3)
    coda = bridge.schedule.first_coda_layer
    _, cache = bridge.run_with_cache(TOKENS)
    logits = bridge(cache["resid_post", 0], start_at_layer=coda)
    check_against_full_logits(result, 0, logits, top_k=3)
    assert (logits - bridge(TOKENS)).abs().max() > 0.1


def test_pass_norm_before_a_coda() -> None:
    bridge = random_bridge("ouro", n_prelude=1, n_coda=1, final_norm=True)
    result = logit_lens(bridge, TOKENS, targets=5, lens="native", top_k=3)
    for loop in range(3):
        check_against_full_logits(
            result, bridge.schedule.pass_of_loop(loop).layers[-1], bridge.readout(TOKENS, loop=loop), top_k=3
        )
    # In the middle of a pass: a stop there, patched into the end of the last pass.
    _, cache = bridge.run_with_cache(TOKENS)
    end = bridge.schedule.pass_of_loop(-1).layers[-1]
    for layer in (0, 1, 3):
        patch = [(f"blocks.{end}.hook_resid_post", lambda t, hook, i=layer: cache["resid_post", i])]
        check_against_full_logits(result, layer, bridge.run_with_hooks(TOKENS, patch), top_k=3)


@FAMILIES
def test_transformer_lens_agrees_where_it_reads_the_same_stream(name: str) -> None:
    # The cap is left out: whether TransformerLens knows it is not what this test is about.
    bridge = random_bridge(name, logit_softcap=None)
    theirs = transformer_lens_lens(bridge, TOKENS, positions=None, targets=[4, 9], return_type="log_probs")
    ours = logit_lens(bridge, TOKENS, targets=[4, 9])
    schedule, compared = bridge.schedule, 0
    for layer in range(schedule.n_layers):
        following = layer + 1
        if following < schedule.n_layers and schedule.pass_of_layer(layer) != schedule.pass_of_layer(following):
            continue  # its entries are the inputs of layers: between passes something lies in between
        torch.testing.assert_close(ours.log_probs[layer], theirs.values[following], atol=1e-4, rtol=0)
        assert torch.equal(ours.ranks[layer], theirs.readout.target_ranks[following])
        torch.testing.assert_close(ours.entropy[layer], theirs.readout.entropy[following], atol=1e-4, rtol=0)
        compared += 1
    assert compared > schedule.n_loops


@LENSES
@pytest.mark.parametrize("chunk_size", [1, 5, 30, 31, 32, 100, 10_000])
def test_the_chunk_size_changes_nothing(lens: Any, chunk_size: int) -> None:
    bridge = shared_bridge("parcae", torch.float64)
    whole, chunked = (
        logit_lens(bridge, TOKENS, targets=[0, 16, LAST], lens=lens, top_k=9, chunk_size=c) for c in (2**22, chunk_size)
    )
    assert whole.log_probs.dtype == torch.float64
    for field in ("log_probs", "entropy", "top_log_probs"):
        torch.testing.assert_close(getattr(chunked, field), getattr(whole, field), atol=1e-12, rtol=0)
    assert torch.equal(chunked.ranks, whole.ranks) and torch.equal(chunked.top_tokens, whole.top_tokens)


def test_equal_logits_share_a_rank_in_any_chunk() -> None:
    bridge = random_bridge("ouro")
    weight = bridge.original_model.canonical_parameters()["unembed.weight"]
    weight.data[[3, 20]] = 0  # a logit of exactly 0 by any kernel
    for chunk_size in (7, 2**22):
        result = logit_lens(bridge, TOKENS, targets=[3, 20], chunk_size=chunk_size)
        assert torch.equal(result.ranks[..., 0], result.ranks[..., 1])
        best = logit_lens(bridge, TOKENS, top_k=1, chunk_size=chunk_size)
        assert not best.ranks[-1].any()


def test_half_precision_keeps_the_models_logits_and_sums_in_single() -> None:
    bridge = random_bridge("ouro", torch.bfloat16)
    result = logit_lens(bridge, TOKENS, targets=[3, 8], lens="native", top_k=1, chunk_size=50)
    logits = bridge(TOKENS)
    assert logits.dtype == torch.bfloat16 and result.log_probs.dtype == torch.float32
    expected = logits.double().log_softmax(-1)
    spacing = float(logits.abs().max()) * 2**-8  # a product of another shape may round a logit to its neighbour
    torch.testing.assert_close(result.log_probs[-1].double(), expected[..., [3, 8]], atol=2 * spacing, rtol=0)


@LENSES
@pytest.mark.parametrize("targets", [None, [1, 2999]])
def test_no_tensor_holds_more_logits_than_the_chunk(lens: Any, targets: Any) -> None:
    d_vocab, chunk_size = 3000, 5000
    bridge = random_bridge("huginn", d_vocab=d_vocab)
    with PeakMemory(bridge) as seen:
        result = logit_lens(bridge, TOKENS, targets=targets, lens=lens, chunk_size=chunk_size)
    assert result.entropy.numel() * SMALL["d_model"] < chunk_size < TOKENS.numel() * d_vocab / 8
    assert seen.largest <= 4 * chunk_size
    with PeakMemory(bridge) as seen:
        bridge(TOKENS)
    assert seen.largest >= 4 * TOKENS.numel() * d_vocab  # the measure sees logits where they are made


@FAMILIES
@LENSES
def test_default_targets_are_the_models_predictions(name: str, lens: Any) -> None:
    bridge = shared_bridge(name)
    predicted = bridge(TOKENS).argmax(-1)
    result = logit_lens(bridge, TOKENS, lens=lens)
    assert torch.equal(result.targets[..., 0], predicted)
    if lens == "native":
        assert not result.rank_trajectory()[-1].any() and torch.equal(result.top_tokens[-1, ..., 0], predicted)
    early = logit_lens(bridge, TOKENS, lens=lens, loops=0, positions=[-1, 2])
    assert early.positions == (2, 6) and torch.equal(early.targets[..., 0], predicted[:, [2, -1]])


def test_positions_and_loops_are_slices_of_the_whole() -> None:
    bridge = shared_bridge("parcae")
    whole = logit_lens(bridge, TOKENS, targets=[4], lens="native")
    part = logit_lens(bridge, TOKENS, targets=[4], lens="native", positions=slice(-2, None), loops=[2, 0])
    rows = [i for i, site in enumerate(whole.sites) if site.loop in (0, 2)]
    assert part.positions == (5, 6) and part.layers == tuple(rows)
    torch.testing.assert_close(part.log_probs, whole.log_probs[rows][:, :, 5:], atol=1e-4, rtol=0)
    assert logit_lens(bridge, TOKENS, targets=4, loops=-1).labels == ("loops.2.blocks.0", "loops.2.blocks.1")
    assert logit_lens(bridge, TOKENS, targets=4, loops=slice(1, None)).layers == (4, 5, 6, 7)
    hrm = logit_lens(shared_bridge("hrm_text"), TOKENS, targets=4, loops=1)
    assert [(s.stack, s.loop) for s in hrm.sites[::2]] == [("L", 2), ("L", 3), ("H", 1)]


@pytest.mark.parametrize("name", ["ouro", "hrm_text", "huginn"])
def test_padding_and_prefix_reach_the_run_and_the_coda(name: str) -> None:
    bridge = shared_bridge(name)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    padded = logit_lens(bridge, TOKENS, targets=9, lens="native", attention_mask=mask)
    alone = logit_lens(bridge, TOKENS[:1, 3:], targets=9, lens="native")
    torch.testing.assert_close(padded.log_probs[:, :1, 3:], alone.log_probs, atol=1e-4, rtol=0)
    if name == "hrm_text":
        prefix = (torch.arange(7) < 4).long().expand(2, 7)
        result = logit_lens(bridge, TOKENS, targets=9, lens="native", token_type_ids=prefix, top_k=3)
        logits = bridge(TOKENS, token_type_ids=prefix)
        assert (logits - bridge(TOKENS)).abs().max() > 0.1
        for layer in (bridge.cfg.n_layers - 1, bridge.schedule.passes[-1].first - 1):
            check_against_full_logits(result, layer, logits, top_k=3)


def test_initial_state_is_the_runs() -> None:
    bridge = shared_bridge("huginn")
    result = logit_lens(bridge, TOKENS, targets=9, lens="native", initial_state=5, top_k=3)
    check_against_full_logits(result, -1, bridge(TOKENS, initial_state=5), top_k=3)
    assert not torch.equal(result.ranks, logit_lens(bridge, TOKENS, targets=9, lens="native").ranks)


@FAMILIES
@LENSES
def test_hooks_act_on_the_run_and_never_on_the_decoding(name: str, lens: Any) -> None:
    bridge = shared_bridge(name)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(4))
    first = bridge.schedule.passes[0].first
    fired: list[str] = []

    def edit(t: torch.Tensor, hook: Any) -> torch.Tensor:
        return t + bias

    with bridge.hooks(fwd_hooks=[(f"blocks.{first}.hook_resid_post", edit)]):
        with bridge.hooks(fwd_hooks=[(lambda n: n.endswith(("hook_out", "hook_z")), lambda t, hook: fired.append(hook.name))]):
            result = logit_lens(bridge, TOKENS, targets=[1, 2], lens=lens, top_k=3)
            assert not [n for n in fired if n.startswith(("unembed", "ln_final"))]
            assert len(fired) == len(set(fired)) and "blocks.0.hook_out" in fired
            fired.clear()
            edited_logits, cache = bridge.run_with_cache(TOKENS)
            assert "unembed.hook_out" in fired
    clean = logit_lens(bridge, TOKENS, targets=[1, 2], lens=lens, top_k=3)
    assert torch.equal(result.ranks[:first], clean.ranks[:first])
    assert not torch.equal(result.log_probs[first], clean.log_probs[first])
    for layer in range(first, bridge.cfg.n_layers):
        check_against_full_logits(result, layer, logits_by_hand(bridge, TOKENS, layer, lens, cache), top_k=3)
    if lens == "native":
        check_against_full_logits(result, -1, edited_logits, top_k=3)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_gradients_and_parameters_are_left_alone() -> None:
    bridge = shared_bridge("huginn")
    before = {n: id(p) for n, p in bridge.named_parameters()}
    with torch.enable_grad():
        assert not logit_lens(bridge, TOKENS, targets=[1], lens="native").log_probs.requires_grad
    assert {n: id(p) for n, p in bridge.named_parameters()} == before


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: logit_lens(b, TOKENS, targets=1, lens="coda"), "lens='coda'.*'logit' or 'native'"),
        (lambda b: logit_lens(b, TOKENS, targets=[1, 31]), r"31 .*0\.\.30"),
        (lambda b: logit_lens(b, TOKENS, targets=torch.tensor([-1])), r"-1 .*0\.\.30"),
        (lambda b: logit_lens(b, TOKENS, targets=[]), "at least one token"),
        (lambda b: logit_lens(b, TOKENS, targets=torch.tensor([0.5])), "token id"),
        (lambda b: logit_lens(b, TOKENS, targets=TOKENS.float()), "int tensor"),
        (lambda b: logit_lens(b, TOKENS, targets=[True]), "target True"),
        (lambda b: logit_lens(b, TOKENS, targets=TOKENS[:, 1:]), r"\(2, 6\).*\(2, 7\)"),
        (lambda b: logit_lens(b, TOKENS, targets="t5 t6"), "'t5 t6' is 2 tokens, 't5', 't6'"),
        (lambda b: logit_lens(b, TOKENS[:, :0], targets=1), "non-empty"),
        (lambda b: logit_lens(b, TOKENS + 30, targets=1), r"0\.\.30"),
        (lambda b: logit_lens(b, TOKENS, targets=1, top_k=0), "top_k=0"),
        (lambda b: logit_lens(b, TOKENS, targets=1, top_k=32), "top_k=32.*31 tokens"),
        (lambda b: logit_lens(b, TOKENS, targets=1, chunk_size=0), "chunk_size=0"),
        (lambda b: logit_lens(b, TOKENS, targets=1, loops=[]), "selects nothing"),
        (lambda b: logit_lens(b, TOKENS, targets=1, loops="first"), "loops='first'.*a list of ints"),
        (lambda b: logit_lens(b, TOKENS, targets=1, positions=slice(7, None)), "selects nothing"),
    ],
)
def test_errors_say_what_was_asked_and_what_exists(call: Callable[[Any], Any], says: str, unchecked: None) -> None:
    bridge = with_words()
    with pytest.raises(LoopedError, match=says):
        call(bridge)


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"loops": 3}, r"loop 3 .*3 loops \(0\.\.2\).*n_loops"), ({"positions": [0, 7]}, r"positions 7 .*7 positions \(0\.\.6\)")],
)
def test_indices_outside_the_run(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(OutOfRangeError, match=says):
        logit_lens(shared_bridge("huginn"), TOKENS, targets=1, **asked)


def test_processed_weights_are_refused() -> None:
    bridge = LoopedBridge.from_config(LoopedConfig(**SMALL, n_core=1, n_loops=2))
    bridge.process_weights()
    with pytest.raises(LoopedError, match="compatibility mode"):
        logit_lens(bridge, TOKENS, targets=1)


@pytest.mark.parametrize("lens", ["logit", "native"])
@pytest.mark.parametrize("name", ["ouro", "huginn", "retrofit_llama", "hrm_text", "parcae", "anchored"])
def test_at_a_loop_is_the_shorter_model(name: str, lens: Any) -> None:
    model, loop = shared_bridge(name), 0
    short = model.unroll(1)
    found, right = logit_lens(model, TOKENS, lens=lens, at_loop=loop), logit_lens(short, TOKENS, lens=lens)
    assert found.labels == right.labels and found.layers == right.layers
    assert torch.equal(found.targets, right.targets)
    for part in ("log_probs", "ranks", "entropy", "top_tokens"):
        torch.testing.assert_close(getattr(found, part), getattr(right, part), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.targets[..., 0], model.readout(TOKENS, loop).argmax(-1))
    where = [(name, lambda x, hook: -x) for name in ("coda.blocks.0.hook_resid_pre",) if model.schedule.n_coda]
    with model.hooks(where), short.hooks(where):  # hooks of the run act, also after the loop
        hooked = logit_lens(model, TOKENS, targets=[3], lens=lens, at_loop=-model.n_loops)
        torch.testing.assert_close(
            hooked.log_probs, logit_lens(short, TOKENS, targets=[3], lens=lens).log_probs, atol=1e-5, rtol=1e-4
        )


def test_a_lens_of_more_loops() -> None:
    model = shared_bridge("huginn")
    deep = logit_lens(model, TOKENS, targets=3, n_loops=5)
    assert torch.equal(deep.log_probs, logit_lens(model.unroll(5), TOKENS, targets=3).log_probs)
    both = logit_lens(model, TOKENS, targets=3, n_loops=5, at_loop=3)
    torch.testing.assert_close(both.log_probs, logit_lens(model.unroll(4), TOKENS, targets=3).log_probs, atol=1e-5, rtol=1e-4)
    assert torch.equal(logit_lens(model, TOKENS, targets=3, loops="all").ranks, logit_lens(model, TOKENS, targets=3).ranks)
    assert logit_lens(model, TOKENS, targets=3, loops=slice(None), at_loop=1).labels[-1] == "loops.1.blocks.2"
    for asked, says in (({"at_loop": 3}, "loop 3 is out of range"), ({"n_loops": 2, "at_loop": 2}, "loop 2 is out of range")):
        with pytest.raises(LoopedError, match=says):
            logit_lens(model, TOKENS, targets=3, **asked)


@pytest.mark.parametrize("chunk_size", [2**22, 200])
@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text"])
def test_the_divergence_from_the_last_row(name: str, chunk_size: int) -> None:
    model = shared_bridge(name)
    found = logit_lens(model, TOKENS, targets=3, lens="native", top_k=31, chunk_size=chunk_size)
    log_probs = torch.zeros_like(found.top_log_probs).scatter(-1, found.top_tokens, found.top_log_probs).double()
    last = log_probs[-1]
    right = (last.exp() * (last - log_probs)).sum(-1)
    torch.testing.assert_close(found.kl.double(), right, atol=1e-4, rtol=1e-4)
    assert not found.kl[-1].any() and (found.kl[0] > 0).all()
    answer = model(TOKENS).double().log_softmax(-1)
    torch.testing.assert_close(last, answer, atol=1e-4, rtol=1e-4)
    part = logit_lens(model, TOKENS, targets=3, lens="native", loops=[0, 1], positions=[2, -1], chunk_size=chunk_size)
    assert not part.kl[-1].any() and part.kl.shape == part.entropy.shape
