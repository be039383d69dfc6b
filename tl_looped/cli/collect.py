"""`tl-looped collect`: activations of a data set into a directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._devices import add_devices, devices
from ._files import read_prompt
from ._parser import add_command
from .analyze import PROMPTS

if TYPE_CHECKING:
    from ._parser import Commands

EXAMPLE = "tl-looped collect toy:text --prompts prompts.txt --sites resid_post --layers -1 --out store"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "activations of chosen sites and loops over many prompts, into a directory that the same command goes on from"
    parser = add_command(commands, "collect", run, help, EXAMPLE)
    parser.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory with config.json and tensors, or a toy")
    parser.add_argument("--prompts", metavar="SOURCE", required=True, help=PROMPTS)
    parser.add_argument("--n", metavar="N", type=int, help="at most so many prompts (default: all)")
    parser.add_argument("--seed", metavar="S", type=int, help="draw the prompts at random (default: the first ones)")
    about = "kinds of activations such as resid_post,mlp_out, or names and patterns such as loops.*.hook_out"
    parser.add_argument("--sites", metavar="A,B", required=True, help=about)
    parser.add_argument("--loops", metavar="T", default="all", help="0,2 or 0:4 or last (default: all)")
    parser.add_argument("--layers", metavar="J", help="layers inside the loop, such as 0,-1 or 0:4 (default: all)")
    parser.add_argument("--stack", help="L or H where two stacks loop; prelude or coda")
    parser.add_argument("--positions", metavar="P", help="positions of every prompt, such as -1 or 1: (default: all)")
    parser.add_argument("--n-loops", metavar="N", type=int, help="how often to loop (default: what the checkpoint says)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="in which they are kept (default: that of the model)")
    about = "write on, and collect that too (default: 0)"
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=0, help=about)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the directory; one of another call is refused")
    about = "the share of this process (default: what torchrun, accelerate or Slurm say, or else all)"
    parser.add_argument("--shard", metavar="3/8", help=about)
    parser.add_argument("--batch-tokens", metavar="N", type=int, default=2048, help="tokens that run at once (default: 2048)")
    about = "skip a prompt that fails and note it, or raise (default: raise)"
    parser.add_argument("--on-error", choices=("skip", "raise"), default="raise", help=about)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_devices(parser)


def run(args: argparse.Namespace) -> int:
    """Collect, and say what the directory holds."""
    import torch

    from ..activations import collect
    from ..bridge.looped_bridge import LoopedBridge
    from ..runs import read_prompts

    loops = args.loops if args.loops in ("all", "last") else _indices("--loops", args.loops)
    texts = read_prompts(args.prompts, n=args.n, seed=args.seed)
    model = LoopedBridge.from_pretrained(args.checkpoint, revision=args.revision, **devices(args))
    store = collect(
        model,
        [read_prompt(model, prompt) if isinstance(prompt, str) else prompt for prompt in texts],
        [site.strip() for site in args.sites.split(",")],
        out=args.out,
        loops=loops,
        layers=None if args.layers is None else _indices("--layers", args.layers),
        stack=args.stack,
        positions=None if args.positions is None else _indices("--positions", args.positions),
        n_loops=args.n_loops,
        dtype=None if args.dtype is None else getattr(torch, DTYPES[args.dtype]),
        max_new_tokens=args.max_new_tokens,
        shard=args.shard,
        batch_tokens=args.batch_tokens,
        on_error=args.on_error,
    )
    print(f"{args.out}: {store!r}")
    return 0


def _indices(option: str, text: str) -> Any:
    """Indices as they are written, such as 3, 0,2 or 1:4."""
    from ..errors import LoopedError

    try:
        if ":" in text:
            return slice(*(int(end) if end.strip() else None for end in text.split(":")))
        found = [int(one) for one in text.split(",")]
    except ValueError:
        raise LoopedError(f"{option} {text} was given; write indices such as 3, 0,2 or 1:4.") from None
    return found[0] if len(found) == 1 else found
