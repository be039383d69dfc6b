"""What a shard says of its rows: which prompt, position and token each is of, and which passes ran there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoopedError
from .places import group_of
from .record import Collection
from .shards import INDEX, DamagedError, Shard
from .texts import Text

NAMES = (
    "row.prompt",
    "row.position",
    "row.token",
    "prompt.digest",
    "prompt.number",
    "prompt.n_prompt",
    "prompt.n_tokens",
    "prompt.n_letters",
    "tokens",
    "text",
    "failed",
)


@dataclass(eq=False)
class Ended:
    """A text that was run.

    Args:
        text: the text.
        row: the first of its rows in the draft.
        positions: which of its positions are kept.
        filled: how many positions every activation has; None where each has all.
    """

    text: Text
    row: int
    positions: list[int]
    filled: dict[str, int] | None = None


def index_names(collection: Collection) -> list[str]:
    """Every tensor that the index of a shard may have."""
    groups = dict.fromkeys(group_of(collection.schedule, name) for name in collection.names)
    return [INDEX + name for name in (*NAMES, *(f"rows.{group}" for group in groups))]


def finished(
    collection: Collection,
    block: Sequence[Text],
    ends: Sequence[Ended],
    active: Mapping[str, Tensor],
    capacity: int,
    tokenizer: Any,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Which rows of a draft are kept of every activation, None for all, and the index of the shard.

    Args:
        collection: what is collected.
        block: all its texts.
        ends: those that were run, in the order of their rows.
        active: for groups of activations that not every position has, the rows of the draft that do.
        capacity: how many rows the draft has.
        tokenizer: what makes text of tokens; None for none.
    """
    rows = torch.tensor([_row(at, k, p) for at in ends for k, p in enumerate(at.positions)], dtype=torch.long)
    positions = torch.tensor([p for at in ends for p in at.positions], dtype=torch.int32)
    owner = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor([len(at.positions) for at in ends], dtype=torch.long))
    numbers = torch.tensor([at.text.number for at in ends], dtype=torch.int32)
    tokens = [at.text.tokens[at.positions].int() for at in ends]
    index = {
        "row.prompt": numbers[owner],
        "row.position": positions,
        "row.token": torch.cat(tokens) if tokens else positions.clone(),
        **_prompts(block, tokenizer),
    }
    whole = None if len(rows) == capacity else rows
    kept: dict[str, Tensor | None] = {}
    groups: dict[str, Tensor] = {}
    for name in collection.names:
        ran = torch.tensor([len(at.text.tokens) if at.filled is None else at.filled[name] for at in ends], dtype=torch.long)
        has, group = positions < ran[owner], group_of(collection.schedule, name)
        if group in active:
            has &= active[group][rows]
        kept[name] = whole if bool(has.all()) else rows[has]
        if not torch.equal(groups.setdefault(group, has), has):
            raise LoopedError(f"{name} has other positions than others of {group or 'its kind'}, which no store keeps.")
    index |= {f"rows.{group}": has.nonzero().flatten().int() for group, has in groups.items() if not bool(has.all())}
    return kept, {INDEX + name: values for name, values in index.items()}


def failures(shard: Shard) -> dict[int, str]:
    """The prompts that a shard leaves out, and why.

    Args:
        shard: the shard.

    Raises:
        DamagedError: what it says cannot be read.
    """
    try:
        found: dict[str, str] = json.loads(bytes(shard.index("failed").numpy()))
        return {int(number): why for number, why in found.items()}
    except (ValueError, AttributeError) as error:  # in a shard of before checksums
        raise DamagedError.of(shard.path, "index.failed is not what was written") from error


def _row(at: Ended, k: int, position: int) -> int:
    """The row of a position in the draft: where all positions of a text have one, or those that are kept."""
    return at.row + (k if at.filled is None else position)


def _prompts(block: Sequence[Text], tokenizer: Any) -> dict[str, Tensor]:
    """What is kept of every text of a block, also of those that failed."""
    texts = [(tokenizer.decode(text.tokens.tolist()) if tokenizer is not None else "").encode() for text in block]
    failed = json.dumps({text.number: text.failed for text in block if text.failed}).encode()
    return {
        "prompt.digest": torch.tensor([text.digest for text in block], dtype=torch.int64),
        "prompt.number": torch.tensor([text.number for text in block], dtype=torch.int64),
        "prompt.n_prompt": torch.tensor([text.n_prompt for text in block], dtype=torch.int32),
        "prompt.n_tokens": torch.tensor([len(text.tokens) for text in block], dtype=torch.int32),
        "prompt.n_letters": torch.tensor([len(text) for text in texts], dtype=torch.int32),
        "tokens": torch.cat([text.tokens for text in block]).int(),
        "text": _bytes(b"".join(texts)),
        "failed": _bytes(failed),
    }


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
