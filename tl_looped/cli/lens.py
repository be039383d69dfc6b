"""`tl-looped lens`: what the model would answer if it stopped after each loop."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import LoopedError
from ._parser import add_command, token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from ..bridge.looped_bridge import LoopedBridge
    from ._parser import Commands

EXAMPLE = 'tl-looped lens ByteDance/Ouro-1.4B --prompt "The capital of France is"'


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "lens", run, "what the model would answer if it stopped after each loop", EXAMPLE)
    parser.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory with config.json and tensors, or a toy")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; the checkpoint must come with a tokenizer")
    prompt.add_argument("--tokens", metavar="5,17,3", type=token_ids, help="the prompt as token ids")
    parser.add_argument("--top-k", metavar="K", type=int, default=5, help="answers per loop (default: 5)")
    parser.add_argument("--n-loops", metavar="N", type=int, help="how often to loop (default: what the checkpoint says)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_old("--loops", "--n-loops")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    import torch

    from ..bridge.looped_bridge import LoopedBridge

    model = LoopedBridge.from_pretrained(args.checkpoint, n_loops=args.n_loops, revision=args.revision, device=args.device)
    print(lens_table(model, args.prompt if args.tokens is None else torch.tensor([args.tokens]), args.top_k))
    return 0


def lens_table(model: LoopedBridge, prompt: str | Tensor, top_k: int = 5) -> str:
    """For each loop, the most probable next tokens if the model stopped there, by the family's own way to its output.

    Args:
        model: the model.
        prompt: a text, or tokens [1, pos].
        top_k: how many tokens.

    Raises:
        LoopedError: text without a tokenizer, or more tokens than the vocabulary has.
    """
    import torch

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
