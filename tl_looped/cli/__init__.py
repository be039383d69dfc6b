"""The `tl-looped` command: one file for each of its commands, which imports torch when its work begins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._process import INTERRUPTED, own_process

if TYPE_CHECKING:
    from ._parser import Parser

__all__ = ["main"]

HELP = """\
Look inside looped language models, loop by loop.

A MODEL is a Hub id (ByteDance/Ouro-1.4B), a directory with config.json and tensors, or a toy that comes with the package
(toy:hop, toy:hop-noinject, toy:text, toy:text-feedforward).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments. None for those of the process, which this then owns: Ctrl-C and a closed pipe end it.

    Returns:
        The exit status.
    """
    if argv is None:
        return own_process(lambda: _run(sys.argv[1:]))
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("tl-looped: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    from ..errors import LoopedError

    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except LoopedError as error:
        print(f"tl-looped: {error}", file=sys.stderr)
        return 1


def parser() -> Parser:
    """What reads the command line."""
    from . import analyze, collect, compare, explore, info, lens, merge, paper, report, sweep_init
    from ._parser import Parser, Version

    commands = (lens, explore, compare, report, paper, analyze, merge, collect, sweep_init, info)
    examples = "\n".join(f"  {command.EXAMPLE}" for command in commands)
    whole = Parser(
        prog="tl-looped",
        description=HELP,
        epilog=f"examples:\n{examples}\n\ntl-looped COMMAND --help shows the options of a command.",
        is_command=False,
    )
    whole.add_argument("--version", action=Version, help="show the version")
    added = whole.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in commands:
        command.add(added)
    return whole
