"""Files that a command reads prompts from or writes to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .._writing import checked_place, write_text
from ..errors import LoopedError
from ._parser import token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from ..bridge.looped_bridge import LoopedBridge


def prompts_in(source: str) -> list[str]:
    """The texts of a file or a data set."""
    from ..runs import read_prompts

    try:
        found = read_prompts(source)
    except LoopedError as error:
        raise LoopedError(f"--prompts {error}") from error
    if not all(isinstance(prompt, str) for prompt in found):
        raise LoopedError(f"--prompts {source!r} holds token ids; this command reads texts.")
    return [str(prompt) for prompt in found]


def read_prompt(model: LoopedBridge, text: str) -> str | Tensor:
    """A prompt for a model: the text, or where it has no tokenizer the token ids that the text lists."""
    import torch

    if model.tokenizer is not None:
        return text
    try:
        return torch.tensor([token_ids(text)])
    except argparse.ArgumentTypeError as error:
        raise LoopedError(f"{model.cfg.model_name} has no tokenizer, and {error}.") from None


def check_writable(place: Path | None) -> None:
    """Refuse a place for a file, if there is one, before the work begins rather than after it."""
    if place is None:
        return
    if not (place := checked_place(place)).parent.is_dir():
        raise LoopedError(f"{str(place)!r} cannot be written: there is no directory {str(place.parent)!r}.")
    draft = place.with_name(f".{place.name}.try")
    try:
        write_text(draft, "").unlink()
    except LoopedError as error:
        raise LoopedError(str(error).replace(draft.name, place.name)) from error
