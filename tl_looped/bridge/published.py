"""Checkpoints that no family knows, but transformers does: its model is traced."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..checkpoints.open import Checkpoint
from ..errors import LoopedError, UnknownFamilyError
from .traced import TracedBridge

N_EXAMPLE = 8  # tokens of the run that is recorded


def traced_checkpoint(
    checkpoint: Checkpoint,
    unknown: UnknownFamilyError,
    where: dict[str, Any],
    dtype: torch.dtype | None,
    asked: dict[str, Any],
    tokenizer: Any,
) -> TracedBridge:
    """Trace transformers' own model of a checkpoint; no code of the checkpoint is run.

    Args:
        checkpoint: the checkpoint.
        unknown: what is raised if transformers does not know it either, or nothing in it loops.
        where: it goes: `device`, or `device_map` and `max_memory`.
        dtype: of its parameters; None for the stored one.
        asked: numbers of loops that were asked for.
        tokenizer: its tokenizer.

    Raises:
        UnknownFamilyError: transformers does not know it, or nothing in it loops.
        LoopedError: a number of loops was asked for.
    """
    kind = checkpoint.config.get("model_type")
    if checkpoint.path is None or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unknown
    device, *planned = where.pop("device"), *where.values()
    spread: dict[str, Any] = where if any(value is not None for value in planned) else {}
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype or "auto", trust_remote_code=False, **spread)
    model = (model if device is None else model.to(device)).eval()
    tokens = torch.arange(N_EXAMPLE, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    try:
        traced = TracedBridge.of(model, tokens, tokenizer=tokenizer, verbose=False)
    except LoopedError as error:
        raise unknown from error
    if asked:
        given = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise LoopedError(
            f"{given} was asked of {checkpoint}, which no family knows, nor where transformers keeps the number of its loops; "
            "load it with transformers, and use LoopedBridge.trace(model, tokens, set_loops=...)."
        )
    warnings.warn(
        f"no family knows model_type={kind!r}: transformers' {type(model).__name__} was traced ({traced.schedule.describe()}). "
        "Hooks, sweeps, lenses and analyses work; exact attribution does not. model.trace.table() says what was found.",
        stacklevel=3,
    )
    return traced
