"""What a checkpoint computes and where its parameters are, from config.json and the names and shapes of its tensors.

Nothing here grows with a count that is merely written in config.json: numbers are compared with the tensors before anything of
their size is built.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from itertools import islice
from typing import NamedTuple

from .. import families
from .._old_calls import accepts_old
from ..errors import CheckpointError, LoopedError
from ..families import Computed, Family, Source
from ..model.config import LoopedConfig
from ..model.parameters import parameter_shapes
from ..schedule import check_count
from .open import Checkpoint

# Unrolling takes some 4 ms and 250 kB per virtual layer. The deepest released model has 264 (8 layers, 32 loops, 8 outside).
MAX_UNROLLED = 320
_MANY_LAYERS = 1000  # more than there are tensors are not listed one by one
_MAX_PROBLEMS = 20  # shown in an error

# Parts of tensor names that wrappers leave, who leaves them, and what to save instead.
_PARALLEL = "module."  # at the beginning of every name; HRM-Text has it inside
_WRAPPED = {
    "_orig_mod.": ("torch.compile", "the state_dict of `model._orig_mod`"),
    "_fsdp_wrapped_module.": ("FullyShardedDataParallel", "the full state_dict, gathered without the wrapper"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "the state_dict of the module it wraps"),
    "base_layer.": ("PEFT (an adapter that is not merged)", "what `merge_and_unload()` returns"),
    "lora_A.": ("PEFT (an adapter that is not merged)", "what `merge_and_unload()` returns"),
    "modules_to_save.": ("PEFT (an adapter that is not merged)", "what `merge_and_unload()` returns"),
    "base_model.model.": ("PEFT (an adapter that is not merged)", "what `merge_and_unload()` returns"),
    _PARALLEL: ("DataParallel or DistributedDataParallel", "the state_dict of `model.module`"),
}


class Plan(NamedTuple):
    """What there is to load.

    Args:
        family: the family of the checkpoint.
        cfg: what it computes.
        sources: where every parameter is stored, by canonical name.
    """

    family: Family
    cfg: LoopedConfig
    sources: Mapping[str, Source | Computed]


@accepts_old("n_loops", "l_cycles", "cfg")
def make_plan(
    checkpoint: Checkpoint, *, n_loops: int | None = None, l_cycles: int | None = None, cfg: LoopedConfig | None = None
) -> Plan:
    """Decide what a checkpoint computes, and compare it with the tensors; none of them is read.

    Args:
        checkpoint: the checkpoint.
        n_loops: how often the looped stack runs, instead of what the checkpoint says.
        l_cycles: runs of the L stack per loop (HRM-Text).
        cfg: what the checkpoint computes, where its config.json does not say it.

    Raises:
        CheckpointError: config.json, names and shapes that do not fit together.
        LoopedError: `n_loops` or `l_cycles` that this model cannot have.
    """
    _check_not_wrapped(checkpoint)
    family = families.detect(checkpoint.config, checkpoint.shapes)
    try:
        cfg = cfg or families.read(family, checkpoint.with_files(getattr(family, "FILES", ())), checkpoint.shapes)
    except LoopedError as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # in a family from outside
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"the config.json of {checkpoint} cannot be understood ({reason}). Restore the published one."
        ) from error
    full, cfg = cfg, _with_counts(cfg, n_loops, l_cycles)
    if cfg.own_layers and cfg.n_loops > full.n_loops:
        raise LoopedError(
            f"n_loops={n_loops} was asked, but every loop of this {cfg.family} model has weights of its own, and {checkpoint} "
            f"holds those of {full.n_loops}; choose at most as many."
        )
    if cfg.n_physical > max(_MANY_LAYERS, len(checkpoint.shapes)):
        raise CheckpointError(
            f"config.json of {checkpoint} has {cfg.n_physical} layers, but there are {len(checkpoint.shapes)} tensors. "
            "Use the config.json these tensors were saved with."
        )
    plan = Plan(family, cfg, family.sources(cfg, checkpoint.shapes))
    later = family.sources(full, checkpoint.shapes).values() if cfg.own_layers else ()  # of loops that nobody asked for
    _check_tensors(checkpoint, plan, {at for source in later for at in stored(source)})
    return plan


def check_depth(checkpoint: Checkpoint, cfg: LoopedConfig, n_loops: int | None, l_cycles: int | None) -> None:
    """Refuse a depth that nobody asked for and that would take more than a few seconds to unroll."""
    unasked = _with_counts(cfg, None if n_loops is None else 1, None if l_cycles is None else 1).schedule.n_layers
    if unasked > max(MAX_UNROLLED, cfg.n_physical):
        counts = f"n_loops={cfg.n_loops}" + ("" if cfg.l_cycles is None else f", l_cycles={cfg.l_cycles}")
        asked = "n_loops=" if cfg.l_cycles is None else "n_loops= and l_cycles="
        raise CheckpointError(
            f"config.json of {checkpoint} asks for {counts}, which unrolls to {cfg.schedule.n_layers} virtual layers and takes "
            f"long; without being asked, at most {MAX_UNROLLED} are unrolled. Pass {asked} to say how deep it shall be."
        )


def stored(source: Source | Computed, shape: tuple[int, ...] = ()) -> Mapping[str, tuple[int, ...]]:
    """The stored tensors that a parameter of some shape is read from, and their shapes."""
    return source.stored if isinstance(source, Computed) else {source.name: source.shape or shape}


def _with_counts(cfg: LoopedConfig, n_loops: int | None, l_cycles: int | None) -> LoopedConfig:
    if l_cycles is not None and cfg.l_cycles is None:
        raise LoopedError(
            f"l_cycles={l_cycles!r} was asked, but a {cfg.family} model has one looped stack; n_loops= says how often it runs."
        )
    changes = {"n_loops": n_loops, "l_cycles": l_cycles}
    asked = {name: check_count(name, count) for name, count in changes.items() if count is not None}
    return cfg.replace(**asked) if asked else cfg


def _check_not_wrapped(checkpoint: Checkpoint) -> None:
    """Refuse tensors whose names show that a wrapper was saved in place of the model."""
    names = checkpoint.shapes
    for part, (wrapper, remedy) in _WRAPPED.items():
        marked = [name for name in names if part in f".{name}"]
        if marked and (part != _PARALLEL or all(name.startswith(part) for name in names)):
            raise CheckpointError(
                f"{checkpoint} has {marked[0]!r}: {part!r} is left in the names of tensors by {wrapper}, which wrapped the "
                f"model. Load or save {remedy}."
            )


def _check_tensors(checkpoint: Checkpoint, plan: Plan, also: Collection[str]) -> None:
    """Compare names and shapes with what the config asks for."""
    family, cfg, sources = plan
    try:
        parameters = dict(parameter_shapes(cfg))
    except RuntimeError as error:  # of torch, which counts the bytes of a tensor in 64 bits
        raise CheckpointError(
            f"config.json asks for a tensor of more than 2^63 bytes (d_model={cfg.d_model}, d_mlp={cfg.d_mlp}, "
            f"d_vocab={cfg.d_vocab}); restore the config.json that the checkpoint was published with."
        ) from error
    if unknown := [name for name in sources if name not in parameters]:
        near = difflib.get_close_matches(unknown[0], parameters, n=3)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise CheckpointError(
            f"sources() of the family {cfg.family} names {', '.join(map(repr, unknown[:4]))}, for which this model has "
            f"no parameter.{hint} All: LoopedModel(cfg).canonical_parameters()."
        )
    expected: dict[str, tuple[tuple[int, ...], list[str]]] = {}
    for name, parameter in parameters.items():
        for at, shape in stored(sources.get(name, Source(name)), parameter).items():
            fields = expected.setdefault(at, (shape, []))[1]
            fields += [field for field in _shape_fields(name) if field not in fields]
    problems = [f"missing: {name} {list(shape)}" for name, (shape, _) in expected.items() if name not in checkpoint.shapes]
    known = {*expected, *also, *(family.TIED if cfg.tied else ())}
    for name, found in checkpoint.shapes.items():
        if name not in known and not any(fnmatch(name, pattern) for pattern in family.IGNORED):
            problems.append(f"unexpected: {name} {list(found)}")
        if name in expected and found != expected[name][0]:
            shape, fields = expected[name]
            follows = ", ".join(f"{field}={getattr(cfg, field)}" for field in fields)
            problems.append(f"wrong shape: {name} should be {list(shape)} from {follows}, but is {list(found)}")
        elif name in expected and not checkpoint.dtypes[name].is_floating_point:
            problems.append(f"not floating point: {name} is {checkpoint.dtypes[name]}; so stored, it cannot be read as numbers")
    if problems:
        more = f"\n  and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckpointError(
            f"{checkpoint} does not hold the tensors of the {cfg.family} model in its config.json "
            f"({cfg.schedule.describe()}):\n  "
            + "\n  ".join(islice(problems, _MAX_PROBLEMS))
            + f"{more}\n{_remedy(expected, checkpoint)}"
        )


def _remedy(expected: Collection[str], checkpoint: Checkpoint) -> str:
    """What to do about names or shapes that do not fit."""
    for name in checkpoint.shapes:
        if inner := next((at for at in expected if name.endswith(f".{at}") and at not in checkpoint.shapes), None):
            return (
                f"The names begin with {name.removesuffix(inner)!r}, which something that wraps the model has left. "
                "Save the state_dict of the model itself, or rename the tensors."
            )
    return "Use the config.json these tensors were saved with."


def _shape_fields(name: str) -> list[str]:
    """The `LoopedConfig` fields that the shape of a parameter follows from."""
    if re.search(r"embed|unembed", name):
        return ["d_vocab", *(["n_kv_heads", "d_head"] if "value" in name else ["d_model"])]
    if match := re.search(r"attn\.(\w+?)(_norm)?\.", name):
        return ["n_kv_heads" if match[1] in ("k", "v", "value_gate") else "n_heads", "d_head", "d_model"]
    return ["d_mlp", "d_model"] if ".mlp." in name else ["d_model"]
