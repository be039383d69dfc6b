"""The `tl-looped` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ._writing import checked_place, write_text
from .bridge.looped_bridge import LoopedBridge
from .errors import LoopedError

HELP = """\
Look inside looped language models, loop by loop.

A MODEL is a Hub id (ByteDance/Ouro-1.4B), a directory with config.json and tensors, or a toy that comes with the package
(toy:hop, toy:hop-noinject, toy:text, toy:text-feedforward).
"""
EXAMPLES = {
    "lens": 'tl-looped lens ByteDance/Ouro-1.4B --prompt "The capital of France is"',
    "report": 'tl-looped report toy:text --prompt "Return the number of" --out report.html',
    "sweep-init": "tl-looped sweep-init --layers 4 --loops 64 --seeds 2 --std fan_in --csv sweep.csv",
    "info": "tl-looped info toy:hop",
}
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except LoopedError as error:
        print(f"tl-looped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tl-looped: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    examples = "\n".join(f"  {example}" for example in EXAMPLES.values())
    parser = argparse.ArgumentParser(
        prog="tl-looped",
        description=HELP,
        epilog=f"examples:\n{examples}\n\ntl-looped COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=f"example: {EXAMPLES[name]}"
        )
        added.set_defaults(run=run)
        return added

    lens = command("lens", _lens, "what the model would answer if it stopped after each loop")
    lens.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory with config.json and tensors, or a toy")
    prompt = lens.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; the checkpoint must come with a tokenizer")
    prompt.add_argument("--tokens", metavar="5,17,3", type=token_list, help="the prompt as token ids")
    lens.add_argument("--top-k", metavar="K", type=int, default=5, help="answers per loop (default: 5)")
    lens.add_argument("--loops", metavar="N", type=int, help="how often to loop (default: what the checkpoint says)")

    page = command(
        "report", _report, "one HTML page with what happens in the loops: answers, patches, fixed points, attention, exits"
    )
    page.add_argument("checkpoint", metavar="MODEL", nargs="?", default="toy:hop", help="as above (default: toy:hop)")
    page.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="may be given several times; the first is shown"
    )
    page.add_argument("--prompts", metavar="FILE", help="a file with a prompt in every line")
    page.add_argument(
        "--loops", metavar="N", type=int, help="how far to look beyond the trained loops (default: twice, at least 16)"
    )
    page.add_argument("--clean", metavar="TEXT", help="with --corrupt: patch activations of this prompt ...")
    page.add_argument("--corrupt", metavar="TEXT", help="... into this one, of as many tokens")
    page.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: report.html")
    page.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=True,
        help="write every number of the page too (default: beside it)",
    )
    page.epilog = (
        f"{page.epilog}. Where a checkpoint has no tokenizer, prompts are token ids such as 5,17,3. The page grows section by "
        "section: Ctrl-C keeps what is done."
    )

    sweep = command(
        "sweep-init", _sweep, "which layouts of norms and injection settle at random initialisation (arXiv 2604.11791)"
    )
    sweep.add_argument("--layers", metavar="N", type=int, default=12, help="layers in the loop (default: 12)")
    sweep.add_argument("--width", metavar="D", type=int, default=128, help="d_model, a multiple of 4 (default: 128)")
    sweep.add_argument("--loops", metavar="N", type=int, default=128, help="how often to loop (default: 128)")
    sweep.add_argument("--seeds", metavar="N", type=int, default=3, help="how many initialisations (default: 3)")
    sweep.add_argument("--std", type=std, default=0.02, help="of the weights, or fan_in for 1/sqrt(fan_in) (default: 0.02)")
    sweep.add_argument("--embed-std", metavar="X", type=float, default=1.0, help="of the embedding (default: 1)")
    sweep.add_argument("--csv", metavar="FILE", type=Path, help="also write every (layout, loop) as a table")

    info = command(
        "info", _info, "the families that can be loaded, or the schedule, sizes, cost per loop and hook names of a checkpoint"
    )
    info.add_argument("checkpoint", metavar="MODEL", nargs="?", help="as above (default: list families and toys)")
    for one in (lens, page, info):
        one.add_argument("--revision", help="branch, tag or commit on the Hub")
    for one in (lens, page):
        one.add_argument("--device", help="default: CUDA where there is one")
    return parser


def _lens(args: argparse.Namespace) -> int:
    model = LoopedBridge.from_pretrained(args.checkpoint, n_loops=args.loops, revision=args.revision, device=args.device)
    print(lens_table(model, args.prompt if args.tokens is None else args.tokens, args.top_k))
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report import Report, report

    beside: Path | None = args.out.with_suffix(".json") if args.json is True else args.json
    if beside is not None and beside.resolve() == args.out.resolve():
        raise LoopedError(f"--json and --out are both {str(args.out)!r}; choose two files.")
    texts = [*args.prompt, *(_lines(args.prompts) if args.prompts else [])]
    for place in (args.out, beside):
        _check_writable(place)
    model = LoopedBridge.from_pretrained(args.checkpoint, revision=args.revision, device=args.device)

    def read(text: str) -> str | Tensor:
        if model.tokenizer is not None:
            return text
        try:
            return token_list(text)
        except argparse.ArgumentTypeError as error:
            raise LoopedError(f"{args.checkpoint} has no tokenizer, and {error}.") from None

    def save(found: Report) -> None:
        found.save(args.out)
        if beside is not None:
            write_text(beside, found.to_json())

    clean, corrupted = (None if text is None else read(text) for text in (args.clean, args.corrupt))
    found = report(
        model,
        [read(text) for text in texts] if texts else None,
        n_loops=args.loops,
        clean=clean,
        corrupted=corrupted,
        on_section=save,
    )
    save(found)
    print(args.out.resolve(), *([] if beside is None else [beside.resolve()]), sep="\n")
    for section in found.sections:
        for failure in section.failed:
            print(f"tl-looped: the section {section.title!r} failed: {failure}", file=sys.stderr)
    if found.missing:
        print(f"tl-looped: interrupted; not done: {', '.join(found.missing)}", file=sys.stderr)
        return INTERRUPTED
    return int(any(section.failed for section in found.sections))


def _lines(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoopedError(f"--prompts {file!r} cannot be read: {error}.") from error
    if not (found := [line for line in lines if line.strip()]):
        raise LoopedError(f"--prompts {file!r} holds no prompt; write one in every line.")
    return found


def _check_writable(place: Path | None) -> None:
    """Refuse before the work begins rather than after it."""
    if place is None:
        return
    if not (place := checked_place(place)).parent.is_dir():
        raise LoopedError(f"{str(place)!r} cannot be written: there is no directory {str(place.parent)!r}.")
    draft = place.with_name(f".{place.name}.try")
    try:
        write_text(draft, "").unlink()
    except LoopedError as error:
        raise LoopedError(str(error).replace(draft.name, place.name)) from error


def _sweep(args: argparse.Namespace) -> int:
    from .analysis.random_init import random_init_sweep

    _check_writable(args.csv)
    sizes = {"n_layers": args.layers, "d_model": args.width, "n_loops": args.loops}
    found = random_init_sweep(**sizes, seeds=args.seeds, std=args.std, embed_std=args.embed_std)
    print(found.summary())
    if args.csv:
        write_text(args.csv, found.to_dataframe().to_csv(index=False))
    return 0


def _info(args: argparse.Namespace) -> int:
    from .info import checkpoint_text, families_text

    print(families_text() if args.checkpoint is None else checkpoint_text(args.checkpoint, args.revision))
    return 0


def std(text: str) -> float | str:
    """A number, or "fan_in".

    Raises:
        argparse.ArgumentTypeError: neither.
    """
    try:
        return text if text == "fan_in" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor fan_in") from None


def token_list(text: str) -> Tensor:
    """Token ids from "5,17,3", as [1, pos].

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        return torch.tensor([[int(token) for token in text.split(",")]])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 5,17,3") from None


def lens_table(model: LoopedBridge, prompt: str | Tensor, top_k: int = 5) -> str:
    """For each loop, the most probable next tokens if the model stopped there, by the family's own way to its output.

    Args:
        model: the model.
        prompt: a text, or tokens [1, pos].
        top_k: how many tokens.

    Raises:
        LoopedError: text without a tokenizer, or more tokens than the vocabulary has.
    """
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise LoopedError(f"top_k={top_k} was asked; the vocabulary has {model.cfg.d_vocab} tokens.")
    if isinstance(prompt, str) and not prompt.strip():
        raise LoopedError("the prompt is empty or holds nothing but whitespace.")
    if isinstance(prompt, str) and model.tokenizer is None:
        raise LoopedError("the checkpoint has no tokenizer; pass the prompt as token ids, such as --tokens 5,17,3.")
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else prompt.to(model.cfg.device)
    answers: dict[int, Tensor] = {}

    def keep(loop: int, logits: Tensor) -> None:
        answers[loop] = logits[0, -1].float().softmax(-1)

    gate_hook = "loops.*.hook_exit_logit" if model.looped_cfg.exit_gate else []
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=gate_hook, on_loop=keep)
    rows = [["loop", *(["exit gate"] if gate_hook else []), *(f"top {i + 1}" for i in range(top_k))]]
    for loop, probabilities in answers.items():
        gate = [f"{cache[f'loops.{loop}.hook_exit_logit'][0, -1].float().sigmoid():.3f}"] if gate_hook else []
        best = probabilities.topk(top_k)
        cells = [f"{_show(model, int(token))} {p:.3f}" for token, p in zip(best.indices, best.values, strict=True)]
        rows.append([str(loop), *gate, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{model.cfg.model_name} ({model.looped_cfg.family}): {model.schedule.describe()}"
    shown = model.to_str_tokens(tokens[0]) if model.tokenizer is not None else tokens[0].tolist()
    return "\n".join([head, f"prompt: {shown}", "", *lines])


def _show(model: LoopedBridge, token: int) -> str:
    return repr(model.tokenizer.decode([token])) if model.tokenizer is not None else str(token)


if __name__ == "__main__":
    sys.exit(main())
