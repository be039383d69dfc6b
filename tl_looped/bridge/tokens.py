"""Texts as tokens: the tokenizer's settings in memory, and which positions are real and which are padding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.utilities.slice import Slice
from transformers import PreTrainedTokenizerBase

from ..errors import LoopedError
from ..tokens import Mask, counts_from_end
from .structure import StructuredBridge


def configured(tokenizer: Any, cfg: TransformerBridgeConfig) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with the special tokens that TransformerLens gives one; `cfg` learns what it adds by itself.

    Nothing is read again from where it came from: what was set in memory stays, and code that lies there cannot run. A special
    token is one that the model has, or none: an invented one would be read as the unknown token.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise LoopedError(f"a {type(tokenizer).__name__} was given as tokenizer; pass a tokenizer of transformers.")
    own: Any = copy.deepcopy(tokenizer)
    vocabulary = own.get_vocab()

    def first(*tokens: str | None) -> str | None:
        return next((token for token in tokens if vocabulary.get(token, cfg.d_vocab) < cfg.d_vocab), None)

    eos = first(own.eos_token, "<|endoftext|>")
    tokens = {"eos_token": eos, "bos_token": first(own.bos_token, eos), "pad_token": first(own.pad_token, eos, own.unk_token)}
    for name, token in tokens.items():
        if getattr(own, name) != token:
            setattr(own, name, token)
    own.init_kwargs.pop("auto_map", None)
    own.init_kwargs |= {name: getattr(own, name) for name in ("padding_side", "truncation_side")}  # so that they are saved
    cfg.tokenizer_prepends_bos, cfg.tokenizer_appends_eos = _added(own)
    return own


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a tokenizer puts its first special token before every text, and its last one after it."""
    special = set(tokenizer.all_special_tokens)
    for text in ("a", *islice((word for word in tokenizer.get_vocab() if word not in special), 99)):
        try:
            plain = tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # what a tokenizer without an unknown token raises has no class of its own
            continue
        if plain:
            break
    else:
        return False, False
    full = tokenizer.encode(text)
    n_added = len(full) - len(plain)
    starts = {tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None)} - {None}
    prepends = n_added > 0 and full[0] in starts and full[1 : 1 + len(plain)] == plain
    return prepends, n_added > prepends and full[-1] == tokenizer.eos_token_id


def encode(
    tokenizer: Any,
    cfg: TransformerBridgeConfig,
    texts: str | Sequence[str],
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    truncate: bool = False,
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
    """The tokens of texts, and the mask of those that are real; None where no text is padded. Arguments as in `to_tokens`.

    Each text is read by itself, so that what is padding is known and not guessed from token ids.
    """
    if tokenizer is None:
        raise LoopedError("text was given, but this model has no tokenizer; pass tokens, or load it with tokenizer=.")
    side = tokenizer.padding_side if padding_side is None else padding_side
    if side not in ("left", "right"):
        raise LoopedError(f"padding_side={side!r} was asked; choose 'left' or 'right'.")
    listed: list[Any] = [texts] if isinstance(texts, str) else list(texts)
    if others := [type(text).__name__ for text in listed if not isinstance(text, str)]:
        raise LoopedError(f"a list with a {others[0]} was given as texts; pass texts, or token ids as a tensor [batch, pos].")
    rows = _ids(tokenizer, cfg, listed, prepend_bos, truncate)
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=0)
    if all(n == longest for n in lengths):
        return torch.tensor(rows, dtype=torch.long, device="cpu").reshape(len(rows), longest), None
    if tokenizer.pad_token_id is None:
        raise LoopedError(
            f"texts of {', '.join(map(str, lengths))} tokens were given, but the tokenizer has no token to pad them with; set "
            "model.tokenizer.pad_token, or pass texts one by one."
        )
    tokens = torch.full((len(rows), longest), tokenizer.pad_token_id, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        tokens[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long, device="cpu"), 1
    return tokens, mask


def _ids(
    tokenizer: Any, cfg: TransformerBridgeConfig, texts: list[str], prepend_bos: bool | None, truncate: bool
) -> list[list[int]]:
    """The tokens of every text, with or without a beginning, and without an end, since texts go on."""
    wants_bos = cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    adds_bos = wants_bos and not cfg.tokenizer_prepends_bos and tokenizer.bos_token_id is not None
    bos: list[Any] = [tokenizer.bos_token_id] if adds_bos else []
    limit = {"truncation": True, "max_length": cfg.n_ctx - len(bos)} if truncate else {"truncation": False}
    shown = ", ".join(map(repr, texts))
    try:
        rows: list[list[int]] = tokenizer(texts, padding=False, **limit)["input_ids"] if texts else []
    except Exception as error:
        if half := next((sign for sign in "".join(texts) if "\ud800" <= sign <= "\udfff"), None):
            raise LoopedError(
                f"{shown} holds {half!r}, half of a character (a lone surrogate), which the tokenizer cannot read; write "
                "all of it or leave it out."
            ) from error
        if type(error) is not Exception:
            raise
        raise LoopedError(  # what a tokenizer without an unknown token raises has no class of its own
            f"the tokenizer has no token for a part of {shown}{_unknown_words(tokenizer, texts)} ({error}); see "
            "model.tokenizer.get_vocab()."
        ) from error
    if cfg.tokenizer_appends_eos:
        rows = [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in rows]
    return [bos + row if wants_bos or not cfg.tokenizer_prepends_bos else row[1:] for row in rows]


def _unknown_words(tokenizer: Any, texts: Sequence[str]) -> str:
    """Which words of texts the tokenizer cannot read, for an error."""
    vocabulary = tokenizer.get_vocab()
    unknown = list(dict.fromkeys(word for word in " ".join(texts).split() if word not in vocabulary))
    return f": {', '.join(map(repr, unknown[:8]))}" if unknown else ""


def check_real(positions: Slice, mask: Mask) -> None:
    """Refuse single positions, and slices that count from the end, which are padding in some row."""
    if mask is None or positions.mode == "identity":
        return
    chosen: Any = positions.slice
    if positions.mode == "slice" and not counts_from_end(chosen):
        return
    found = positions.apply(mask.bool(), dim=-1)
    if not bool(found.all()):
        row = int((~(found if found.ndim == 2 else found[:, None]).all(-1)).nonzero()[0])
        raise LoopedError(
            f"pos_slice={chosen!r} was asked, which is padding in row {row}; take all positions (pos_slice=None) and "
            "choose each row's own, or run rows of different lengths one by one."
        )


class Reading:
    """What reads text: a model with a `cfg` of TransformerLens, and a tokenizer or None."""

    @property
    def tokenizer(self: Any) -> Any:
        """The tokenizer, a copy with TransformerLens's settings whenever it is set; None if there is none."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self: Any, value: Any) -> None:
        self._tokenizer = None if value is None else configured(value, self.cfg)

    def to_tokens(
        self: Any,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of a text, as in TransformerBridge; a text longer than the context is cut only if `truncate` is True.

        Args:
            input: a text, or several, which are padded to the longest.
            prepend_bos: put a beginning-of-sequence token first; None for the model's default.
            padding_side: "left" or "right"; None for the tokenizer's own.
            move_to_device: return the tokens where the model is.
            truncate: cut a text to the context.

        Raises:
            LoopedError: there is no tokenizer, or it has no token for a part of the text.
        """
        tokens, _ = encode(self.tokenizer, self.cfg, input, prepend_bos, padding_side, truncate)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def read(
        self: Any,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Any, Tensor | None]:
        """Texts as tokens and the mask of those that are real; tensors with the mask they came with; all where the model is.

        Args:
            input: text, texts, or what `forward` takes.
            prepend_bos: as in `to_tokens`.
            padding_side: as in `to_tokens`.
            attention_mask: [batch, pos], 1 for real tokens, where it is known.

        Returns:
            The tokens [batch, pos], and the mask [batch, pos]; None where all tokens are real.

        Raises:
            LoopedError: what is no prompt; there is no tokenizer, or it has no token for a part of the text.
        """
        if not isinstance(input, (str, list, tuple)):
            if not isinstance(input, (Tensor, type(None))):
                raise LoopedError(
                    f"a {type(input).__name__} was given as the prompt; pass text, texts or a tensor of token ids."
                )
            if isinstance(input, Tensor) and input.ndim == 1 and attention_mask is not None and attention_mask.ndim == 1:
                attention_mask = attention_mask[None]
            tokens, mask = input, attention_mask
        else:
            tokens, mask = encode(self.tokenizer, self.cfg, input, prepend_bos, padding_side)
            mask = mask if attention_mask is None else attention_mask
        at = self.cfg.device
        return None if tokens is None else tokens.to(at), None if mask is None else mask.to(at)


class ReadingBridge(Reading, StructuredBridge):
    """The part of a `LoopedBridge` that reads text."""

    def input_to_embed(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """The stream entering the first layer, the tokens, None, and the mask of those that are real, as in TransformerBridge.

        Args:
            input: as in `forward`.
            prepend_bos: as in `to_tokens`.
            padding_side: as in `to_tokens`.
            attention_mask: as in `forward`.
        """
        tokens, mask = self.read(input, prepend_bos, padding_side, attention_mask)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        return self.forward(tokens, attention_mask=mask, stop_at_layer=0), tokens, None, mask

    def _accepts_derived_position_ids(self) -> bool:
        """No: the model derives positions from the mask row by row, so that no row depends on the padding of its neighbours."""
        return False
