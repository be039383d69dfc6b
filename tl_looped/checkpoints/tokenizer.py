"""The tokenizer of a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

_ENOUGH = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")  # any of these is a tokenizer
TOKENIZER_FILES = frozenset(
    "added_tokens.json additional_chat_templates chat_template.jinja chat_template.json merges.txt sentencepiece.bpe.model "
    "special_tokens_map.json spiece.model tokenizer.json tokenizer.model tokenizer_config.json vocab.json vocab.txt".split()
)


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer that lies in a directory, without running code of the repository; None if there is none."""
    if not any((path / name).is_file() for name in _ENOUGH):
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
