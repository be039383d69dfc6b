"""`tl-looped paper`: every figure of arXiv 2604.11791 on one model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ._files import read_prompt
from ._parser import add_command

if TYPE_CHECKING:
    from ._parser import Commands

EXAMPLE = "tl-looped paper ByteDance/Ouro-1.4B --prompts gsm8k.jsonl --n 256 --loops 128 --out ouro"


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "every figure and table of arXiv 2604.11791 on one model, as a page and as tables"
    parser = add_command(commands, "paper", run, help, EXAMPLE)
    parser.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory with config.json and tensors, or a toy")
    source = "a file with a prompt in every line, FILE.jsonl[:column], or a data set ID[:split[:column]]"
    parser.add_argument("--prompts", metavar="FILE|ID", required=True, help=source)
    parser.add_argument("--n", metavar="N", type=int, default=256, help="how many prompts (default: 256)")
    parser.add_argument("--loops", metavar="N", type=int, default=128, help="how far to loop (default: 128)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a directory for page, tables and results")
    parser.add_argument("--feed-forward", metavar="MODEL", help="a model without loops to compare the stages with")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="default: CUDA where there is one")


def run(args: argparse.Namespace) -> int:
    """Measure, and write the directory."""
    from ..bridge.looped_bridge import LoopedBridge
    from ..paper import paper
    from ..paper.writing import check_directory
    from ..runs import read_prompts

    check_directory(args.out)
    given = read_prompts(args.prompts, n=args.n)
    model = LoopedBridge.from_pretrained(args.checkpoint, revision=args.revision, device=args.device)
    twin = None if args.feed_forward is None else LoopedBridge.from_pretrained(args.feed_forward, device=args.device)
    prompts = [read_prompt(model, one) if isinstance(one, str) else one for one in given]
    found = paper(model, prompts, out=args.out, n_loops=args.loops, feed_forward=twin)
    print(found.page.resolve())
    for row in found.rows:
        if not row.here:
            print(f"tl-looped: not done: {row.figure}: {row.not_done}.", file=sys.stderr)
    for index, reason in found.failed:
        print(f"tl-looped: prompt {index} failed: {reason}", file=sys.stderr)
    return 0
