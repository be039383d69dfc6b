"""A `LoopedConfig` either describes a model or says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from copy import deepcopy

import numpy as np
import pytest

from tl_looped import LoopedConfig, LoopedError

BASE = {"d_model": 16, "n_heads": 4, "d_vocab": 20, "n_core": 2, "n_loops": 3}
TWO_STACKS = {"l_cycles": 2, "injection": "add", "initial_state": "learned", "pass_norm": True}


def test_usual_sizes_are_filled_in() -> None:
    cfg = LoopedConfig(**BASE)
    assert (cfg.n_kv_heads, cfg.d_head, cfg.d_mlp, cfg.n_physical) == (4, 4, 64, 2)
    assert LoopedConfig(**BASE, d_head=6).d_head == 6
    assert cfg.replace(n_loops=5).schedule.n_layers == 10 and cfg.schedule.n_layers == 6


@pytest.mark.parametrize("field", [*BASE, "n_ctx", "anchor_steps"])
@pytest.mark.parametrize("value", [0, -2, 1.5, True])
def test_counts_are_positive_ints(field: str, value: object, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=f"{field}={value!r}"):
        LoopedConfig(**{**BASE, field: value})


@pytest.mark.parametrize(
    "field", ["norm", "qk_norm", "mlp", "act_fn", "rope_layout", "injection", "initial_state", "after_loop", "strategy"]
)
def test_choices_are_listed_when_missed(field: str, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=f"{field}='other' was asked; choose one of '"):
        LoopedConfig(**BASE, **{field: "other"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"n_kv_heads": -4}, "n_kv_heads=-4 was asked"),
        ({"n_heads": 3}, "d_model=16 is not a multiple of n_heads=3"),
        ({"d_head": 5}, "rotary positions need an even d_head, got 5"),
        ({"l_cycles": 2}, "two stacks"),
        ({**TWO_STACKS, "l_cycles": None}, "two stacks"),
        ({"initial_state": "learned"}, "two stacks"),
        ({"initial_state": "learned", "injection": "concat"}, "two stacks"),
        ({**TWO_STACKS, "l_cycles": 0}, "l_cycles=0"),
        ({**TWO_STACKS, "pass_norm": False}, "with pass_norm"),
        ({**TWO_STACKS, "n_prelude": 1}, "without prelude"),
        ({**TWO_STACKS, "n_coda": 1}, "without prelude"),
        ({**TWO_STACKS, "prelude_norm": True}, "prelude_norm"),
        ({"n_prelude": -1}, "n_prelude=-1"),
        ({"initial_state": "noise"}, "would ignore the prompt"),
        ({"strategy": "anchored", "pass_norm": True}, "goes with injection='none' and without pass_norm"),
        ({"strategy": "anchored", "injection": "concat"}, "goes with injection='none'"),
        ({"final_norm": False}, "the norm of the last pass must be the last norm"),
        ({"final_norm": False, "pass_norm": True, "n_coda": 1}, "the norm of the last pass must be the last norm"),
        ({"final_norm": False, "pass_norm": True, "after_loop": "linear"}, "the norm of the last pass must be the last norm"),
        ({"windows": (None,)}, "windows has 1 entries for 2 physical layers"),
        ({"windows": (None, 0)}, r"windows\[1\]=0 was asked"),
        ({"biases": ("q", "w")}, r"biases\[1\]='w' was asked; choose one of"),
        ({"value_embed_layers": (0,)}, "0 < value_gate_width <= d_model, got 0"),
        ({"value_embed_layers": (2,), "value_gate_width": 4}, r"value_embed_layers names \[2\]"),
    ],
)
def test_contradictions_are_refused(fields: dict, message: str, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=message):
        LoopedConfig(**{**BASE, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        TWO_STACKS,
        {"windows": (4, None), "biases": ("q", "in"), "value_embed_layers": (1,), "value_gate_width": 8},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "logit_softcap": 15.0, "tied": True},
        {"injection": "decay", "initial_state": "noise", "noise_std": 0.01, "prelude_norm": True, "after_loop": "linear"},
    ],
)
def test_a_config_survives_json(fields: dict) -> None:
    cfg = LoopedConfig(**{**BASE, **fields})
    assert LoopedConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_unknown_fields_are_refused() -> None:
    values = {**LoopedConfig(**BASE).to_dict(), "n_layer": 3}
    with pytest.raises(LoopedError, match=r"unknown LoopedConfig fields \['n_layer'\]; this version knows \['act_fn'"):
        LoopedConfig.from_dict(values)


def test_a_config_cannot_change() -> None:
    cfg = LoopedConfig(**BASE)
    with pytest.raises(AttributeError):
        cfg.n_loops = 5  # type: ignore[misc]
    assert deepcopy(cfg) is cfg
    with pytest.raises(LoopedError, match="n_loops=0"):
        cfg.replace(n_loops=0)


def test_widths_that_follow_from_others_follow_them() -> None:
    cfg = LoopedConfig(d_model=64, n_heads=4, d_vocab=10, n_core=1, n_loops=2)
    fresh = LoopedConfig(d_model=32, n_heads=2, d_vocab=10, n_core=1, n_loops=2)
    assert cfg.replace(d_model=32, n_heads=2) == fresh and hash(cfg.replace(n_loops=2)) == hash(cfg)
    own = LoopedConfig(d_model=64, n_heads=4, d_vocab=10, n_core=1, n_loops=2, n_kv_heads=2, d_head=8, d_mlp=100)
    assert own.replace(n_loops=5).replace(d_model=32).to_dict() == {**own.to_dict(), "n_loops": 5, "d_model": 32}
    scaled = cfg.replace(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert hash(scaled) == hash(cfg) and scaled != cfg


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"logit_softcap": 0.0}, "would make every logit 0"),
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0 was asked"),
        ({"initial_state": "noise", "injection": "add", "noise_std": 0.0}, "needs noise_std > 0"),
        ({"beta": 7.0}, "between 0 and 1"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' was asked"),
        ({"mlp": "relu_squared", "biases": ("gate",)}, "does not have"),
    ],
)
def test_values_that_would_fail_later_or_silently_fail_at_once(changes: dict[str, object], why: str) -> None:
    with pytest.raises(LoopedError, match=why):
        LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=1, n_loops=2, **changes)  # pyright: ignore[reportArgumentType]


WRONG = [None, True, 0, -1, 1.5, 10**400, 10**5000, math.nan, math.inf, "false", "x", [], ["x"], [-1], {}, {"rope_type": []}]


ACCEPTED = {
    **dict.fromkeys(
        (
            "norm_weight inner_norm qk_norm_weight query_gain prelude_norm entry_norm pass_norm final_norm exit_gate "
            "attn_gate tied prefix_lm learned_positions own_layers"
        ).split(),
        (True,),
    ),
    **dict.fromkeys("n_prelude n_coda n_kv_heads d_head d_mlp value_gate_width".split(), (0,)),
    **dict.fromkeys("noise_std noise_scale embed_scale".split(), (0, 1.5)),
    "norm_eps": [None, 0, 1.5],
    **dict.fromkeys("biases windows value_embed_layers own_parts".split(), ([],)),
    "qk_norm_eps": [None, 0, 1.5],
    "logit_softcap": [None, 1.5],
    "rope_theta": [1.5],
    "rope_theta_windowed": [None, 1.5],
    "loop": ["false", "x"],
    "options": [{}, {"rope_type": []}],
    "rope_scaling": [None, {}],
    "l_cycles": [None],
    "beta": [0],
    "family": ["false", "x"],
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LoopedConfig)])
def test_every_field_of_a_config_has_a_kind(field: str, unchecked: None) -> None:
    """What a field accepts is written down here; everything else in the list is refused, with the field's name."""
    base = {"d_model": 16, "n_heads": 4, "d_vocab": 20, "n_core": 2, "n_loops": 3}
    for value in WRONG:
        if any(value == right and type(value) is type(right) for right in ACCEPTED.get(field, [])):
            LoopedConfig(**{**base, field: value})
            continue
        with pytest.raises(LoopedError, match=f"{field}|rope scaling"):
            LoopedConfig(**{**base, field: value})
        with pytest.raises(LoopedError, match=f"{field}|rope scaling"):
            LoopedConfig.from_dict({**base, field: value})


def test_numpys_numbers_are_numbers(unchecked: None) -> None:
    plain = LoopedConfig(d_model=16, n_heads=4, d_vocab=20, n_core=2, n_loops=3, norm_eps=0.5, tied=True, windows=(4, None))
    made = LoopedConfig(
        d_model=np.int64(16), n_heads=np.int32(4), d_vocab=20, n_core=np.uint8(2), n_loops=3,
        norm_eps=np.float32(0.5), tied=np.bool_(True), windows=[np.int64(4), None],
    )  # fmt: skip
    assert made == plain and json.loads(json.dumps(made.to_dict())) == json.loads(json.dumps(plain.to_dict()))
