"""The canonical model, on small configurations that together use every option of `LoopedConfig`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_options import EVERY, OPTIONS, SIZES, build, close, config, hooked, tokens_for
from torch import Tensor, nn

from tl_looped.errors import LoopedError, OutOfRangeError
from tl_looped.model import LoopedModel
from tl_looped.model.config import LoopedConfig
from tl_looped.model.looped_model import initialise


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
