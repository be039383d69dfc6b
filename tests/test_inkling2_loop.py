"""Inkling-2 loop: another configuration against its formulas, and what every family must pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_checks import check_family, close
from safetensors.torch import load_file
from torch import Tensor
from zoo import GOLDEN, with_config

from tl_looped import LoopedBridge, LoopedError
from tl_looped.attribution import edge_sweep
from tl_looped.checkpoints import MemoryCheckpoint, load_model
from tl_looped.errors import CheckpointError, RunningSumError
from tl_looped.interventions import ablate, skip_layer, skip_loop
from tl_looped.lenses import logit_lens

D, VOCAB, K, RANK, D_REL, EXTENT, E, TOP, WIDTH, WINDOW, BLOCK = 20, 29, 3, 4, 3, 5, 5, 3, 12, 4, 2
KINDS = "FSSFSFS"  # a full layer first, and a coda that ends inside a block
HEADS = {"F": (6, 2, 5), "S": (3, 3, 8)}
START, STOP = 2, 4
CONFIG: dict[str, Any] = {
    "model_type": "inkling2_loop_text", "hidden_size": D, "vocab_size": VOCAB + 3, "unpadded_vocab_size": VOCAB,
    "layer_types": [{"F": "hybrid", "S": "hybrid_sliding"}[kind] for kind in KINDS], "num_hidden_layers": len(KINDS),
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 5, "swa_num_attention_heads": 3,
    "swa_num_key_value_heads": 3, "swa_head_dim": 8, "sliding_window_size": WINDOW, "d_rel": D_REL, "rel_extent": EXTENT,
    "conv_kernel_size": K, "log_scaling_n_floor": 3, "log_scaling_alpha": 0.5, "loop_gate_rank": RANK,
    "loop_layer_index_start": START, "loop_layer_index_end": STOP, "loop_num_passes": 3, "max_position_embeddings": 48,
    "mlp_gate_softcap": 1.2, "mlp_up_softcap": 2.0, "moe_intermediate_size": WIDTH, "n_layers_per_attn_res_block": BLOCK,
    "n_routed_experts": E, "num_experts_per_tok": TOP, "qk_l2_clip_threshold": 2.5, "rel_l2_clip_threshold": 1.3,
    "rms_norm_eps": 0.001, "route_scale": 1.2, "final_logit_softcapping": 6.0, "scoring_func": "sigmoid",
}  # fmt: skip
TOKENS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("no_grad")


def stored_tensors() -> dict[str, Tensor]:
    """Random tensors under the released names."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (VOCAB + 3, D), "unembed.weight": (VOCAB + 3, D), "embed_norm.weight": (D,), "norm.weight": (D,),
        "attn_res.output_query": (D,), "middle_cycle_cross_pass_queries": (2 * (STOP - START), D),
        "middle_cycle_cross_pass_kv_queries": (2 * (STOP - START), D),
    }  # fmt: skip
    for i, kind in enumerate(KINDS):
        (h, kv, d), at, full = HEADS[kind], f"layers.{i}.", kind == "F"
        extent = EXTENT if full else WINDOW
        shapes |= {f"attn_res.mlp_queries.{i}": (D,)}
        shapes |= {f"attn_res.attn_queries.{i - 1}": (3, D) if full else (D,)} if i else {}
        attention = {"wq_du.weight": (h * d, D), "wk_dv.weight": (kv * d, D), "wv_dv.weight": (kv * d, D),
                     "wo_ud.weight": (D, h * d), "gate_attn.weight": (h * d, D), "attn_sink_proj.weight": (h, D),
                     "wr_du.weight": (h * D_REL, D), "rel_logits_proj.proj": (D_REL, extent),
                     "q_l2_clip.scale": (h, d), "rel_l2_clip.scale": (h, D_REL)}  # fmt: skip
        for x in "kv":
            taps = {"static_w": (K, kv * d), "weight_proj": (kv * K, D)} if full else {"weight": (kv * d, 1, K)}
            attention |= {f"{x}_sconv.{name}": shape for name, shape in taps.items()}
        shapes |= {f"{at}attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"{at}{x}_input_norm.weight": (D,) for x in "qkv"} if full else {f"{at}attn_norm.weight": (D,)}
        shapes |= {f"{at}{x}_sconv.weight": (D, 1, K) for x in ("attn", "mlp")} | {f"{at}mlp_norm.weight": (D,)}
        shapes |= {f"{at}mlp.gate.weight": (E, D), f"{at}mlp.gate.bias": (E,),
                   f"{at}mlp.experts.w13_weight": (E, 2 * WIDTH, D), f"{at}mlp.experts.w2_weight": (E, D, WIDTH)}  # fmt: skip
        if START <= i < STOP:
            for x in ("attn", "k", "v", "mlp"):
                gate = {"down": (RANK, 2 * D), "forget": (D, RANK), "gain": (D, RANK)}
                shapes |= {f"{at}controllers.{x}.{name}_weight": shape for name, shape in gate.items()}
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        plain = "queries" in name or "query" in name or "embed" in name
        tensors[f"model.llm.{name}"] = (
            1 + 0.3 * noise if "norm" in name or "scale" in name else (noise if plain else noise / shape[-1] ** 0.5)
        )
    return tensors


def rms(x: Tensor, eps: float = 0.001) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def mix(sources: list[Tensor], query: Tensor) -> Tensor:
    units = [rms(source, 1e-6) for source in sources]
    weights = torch.stack([unit @ query / math.sqrt(D) for unit in units], -1).softmax(-1)
    return sum((weights[..., j, None] * unit for j, unit in enumerate(units)), torch.zeros(()))


def clip(x: Tensor, length: float) -> Tensor:
    size = x.norm(dim=-1, keepdim=True)
    return x * (length / (size + 1e-6)).clamp(max=1)


def back(x: Tensor, lag: int) -> Tensor:
    return F.pad(x, (0, 0, lag, 0))[:, : x.shape[1]]


def conv(x: Tensor, weight: Tensor) -> Tensor:
    return (sum((weight[:, 0, K - 1 - lag] * back(x, lag) for lag in range(K)), x)) / math.sqrt(K + 1)


class Reference:
    """The forward, from its formulas."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.p = {name.removeprefix("model.llm."): value for name, value in tensors.items()}

    def attention(self, i: int, x: list[Tensor]) -> Tensor:
        p, at, (h, kv, d), full = self.p, f"layers.{i}.attn.", HEADS[KINDS[i]], KINDS[i] == "F"
        n = x[0].shape[1]

        def projected(name: str, read: Tensor) -> Tensor:
            u = read @ p[f"{at}w{name}_dv.weight"].T
            if not full:
                return conv(u, p[f"{at}{name}_sconv.weight"]).unflatten(-1, (kv, d))
            total, taps = u, (read @ p[f"{at}{name}_sconv.weight_proj"].T).unflatten(-1, (kv, K))
            for lag in range(K):
                tap = p[f"{at}{name}_sconv.static_w"][lag] + taps[..., lag].repeat_interleave(d, -1)
                total = total + tap * back(u, lag)
            return (total / math.sqrt(2 * K + 1)).unflatten(-1, (kv, d))

        k, v = clip(projected("k", x[1]), 2.5), rms(projected("v", x[2]))
        q = clip((x[0] @ p[f"{at}wq_du.weight"].T).unflatten(-1, (h, d)) * p[f"{at}q_l2_clip.scale"], 2.5)
        r = clip((x[0] @ p[f"{at}wr_du.weight"].T).unflatten(-1, (h, D_REL)) * p[f"{at}rel_l2_clip.scale"], 1.3)
        if full:
            tau = 1 + 0.5 * torch.tensor([math.log(max((pos + 1) / 3, 1)) for pos in range(n)], dtype=q.dtype)[:, None, None]
            q, r = q * tau, r * tau
        table, heads = p[f"{at}rel_logits_proj.proj"], []
        sinks = x[0] @ p[f"{at}attn_sink_proj.weight"].T
        for head in range(h):
            group, rows = head // (h // kv), []
            for s in range(n):
                first = 0 if full else max(0, s - WINDOW + 1)
                scores = [
                    (q[:, s, head] * k[:, t, group]).sum(-1) / math.sqrt(d)
                    + ((r[:, s, head] @ table[:, s - t]) if s - t < table.shape[1] else 0)
                    for t in range(first, s + 1)
                ]
                a = torch.stack([*scores, sinks[:, s, head]], -1).softmax(-1)[:, :-1]
                rows.append(torch.einsum("bt,bti->bi", a, v[:, first : s + 1, group]))
            heads.append(torch.stack(rows, 1))
        gate = torch.sigmoid(x[0] @ p[f"{at}gate_attn.weight"].T)
        return (torch.cat(heads, -1) * gate) @ p[f"{at}wo_ud.weight"].T

    def experts(self, i: int, x: Tensor) -> Tensor:
        p, at = self.p, f"layers.{i}.mlp."
        scores = torch.sigmoid(x @ p[f"{at}gate.weight"].T)
        out = torch.zeros_like(x)
        for b, s in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
            chosen = (scores[b, s] + p[f"{at}gate.bias"]).argsort(descending=True)[:TOP]
            for e in chosen.tolist():
                both = p[f"{at}experts.w13_weight"][e] @ x[b, s]
                gate, up = both[0::2], both[1::2]
                post = 1.2 * torch.tanh(gate / 1.2) * torch.sigmoid(gate) * 2 * torch.tanh(up / 2)
                weight = scores[b, s, e] / scores[b, s, chosen].sum() * 1.2
                out[b, s] += weight * (p[f"{at}experts.w2_weight"][e] @ post)
        return out

    def gated(self, i: int, name: str, c: Tensor, message: Tensor) -> Tensor:
        down, forget, gain = (self.p[f"layers.{i}.controllers.{name}.{part}_weight"] for part in ("down", "forget", "gain"))
        low = torch.cat((rms(c), rms(message)), -1) @ down.T
        return (1 - torch.tanh(low @ forget.T)) * c + torch.tanh(low @ gain.T) * message

    def layer(self, i: int, h: Tensor, blocks: list[Tensor], past: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        p, at, full = self.p, f"layers.{i}.", KINDS[i] == "F"
        queries = p[f"attn_res.attn_queries.{i - 1}"].reshape(-1, D) if i else []
        c = [mix([*blocks, h], query) for query in queries] or [h]
        c = c * 3 if len(c) == 1 else c
        j = 2 * (i - START)
        if past is not None:
            own, kv = p["middle_cycle_cross_pass_queries"], p["middle_cycle_cross_pass_kv_queries"]
            messages = [mix(past, query) for query in (own[j], kv[j], kv[j + 1])]
            c = [self.gated(i, name, x, m) for name, x, m in zip(("attn", "k", "v"), c, messages, strict=True)]
        norms = [p[f"{at}{x}_input_norm.weight"] for x in "qkv"] if full else [p[f"{at}attn_norm.weight"]] * 3
        y = conv(self.attention(i, [rms(x) * norm for x, norm in zip(c, norms, strict=True)]), p[f"{at}attn_sconv.weight"])
        h, blocks = (y, [*blocks, h]) if i % BLOCK == 0 else (h + y, blocks)
        c = [mix([*blocks, h], p[f"attn_res.mlp_queries.{i}"])]
        if past is not None:
            c = [self.gated(i, "mlp", c[0], mix(past, p["middle_cycle_cross_pass_queries"][j + 1]))]
        return h + conv(self.experts(i, rms(c[0]) * p[f"{at}mlp_norm.weight"]), p[f"{at}mlp_sconv.weight"]), blocks

    def __call__(self, tokens: Tensor, n_loops: int) -> Tensor:
        p = self.p
        h, blocks = rms(p["embed.weight"][tokens]) * p["embed_norm.weight"], list[Tensor]()
        for i in range(START):
            h, blocks = self.layer(i, h, blocks, None)
        begun, past = (h, blocks), None
        for _ in range(n_loops):
            h, blocks = begun
            for i in range(START, STOP):
                h, blocks = self.layer(i, h, blocks, past)
            past = [*blocks[len(begun[1]) + 1 :], h]
        for i in range(STOP, len(KINDS)):
            h, blocks = self.layer(i, h, blocks, None)
        c = rms(mix([*blocks, h], p["attn_res.output_query"])) * p["norm.weight"]
        return 6 * torch.tanh(c @ p["unembed.weight"][:VOCAB].T / 6)


@pytest.fixture(scope="module", name="bridge")
def _bridge() -> LoopedBridge:
    return LoopedBridge(load_model(MemoryCheckpoint(CONFIG, stored_tensors())), None, "inkling2_loop")


def test_another_configuration_follows_the_formulas(bridge: LoopedBridge) -> None:
    reference = Reference(stored_tensors())
    for n_loops in (1, 2, 3):
        close(bridge.unroll(n_loops)(TOKENS), reference(TOKENS, n_loops))


def test_what_every_family_must_pass(bridge: LoopedBridge) -> None:
    report = check_family(bridge)
    assert report["attribution"].status == "passed"


def test_earlier_passes_reach_the_logits_through_messages_alone(bridge: LoopedBridge) -> None:
    _, cache = bridge.run_with_cache(TOKENS)
    found = cache.attribute_logits(tokens=7, positions=None)
    early = [i for i, label in enumerate(found.labels) if label.startswith(("loops.0.", "loops.1."))]
    assert len(early) == 2 * 2 * (STOP - START) and not found.values[early].any()
    share = cache["final_mix.hook_weights"] / cache["final_mix.hook_scale"]  # of the last block's sum
    direct = share[..., -1:] * cache[f"blocks.{bridge.cfg.n_layers - 1}.hook_mlp_out"]
    expected = direct / cache["ln_final.hook_scale"] * bridge.ln_final.weight @ bridge.W_U[:, 7]
    close(found.values[-1], expected)
    without = bridge.run_with_hooks(TOKENS, fwd_hooks=[("loops.1:.hook_sources", lambda x, hook: x.flip(-1))])
    assert (without - bridge(TOKENS)).abs().max() > 1e-2


def test_contributions_of_padded_rows_are_those_of_the_rows_alone(bridge: LoopedBridge) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    alone = bridge.run_with_cache(TOKENS[:1, 3:])[1].attribute_logits(tokens=7, unit="head")
    both = bridge.run_with_cache(TOKENS, attention_mask=mask)[1].attribute_logits(tokens=7, unit="head")
    assert alone.labels == both.labels
    close(both.values[:, :1], alone.values)
    assert sum("head" in label for label in alone.labels) == sum(HEADS[KINDS[i]][0] for i in bridge.plain.cfg.schedule.physical)


def test_contributions_in_half_precision() -> None:
    bridge = LoopedBridge.from_pretrained(GOLDEN / "inkling2_loop", dtype=torch.bfloat16)
    _, cache = bridge.run_with_cache(torch.tensor([[1, 2, 3, 4]]))
    logit = (cache["unembed.hook_in"] @ bridge.W_U[:, 7])[:, -1].float()
    for unit in ("component", "head"):
        found = cache.attribute_logits(tokens=7, unit=unit).values.sum(0)
        torch.testing.assert_close(found, logit, atol=0.2, rtol=0.05)


def test_heads_of_a_cache_of_some_positions_are_refused(bridge: LoopedBridge) -> None:
    _, cache = bridge.run_with_cache(TOKENS, pos_slice=-1)
    with pytest.raises(LoopedError, match="earlier positions"):
        cache.attribute_logits(tokens=7, unit="head")
    assert cache.attribute_logits(tokens=7).values.shape[1:] == (2,)


@pytest.mark.parametrize("default", [True, False])
def test_left_padding(default: bool) -> None:
    bridge, data = (
        LoopedBridge.from_pretrained(GOLDEN / "inkling2_loop"),
        load_file(GOLDEN / "inkling2_loop/golden.safetensors"),
    )
    mask = data["R3/leftpad_attention_mask"]
    positions = {"position_ids": torch.arange(12)[None]} if default else {}
    expected = data["R3/leftpad_logits_default_positions" if default else "R3/leftpad_logits"]
    found = bridge(data["input_ids"], attention_mask=mask, **positions)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-4, rtol=0)


def test_cached_steps_keep_what_the_convolutions_read() -> None:
    bridge, data = (
        LoopedBridge.from_pretrained(GOLDEN / "inkling2_loop"),
        load_file(GOLDEN / "inkling2_loop/golden.safetensors"),
    )
    state, logits = None, []
    for token in data["input_ids"].split(1, dim=1):
        out = bridge.plain(token, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), data["R3/cached_logits"], atol=2e-4, rtol=0)
    kept: Any = state
    block: Any = bridge.plain.blocks[11]
    for conv_of, which in ((block.attn.k_conv, 0), (block.attn.v_conv, 1), (block.attn_conv, 2), (block.mlp_conv, 3)):
        found = kept.layers[conv_of.slot].keys[:, 0, -4:].mT
        torch.testing.assert_close(found, data[f"R3/cache_conv{which}/core/layer1/loop2"], atol=2e-4, rtol=0)


def test_readouts_and_the_native_lens_are_those_of_shorter_runs(bridge: LoopedBridge) -> None:
    every = bridge.readout(TOKENS, loop="all")
    lens = logit_lens(bridge, TOKENS, lens="native", targets=[7])
    for n_loops in (1, 2, 3):
        shorter = bridge.unroll(n_loops)(TOKENS)
        close(every[n_loops - 1], shorter)
        row = lens.labels.index(f"loops.{n_loops - 1}.blocks.{STOP - START - 1}")
        torch.testing.assert_close(lens.probs[row][..., 0], shorter.softmax(-1)[..., 7].to(lens.probs.dtype))


def test_packed_texts_and_caches_of_other_depths_are_refused(bridge: LoopedBridge) -> None:
    with pytest.raises(LoopedError, match="packed"):
        bridge(TOKENS, position_ids=torch.arange(9)[None] % 5)
    cache = bridge.plain(TOKENS[:, :5], use_cache=True).past_key_values
    for n_loops in (2, 4):
        with pytest.raises(LoopedError, match="another n_loops"):
            bridge.plain.unrolled(n_loops)(TOKENS[:, 5:], past_key_values=cache)


def test_every_pass_begins_with_the_state_that_is_given(bridge: LoopedBridge) -> None:
    state = torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    given, cache = bridge.run_with_cache(TOKENS, initial_state=state)
    close(given, bridge.run_with_hooks(TOKENS, fwd_hooks=[("loops.0.hook_state", lambda x, hook: state)]))
    assert all(torch.equal(cache[f"loops.{t}.hook_state"], state) for t in range(3))
    found = cache.attribute_logits(tokens=7, positions=None)
    assert "initial_state" in found.labels
    close(found.values.sum(0), cache["unembed.hook_in"] @ bridge.W_U[:, 7])


def test_what_takes_the_stream_for_all_that_is_read_is_refused(bridge: LoopedBridge) -> None:
    _, cache = bridge.run_with_cache(TOKENS)
    asked = [
        lambda: logit_lens(bridge, TOKENS),
        lambda: skip_layer(bridge),
        lambda: skip_loop(bridge, 1),
        lambda: edge_sweep(bridge, TOKENS, cache, lambda logits: logits[:, -1, 0]),
        lambda: cache.decompose_resid(layer=3, apply_ln=True),
        lambda: cache.accumulated_resid(layer=None, apply_ln=True),
        lambda: bridge.set_use_split_qkv_input(True),
        lambda: bridge(cache["blocks.4.hook_resid_pre"], start_at_layer=4),
    ]
    for ask in asked:
        with pytest.raises(LoopedError, match="mixture"):
            ask()
    with pytest.raises(RunningSumError, match="mixture"):
        _ = bridge.blocks[0].hook_out_is_single_residual_stream
    with pytest.raises(LoopedError, match="experts"):
        ablate(bridge, "neuron")
    for stacked in ("W_O", "W_K"):
        with pytest.raises(LoopedError, match="3 heads of 8"):
            getattr(bridge, stacked)
    with pytest.raises(LoopedError, match="3 heads of 8"):
        ablate(bridge, "head", heads=0)


def test_what_a_token_costs_counts_the_chosen_experts_and_the_heads_of_every_layer(bridge: LoopedBridge) -> None:
    found = bridge.facts().sizes
    core = [range(START, STOP)[j] for j in range(STOP - START)]
    assert found.cache_per_loop == 2 * sum(HEADS[KINDS[i]][1] * HEADS[KINDS[i]][2] for i in core)
    experts = 3 * E * WIDTH * D * len(core)
    matrices = sum(p.numel() for name, p in bridge.core_weights.items() if p.ndim > 1) - experts
    assert found.flops_per_loop == 2 * (matrices + experts * TOP // E)


def test_what_a_config_says_twice_must_agree() -> None:
    given = {"core_start": 2, "core_end": 6, "num_passes": 2, "gate_rank": 5}
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(CheckpointError, match=r"loop_num_passes=3.*'num_passes'.*=2"):
        load_model(with_config("inkling2_loop", loop_config=given))
    shorter = load_model(with_config("inkling2_loop", loop_config=given, loop_num_passes=None))
    assert torch.equal(shorter(tokens).logits, load_model(with_config("inkling2_loop", loop_num_passes=2))(tokens).logits)
    with pytest.raises(CheckpointError, match="n_routed_experts=5 and num_local_experts=4"):
        load_model(with_config("inkling2_loop", num_local_experts=4))
    with pytest.raises(CheckpointError, match="must begin a block"):
        load_model(with_config("inkling2_loop", loop_layer_index_start=1))
