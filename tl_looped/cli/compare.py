"""`tl-looped compare`: two models, or one with two numbers of loops or on two sets of prompts, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoopedError
from ._devices import add_devices, devices
from ._files import check_writable, prompts_in, read_prompt
from ._parser import add_command, token_ids

if TYPE_CHECKING:
    from ._parser import Commands

EXAMPLE = 'tl-looped compare toy:hop toy:hop-noinject --prompt "A b B c C a ? A" --answer b'


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "two models side by side, loop by loop, and the first loop in which they differ"
    parser = add_command(commands, "compare", run, help, EXAMPLE)
    parser.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory with config.json and tensors, or a toy")
    parser.add_argument(
        "other", metavar="OTHER", nargs="?", help="the second model (default: the same, with --n-loops 2,4 or --corrupted)"
    )
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a file with a prompt in every line")
    parser.add_argument(
        "--corrupted", metavar="TEXT", action="append", help="a prompt of the second side for every prompt, in their order"
    )
    parser.add_argument(
        "--answer",
        metavar="TEXT",
        action="append",
        help="the right token after a prompt, for all or one for each (default: every next token of the prompts is scored)",
    )
    parser.add_argument("--n-loops", metavar="N or N,M", type=_counts, help="how often to loop, for both or each")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write every (side, loop) as a table")
    add_devices(parser)
    parser.epilog = f"{parser.epilog}. Where a checkpoint has no tokenizer, prompts are token ids such as 5,17,3."


def run(args: argparse.Namespace) -> int:
    """Print the comparison and write the table."""
    texts = [*args.prompt, *(prompts_in(args.prompts) if args.prompts else [])]
    if not texts:
        raise LoopedError("compare was asked of no prompts; give --prompt TEXT or --prompts FILE.")
    check_writable(args.csv)
    from .._writing import write_text
    from ..analysis.side_by_side import compare
    from ..bridge.looped_bridge import LoopedBridge

    names = [args.checkpoint] if args.other is None else [args.checkpoint, args.other]
    models = {name: LoopedBridge.from_pretrained(name, **devices(args)) for name in names}
    first, *_, last = [*models.values()] * 2
    answers = args.answer
    if answers is not None and first.tokenizer is None:
        answers = [token for text in answers for token in token_ids(text)]
    found = compare(
        models,
        [read_prompt(first, text) for text in texts],
        corrupted=None if args.corrupted is None else [read_prompt(last, text) for text in args.corrupted],
        n_loops=args.n_loops,
        answers=answers[0] if answers is not None and len(answers) == 1 else answers,
    )
    print(found.summary())
    if args.csv:
        write_text(args.csv, found.to_dataframe().to_csv(index=False))
    return 0


def _counts(text: str) -> int | tuple[int, int]:
    try:
        counts = [int(n) for n in text.split(",")]
    except ValueError:
        counts = []
    if len(counts) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of loops nor two, such as 2,4")
    return counts[0] if len(counts) == 1 else (counts[0], counts[1])
