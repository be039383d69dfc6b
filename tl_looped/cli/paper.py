"""`tl-looped paper`: every figure of arXiv 2604.11791 on one model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ._devices import add_devices, devices, devices_beside
from ._files import read_prompt
from ._parser import add_command
from ._process import any_number_of_threads
from .analyze import PROMPTS

if TYPE_CHECKING:
    from ..paper import Paper
    from ._parser import Commands

EXAMPLE = "tl-looped paper ByteDance/Ouro-1.4B --prompts gsm8k.jsonl --n 256 --loops 128 --out ouro"


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "every figure and table of arXiv 2604.11791 on one model, as a page and as tables"
    parser = add_command(commands, "paper", run, help, EXAMPLE)
    parser.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory with config.json and tensors, or a toy")
    parser.add_argument("--prompts", metavar="SOURCE", required=True, help=PROMPTS)
    parser.add_argument("--n", metavar="N", type=int, default=256, help="how many prompts (default: 256)")
    parser.add_argument("--seed", metavar="S", type=int, help="draw the prompts at random (default: the first ones)")
    parser.add_argument("--loops", metavar="N", type=int, default=128, help="how far to loop (default: 128)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a directory for page, tables and results")
    parser.add_argument("--feed-forward", metavar="MODEL", help="a model without loops to compare the stages with")
    about = "the share of this process (default: what torchrun, accelerate or Slurm say, or else all)"
    parser.add_argument("--shard", metavar="3/8", help=about)
    about = "measure so many prompts of equally many tokens together (default: 1)"
    parser.add_argument("--batch-size", metavar="N", type=int, default=1, help=about)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_devices(parser)


def run(args: argparse.Namespace) -> int:
    """Measure a share; make the page if it is the last."""
    any_number_of_threads()
    from ..bridge.looped_bridge import LoopedBridge
    from ..bridge.ordinary import looped_or_ordinary
    from ..paper import paper
    from ..paper.writing import check_directory
    from ..runs import read_prompts

    check_directory(args.out)
    given = read_prompts(args.prompts, n=args.n, seed=args.seed)
    model = LoopedBridge.from_pretrained(args.checkpoint, revision=args.revision, **devices(args))
    twin = (
        None if args.feed_forward is None else looped_or_ordinary(args.feed_forward, **devices_beside(args, model.cfg.device))
    )
    prompts = [read_prompt(model, one) if isinstance(one, str) else one for one in given]
    options = {"shard": args.shard, "batch_size": args.batch_size}
    found = paper(model, prompts, out=args.out, n_loops=args.loops, feed_forward=twin, **options)
    return 0 if found is None else said(found)


def said(found: Paper) -> int:
    """Say where the page is, and what is not on it."""
    print(found.page.resolve())
    for row in found.rows:
        if not row.here:
            print(f"tl-looped: not done: {row.figure}: {row.not_done}.", file=sys.stderr)
    for index, reason in found.failed:
        print(f"tl-looped: left out prompt {index}: {reason}", file=sys.stderr)
    return 0
