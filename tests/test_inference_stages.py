"""Stages of inference against formulas written out with numpy, closed forms, and a feed-forward model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_llama
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from zoo import FAMILIES, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedBridge, LoopedError
from tl_looped.analysis import InferenceStages, inference_stages, output_neurons
from tl_looped.analysis.inference_stages import colsum_concentration, matrix_entropy, mixing_score, sink_score

METRICS = ["colsum", "sink_rate", "mixing", "entropy", "norm"]


def by_numpy(pattern: np.ndarray, resid: np.ndarray, tau: float = 0.3) -> list[float]:
    """The five metrics of one example; pattern [head, query, key], resid [pos, d_model]."""
    n = pattern.shape[-1]
    colsum, mixing = [], []
    for head in pattern:
        share = head.sum(0) / n
        colsum.append(1 + sum(c * math.log(c) for c in share if c > 0) / math.log(n))
        mixing.append(-sum(a * math.log(a) for row in head for a in row if a > 0) / n)
    power = np.linalg.svd(resid, compute_uv=False) ** 2
    p = power / power.sum()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    sinks = [head[:, 0].mean() >= tau for head in pattern]
    return [np.mean(colsum), np.mean(sinks), np.mean(mixing), entropy, np.linalg.norm(resid, axis=-1).mean()]


def llama() -> TransformerBridge:
    """An ordinary decoder in TransformerLens, as a user would compare with."""
    hf = tiny_llama(attn_implementation="eager")
    return build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config, dtype=torch.float32, device="cpu")


@FAMILIES
def test_every_metric_is_the_formula_on_the_cached_activations(name: str) -> None:
    bridge, tokens = shared_bridge(name), random_tokens(3)
    stages = inference_stages(bridge, tokens, verbose=False)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    for i in range(bridge.schedule.n_layers):
        pattern, resid = cache["pattern", i].double().numpy(), cache["resid_post", i].double().numpy()
        rows = np.array([by_numpy(a, x) for a, x in zip(pattern, resid, strict=True)])
        for k, metric in enumerate(METRICS):
            found = getattr(stages, metric)
            assert found.values[i].item() == pytest.approx(rows[:, k].mean(), abs=2e-6), (metric, i)
            assert found.stderr[i].item() == pytest.approx(rows[:, k].std(ddof=1) / 3**0.5, abs=2e-6)
            assert found.count == 3
    assert stages.colsum.labels["depth"] == [bridge.schedule.name(i, "x")[:-2] for i in range(bridge.schedule.n_layers)]


def test_closed_forms() -> None:
    n = 6
    uniform, one = torch.full((n, n), 1 / n), torch.zeros(n, n)
    one[:, 0] = 1
    assert colsum_concentration(uniform).item() == pytest.approx(0, abs=1e-7) and colsum_concentration(one).item() == 1
    assert sink_score(one).item() == 1 and sink_score(uniform).item() == pytest.approx(1 / n)
    assert mixing_score(one).item() == 0 and mixing_score(uniform).item() == pytest.approx(math.log(n), rel=1e-6)
    assert mixing_score(torch.eye(n)).item() == 0 and colsum_concentration(torch.eye(n)).item() == pytest.approx(0, abs=1e-15)
    isotropic = torch.linalg.qr(torch.randn(8, 5))[0]
    for x in (isotropic, 7.5 * isotropic, isotropic.T):
        assert matrix_entropy(x).item() == pytest.approx(math.log(5), rel=1e-6)
    assert matrix_entropy(isotropic, unit="bits").item() == pytest.approx(math.log2(5), rel=1e-6)
    rank_one = torch.outer(torch.randn(8), torch.randn(5))
    assert matrix_entropy(rank_one).item() == pytest.approx(0, abs=1e-5)
    assert matrix_entropy(torch.zeros(3, 4)).isnan()  # 0/0
    # A common offset is one large direction; centred, the rest is what it was.
    x = torch.randn(40, 5, dtype=torch.float64)
    x -= x.mean(0)
    assert matrix_entropy(x + 1e3).item() < 1e-3
    assert matrix_entropy(x + 1e3, centred=True).item() == pytest.approx(matrix_entropy(x).item(), rel=1e-6)


def test_options_reach_the_metrics_and_are_named() -> None:
    bridge, tokens = shared_bridge("huginn"), random_tokens()
    plain, other = (inference_stages(bridge, tokens, verbose=False, **o) for o in ({}, {"centred": True, "unit": "bits"}))
    assert (plain.entropy.name, other.entropy.name) == ("matrix entropy (nats)", "centred matrix entropy (bits)")
    with torch.no_grad():
        x = bridge.run_with_cache(tokens)[1]["resid_post", 4]
    assert other.entropy.values[4].item() == pytest.approx(matrix_entropy(x, True, "bits").mean().item())
    assert torch.equal(inference_stages(bridge, tokens, tau=0.0, verbose=False).sink_rate.values, torch.ones(12).double())
    with pytest.raises(LoopedError, match="cannot be added"):
        plain + other


@pytest.mark.parametrize("name", ["hrm_text", "looped_qwen"])
def test_split_work_gives_the_same_as_one_process(name: str) -> None:
    bridge = shared_bridge(name)
    prompts = [random_tokens(2, 5), random_tokens(1, 7, seed=1), random_tokens(3, 4, seed=2)]
    whole = inference_stages(bridge, iter(prompts), verbose=False)
    parts = [inference_stages(bridge, p, verbose=False) for p in prompts]
    merged = parts[2] + (parts[0] + parts[1])
    for metric in METRICS:
        a, b = getattr(whole, metric), getattr(merged, metric)
        assert torch.allclose(a.values, b.values, rtol=1e-12) and torch.allclose(a.stderr, b.stderr, rtol=1e-9)
    frame = whole.to_dataframe()
    assert len(frame) == bridge.schedule.n_layers and set(frame["count"]) == {6} and "norm_stderr" in frame


def made_up(bridge: LoopedBridge, change: Any) -> InferenceStages:
    stages = inference_stages(bridge, random_tokens(), verbose=False)
    for metric in METRICS:
        values = getattr(stages, metric).values
        values.copy_(change(torch.arange(len(values), dtype=torch.float64)))
    return stages


def test_repetition_is_one_for_equal_passes_and_known_for_shifted_ones() -> None:
    bridge = random_bridge("ouro", n_core=4)
    same = made_up(bridge, lambda i: (i % 4).sin()).repetition()
    assert same.values.shape == (2, 5, 2) and torch.allclose(same.values, torch.ones(2, 5, 2).double())
    assert same.labels["loop"] == [1, 2]
    shifted = made_up(bridge, lambda i: i).repetition()  # the same slope, 4 higher in every pass
    var = np.var(range(4))
    assert torch.allclose(shifted.values[..., 0], torch.ones(2, 5).double())
    assert torch.allclose(shifted.values[..., 1], torch.full((2, 5), 2 * var / (2 * var + 16)).double())
    constant = made_up(bridge, lambda i: torch.ones_like(i)).repetition()
    assert constant.values[..., 0].isnan().all() and (constant.values[..., 1] == 1).all()


def test_curves_of_two_stacks_and_of_prelude_and_coda() -> None:
    hrm = made_up(shared_bridge("hrm_text"), lambda i: i)
    assert hrm.curves("norm", "L").tolist() == [[0, 1], [2, 3], [6, 7], [8, 9]]
    assert hrm.curves("norm", "H").tolist() == [[4, 5], [10, 11]]
    with pytest.raises(LoopedError, match="pass stack="):
        hrm.curves("norm")
    huginn = made_up(shared_bridge("huginn"), lambda i: i)
    assert huginn.curves("norm", edges=True).tolist()[1] == [0, 1, 5, 6, 7, 11]
    with pytest.raises(LoopedError, match="there are colsum"):
        huginn.curves("loss")


def test_against_a_feed_forward_model() -> None:
    feed_forward = inference_stages(llama(), random_tokens(), verbose=False)
    assert feed_forward.colsum.labels["depth"] == [f"blocks.{i}" for i in range(4)]
    # The same Llama with layers 1 and 2 in a loop that runs once is the same model.
    bridge = LoopedBridge.loop_layers(tiny_llama(attn_implementation="eager"), 1, 3, n_loops=1)
    once = inference_stages(bridge, random_tokens(), verbose=False)
    for metric in METRICS:
        assert torch.allclose(getattr(once, metric).values, getattr(feed_forward, metric).values, atol=1e-5)
    scores = once.compare(feed_forward)
    assert scores.axes == ("loop", "metric", "score") and scores.values.shape == (1, 5, 2)
    assert torch.allclose(scores.values.nan_to_num(1.0), torch.ones(1, 5, 2).double(), atol=1e-3)
    # Curves of different length are compared at the same relative depth: 0, 1/3, 2/3, 1 against 0, 1/2, 1.
    deep, shallow = made_up(random_bridge("ouro", n_core=4, n_loops=1), lambda i: i / 3), None
    shallow = made_up(random_bridge("ouro", n_core=3, n_loops=2), lambda i: (i % 3) / 2)
    assert torch.allclose(shallow.compare(deep).values, torch.ones(2, 5, 2).double())


def test_output_neurons_are_counted_from_the_weights() -> None:
    models = {"core.1": shared_bridge("ouro"), "coda.0": shared_bridge("huginn"), "blocks.3": llama()}
    for last, bridge in models.items():
        found = output_neurons(bridge, kurtosis=0.5)
        assert found.labels["layer"][-1] == last
        block = bridge.blocks[len(bridge.blocks) - 1]
        unembed = (bridge.ln_final.weight * bridge.W_U.T).detach().double().numpy()
        writes = block.mlp.W_out.detach().double().numpy()
        if getattr(block, "ln2_post", None) is not None:
            writes = writes * block.ln2_post.weight.detach().double().numpy()
        counts = [0, 0]
        for neuron in writes:
            logits = unembed @ neuron
            z = (logits - logits.mean()) / logits.std()
            if (z**4).mean() - 3 >= 0.5:
                counts[int((z**3).mean() < 0)] += 1
        assert found.values[:, -1].tolist() == [c / len(writes) for c in counts]
    assert output_neurons(shared_bridge("hrm_text")).labels["layer"] == ["L.0", "L.1", "H.0", "H.1"]


def test_a_planted_prediction_neuron() -> None:
    bridge = random_bridge("nanbeige", d_model=256, n_heads=4, d_head=8, n_kv_heads=1, d_vocab=200)
    assert output_neurons(bridge).values.sum() == 0
    unembed = bridge.ln_final.weight * bridge.W_U.T
    with torch.no_grad():  # a neuron that raises token 3 and no other, and one that lowers it
        only = torch.linalg.lstsq(unembed, torch.eye(200)[:, 3:4]).solution[:, 0]
        bridge.blocks[0].mlp.out.weight[:, 0], bridge.blocks[0].mlp.out.weight[:, 5] = only, -only
    assert output_neurons(bridge).values.tolist() == [[1 / 20, 0], [1 / 20, 0]]


def test_plots() -> None:
    stages = inference_stages(shared_bridge("huginn"), random_tokens(), verbose=False)
    figure = stages.plot("entropy", "recurrence")
    assert [line.name for line in figure.data] == ["prelude", "loop 0", "loop 1", "loop 2", "coda"]
    assert list(figure.data[2].y) == stages.entropy.values[5:8].tolist()
    assert len(stages.plot().data) == 1 and len(stages.plot(group_by="layer").data) == 6


def test_refusals() -> None:
    bridge = random_bridge("ouro")
    with pytest.raises(LoopedError, match="no prompts"):
        inference_stages(bridge, [], verbose=False)
    with pytest.raises(LoopedError, match="one token"):
        inference_stages(bridge, torch.tensor([3]), verbose=False)
    with pytest.raises(LoopedError, match="does not loop"):
        inference_stages(llama(), random_tokens(), n_loops=2, verbose=False)
    with pytest.raises(LoopedError, match="needs at least 2"):
        inference_stages(bridge, random_tokens(), n_loops=1, verbose=False).repetition()
    with pytest.raises(LoopedError, match="one layer"):
        inference_stages(random_bridge("ouro", n_core=1), random_tokens(), verbose=False).repetition()
    with pytest.raises(LoopedError, match="share of attention"):
        inference_stages(bridge, random_tokens(), tau=3.0, verbose=False)
    bridge.add_hook("loops.1.blocks.1.hook_mlp_out", lambda x, hook: x * torch.nan, is_permanent=True)
    with pytest.raises(LoopedError, match=r"loops\.1\.blocks\.1\.hook_resid_post holds NaN"):
        inference_stages(bridge, random_tokens(), verbose=False)


def test_stages_measured_differently_are_not_compared() -> None:
    bridge, tokens = shared_bridge("looped_qwen"), random_tokens()
    stages = inference_stages(bridge, tokens, verbose=False)
    for other in ({"unit": "bits"}, {"tau": 0.5}, {"centred": True}):
        with pytest.raises(LoopedError, match="measure both alike"):
            stages.compare(inference_stages(bridge, tokens, verbose=False, **other))  # pyright: ignore[reportArgumentType]
    one_layer = LoopedBridge.from_config(bridge.looped_cfg.replace(n_core=1, n_loops=1, n_prelude=0, n_coda=0, windows=()))
    with pytest.raises(LoopedError, match="over one layer"):
        stages.compare(inference_stages(one_layer, tokens, verbose=False))
