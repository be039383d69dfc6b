"""`tl-looped analyze`: analyses over many prompts, by one process or many."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoopedError
from ._devices import add_devices, devices
from ._files import read_prompt
from ._parser import add_command
from ._process import any_number_of_threads

if TYPE_CHECKING:
    from ..runs import Run
    from ._parser import Commands

EXAMPLE = "tl-looped analyze toy:text --analysis fixed_points,stages --prompts prompts.txt --loops 128 --out run"
PROMPTS = (
    "FILE.txt with a prompt in every line, FILE.jsonl[:column], or a data set ID[:split:column]; messages number the prompts "
    "that are taken from 0 on, empty ones left out"
)


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "analyses over many prompts, by one process or many, into a directory that the same command goes on from"
    parser = add_command(commands, "analyze", run, help, EXAMPLE)
    parser.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory or a toy; also a Llama-shaped decoder")
    parser.add_argument(
        "--analysis", metavar="A,B", required=True, help="analyses of tl_looped.analysis; a wrong name lists them"
    )
    parser.add_argument("--prompts", metavar="SOURCE", required=True, help=PROMPTS)
    parser.add_argument("--n", metavar="N", type=int, help="at most so many prompts (default: all)")
    parser.add_argument("--seed", metavar="S", type=int, help="draw the prompts at random (default: the first ones)")
    parser.add_argument("--loops", "--n-loops", metavar="L", type=int, help="how often to loop (default: of the analysis)")
    about = "a setting of an analysis, such as fixed_points.reduction=matrix; may be given several times"
    parser.add_argument("--set", metavar="ANALYSIS.KEY=VALUE", action="append", default=[], dest="settings", help=about)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the directory; one of another run is refused")
    about = "the share of this process (default: what torchrun, accelerate or Slurm say, or else all)"
    parser.add_argument("--shard", metavar="3/8", help=about)
    about = "measure so many prompts of equally many tokens together (default: 1)"
    parser.add_argument("--batch-size", metavar="N", type=int, default=1, help=about)
    about = "skip a prompt that fails and list it, or raise (default: skip)"
    parser.add_argument("--on-error", choices=("skip", "raise"), default="skip", help=about)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_devices(parser)


def run(args: argparse.Namespace) -> int:
    """Measure a share; write the results if it is the last."""
    any_number_of_threads()
    from ..analysis.by_name import settings_of
    from ..bridge.ordinary import looped_or_ordinary
    from ..runs import analyze, read_prompts

    names = [name.strip() for name in args.analysis.split(",") if name.strip()]
    asked: dict[str, dict[str, Any]] = {}
    for name in names:
        known = settings_of(name)
        asked[name] = {"n_loops": args.loops} if args.loops is not None and "n_loops" in known else {}
    for text in args.settings:
        name, key, value = _setting(text)
        if name not in asked:
            raise LoopedError(f"--set {text} was given, but --analysis asks for {', '.join(asked)}.")
        if key not in (known := settings_of(name)):
            raise LoopedError(f"--set {text} was given; {name} has the settings {', '.join(known)}.")
        asked[name][key] = value
    texts = read_prompts(args.prompts, n=args.n, seed=args.seed)
    model = looped_or_ordinary(args.checkpoint, revision=args.revision, **devices(args))
    prompts = [read_prompt(model, prompt) if isinstance(prompt, str) else prompt for prompt in texts]
    options = {"shard": args.shard, "batch_size": args.batch_size, "on_error": args.on_error}
    try:
        found = analyze(asked, model, prompts, out=args.out, **options)
    except LoopedError as error:
        raise LoopedError(f"{error}{_as_options(str(error), names)}") from error
    return 0 if found is None else written(args.out, found)


def written(out: Path, found: dict[str, Run]) -> int:
    """Write a table beside every result, and say where they are and what was left out."""
    from .._writing import write_text

    for name, run in found.items():
        failed = f"; {len(run.failed)} failed" if run.failed else ""
        if run.result is None:
            print(f"tl-looped: {name} has no result; prompt {run.failed[0][0]}: {run.failed[0][1]}", file=sys.stderr)
            continue
        write_text(out / f"{name}.csv", run.to_dataframe().to_csv(index=False))
        print(f"{out / name}.safetensors and .csv: {run.done} prompts{failed}")
        for prompt, reason in run.failed:
            print(f"tl-looped: {name} left out prompt {prompt}: {reason}", file=sys.stderr)
    return int(any(run.result is None for run in found.values()))


def _as_options(message: str, names: Sequence[str]) -> str:
    """How the command passes the first setting that a message says to pass in Python."""
    import re

    from ..analysis.by_name import settings_of

    if (found := re.search(r"pass (\w+)='?(\w+)", message)) is None:
        return ""
    key, value = found.groups()
    options = [f"--set {name}.{key}={value}" for name in names if key in settings_of(name)]
    return f" On the command line it is {' '.join(options)}." if options else ""


def _setting(text: str) -> tuple[str, str, Any]:
    import ast

    place, equals, value = text.partition("=")
    name, dot, key = place.strip().partition(".")
    if not equals or not dot:
        raise LoopedError(f"--set {text} was given; write ANALYSIS.KEY=VALUE, such as fixed_points.reduction=matrix.")
    if len(ends := value.split(":")) == 2 and all(not end or end.lstrip("-").isdigit() for end in ends):
        return name, key, slice(*(int(end) if end else None for end in ends))
    try:
        return name, key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, key, value
