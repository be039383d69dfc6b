"""`tl-looped info`: what can be loaded, and what a checkpoint is."""

from __future__ import annotations

import argparse
import shutil
from typing import TYPE_CHECKING

from ._parser import add_command

if TYPE_CHECKING:
    from ._parser import Commands

EXAMPLE = "tl-looped info toy:hop"


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "the families that can be loaded, or the schedule, sizes, cost per loop and hook names of a checkpoint"
    parser = add_command(commands, "info", run, help, EXAMPLE)
    about = "what to look at: a Hub id, a directory or a toy (default: list families and toys)"
    parser.add_argument("checkpoint", metavar="MODEL", nargs="?", help=about)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from ..info import checkpoint_text, families_text

    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print(families_text(width) if args.checkpoint is None else checkpoint_text(args.checkpoint, args.revision, width))
    return 0
