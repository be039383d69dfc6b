"""Texts as tokens: the tokenizer's settings in memory, and which positions are real and which are padding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.utilities.slice import Slice
from transformers import PreTrainedTokenizerBase

from ..errors import LoopedError
from ..kinds import plain
from ..schedule import Indices, select_indices
from .structure import StructuredBridge

Mask = Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None  # 1 for real tokens; None where all are


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
    rows = _ids(tokenizer, cfg, [texts] if isinstance(texts, str) else list(texts), prepend_bos, truncate)
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


def refuse_unmarked_padding(tokenizer: Any, tokens: Tensor, what: str, sides: Sequence[str] = ("left", "right")) -> None:
    """Refuse rows that look padded to the longest where no mask says whether they are.

    One pad token at the start of a row, where it is the beginning-of-sequence token too, or at the end, where it is the
    end-of-sequence token too, is the text's own. Rows that all begin or end alike are no rows of different lengths.

    Args:
        tokenizer: whose pad token is meant; without one nothing is refused.
        tokens: [batch, pos].
        what: what was asked, for the error.
        sides: where padding matters.

    Raises:
        LoopedError: some rows, not all, begin or end with pad tokens.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or tokens.ndim != 2 or tokens.is_floating_point() or len(tokens) < 2:
        return
    for side in sides:
        own = tokenizer.bos_token_id if side == "left" else tokenizer.eos_token_id
        at_edge = (tokens if side == "left" else tokens.flip(1)) == pad
        n_pads = at_edge.long().cumprod(1).sum(1)
        looks_padded = n_pads > (own == pad)
        if bool(looks_padded.any()) and not bool(looks_padded.all()):
            row = int(looks_padded.nonzero()[0])
            raise LoopedError(
                f"{what} was asked of tokens whose row {row} {'begins' if side == 'left' else 'ends'} with {int(n_pads[row])} "
                f"pad tokens ({pad}), and nothing says whether they are padding; pass the texts, or attention_mask= with 1 for "
                "real tokens, or rows of different lengths one by one."
            )


def counts_from_end(positions: Indices) -> bool:
    """Whether negative positions are among those asked for."""
    positions = plain(positions)
    if isinstance(positions, slice):
        return any(end is not None and end < 0 for end in (positions.start, positions.stop))
    return any(i < 0 for i in ([positions] if isinstance(positions, int) else positions or ()))


def real_positions(positions: Indices, mask: Mask, n_pos: int) -> Int[Tensor, "#batch chosen"]:
    """The columns of the chosen positions in every row; negative ones count from the row's own last real token.

    Args:
        positions: an int, a slice, several ints, or None for all columns, padding included.
        mask: which columns are real.
        n_pos: how many columns there are.

    Raises:
        OutOfRangeError: a position that a row does not have.
        LoopedError: a column that is padding in some row; positions that count from both ends.
    """
    positions = plain(positions)
    if mask is None or positions is None or positions == slice(None) or bool(mask.bool().all()):
        return torch.tensor([select_indices(positions, n_pos, "positions")], device="cpu")
    real = mask.bool().cpu()
    both_ends = f"positions={positions!r} was asked, which counts from both ends of padded rows; ask for each end by itself."
    if isinstance(positions, slice):
        start, stop = positions.start or 0, positions.stop
        if stop is not None and (start < 0) != (stop < 0):
            raise LoopedError(both_ends)
        asked = list(range(start, stop or 0, positions.step or 1) if start < 0 else range(n_pos)[positions])
    else:
        asked = [positions] if isinstance(positions, int) else list(positions)
    if counts_from_end(asked):
        if not all(i < 0 for i in asked):
            raise LoopedError(both_ends)
        shortest = int(real.sum(1).min())
        back = [i - shortest for i in select_indices(asked, shortest, "real positions in the shortest row")]
        return torch.stack([row.nonzero().flatten()[back] for row in real])
    chosen = select_indices(asked, n_pos, "positions")
    if not bool(real[:, chosen].all()):
        row = int((~real[:, chosen]).any(1).nonzero()[0])
        raise LoopedError(
            f"positions={positions!r} was asked, which is padding in row {row}; count from the end of rows (-1 is a row's last "
            "token), choose positions that every row has, or give rows of different lengths one by one."
        )
    return torch.tensor([chosen], device="cpu")


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


def real_mean(values: Float[Tensor, "batch pos *rest"], mask: Mask) -> Float[Tensor, "*rest"]:
    """The mean over rows and real positions.

    Args:
        values: [batch, pos, ...].
        mask: which positions are real.

    Raises:
        LoopedError: the values are those of other positions than the mask.
    """
    if mask is None:
        return values.mean((0, 1))
    if mask.shape != values.shape[:2]:
        raise LoopedError(
            f"a mean of {tuple(values.shape)} was asked, but the mask of its run is {tuple(mask.shape)}: it is not known which "
            "are padding; cache all positions, or rows of different lengths one by one."
        )
    return values[mask.bool().to(values.device)].mean(0)


class ReadingBridge(StructuredBridge):
    """The part of a `LoopedBridge` that reads text."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, a copy with TransformerLens's settings whenever it is set; None if there is none."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = None if value is None else configured(value, self.cfg)

    def to_tokens(
        self,
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
        tokens, mask = self._read(input, prepend_bos, padding_side, attention_mask)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        return self.forward(tokens, attention_mask=mask, stop_at_layer=0), tokens, None, mask

    def _accepts_derived_position_ids(self) -> bool:
        """No: the model derives positions from the mask row by row, so that no row depends on the padding of its neighbours."""
        return False

    def _read(
        self, input: Any, prepend_bos: bool | None, padding_side: str | None, attention_mask: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """Texts as tokens and the mask of those that are real; what is no text as it is, with the mask it came with."""
        if not isinstance(input, (str, list, tuple)):
            if not isinstance(input, (Tensor, type(None))):
                raise LoopedError(
                    f"a {type(input).__name__} was given as the prompt; pass text, texts or a tensor of token ids."
                )
            if isinstance(input, Tensor) and input.ndim == 1 and attention_mask is not None and attention_mask.ndim == 1:
                attention_mask = attention_mask[None]
            return input, attention_mask
        tokens, mask = encode(self.tokenizer, self.cfg, input, prepend_bos, padding_side)
        mask = mask if attention_mask is None else attention_mask
        return tokens.to(self.cfg.device), None if mask is None else mask.to(self.cfg.device)
