"""Where a command puts its model: on one device, or spread over several."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._parser import Parser

PLANS = ("auto", "balanced")


def add_devices(parser: Parser) -> None:
    """Declare the options of a command that loads a model.

    Args:
        parser: of the command.
    """
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="default: CUDA where there is one, of several that of the process")
    about = 'spread the model: auto, balanced, or the device of every part, such as {"": 0, "core": 1, "coda": 1}'
    where.add_argument("--device-map", metavar="MAP", type=_device_map, help=about)


def devices(args: argparse.Namespace) -> dict[str, Any]:
    """Where the model goes, as `from_pretrained` takes it.

    Args:
        args: with what was given for the options of `add_devices`.
    """
    if args.device_map is not None:
        return {"device_map": args.device_map}
    return {"device": args.device or _own_device()}


def devices_beside(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Where a second model goes, whose parts have other names: a plan is one for any model, a map of parts is not.

    Args:
        args: as in `devices`.
        device: of the first model.
    """
    return {"device": device} if isinstance(args.device_map, dict) else devices(args)


def _own_device() -> str | None:
    """The device of this process among those of its machine; None for the usual one."""
    import torch

    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    there = torch.cuda.device_count()
    return f"cuda:{int(rank) % there}" if there > 1 and rank.isdigit() else None


def _device_map(text: str) -> str | dict[str, str | int]:
    if text in PLANS:
        return text
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(type(device) in (str, int) for device in found.values()):
        why = 'is neither auto nor balanced nor a map of parts to devices such as {"": 0, "core": 1}'
        raise argparse.ArgumentTypeError(f"{text!r} {why}; for the whole model on one device use --device")
    return found
