"""The tokenizer of a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer that lies in a directory, without running code of the repository; None if there is none."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about keys of config.json that no tokenizer reads
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # what an unknown model_type raises differs between versions of transformers
        try:
            return PreTrainedTokenizerFast.from_pretrained(path)
        except Exception:  # damaged files raise anything
            warnings.warn(f"the tokenizer in {path} cannot be loaded ({error}); pass tokenizer= yourself.", stacklevel=3)
            return None
