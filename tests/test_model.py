"""The canonical model, on small configurations that together use every option of `LoopedConfig`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tl_looped.errors import LoopedError, OutOfRangeError
from tl_looped.model import LoopedModel
from tl_looped.model.config import LoopedConfig
from tl_looped.model.layers import Block
from tl_looped.model.looped_model import initialise
from tl_looped.model.norms import RMSNorm
from tl_looped.model.passes import PassEnds

SIZES: dict[str, Any] = {"d_model": 24, "n_heads": 3, "d_vocab": 29, "n_core": 2, "n_loops": 3, "d_mlp": 40, "n_ctx": 24}
FINAL_PASS_NORM = {"pass_norm": True, "final_norm": False}
NOISE = {"injection": "concat", "initial_state": "noise", "noise_std": 0.6}
EVERY_BIAS = ("q", "k", "v", "o", "gate", "in", "out", "attn_gate")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 16
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"n_kv_heads": 1, "tied": True},
    "ouro": {"norm": "sandwich", "exit_gate": True, "rope_theta": 1e6, **FINAL_PASS_NORM},
    "huginn": {"norm": "stream", **NOISE, "after_loop": "final_norm", "rope_layout": "pairs", "tied": True, "embed_scale": 4.9}
    | {"biases": ("q", "k"), "n_prelude": 1, "n_coda": 1, "noise_scale": 1.5},
    "retrofit_llama": {
        **NOISE,
        "n_heads": 6,
        "n_kv_heads": 2,
        "rope_scaling": LLAMA3,
        "n_prelude": 2,
        "n_coda": 1,
        "d_head": 8,
    },
    "retrofit_olmo": {
        "norm": "branch",
        **NOISE,
        "noise": "normal",
        "qk_norm": "flat",
        "n_kv_heads": 1,
        "n_prelude": 1,
        "n_coda": 2,
    },
    "hrm_text": {"l_cycles": 2, "n_loops": 2, "injection": "add", "initial_state": "learned", **FINAL_PASS_NORM}
    | {"norm_weight": False, "attn_gate": True, "prefix_lm": True, "embed_scale": 3.0},
    "parcae": {"mlp": "relu_squared", "injection": "decay", "initial_state": "noise", "noise_std": 0.3, "prelude_norm": True}
    | {"after_loop": "linear", "rope_layout": "pairs", "qk_norm": "after_rope", "n_prelude": 1, "n_coda": 1, "tied": True}
    | {"value_embed_layers": (1, 3), "value_gate_width": 5, "logit_softcap": 6.0},
    "nanbeige": {"d_head": 10, "n_kv_heads": 1, "act_fn": "gelu", **FINAL_PASS_NORM},
    "qwen3": {"qk_norm": "head", "windows": (3, None), "biases": EVERY_BIAS, "attn_gate": True, "act_fn": "gelu_tanh"},
    "anchored": {"strategy": "anchored", "anchor_steps": 3, "beta": 0.3, "n_prelude": 1, "n_coda": 1, "exit_gate": True},
    "nanochat": {"norm": "stream", "injection": "add", "prelude_norm": True, "pass_norm": True, "rope_layout": "none"}
    | {"windows": (4, 4, None), "n_coda": 1, "act_fn": "relu", "logit_softcap": 15.0},
    "decay": {"injection": "decay", "norm": "sandwich", "n_prelude": 2, "qk_norm": "head", "norm_eps": 1e-5, "n_loops": 4}
    | {"qk_norm_eps": 1e-3},
    "dory": {"norm": "sandwich", "norm_kind": "l2", "norm_weight": False, "inner_norm": True, "residual": "interpolate"}
    | {"qk_norm": "head", "qk_norm_weight": False, "query_gain": True, "attn_gate": True, "windows": (3, None, 3)}
    | {"rope_theta_windowed": 50.0, "injection": "add", "prelude_norm": True, "entry_norm": True, "n_prelude": 1},
    "gpt": {"mlp": "plain", "act_fn": "gelu", "learned_positions": True, "norm_eps": None, "biases": ("q", "o", "in")}
    | {"rope_layout": "none", "n_prelude": 1, "tied": True},
    "bf16 angles": {"rope_precision": "bfloat16"},
    "loopus": {"loop": "gated", "options": {"gate_rank": 3}, "exit_gate": True, "n_prelude": 1, "qk_norm": "head"},
}
EVERY = pytest.mark.parametrize("name", OPTIONS)


def config(name: str, **changes: Any) -> LoopedConfig:
    return LoopedConfig(family=name, **{**SIZES, **OPTIONS[name], **changes})


def build(cfg: LoopedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoopedModel:
    """A model with parameters of trained size: matrices that keep the scale, gains and biases away from 1 and 0."""
    model, generator = LoopedModel(cfg), torch.Generator().manual_seed(seed)
    for name, parameter in model.canonical_parameters().items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 2:
            noise *= 1.2 / parameter.shape[1] ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.25 * noise
        else:
            noise *= 0.3
        model.set_parameter(name, nn.Parameter(noise.to(dtype)))
    return model.eval()


def tokens_for(cfg: LoopedConfig, batch: int = 2, pos: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(cfg.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))


def blocks(model: LoopedModel) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def passes(model: LoopedModel) -> list[PassEnds]:
    return [ends for ends in model.passes if isinstance(ends, PassEnds)]


@contextmanager
def hooked(*pairs: tuple[nn.Module, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Run functions on the outputs of modules; what they return, if anything, takes the place of the output."""
    handles = [module.register_forward_hook(lambda _m, _i, out, f=f: f(out)) for module, f in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def close(got: Tensor, wanted: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)


def test_the_configurations_use_every_option() -> None:
    """A field that no configuration changes would be untested."""
    plain = LoopedConfig(**SIZES).to_dict()
    changed = {field for name in OPTIONS for field, value in config(name).to_dict().items() if value != plain[field]}
    elsewhere = {"own_layers", "own_parts"}  # without the sharing that is tested here: test_llama_rrt.py, test_mor.py
    assert set(plain) - changed == {"d_model", "d_vocab", "n_core", "n_ctx", "d_mlp"} | elsewhere


# Parameters


@EVERY
def test_passes_share_their_parameters(name: str) -> None:
    def storages(cfg: LoopedConfig) -> int:
        model = LoopedModel(cfg)
        assert len({id(p) for p in model.parameters()}) == len(model.canonical_parameters())
        return len({p.untyped_storage().data_ptr() for p in model.parameters()})

    assert storages(config(name, n_loops=1)) == storages(config(name, n_loops=9))


@EVERY
def test_every_module_sees_a_parameter_that_is_set(name: str) -> None:
    """Every parameter is read somewhere in the forward, in every place it stands."""
    model = build(config(name))
    for canonical, parameter in model.canonical_parameters().items():
        fresh = nn.Parameter(parameter.detach().clone())
        model.set_parameter(canonical, fresh)
        assert not any(p is parameter for p in model.parameters())
        assert model.canonical_parameters()[canonical] is fresh
    model(tokens_for(model.cfg), position_ids=None).logits.square().sum().backward()
    without = {n for n, p in model.canonical_parameters().items() if p.grad is None or not p.grad.any()}
    unread = {n for n in without if n.startswith("exit_gate")}  # the gate's logit is for the reader, not for the logits
    assert without == unread


@EVERY
def test_initialisation_is_a_function_of_the_seed(name: str) -> None:
    def drawn(seed: int, n_loops: int = 2) -> dict[str, Tensor]:
        return dict(initialise(LoopedModel(config(name, n_loops=n_loops)), seed).canonical_parameters())

    first, again, deeper, other = drawn(3), drawn(3), drawn(3, n_loops=4), drawn(4)
    assert all(torch.equal(first[n], again[n]) and torch.equal(first[n], deeper[n]) for n in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert all(p.isfinite().all() for p in first.values())
    assert first["core.0.attn.q.weight" if "core.0.attn.q.weight" in first else "L.0.attn.q.weight"].std().item() < 0.03


# The same logits on another way


@EVERY
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 1, 3, 1)], ids=["tokens", "chunks"])
def test_cached_logits_equal_the_full_forward(name: str, chunks: tuple[int, ...], no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    cache, logits = None, []
    for part in tokens.split(chunks, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    close(torch.cat(logits, dim=1), model(tokens).logits)
    assert {cache.get_seq_length(i) for i in range(model.cfg.schedule.n_layers)} == {tokens.shape[1]}


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(name: str, side: str, no_grad: None) -> None:
    model = build(config(name))
    tokens, lengths = tokens_for(model.cfg, batch=3), (9, 5, 1)
    real = torch.stack([torch.arange(9) < n if side == "right" else torch.arange(9) >= 9 - n for n in lengths])
    logits = model(tokens, attention_mask=real.long()).logits
    assert logits.isfinite().all()
    for row in range(3):
        close(logits[row, real[row]], model(tokens[row : row + 1, real[row]]).logits[0])


@EVERY
def test_left_padded_rows_decode_like_the_rows_alone(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    mask = torch.ones(2, 9)
    mask[1, :4] = 0
    cache = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    for i in range(6, 9):
        step = model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits[:, 0]
        close(step[0], model(tokens[:1, : i + 1]).logits[0, -1])
        close(step[1], model(tokens[1:, 4 : i + 1]).logits[0, -1])


@EVERY
def test_positions_are_relative_to_each_other(name: str, no_grad: None) -> None:
    """Rotary attention sees differences of positions; which state a random one is drawn from depends on the position itself."""
    model = build(config(name, n_ctx=64))
    tokens, default = tokens_for(model.cfg), torch.arange(9)[None]
    state = {"initial_state": "zero"} if model.cfg.initial_state == "noise" else {}
    logits = model(tokens, **state).logits
    assert torch.equal(model(tokens, position_ids=default, **state).logits, logits)
    assert torch.equal(model(tokens, position_ids=default.expand(2, 9), **state).logits, logits)
    is_relative = not model.cfg.learned_positions and model.cfg.rope_precision == "float32"
    if (
        is_relative and not model.cfg.query_gain
    ):  # which acts after the rotation, and is not the same for both entries of a pair
        close(model(tokens, position_ids=default + 7, **state).logits, logits)
    stretched = model(tokens, position_ids=default * 3, **state).logits
    assert torch.equal(stretched, logits) == (model.cfg.rope_layout == "none" and is_relative)
    if state:
        assert not torch.equal(model(tokens, position_ids=default + 7).logits, model(tokens).logits)


@EVERY
def test_embeddings_stand_for_tokens(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    read = tokens if model.cfg.value_embed_layers else None
    assert torch.equal(
        model(read, inputs_embeds=model.embed(tokens, position_ids=torch.arange(tokens.shape[1]))).logits, model(tokens).logits
    )


@EVERY
def test_reading_out_a_loop_equals_the_shorter_model(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens, n_loops = tokens_for(model.cfg), model.cfg.n_loops
    for t in range(n_loops):
        shorter = LoopedModel(model.cfg.replace(n_loops=t + 1))
        for parameter_name, parameter in model.canonical_parameters().items():
            shorter.set_parameter(parameter_name, parameter)
        wanted = shorter(tokens).logits
        assert torch.equal(model(tokens, loop=t).logits, wanted)
        assert torch.equal(model(tokens, loop=t - n_loops).logits, wanted)
        assert torch.equal(model(tokens).logits, wanted) == (t == n_loops - 1)


@EVERY
def test_one_run_reads_out_every_loop(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    read: dict[int, Tensor] = {}
    assert torch.equal(model(tokens, on_loop=read.__setitem__).logits, model(tokens).logits)
    assert list(read) == list(range(model.cfg.n_loops))
    assert all(torch.equal(logits, model(tokens, loop=t).logits) for t, logits in read.items())
    read.clear()
    model(tokens, loop=1, on_loop=read.__setitem__)
    assert list(read) == [0, 1]


@EVERY
def test_half_precision_stays_half(name: str, no_grad: None) -> None:
    model = build(config(name))
    wanted = model(tokens_for(model.cfg)).logits
    half = build(config(name), dtype=torch.bfloat16)
    dtypes: set[torch.dtype] = set()
    with hooked(*((block, lambda out: dtypes.add(out.dtype)) for block in half.blocks)):
        logits = half(tokens_for(half.cfg)).logits
    assert dtypes == {torch.bfloat16} == {logits.dtype}
    # One rounding to bf16 is up to 2^-9 of a value; some sixty follow each other here. Unrelated logits would be 1.4 apart.
    assert (logits.float() - wanted).norm() / wanted.norm() < 60 * 2**-9


# Parts of a run


def injections(model: LoopedModel, tokens: Tensor) -> list[Tensor | None]:
    """What every pass injects."""
    found: list[Tensor | None] = [None] * len(model.passes)
    if model.cfg.injection != "none":

        def keep(index: int) -> Callable[[Tensor], None]:
            return lambda out: found.__setitem__(index, out)

        with hooked(*((ends.hook_injection, keep(i)) for i, ends in enumerate(passes(model)))):
            model(tokens)
    return found


@EVERY
def test_stopping_and_restarting_at_any_layer_changes_nothing(name: str, no_grad: None) -> None:
    model = build(config(name))
    schedule, tokens = model.cfg.schedule, tokens_for(model.cfg)
    logits, injected = model(tokens).logits, injections(model, tokens)
    stream: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[Any, Any], None]:
        return lambda _module, args: stream.__setitem__(index, args[0])

    handles = [block.register_forward_pre_hook(keep(i)) for i, block in enumerate(model.blocks)]
    model(tokens)
    for handle in handles:
        handle.remove()
    for i in range(schedule.n_layers):
        resid = model(tokens, stop=i).logits
        assert torch.equal(resid, stream[i])
        assert torch.equal(model(tokens, stop=i - schedule.n_layers).logits, resid)
        entry = schedule.pass_of_layer(i)
        injection = None if entry is None else injected[entry.index]
        needed = entry is not None and injection is not None and entry is not schedule.passes[-1]
        if entry is not None and name in ("anchored", "loopus"):
            with pytest.raises(LoopedError, match=r"loop( of the kind 'gated')?, whose (output|state) also needs"):
                model(tokens, inputs_embeds=resid, start=i)
            continue
        if needed:
            with pytest.raises(LoopedError, match=rf"cache\['{schedule.pass_prefix(entry)}\.hook_injection'\]"):
                model(tokens, inputs_embeds=resid, start=i)
        assert torch.equal(model(tokens, inputs_embeds=resid, start=i, injection=injection).logits, logits)
        assert torch.equal(model(tokens, inputs_embeds=resid, start=i - schedule.n_layers, injection=injection).logits, logits)
        if not needed:
            assert torch.equal(model(tokens, inputs_embeds=resid, start=i).logits, logits)
        later = schedule.n_layers - 1
        part = model(tokens, inputs_embeds=resid, start=i, stop=later, injection=injection).logits
        assert torch.equal(part, stream[later])


@EVERY
def test_a_part_runs_only_its_layers(name: str, no_grad: None) -> None:
    model = build(config(name))
    schedule, tokens = model.cfg.schedule, tokens_for(model.cfg)
    n, ran = schedule.n_layers, []
    injected = injections(model, tokens)
    embeds = model.embed(tokens, position_ids=torch.arange(tokens.shape[1]))

    def layers_of(**part: Any) -> list[int]:
        ran.clear()
        model(tokens, **part)
        return list(ran)

    with hooked(*((block, lambda _, i=i: ran.append(i)) for i, block in enumerate(model.blocks))):
        assert layers_of() == list(range(n))
        for stop in range(n + 1):
            assert layers_of(stop=stop) == list(range(stop))
        for loop in range(schedule.n_loops):
            last = schedule.pass_of_loop(loop).layers.stop
            assert layers_of(loop=loop) == [*range(last), *range(schedule.first_coda_layer, n)]
        for start in range(n):
            entry = schedule.pass_of_layer(start)
            if entry is None or name not in ("anchored", "loopus"):
                part = {"inputs_embeds": embeds, "start": start, "injection": entry and injected[entry.index]}
                assert layers_of(**part) == list(range(start, n))
                assert layers_of(**part, stop=n - 1) == list(range(start, n - 1))


@EVERY
def test_stopping_after_the_last_layer_returns_its_output(name: str, no_grad: None) -> None:
    model = build(config(name))
    outputs: list[Tensor] = []
    with hooked((model.blocks[-1], outputs.append)):
        stream = model(tokens_for(model.cfg), stop=model.cfg.schedule.n_layers).logits
    assert torch.equal(stream, outputs[0])


def test_caches_work_in_parts_but_not_across_different_ones(no_grad: None) -> None:
    model = build(config("ouro"))
    tokens = tokens_for(model.cfg)
    shallow = model(tokens[:, :5], loop=0, use_cache=True).past_key_values
    with pytest.raises(LoopedError, match=r"holds \[0, 5\] positions, depending on the layer.*make a new cache"):
        model(tokens[:, 5:6], past_key_values=shallow)
    step = model(tokens[:, 5:6], loop=0, past_key_values=shallow).logits
    close(step[:, 0], model(tokens[:, :6], loop=0).logits[:, -1])

    stream = model(tokens, stop=3).logits
    upper = model(inputs_embeds=stream[:, :8], start=3, use_cache=True).past_key_values
    close(model(inputs_embeds=stream[:, 8:], start=3, past_key_values=upper).logits[:, 0], model(tokens).logits[:, -1])


# The initial state


def first_state(model: LoopedModel, tokens: Tensor, **kwargs: Any) -> Tensor:
    states: list[Tensor] = []
    with torch.no_grad(), hooked((passes(model)[0].hook_state, states.append)):
        model(tokens, **kwargs)
    return states[0]


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if o.get("initial_state") == "noise"])
def test_random_states_are_reproducible(name: str) -> None:
    model = build(config(name))
    cfg, tokens = model.cfg, tokens_for(model.cfg)
    state = first_state(model, tokens)
    assert torch.equal(first_state(model, tokens), state)
    assert torch.equal(first_state(build(cfg, seed=5), tokens), state)  # a function of the seed, not of the parameters
    assert torch.equal(first_state(model, tokens, initial_state=0), state)
    other = first_state(model, tokens, initial_state=1)
    assert torch.equal(other, first_state(model, tokens, initial_state=1)) and not torch.equal(other, state)
    assert state.abs().max() <= 3 * cfg.noise_std * cfg.noise_scale
    wide = first_state(model, torch.zeros(1, cfg.n_ctx, dtype=torch.long))
    # 24 x 24 draws; the std of a normal cut at 3 is 0.9866, and its estimate is off by about 1 / sqrt(2 * 576) = 3%.
    assert wide.std() / (0.9866 * cfg.noise_std * cfg.noise_scale) == pytest.approx(1, abs=0.12)
    assert len({tuple(row) for row in wide[0].tolist()}) == cfg.n_ctx
    assert torch.equal(wide[0, :9], state[0])  # a longer prompt starts from the same rows


@pytest.mark.parametrize("name", ["huginn", "parcae"])
def test_a_generator_gives_the_state_of_the_published_code(name: str) -> None:
    model = build(config(name))
    cfg, tokens = model.cfg, tokens_for(model.cfg)
    shape = (*tokens.shape, cfg.d_model)
    torch.manual_seed(11)
    torch.randn(shape)  # drawn and thrown away
    std = cfg.noise_std
    wanted = torch.nn.init.trunc_normal_(torch.empty(shape), std=std, a=-3 * std, b=3 * std) * cfg.noise_scale
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(first_state(model, tokens, initial_state=generator), wanted)
    assert not torch.equal(first_state(model, tokens, initial_state=generator), wanted)  # it has been advanced


@EVERY
def test_a_state_may_be_given(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    given = torch.randn(*tokens.shape, model.cfg.d_model)
    shown = given / (given.square().sum(-1, keepdim=True) + 1e-6).sqrt() if model.cfg.entry_norm else given
    torch.testing.assert_close(
        first_state(model, tokens, initial_state=given), shown, rtol=0, atol=1e-6 if name == "dory" else 0
    )
    assert not first_state(model, tokens, initial_state="zero").any()
    default = first_state(model, tokens)  # of a vector of length 1 the norm takes 5e-7, its epsilon over 2
    again, logits = model(tokens, initial_state=default).logits, model(tokens).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-4 if name == "dory" else 0)
    assert not torch.equal(model(tokens, initial_state=given).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        (
            "huginn",
            torch.zeros(2, 8, 24),
            r"shape \(2, 8, 24\) was asked; this run needs .* = \(2, 9, 24\)",
        ),
        ("huginn", "ones", r"initial_state='ones' was asked; pass a tensor, an int seed"),
        ("huginn", 1.5, "initial_state=1.5 was asked"),
        ("huginn", True, "initial_state=True was asked"),
        ("ouro", 3, "the ouro initial state is not random"),
        ("hrm_text", torch.Generator(), "the hrm_text initial state is not random"),
    ],
)
def test_other_states_are_refused(name: str, asked: Any, message: str, unchecked: None) -> None:
    model = build(config(name))
    with pytest.raises(LoopedError, match=message):
        model(tokens_for(model.cfg), initial_state=asked)


# Gradients


@EVERY
def test_gradients_reach_every_pass(name: str) -> None:
    """Directional derivatives in the input of each pass against central differences.

    With steps of 1e-4 in float64 the differences are off by about 1e-8 (the third derivative) and 1e-11 (rounding).
    """
    model = build(config(name), dtype=torch.float64)
    tokens = tokens_for(model.cfg, pos=5)
    readout = torch.randn(2, 5, model.cfg.d_vocab, dtype=torch.float64)
    grads: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[Any, Any, Any], None]:
        return lambda _module, _inputs, outputs: grads.__setitem__(index, outputs[0])

    handles = [ends.hook_in.register_full_backward_hook(keep(i)) for i, ends in enumerate(passes(model))]
    (model(tokens).logits * readout).sum().backward()
    for handle in handles:
        handle.remove()
    for i, ends in enumerate(passes(model)):
        direction = torch.randn_like(grads[i])
        direction /= direction.norm()

        def loss(step: float, ends: PassEnds = ends, direction: Tensor = direction) -> float:
            with torch.no_grad(), hooked((ends.hook_in, lambda out: out + step * direction)):
                return float((model(tokens).logits * readout).sum())

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        assert abs(slope) > 1e-3
        assert float((grads[i] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)


@EVERY
def test_the_gradient_of_a_shared_weight_is_the_sum_over_passes(name: str) -> None:
    tied, untied = (build(config(name), dtype=torch.float64) for _ in range(2))
    schedule, tokens = tied.cfg.schedule, tokens_for(tied.cfg)
    own: dict[int, list[nn.Parameter]] = {}
    for physical, block in zip(schedule.physical, blocks(untied), strict=True):
        block.attn.q.weight = nn.Parameter(block.attn.q.weight.detach().clone())
        own.setdefault(physical, []).append(block.attn.q.weight)
    for model in (tied, untied):
        model(tokens).logits.logsumexp(-1).sum().backward()
    for physical, block in zip(schedule.physical, blocks(tied), strict=True):
        grads = [weight.grad for weight in own[physical] if weight.grad is not None]
        assert len(grads) == len(own[physical]) and all(grad.any() for grad in grads)
        torch.testing.assert_close(block.attn.q.weight.grad, torch.stack(grads).sum(0))


# Hooks


@EVERY
def test_observing_attention_does_not_change_a_bit(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    patterns: list[Tensor] = []
    slots = [slot for block in blocks(model) for slot in (block.attn.hook_pattern, block.attn.hook_attn_scores)]
    for attention_mask in (None, mask):
        logits = model(tokens, attention_mask=attention_mask).logits
        for observed in (slots[::2], slots[1::2], slots):
            with hooked(*((slot, patterns.append) for slot in observed)):
                assert torch.equal(model(tokens, attention_mask=attention_mask).logits, logits)
    pattern = patterns[0]
    assert pattern.shape == (2, model.cfg.n_heads, 9, 9)
    assert not pattern.triu(1).any()
    close(pattern.sum(-1), torch.ones(2, model.cfg.n_heads, 9), atol=1e-6)


@EVERY
def test_the_explicit_attention_equals_the_fused_one(name: str) -> None:
    """A gradient that flows through the pattern takes the explicit path."""
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    used: list[Tensor] = []
    with hooked(*((block.attn.hook_pattern, used.append) for block in blocks(model))):
        logits = model(tokens).logits
    close(logits, model(tokens).logits)
    grads = torch.autograd.grad(logits.sum(), used)
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["plain", "retrofit_llama", "hrm_text"])
def test_editing_attention_does_what_a_hand_computation_says(name: str, no_grad: None) -> None:
    """All heads look at position 0: every position gets the values of position 0, through the output matrix."""
    model = build(config(name))
    cfg, tokens = model.cfg, tokens_for(model.cfg)
    attn = blocks(model)[-1].attn
    seen: list[Tensor] = []
    handle = attn.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    first = torch.nn.functional.one_hot(torch.zeros(9, dtype=torch.long), 9).float()
    outputs: list[Tensor] = []
    edits = [
        (attn.hook_pattern, lambda pattern: first.expand_as(pattern)),
        (attn.hook_attn_scores, lambda scores: scores + 1e4 * first),
        (attn.hook_attn_scores, lambda scores: scores - 7.0),  # softmax does not see a constant
    ]
    model(tokens)
    for slot, edit in edits:
        with hooked((slot, edit), (attn, outputs.append)):
            model(tokens)
    handle.remove()
    x = seen[0]
    values = attn.v(x)[:, :1].unflatten(-1, (-1, cfg.d_head)).repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=2)
    z = values.flatten(-2).expand(-1, 9, -1)
    wanted = attn.o(z if attn.gate is None else z * torch.sigmoid(attn.gate(x)))
    close(outputs[0], wanted, atol=1e-5)
    close(outputs[1], wanted, atol=1e-5)
    with hooked((attn, outputs.append)):
        model(tokens)
    close(outputs[2], outputs[3], atol=1e-5)


@EVERY
def test_an_edit_leaves_earlier_passes_alone(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)

    def outputs(*edits: tuple[nn.Module, Callable[[Tensor], Tensor]]) -> list[Tensor]:
        states: list[Tensor] = []
        with hooked(*edits, *((ends.hook_out, lambda out: states.append(out.clone())) for ends in passes(model))):
            model(tokens)
        return states

    clean = outputs()
    for p in model.cfg.schedule.passes:
        edited = outputs((blocks(model)[p.first].hook_resid_mid, lambda out: out + 1))
        assert all(torch.equal(a, b) for a, b in zip(clean[: p.index], edited[: p.index], strict=True))
        assert not torch.equal(clean[p.index], edited[p.index])


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if o.get("injection", "none") != "none"])
def test_editing_an_injection_concerns_one_pass(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    clean = injections(model, tokens)
    edited: list[Tensor] = []
    slots = [ends.hook_injection for ends in passes(model)]
    with hooked((slots[1], lambda out: out + 1), *((slot, lambda out: edited.append(out.clone())) for slot in slots)):
        model(tokens)
    assert torch.equal(edited[0], clean[0]) and torch.equal(edited[1], clean[1] + 1)
    if model.cfg.l_cycles is None:
        assert all(torch.equal(edited[k], clean[k]) for k in range(2, len(slots)))


@pytest.mark.parametrize("name", ["ouro", "anchored"])
def test_the_exit_gate_reads_the_state_leaving_the_pass(name: str, no_grad: None) -> None:
    model = build(config(name))
    states: list[Tensor] = []
    gates: list[Tensor] = []
    ends = passes(model)
    with hooked(*((e.hook_out, states.append) for e in ends), *((e.hook_exit_logit, gates.append) for e in ends)):
        model(tokens_for(model.cfg))
    parameters = model.canonical_parameters()
    for state, gate in zip(states, gates, strict=True):
        assert gate.shape == (2, 9)
        close(gate, state @ parameters["exit_gate.weight"][0] + parameters["exit_gate.bias"], atol=1e-5)


def test_a_norm_shows_its_scale(no_grad: None) -> None:
    norm = RMSNorm(6, 1e-6)
    norm.weight = nn.Parameter(torch.randn(6))
    x = torch.randn(2, 3, 6)
    scales: list[Tensor] = []
    with hooked((norm.hook_scale, scales.append)):
        out = norm(x)
    close(scales[0], (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-6)
    close(out, x / scales[0] * norm.weight, atol=1e-6)
    with hooked((norm.hook_scale, lambda scale: scale * 2)):
        close(norm(x), out / 2, atol=1e-6)


# What a position may see


@EVERY
def test_later_tokens_do_not_change_earlier_logits(name: str, no_grad: None) -> None:
    model = build(config(name))
    tokens = tokens_for(model.cfg)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % model.cfg.d_vocab
    logits, other = model(tokens).logits, model(changed).logits
    assert torch.equal(logits[:, :5], other[:, :5])
    assert (logits[:, 5:] - other[:, 5:]).abs().amax(-1).min() > 1e-3


def test_a_window_hides_older_tokens(no_grad: None) -> None:
    model = build(LoopedConfig(**{**SIZES, "n_core": 1, "n_loops": 2}, windows=(3,)))
    tokens = tokens_for(model.cfg)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % model.cfg.d_vocab
    differs = (model(tokens).logits != model(changed).logits).any(-1)
    assert differs.tolist() == [[True] * 5 + [False] * 4] * 2  # two layers, each two positions back


def test_a_prefix_sees_itself_in_both_directions(no_grad: None) -> None:
    model = build(config("hrm_text"))
    tokens = tokens_for(model.cfg)
    prefix = (torch.arange(9) < 4).long().expand(2, 9)
    logits = model(tokens, token_type_ids=prefix).logits
    assert torch.equal(model(tokens, token_type_ids=torch.zeros_like(prefix)).logits, model(tokens).logits)
    assert not torch.equal(logits[:, 0], model(tokens).logits[:, 0])

    def differing(position: int) -> list[bool]:
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % model.cfg.d_vocab
        return (model(changed, token_type_ids=prefix).logits != logits).any(-1)[0].tolist()

    assert differing(3) == [True] * 9
    assert differing(4) == [False] * 4 + [True] * 5

    out = model(tokens[:, :6], token_type_ids=prefix[:, :6], use_cache=True)
    close(model(tokens[:, 6:], past_key_values=out.past_key_values).logits, logits[:, 6:])
    mask = torch.ones(2, 11)
    mask[:, :2] = 0
    padded, types = (nn.functional.pad(t, (2, 0)) for t in (tokens, prefix))
    close(model(padded, attention_mask=mask, token_type_ids=types).logits[:, 2:], logits)


# Options that no checkpoint family's reference activations cover


def test_an_anchored_loop_is_its_formula(no_grad: None) -> None:
    model = build(config("anchored", exit_gate=False))
    cfg, tokens = model.cfg, tokens_for(model.cfg)

    def layers(x: Tensor, first: int, last: int) -> Tensor:
        once = LoopedModel(cfg.replace(strategy="naive", n_loops=1))
        for name, parameter in model.canonical_parameters().items():
            once.set_parameter(name, parameter)
        return once(inputs_embeds=x, start=first, stop=last).logits

    h_in = h = layers(model.embed(tokens, position_ids=torch.arange(tokens.shape[1])), 0, 1)
    for _ in range(cfg.n_loops):
        h = h + (layers(h, 1, 3) - h) / cfg.anchor_steps
    out = cfg.beta * layers(h_in, 1, 3) + (1 - cfg.beta) * h
    close(model(inputs_embeds=out, start=cfg.schedule.first_coda_layer).logits, model(tokens).logits, atol=1e-5)


def test_a_softcap_bounds_the_logits(no_grad: None) -> None:
    capped, plain = build(config("parcae")), build(config("parcae", logit_softcap=None))
    tokens = tokens_for(capped.cfg)
    raw = plain(tokens).logits
    assert raw.abs().max() > 1
    close(capped(tokens).logits, 6 * torch.tanh(raw / 6), atol=1e-5)


def test_unknown_rope_scaling_is_refused() -> None:
    with pytest.raises(LoopedError, match="rope scaling 'dynamic' was asked; supported are default, linear, llama3, yarn"):
        LoopedModel(config("plain", rope_scaling={"rope_type": "dynamic", "factor": 2.0}))


# Bad input

TOKENS = tokens_for(config("plain"))
EMBEDS = torch.zeros(2, 9, 24)
WHOLE = {"input_ids": TOKENS}
REST = {"inputs_embeds": EMBEDS}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("plain", {"input_ids": torch.tensor([[3, 29]])}, r"token 29 was given, but the vocabulary of this model is 0\.\.28"),
        ("plain", {"input_ids": torch.tensor([[3, -1]])}, "token -1 was given"),
        ("plain", {"input_ids": TOKENS.float()}, "torch.float32 were given; pass a non-empty int"),
        ("plain", {"input_ids": TOKENS[0]}, r"shape \(9,\)"),
        ("plain", {"input_ids": TOKENS[:, :0]}, r"shape \(2, 0\)"),
        (
            "plain",
            {"input_ids": torch.zeros(1, 25, dtype=torch.long)},
            "has 25 positions, but .* n_ctx=24",
        ),
        ("plain", {}, "pass either input_ids or inputs_embeds"),
        ("plain", {**WHOLE, **REST}, "pass either input_ids or inputs_embeds"),
        (
            "plain",
            {"inputs_embeds": EMBEDS[..., :5]},
            r"shape \(2, 9, 5\) was given; this model needs .*=24\]",
        ),
        ("plain", {"inputs_embeds": EMBEDS[:, :0]}, r"shape \(2, 0, 24\)"),
        ("plain", {**WHOLE, "attention_mask": torch.ones(2, 8)}, r"attention_mask of shape \(2, 8\) .* \(2, 9\)"),
        ("plain", {**WHOLE, "position_ids": torch.arange(8)[None]}, r"position_ids of shape \(1, 8\) .* \(2, 9\)"),
        ("plain", {**WHOLE, "token_type_ids": torch.ones_like(TOKENS)}, "which this plain model does not have"),
        ("hrm_text", {**WHOLE, "token_type_ids": torch.ones(2, 8).long()}, "mark the prefix of the prompt"),
        ("parcae", {"inputs_embeds": EMBEDS}, "also read the token ids"),
        ("plain", {**WHOLE, "start": 2}, "pass inputs_embeds, the residual stream"),
        ("plain", {**WHOLE, "loop": 0, "stop": 3}, r"stop=3 .*after loop 0 skips the layers 2 to \d"),
        ("plain", {**WHOLE, "on_loop": print, "stop": 2}, "nor stop= with on_loop="),
        ("huginn", {**WHOLE, "on_loop": print, "use_cache": True}, "for which a cache has no slots"),
        ("plain", {**REST, "start": 4, "stop": 3}, "start=4 and stop=3 were asked, but a run goes forward"),
        ("plain", {**REST, "start": 2, "injection": EMBEDS}, "injection= goes with a start= inside a pass"),
        ("huginn", {**WHOLE, "injection": EMBEDS}, "injection= goes with a start= inside a pass"),
        ("huginn", {**REST, "start": 1, "injection": EMBEDS, "initial_state": 3}, "a run from start=1 on does not read it"),
    ],
)
def test_bad_input_is_refused(name: str, given: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=message):
        build(config(name))(**given)


@pytest.mark.parametrize(
    "part", [{"loop": 3}, {"loop": -4}, {"inputs_embeds": EMBEDS, "start": 6}, {"stop": 7}, {"stop": -7}, {"loop": True}]
)
def test_parts_out_of_range_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(LoopedError) as caught:
        build(config("plain"))(TOKENS, **part)
    assert isinstance(caught.value, OutOfRangeError) or part == {"loop": True}


def test_a_cache_must_fit_the_mask(no_grad: None) -> None:
    model = build(config("hrm_text"))
    cache = model(TOKENS, use_cache=True).past_key_values
    with pytest.raises(LoopedError, match=r"\(2, 10\) \(9 cached positions included\)"):
        model(TOKENS[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 9))
    with pytest.raises(LoopedError, match="with the whole prompt, uncached"):
        model(TOKENS[:, :1], past_key_values=cache, token_type_ids=torch.ones(2, 1).long())


def test_long_prompts_may_be_padding(no_grad: None) -> None:
    """The context limits positions, not the length of a padded batch."""
    model = build(config("plain"))
    tokens, mask = torch.zeros(1, 30, dtype=torch.long), torch.zeros(1, 30)
    mask[:, 20:] = 1
    close(model(tokens, attention_mask=mask).logits[:, 20:], model(tokens[:, 20:]).logits)
