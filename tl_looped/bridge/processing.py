"""Weight processing that keeps the sharing, and what TransformerLens's tools may assume about a looped residual stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge

from ..errors import LoopedError, RunningSumError
from ..model import LoopedModel
from ..model.config import LoopedConfig
from ..model.loops import loop_of
from ..schedule import virtual_layer
from .components import LoopedBlock

READS_LN1 = ("attn.q", "attn.k", "attn.v", "attn.gate", "attn.value_gate")
READS_LN2 = ("mlp.gate", "mlp.up")


def check_options(cfg: LoopedConfig, fold_value_biases: bool, refactor_factored_attn_matrices: bool) -> None:
    """Raise a `LoopedError` for processing that would change what the model computes."""
    if refactor_factored_attn_matrices:
        raise LoopedError(
            "refactor_factored_attn_matrices=True was asked, but it rotates queries and keys within a head, and what "
            "is done to them afterwards (rotary positions, norms, grouped keys) does not commute with that; leave it False."
        )
    if fold_value_biases and (cfg.attn_gate or cfg.inner_norm) and "v" in cfg.biases:
        between = "an attention gate multiplies" if cfg.attn_gate else "a norm scales"
        raise LoopedError(
            f"fold_value_biases=True was asked, but {between} the values on their way to the output bias; "
            "pass fold_value_biases=False."
        )


@torch.no_grad()
def process_weights(
    model: LoopedModel, *, fold_ln: bool = True, center_unembed: bool = True, fold_value_biases: bool = True
) -> None:
    """TransformerLens's weight processing on the canonical parameters, each physical layer once.

    Parameters that change are replaced, not written to: other unrolls of the model keep theirs. The log-probabilities stay.
    Norms on branch outputs, on the stream and between passes stay as they are; only the last norm before the unembedding gets
    a weight of its own.

    Args:
        model: the model to change.
        fold_ln: fold `ln1` into q, k, v and the gates of attention, `ln2` into the MLP, the last norm into the unembedding.
            A tied unembedding stays tied: the embedding divides the folded weight out again.
        center_unembed: subtract the mean over the vocabulary from the unembedding, if it is not tied and there is no softcap.
        fold_value_biases: move the biases of v into the biases of o.
    """
    cfg, readers = model.cfg, dict[str, dict[str, None]]()  # of every norm; loops may share either
    for layer in [at for stack, n in cfg.schedule.stacks.items() for j in range(n) for at in cfg.layer_names(stack, j)]:
        for norm, parts in (("ln1", READS_LN1), ("ln2", READS_LN2)):
            read = [cfg.shared_name(f"{layer}.{part}.weight") for part in parts]
            readers.setdefault(cfg.shared_name(f"{layer}.{norm}.weight"), {}).update(dict.fromkeys(read))
        if fold_value_biases:
            _fold_value_bias(model, layer)
    # Elsewhere the stream itself goes through these norms, or each of the readers has its own.
    for norm, names in readers.items() if fold_ln and cfg.residual == "add" and model.loop.mixes is None else ():
        _fold_norm(model, norm, list(names))
    if fold_ln:
        _fold_final_norm(model)
    if center_unembed and (model.cfg.tied or model.cfg.logit_softcap is not None):
        why = "tied to the embedding" if model.cfg.tied else "followed by a softcap"
        logging.warning("center_unembed=True was asked, but the unembedding is %s; it stays uncentred.", why)
    elif center_unembed:
        unembed = _wide(model, "unembed.weight")
        _put(model, "unembed.weight", unembed - unembed.mean(0))


def _get(model: LoopedModel, name: str) -> nn.Parameter:
    return getattr(*model.parameter_slots[name][0])


def _wide(model: LoopedModel, name: str) -> Tensor:
    parameter = _get(model, name)
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def _put(model: LoopedModel, name: str, value: Tensor) -> None:
    embed = model.parameter_slots["embed.weight"][0][0].weight
    assert isinstance(embed, nn.Parameter)
    model.set_parameter(name, nn.Parameter(value.to(embed.dtype), requires_grad=embed.requires_grad))


def _fold_norm(model: LoopedModel, norm: str, readers: list[str]) -> None:
    """Fold the weight of a norm into the projections that read it; a value gate reads only the first columns."""
    if norm not in model.parameter_slots:
        return
    weight = _wide(model, norm)
    for reader in [name for name in readers if name in model.parameter_slots]:
        old = _wide(model, reader)
        _put(model, reader, old * weight[: old.shape[1]])
    _put(model, norm, torch.ones_like(weight))


def _fold_value_bias(model: LoopedModel, layer: str) -> None:
    """Attention patterns sum to 1, so what o makes of the values' bias is a constant."""
    slots, cfg = model.parameter_slots, model.cfg
    values, output = f"{layer}.attn.v.bias", f"{layer}.attn.o.bias"
    if values not in slots:
        return
    bias = _wide(model, values)
    per_head = bias.view(cfg.n_kv_heads, -1).repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=0).flatten()
    written = _wide(model, f"{layer}.attn.o.weight") @ per_head
    if output in slots:
        written = written + _wide(model, output)
    else:
        slots[output] = [(owner, "bias") for owner, _ in slots[f"{layer}.attn.o.weight"]]
    _put(model, output, written)
    _put(model, values, torch.zeros_like(bias))


def _fold_final_norm(model: LoopedModel) -> None:
    """Fold the last norm into the unembedding. Its other uses, between passes or before the coda, keep the old weight."""
    slots, cfg = model.parameter_slots, model.cfg
    shared = "pass_norm.weight" if cfg.pass_norm_is_final else "ln_final.weight"
    if shared not in slots:
        return
    weight = _wide(model, shared)
    if cfg.tied and not bool(weight.all()):
        raise LoopedError(
            "fold_ln=True was asked, but the last norm has a weight of exactly 0, which a tied embedding cannot divide out; "
            "pass fold_ln=False."
        )
    holders = slots.pop(shared)
    others = holders[:-1] if cfg.pass_norm_is_final else holders[1:]
    slots["ln_final.weight"] = [holder for holder in holders if holder not in others]
    if others:
        slots[shared if cfg.pass_norm_is_final else "after_loop.weight"] = others
    _put(model, "ln_final.weight", torch.ones_like(weight))
    if cfg.tied:
        embed = slots["embed.weight"][0][0]
        for name in ("embed.weight", "embed.positions") if cfg.learned_positions else ("embed.weight",):
            _put(model, name, _wide(model, name) * weight)
        embed.register_buffer("unfold", (1 / weight).to(_get(model, "embed.weight").dtype))
        embed.register_forward_hook(_unfold)
    else:
        _put(model, "unembed.weight", _wide(model, "unembed.weight") * weight)
    if cfg.pass_norm_is_final:
        model.register_forward_pre_hook(_refuse_early_readout, with_kwargs=True)
        if cfg.exit_gate:  # the gate of the last pass reads the state after the norm that lost its weight
            *earlier, last = slots.pop("exit_gate.weight")
            slots["last_exit_gate.weight"] = [last]
            _put(model, "last_exit_gate.weight", getattr(*slots["last_exit_gate.weight"][0]) * weight)
            if earlier:
                slots["exit_gate.weight"] = earlier


def _unfold(embed: Any, args: Any, out: Tensor) -> Tensor:
    return out * embed.unfold


def _refuse_early_readout(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    assert isinstance(model, LoopedModel)
    loop, schedule = kwargs.get("loop"), model.cfg.schedule
    early = kwargs.get("on_loop") is not None or kwargs.get("early_exit") is not None
    if early or (loop is not None and schedule.loop(loop) != schedule.n_loops - 1):
        raise LoopedError(
            "a readout after an earlier loop (loop=, a lens, an exit policy) was asked, but the weights were processed "
            "(compatibility mode): the unembedding "
            "has absorbed the weight of the last norm, which the norms of the earlier passes still have; "
            "use a model without weight processing, or fold_ln=False."
        )


class LoopedEmbedding(EmbeddingBridge):
    """The token embedding; `W_E` is the matrix without the family's scale, and without what was folded into a tied one."""

    @property
    def W_E(self) -> Tensor:
        """The embedding matrix, [d_vocab, d_model]."""
        embed: Any = self.original_component
        return embed.weight * embed.unfold if hasattr(embed, "unfold") else embed.weight


def last_norm_is_folded(model: LoopedModel) -> bool:
    """Whether the norm of the last pass has given its weight to the unembedding, and those of earlier passes have not."""
    return model.cfg.pass_norm_is_final and "ln_final.weight" in model.parameter_slots


def stream_break(cfg: LoopedConfig, layer: int) -> str | None:
    """Why what a virtual layer writes is not simply added to the stream that all later layers read; None if it is.

    Example:
        >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3, pass_norm=True, final_norm=False)
        >>> stream_break(cfg, 0)
        'the state is normed after every pass'
        >>> stream_break(cfg, 5)
    """
    schedule = cfg.schedule
    if cfg.residual == "interpolate":
        return "every branch draws the stream towards its output"
    if (why := loop_of(cfg).scaled) is not None:
        return why
    if cfg.norm in ("branch", "sandwich"):
        return "every branch output is normed before it is added"
    if cfg.norm == "stream":
        return "the stream is normed after every addition"
    if cfg.prelude_norm and cfg.injection == "none":
        return "the embedding is normed before the loop"
    if layer < schedule.n_prelude:
        return None if cfg.injection == "none" else "the prelude reaches the loop through its injection"
    p = schedule.pass_of_layer(layer)
    return None if p is None else loop_of(cfg).between(p)


def check_running_sum(cfg: LoopedConfig, layers: range, asked: str) -> None:
    """Raise a `RunningSumError` unless what all these layers write is simply added to the stream."""
    for layer in layers:
        if (why := stream_break(cfg, layer)) is not None:
            raise RunningSumError(
                f"{asked} was asked, which takes the residual stream for one running sum; in this {cfg.family} model, "
                f"from layer {layer} ({cfg.schedule.layer_name(layer)}) on, {why}. Patch activations instead, or decompose "
                "a cache, which follows the stream through the loops."
            )


def check_shared(model: LoopedModel, keys: Mapping[str, list[str]], values: Mapping[str, Tensor]) -> None:
    """Raise a `LoopedError` if values that go to one parameter differ, as they do after weight processing."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[int, str] = {}
    for key in [key for key in keys if key in values]:
        for target in [parameters[actual] for actual in keys[key] if actual in parameters]:
            first = seen.setdefault(id(target), key)
            if not torch.equal(values[first], values[key]):
                raise LoopedError(
                    f"{first!r} and {key!r} differ, but they are one parameter of this model; were the weights processed, "
                    "or are they those of a model that does not loop?"
                )


def has_output_bias(model: LoopedModel) -> bool:
    """Whether attention or MLPs write a bias to the stream."""
    return any(name.endswith(("attn.o.bias", "mlp.down.bias")) for name in model.parameter_slots)


class StreamBlock(LoopedBlock):
    """A virtual layer that tells TransformerLens's tools when they may not take the residual stream for one running sum."""

    def __init__(self, looped: LoopedConfig, aliases: Mapping[str, str], **kwargs: Any):
        super().__init__(**kwargs)
        self.looped = looped
        self.hook_aliases: dict[str, str | list[str]] = {**self.hook_aliases, **aliases}

    @property
    def residual_contribution_scale(self) -> float:
        """1, where that is all there is between what the layer writes and what later layers read.

        Raises:
            LoopedError: something else happens to it on the way.
        """
        layer = virtual_layer(str(self.name))
        assert layer is not None
        check_running_sum(self.looped, range(layer, layer + 1), "a tool over paths between components")
        return 1.0

    @property
    def hook_out_is_single_residual_stream(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the last layer's output is what the last norm and the unembedding read.

        Raises:
            LoopedError: it is not.
        """
        cfg = self.looped
        if (why := loop_of(cfg).mixes) is not None:
            raise RunningSumError(
                f"a readout of the residual stream was asked, but in this {cfg.family} model {why}, and so does the last norm; "
                'use tl_looped.lenses.logit_lens(..., lens="native"), or cache.attribute_logits for contributions.'
            )
        if not cfg.n_coda and loop_of(cfg).between(cfg.schedule.passes[-1]) is not None:
            raise RunningSumError(
                f"a readout of the residual stream was asked, but between the last layer of this {cfg.family} model and its "
                'last norm the state goes through another map; use tl_looped.analysis.logit_lens(..., lens="native"), or '
                "cache.attribute_logits for contributions."
            )
        return True
