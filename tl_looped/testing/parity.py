"""Parity with the code that a model was published with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import open_checkpoint
from ..errors import LoopedError
from ..families import TABLE
from .case import Case, close

NAME = "parity"
ASKS = "logits are those of the reference"


def check(reference: Callable[[Tensor], Tensor] | None) -> Callable[[Case], str]:
    """The check against a reference.

    Args:
        reference: from tokens to logits; None for none.
    """

    def compare(case: Case) -> str:
        if reference is None:
            raise LoopedError("no reference was given; pass reference=, from tokens to logits.")
        found = reference(case.tokens.clone())
        return close(case, "logits", found.to(case.logits), case.logits)

    return compare


def of_transformers(path: str | Path) -> Callable[[Tensor], Tensor] | None:
    """The logits of transformers' own class for a checkpoint, without code from elsewhere; None if it has no such class.

    Args:
        path: a directory or a Hub id.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    checkpoint = open_checkpoint(path)
    kind = checkpoint.config.get("model_type")  # a looped model may call itself by that of its ordinary blocks
    if (
        checkpoint.quantised
        or kind not in [row.name for row in TABLE if row.transformers]
        or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        return None

    def logits(tokens: Tensor) -> Tensor:
        theirs: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, attn_implementation="eager")
        with torch.no_grad():
            return theirs.eval().to(tokens.device)(tokens).logits

    return logits
