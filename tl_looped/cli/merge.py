"""`tl-looped merge`: the results of what the processes of `tl-looped analyze` or `tl-looped paper` found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ._parser import add_command
from .analyze import written
from .paper import said

if TYPE_CHECKING:
    from ._parser import Commands

EXAMPLE = "tl-looped merge run"


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "merge", run, "add up what the processes of analyze or paper found, and write the results", EXAMPLE
    )
    parser.add_argument("out", metavar="DIR", type=Path, help="the --out of analyze or paper")


def run(args: argparse.Namespace) -> int:
    """Write the results of all shares."""
    from ..paper import ASKED, finish
    from ..runs import merge
    from ..runs.folder import refuse_part_of_paper

    refuse_part_of_paper(args.out)
    if (args.out / ASKED).is_file():
        return said(finish(args.out))
    return written(args.out, merge(args.out))
