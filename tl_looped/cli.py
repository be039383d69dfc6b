"""The `tl-looped` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from .analysis.random_init import random_init_sweep
from .bridge.looped_bridge import LoopedBridge
from .errors import LoopedError

SWEEP_EXAMPLE = "example: tl-looped sweep-init --layers 4 --loops 64 --seeds 2 --std fan_in --csv sweep.csv"
LENS_EXAMPLE = 'example: tl-looped lens ByteDance/Ouro-1.4B --prompt "The capital of France is" --loops 4'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tl-looped", description="Look inside looped language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    lens = commands.add_parser(
        "lens",
        help="what the model would answer if it stopped after each loop",
        description=lens_table.__doc__,
        epilog=LENS_EXAMPLE,
    )
    lens.add_argument("checkpoint", help="a Hub id, or a directory with config.json and tensors")
    prompt = lens.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; the checkpoint must come with a tokenizer")
    prompt.add_argument("--tokens", metavar="5,17,3", type=token_list, help="the prompt as token ids")
    lens.add_argument("--loops", metavar="N", type=int, help="how often to loop (default: what the checkpoint says)")
    lens.add_argument("--top-k", metavar="K", type=int, default=5, help="answers per loop (default: 5)")
    lens.add_argument("--revision", help="branch, tag or commit on the Hub")
    lens.add_argument("--device", help="default: CUDA where there is one")
    sweep = commands.add_parser(
        "sweep-init",
        help="which layouts of norms and injection settle at random initialisation",
        description=random_init_sweep.__doc__.split("\n\n")[0] if random_init_sweep.__doc__ else None,
        epilog=SWEEP_EXAMPLE,
    )
    sweep.add_argument("--layers", metavar="N", type=int, default=12, help="layers in the loop (default: 12)")
    sweep.add_argument("--width", metavar="D", type=int, default=128, help="d_model, a multiple of 4 (default: 128)")
    sweep.add_argument("--loops", metavar="N", type=int, default=128, help="how often to loop (default: 128)")
    sweep.add_argument("--seeds", metavar="N", type=int, default=3, help="how many initialisations (default: 3)")
    sweep.add_argument("--std", type=std, default=0.02, help="of the weights, or fan_in for 1/sqrt(fan_in) (default: 0.02)")
    sweep.add_argument("--embed-std", metavar="X", type=float, default=1.0, help="of the embedding (default: 1)")
    sweep.add_argument("--csv", metavar="FILE", help="also write every (layout, loop) as a table")
    args = parser.parse_args(argv)
    try:
        if args.command == "sweep-init":
            sizes = {"n_layers": args.layers, "d_model": args.width, "n_loops": args.loops}
            found = random_init_sweep(**sizes, seeds=args.seeds, std=args.std, embed_std=args.embed_std)
            print(found.summary())
            if args.csv:
                found.to_dataframe().to_csv(args.csv, index=False)
            return 0
        model = LoopedBridge.from_pretrained(args.checkpoint, n_loops=args.loops, revision=args.revision, device=args.device)
        print(lens_table(model, args.prompt if args.tokens is None else args.tokens, args.top_k))
    except LoopedError as error:
        print(f"tl-looped: {error}", file=sys.stderr)
        return 1
    return 0


def std(text: str) -> float | str:
    """A number, or "fan_in"."""
    try:
        return text if text == "fan_in" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor fan_in") from None


def token_list(text: str) -> Tensor:
    """Token ids from "5,17,3", as [1, pos]."""
    try:
        return torch.tensor([[int(token) for token in text.split(",")]])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 5,17,3") from None


def lens_table(model: LoopedBridge, prompt: str | Tensor, top_k: int = 5) -> str:
    """For each loop, the most probable next tokens if the model stopped there, by the family's own way to its output."""
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise LoopedError(f"top_k={top_k} was asked; the vocabulary has {model.cfg.d_vocab} tokens.")
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
