"""TransformerLens's own tools on looped models: each equals a direct computation, or refuses."""

from __future__ import annotations

from functools import cache as once

import pytest
import torch
from helpers import plain_model, word_tokenizer
from short_models import CLEAN, CORRUPTED, SHORT, short
from torch.nn.functional import cross_entropy
from transformer_lens import SVDInterpreter, evals
from transformer_lens.head_detector import detect_head
from transformer_lens.tools.analysis import (
    JacobianLens,
    SubspaceInterchange,
    attention_head_subspace_affinity,
    collect_activations,
    fit_das,
    fit_sparse_probe,
    intervened_logits,
    logit_lens,
    reinitialized,
    run_with_intervention,
)
from transformer_lens.tools.analysis.logit_lens import logit_readout
from zoo import FAMILIES, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedBridge, LoopedConfig, LoopedError

# Lenses


@FAMILIES
@pytest.mark.parametrize("compatible", [False, True])
def test_logit_lens_is_the_last_norm_and_the_unembedding(name: str, compatible: bool) -> None:
    bridge = random_bridge(name)
    plain = plain_model(bridge)
    if compatible:
        bridge.enable_compatibility_mode()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(CORRUPTED)
        result = logit_lens(bridge, CORRUPTED, positions=None, return_type="log_probs")
        from_cache = logit_lens(cache, positions=None, return_type="log_probs")
        assert len(result.labels) == len(result.values) == bridge.cfg.n_layers + 1
        for entry, values in enumerate(result.values):
            is_last = entry == bridge.cfg.n_layers
            stream = cache["resid_post", -1] if is_last else cache["resid_pre", entry]
            normed = plain.ln_final.unhooked(stream)
            by_hand = normed @ (plain.unembed.weight.T)
            if (cap := bridge.looped_cfg.logit_softcap) is not None:
                by_hand = cap * torch.tanh(by_hand / cap)
            torch.testing.assert_close(values, by_hand.log_softmax(-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.values[-1], logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(from_cache.values, result.values)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("anchored", {"n_coda": 0}), ("huginn", {"n_coda": 0}), ("nanbeige", {"final_norm": True})],
)
def test_readouts_of_the_stream_are_refused_where_the_model_does_not_read_it(name: str, changes: dict[str, object]) -> None:
    bridge = random_bridge(name, **changes)
    bridge.tokenizer = word_tokenizer()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CORRUPTED)
    calls = [
        lambda: logit_lens(bridge, CORRUPTED),
        lambda: logit_lens(cache),
        lambda: logit_readout(bridge, cache["resid_post", 0]),
        lambda: JacobianLens.fit(bridge, ["t3 t4 t5 t6"], corpus="toy", skip_first_positions=0, show_progress=False),
    ]
    for call in calls:
        with pytest.raises(LoopedError, match="native"):
            call()


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text", "parcae", "looped_qwen"])
def test_jacobian_lens_is_the_jacobian_of_the_plain_model(name: str) -> None:
    bridge = short(name)
    bridge.tokenizer = word_tokenizer()
    prompts = ["t3 t9 t4 t30", "t8 t7 t7"]
    lens = JacobianLens.fit(bridge, prompts, corpus="toy", skip_first_positions=0, show_progress=False, dim_batch=24)
    plain = plain_model(bridge)
    last = bridge.cfg.n_layers - 1
    assert lens.source_layers == list(range(last))
    expected = dict.fromkeys(range(last), torch.zeros(24, 24))
    for prompt in prompts:
        outs: list[torch.Tensor] = []
        handles = [block.register_forward_hook(lambda m, i, out, to=outs: to.append(out)) for block in plain.blocks]
        plain(bridge.to_tokens(prompt))
        for handle in handles:
            handle.remove()
        n = outs[0].shape[1] - 1  # the last position is neither source nor target
        for row in range(24):
            gradients = torch.autograd.grad(outs[last][0, :n, row].sum(), outs[:last], retain_graph=True)
            for layer, gradient in enumerate(gradients):
                expected[layer] = expected[layer].clone()
                expected[layer][row] += gradient[0, :n].mean(0) / len(prompts)
    for layer in range(last):
        scale = float(expected[layer].abs().max())
        torch.testing.assert_close(lens.jacobians[layer], expected[layer], atol=1e-4 * scale, rtol=1e-4)
        state = torch.randn(3, 24)
        torch.testing.assert_close(lens.transport(state, layer), state @ lens.jacobians[layer].T)
    readout = lens.readout(bridge, "t3 t9 t4", return_full_logits=True)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(bridge.to_tokens("t3 t9 t4"))
        decoded = bridge.unembed(bridge.ln_final(lens.transport(cache["resid_post", 0], 0)))
    if (cap := bridge.looped_cfg.logit_softcap) is not None:
        decoded = cap * torch.tanh(decoded / cap)
    torch.testing.assert_close(readout.lens_logits[0], decoded[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(readout.lens_logits[last], logits[0])


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text"])
def test_jacobian_lens_intervenes_in_one_loop(name: str) -> None:
    bridge = short(name)
    bridge.tokenizer = word_tokenizer()
    lens = JacobianLens.fit(bridge, ["t3 t9 t4 t30"], corpus="toy", skip_first_positions=0, show_progress=False, dim_batch=24)
    layer = bridge.schedule.pass_of_loop(0).first
    raw = bridge.W_U[:, [5, 8]].detach().T @ lens.jacobians[layer]
    unit = raw[0] / raw[0].norm()

    def steered(x: torch.Tensor) -> torch.Tensor:
        return x + 2 * x.norm(dim=-1).median() * unit

    def ablated(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ unit)[..., None] * unit

    def swapped(x: torch.Tensor) -> torch.Tensor:
        coordinates = x @ torch.linalg.pinv(raw)
        return x + (coordinates.flip(-1) - coordinates) @ raw

    cases = [
        (lens.steering_hooks(bridge, 5, [layer], alpha=2.0), steered),
        (lens.ablation_hooks(bridge, 5, [layer]), ablated),
        (lens.swap_hooks(bridge, 5, 8, [layer]), swapped),
    ]
    loop_name = bridge.schedule.name(layer, "hook_resid_post")
    with torch.no_grad():
        for hooks, by_hand in cases:
            expected = bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(loop_name, lambda t, hook, f=by_hand: f(t))])
            torch.testing.assert_close(bridge.run_with_hooks(CORRUPTED, fwd_hooks=hooks), expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(expected, bridge(CORRUPTED), atol=1e-3)
    with pytest.raises(ValueError, match="final-layer"):  # another number of loops is another model to it
        lens.validate_model(bridge.unroll(3))


# Weights


def test_composition_scores_where_the_stream_is_a_running_sum() -> None:
    bridge = shared_bridge("looped_qwen")
    with torch.no_grad():
        result = bridge.all_composition_scores("K")
        weights = bridge.original_model.canonical_parameters()
    assert result.layer_indices == list(range(8))

    def of(site: str, letter: str, head: int) -> torch.Tensor:
        rows = weights[f"{site}.attn.{letter}.weight"]
        return rows[:, 8 * head : 8 * head + 8] if letter == "o" else rows[8 * head : 8 * head + 8]

    written = of("core.1", "v", 0).T @ of("core.1", "o", 2).T  # layer 2: loop 0; one key-value head serves all
    read = of("core.0", "k", 0).T @ of("core.0", "q", 1)  # layer 5: loop 2
    expected = (written @ read).norm() / written.norm() / read.norm()
    torch.testing.assert_close(result.scores[2, 2, 5, 1], expected)
    assert not result.scores[5, :, 2].any()


@pytest.mark.parametrize("name", ["ouro", "huginn", "looped_qwen", "hrm_text"])
@pytest.mark.parametrize("role", ["Q", "V"])
def test_projection_kernel_of_virtual_layers(name: str, role: str) -> None:
    bridge = short(name)
    with torch.no_grad():
        result = attention_head_subspace_affinity(bridge, target_role=role)
        last = bridge.cfg.n_layers - 1
        written, _ = torch.linalg.qr(bridge.blocks[0].attn.o.weight[:, 8:16])
        read, _ = torch.linalg.qr(getattr(bridge.blocks[last].attn, role.lower()).weight[:8].T)
    assert result.scores.shape[:3:2] == (last + 1, last + 1)
    torch.testing.assert_close(result.scores[0, 1, last, 0], (written.T @ read).square().sum(), atol=1e-4, rtol=1e-4)


@FAMILIES
def test_singular_vectors_of_virtual_layers(name: str) -> None:
    bridge = shared_bridge(name)
    interpreter = SVDInterpreter(bridge)
    layer = bridge.cfg.n_layers - 1
    with torch.no_grad():
        block, group = bridge.blocks[layer], 3 // bridge.looped_cfg.n_kv_heads
        kv = 2 // group
        ov = block.attn.v.weight[8 * kv : 8 * kv + 8].T @ block.attn.o.weight[:, 16:24].T
        w_in = getattr(block.mlp, "in").weight
        if "ln2" in block._modules and block.ln2.weight is not None:
            w_in = w_in * block.ln2.weight
        matrices = {"OV": ov, "w_in": w_in, "w_out": block.mlp.out.weight.T}
        for kind, matrix in matrices.items():
            vectors = interpreter.get_singular_vectors(kind, layer, num_vectors=3, head_index=2 if kind == "OV" else None)
            expected = bridge.W_U.T @ torch.linalg.svd(matrix).Vh[:3].T
            torch.testing.assert_close(vectors[:, 0].abs(), expected.abs(), atol=1e-3, rtol=1e-3)  # the sign is arbitrary


@FAMILIES
def test_accumulated_bias_is_the_sum_or_refused(name: str) -> None:
    assert not shared_bridge(name).accumulated_bias(2).any()  # no biases, nothing to add up
    biased = random_bridge(name, biases=("o", "out"))
    if name != "looped_qwen":
        with pytest.raises(LoopedError, match=r"accumulated_bias.*running sum"):
            biased.accumulated_bias(biased.cfg.n_layers)
        return
    weights = biased.original_model.canonical_parameters()
    expected = sum(
        weights[f"{layer}.attn.o.bias"] + weights[f"{layer}.mlp.down.bias"]
        for layer in ("prelude.0", "core.0", "core.1", "core.0")
    )
    torch.testing.assert_close(biased.accumulated_bias(4), expected)
    torch.testing.assert_close(biased.accumulated_bias(4, mlp_input=True), expected + weights["core.1.attn.o.bias"])


# Patterns, interventions, probes, evaluations


@pytest.mark.parametrize("name", SHORT)
def test_head_detector_scores_every_loop(name: str) -> None:
    bridge = short(name)
    bridge.tokenizer = word_tokenizer()
    prompt = "t3 t4 t3 t4"
    with torch.no_grad():
        scores = detect_head(bridge, prompt, "previous_token_head")
        _, cache = bridge.run_with_cache(bridge.to_tokens(prompt))
    assert tuple(scores.shape) == (bridge.cfg.n_layers, 3)
    for layer in range(bridge.cfg.n_layers):
        pattern = cache[bridge.schedule.name(layer, "attn.hook_pattern")][0]
        expected = pattern.diagonal(-1, dim1=-2, dim2=-1).sum(-1) / pattern.sum((-2, -1))
        torch.testing.assert_close(scores[layer], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text"])
def test_interchange_interventions_at_one_loop(name: str) -> None:
    bridge = short(name)
    stack = bridge.schedule.core_stacks[-1]
    hook_name = ("" if stack == "core" else f"{stack}.") + "loops.1.hook_state"
    basis, _ = torch.linalg.qr(torch.randn(24, 4))
    positions = torch.tensor([1])
    task = lambda tokens: bridge(tokens)[:, -1]  # noqa: E731
    with torch.no_grad():
        source = collect_activations(bridge, hook_name, CLEAN, task, positions=positions)
        logits = run_with_intervention(
            bridge, hook_name, SubspaceInterchange(basis), CORRUPTED, source, task, positions=positions
        )
        _, clean = bridge.run_with_cache(CLEAN)

        def patch(tensor: torch.Tensor, hook: object) -> torch.Tensor:
            new = tensor.clone()
            new[:, 1] += (clean[hook_name][:, 1] - tensor[:, 1]) @ basis @ basis.T
            return new

        by_hand = bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(hook_name, patch)])[:, -1]
    torch.testing.assert_close(source, clean[hook_name][:, 1])
    torch.testing.assert_close(logits, by_hand)
    assert not torch.equal(logits, task(CORRUPTED))


def test_alignment_search_in_one_loop() -> None:
    bridge = short("huginn")
    base, source = random_tokens(8, 3, seed=3), random_tokens(8, 3, seed=4)
    at, task = torch.full((8,), 2), lambda tokens: bridge(tokens)[:, -1]
    hook_name = "loops.1.hook_in"
    with torch.no_grad():
        states = collect_activations(bridge, hook_name, source, task, positions=at)
        targets = task(source).argmax(-1)
    found = fit_das(bridge, hook_name, base, source, targets, task, rank=24, epochs=1, base_positions=at, source_positions=at)
    with torch.no_grad():
        logits = intervened_logits(bridge, hook_name, SubspaceInterchange(found.basis), base, states, task, positions=at)

        def patch(tensor: torch.Tensor, hook: object) -> torch.Tensor:
            new = tensor.clone()
            new[:, 2] = states  # all 24 directions are exchanged
            return new

        by_hand = bridge.run_with_hooks(base, fwd_hooks=[(hook_name, patch)])[:, -1]
        torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=1e-4)
        with pytest.raises(RuntimeError, match="fired 2 times"):
            collect_activations(bridge, "loops.*.hook_in", source, task, positions=at)


@FAMILIES
def test_untrained_twins_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot reset"):
        reinitialized(shared_bridge(name), 0)


def test_sparse_probes_read_the_state_of_a_loop() -> None:
    bridge = short("ouro")
    tokens = random_tokens(40, 4)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter="loops.0.hook_out")
        states: list[torch.Tensor] = []
        plain = plain_model(bridge)
        plain.passes[0].norm.register_forward_hook(lambda m, i, out: states.append(out))
        plain(tokens)
    labels = states[0][:, -1, 7] > states[0][:, -1, 7].median()
    result = fit_sparse_probe(cache["loops.0.hook_out"][:, -1], labels, k=1)
    assert result.selected_features.tolist() == [7] and result.metrics.roc_auc == 1.0
    expected = fit_sparse_probe(states[0][:, -1], labels, k=1)
    assert torch.equal(result.coefficients, expected.coefficients)


@once
def long_vocabulary() -> LoopedBridge:
    cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=20_000, n_core=1, n_loops=2, injection="concat", initial_state="noise")
    return LoopedBridge.from_config(cfg)


def test_evaluations_equal_the_loss_of_the_plain_model() -> None:
    bridge = long_vocabulary()
    plain = plain_model(bridge)
    batches = [{"tokens": random_tokens(2, 7, seed)} for seed in (0, 1)]

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return cross_entropy(plain(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    with torch.no_grad():
        expected = sum(float(loss(batch["tokens"])) for batch in batches) / 2
        assert evals.evaluate_on_dataset(bridge, batches, device="cpu") == pytest.approx(expected, rel=1e-5)
        torch.manual_seed(4)
        induction = evals.induction_loss(bridge, batch_size=2, subseq_len=6, prepend_bos=False, device="cpu")
        torch.manual_seed(4)
        tokens = torch.randint(100, 20000, (2, 6)).repeat(1, 2)
        log_probs = plain(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(abs(float(induction)), abs(float(log_probs[:, 7:].mean())), rtol=1e-5, atol=0)


def test_indirect_objects() -> None:
    bridge = short("ouro")
    prompts = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    samples = [
        {"prompt": prompt, "IO": prompt[-1:], "S": wrong}
        for prompt, wrong in zip(prompts, (torch.tensor([20]), torch.tensor([21])), strict=True)
    ]
    with torch.no_grad():
        result = evals.ioi_eval(bridge, dataset=samples, batch_size=1, tokenizer=word_tokenizer())
        logits = plain_model(bridge)(prompts).logits[:, -2]
    differences = [float(logits[0, 8] - logits[0, 20]), float(logits[1, 14] - logits[1, 21])]
    assert float(result["Logit Difference"]) == pytest.approx(sum(differences) / 2, rel=1e-4)
    assert result["Accuracy"] == sum(d > 0 for d in differences) / 2
