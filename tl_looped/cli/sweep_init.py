"""`tl-looped sweep-init`: which layouts settle at random initialisation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ._files import check_writable
from ._parser import add_command

if TYPE_CHECKING:
    from ._parser import Commands

EXAMPLE = "tl-looped sweep-init --n-layers 4 --n-loops 64 --seeds 2 --std fan_in --csv sweep.csv"


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "which layouts of norms and injection settle at random initialisation (arXiv 2604.11791)"
    parser = add_command(commands, "sweep-init", run, help, EXAMPLE)
    parser.add_argument("--n-layers", metavar="N", type=int, default=12, help="layers in the loop (default: 12)")
    parser.add_argument("--d-model", metavar="D", type=int, default=128, help="the width, a multiple of 4 (default: 128)")
    parser.add_argument("--n-loops", metavar="N", type=int, default=128, help="how often to loop (default: 128)")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="how many initialisations (default: 3)")
    parser.add_argument("--std", type=_std, default=0.02, help="of the weights, or fan_in for 1/sqrt(fan_in) (default: 0.02)")
    parser.add_argument("--embed-std", metavar="X", type=float, default=1.0, help="of the embedding (default: 1)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write every (layout, loop) as a table")
    for old, new in (("--layers", "--n-layers"), ("--width", "--d-model"), ("--loops", "--n-loops")):
        parser.add_old(old, new)


def run(args: argparse.Namespace) -> int:
    """Sweep, print the summary and write the table."""
    check_writable(args.csv)
    from .._writing import write_text
    from ..analysis.random_init import random_init_sweep

    sizes = {"n_layers": args.n_layers, "d_model": args.d_model, "n_loops": args.n_loops}
    found = random_init_sweep(**sizes, seeds=args.seeds, std=args.std, embed_std=args.embed_std)
    print(found.summary())
    if args.csv:
        write_text(args.csv, found.to_dataframe().to_csv(index=False))
    return 0


def _std(text: str) -> float | str:
    try:
        return text if text == "fan_in" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor fan_in") from None
