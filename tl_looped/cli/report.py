"""`tl-looped report`: one HTML page with what happens in the loops."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoopedError
from ._devices import add_devices, devices
from ._files import check_writable, prompts_in
from ._parser import add_command, token_ids
from ._process import INTERRUPTED

if TYPE_CHECKING:
    from torch import Tensor

    from ..report import Report
    from ._parser import Commands

EXAMPLE = 'tl-looped report toy:text --prompt "Return the number of" --out report.html'


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "one HTML page with what happens in the loops: answers, patches, fixed points, attention, exits"
    parser = add_command(commands, "report", run, help, EXAMPLE)
    about = "a Hub id, a directory with config.json and tensors, or a toy (default: toy:hop)"
    parser.add_argument("checkpoint", metavar="MODEL", nargs="?", default="toy:hop", help=about)
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="may be given several times; the first is shown"
    )
    parser.add_argument("--prompts", metavar="FILE", help="a file with a prompt in every line")
    parser.add_argument("--clean", metavar="TEXT", help="with --corrupted: patch activations of this prompt ...")
    parser.add_argument("--corrupted", metavar="TEXT", help="... into this one, of as many tokens")
    parser.add_argument("--answer", metavar="TOKEN", help='the right answer, such as " Paris" (default: what the model says)')
    parser.add_argument("--wrong", metavar="TOKEN", help="the answer it is compared with (default: that to --corrupted)")
    parser.add_argument("--tokens", action="store_true", help="prompts and answers are token ids such as 5,17,3")
    parser.add_argument("--at-loop", metavar="T", type=int, help="measure the answer after loop T (default: the last)")
    parser.add_argument(
        "--n-loops", metavar="N", type=int, help="how far to loop (default: twice the model's own number, at least 16)"
    )
    parser.add_argument("--sections", metavar="A,B", help="sections of the page, such as answers,patching (default: all)")
    parser.add_argument(
        "--skip-first-token", action="store_true", help="leave the first token out of norms, distances, PCA and CKA"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: report.html")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=True,
        help="write every number of the page too (default: beside it)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_devices(parser)
    parser.add_old("--loops", "--n-loops")
    parser.add_old("--corrupt", "--corrupted")
    parser.epilog = (
        f"{parser.epilog}. Where a checkpoint has no tokenizer, prompts are token ids such as 5,17,3. The page grows section "
        "by section: Ctrl-C keeps what is done."
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, after every section anew."""
    beside: Path | None = args.out.with_suffix(".json") if args.json is True else args.json
    if beside is not None and beside.resolve() == args.out.resolve():
        raise LoopedError(f"--json and --out are both {str(args.out)!r}; choose two files.")
    texts = [*args.prompt, *(prompts_in(args.prompts) if args.prompts else [])]
    for place in (args.out, beside):
        check_writable(place)
    import torch

    from .._writing import write_text
    from ..bridge.looped_bridge import LoopedBridge
    from ..report import report

    model = LoopedBridge.from_pretrained(args.checkpoint, revision=args.revision, **devices(args))

    def read(text: str) -> str | Tensor:
        if model.tokenizer is not None and not args.tokens:
            return text
        try:
            return torch.tensor([token_ids(text)])
        except argparse.ArgumentTypeError as error:
            why = "--tokens was given" if args.tokens else f"{args.checkpoint} has no tokenizer"
            raise LoopedError(f"{why}, and {error}.") from None

    def token(text: str | None) -> str | int | None:
        read_as = None if text is None else read(text)
        return int(read_as) if isinstance(read_as, torch.Tensor) and read_as.numel() == 1 else text

    def save(found: Report) -> None:
        found.save(args.out)
        if beside is not None:
            write_text(beside, found.to_json())

    clean, corrupted = (None if text is None else read(text) for text in (args.clean, args.corrupted))
    found = report(
        model,
        [read(text) for text in texts] if texts else None,
        clean=clean,
        corrupted=corrupted,
        answer=token(args.answer),
        wrong=token(args.wrong),
        at_loop=args.at_loop,
        n_loops=args.n_loops,
        sections=None if args.sections is None else [name.strip() for name in args.sections.split(",")],
        skip_first_token=args.skip_first_token,
        on_section=save,
    )
    save(found)
    print(args.out.resolve(), *([] if beside is None else [beside.resolve()]), sep="\n")
    for section in found.unmeasured:
        print(f"tl-looped: not measured: {section.title}. {section.why_empty()}", file=sys.stderr)
    for section in found.sections:
        for failure in section.failed:
            print(f"tl-looped: the section {section.title!r} failed: {failure}", file=sys.stderr)
    if found.missing:
        print(f"tl-looped: interrupted; not done: {', '.join(found.missing)}", file=sys.stderr)
        return INTERRUPTED
    return int(any(section.failed for section in found.sections))
