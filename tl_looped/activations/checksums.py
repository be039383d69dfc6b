"""What tells a flipped bit in a shard: a checksum of its header, and of every tensor. Against damage, not against attackers."""

from __future__ import annotations

import json
import os
from typing import Any
from zlib import crc32

HEADER, TENSORS = "crc32.header", "crc32"  # in the metadata: one, and one for every tensor, in their order
BLANK = "0" * 8
_PIECE = 2**20  # bytes that are read at once


def of_bytes(content: bytes | bytearray) -> str:
    """The checksum of bytes."""
    return f"{crc32(content):08x}"


def of_file(file: int, start: int, end: int) -> str:
    """The checksum of a part of a file.

    Args:
        file: its descriptor.
        start: where the part begins.
        end: where it ends.
    """
    found = 0
    while start < end and (piece := os.pread(file, min(_PIECE, end - start), start)):
        found, start = crc32(piece, found), start + len(piece)
    return f"{found:08x}"


def of_header(content: dict[str, Any]) -> str:
    """The checksum of a header, its own left out.

    Args:
        content: what the header says.
    """
    metadata = {name: text for name, text in content["__metadata__"].items() if name != HEADER}
    return of_bytes(json.dumps({**content, "__metadata__": metadata}, separators=(",", ":")).encode())
