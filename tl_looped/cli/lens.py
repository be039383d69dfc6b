"""`tl-looped lens`: what the model would answer if it stopped after each loop."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._writing import write_text
from ..errors import LoopedError
from ._files import check_writable, prompts_in, read_prompt
from ._parser import add_command, token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from ..bridge.looped_bridge import LoopedBridge
    from ..lenses.answers import Answers
    from ._parser import Commands

EXAMPLE = 'tl-looped lens ByteDance/Ouro-1.4B --prompt "The capital of France is"'


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "lens", run, "what the model would answer if it stopped after each loop", EXAMPLE)
    parser.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory with config.json and tensors, or a toy")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; the checkpoint must come with a tokenizer")
    prompt.add_argument("--prompts", metavar="FILE", help="a file with a prompt in every line: one row of the table for each")
    prompt.add_argument("--tokens", metavar="5,17,3", type=token_ids, help="the prompt as token ids")
    parser.add_argument("--top-k", metavar="K", type=int, default=5, help="answers per loop (default: 5)")
    parser.add_argument("--n-loops", metavar="N", type=int, help="how often to loop (default: what the checkpoint says)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write every (prompt, loop) as a table")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_old("--loops", "--n-loops")


def run(args: argparse.Namespace) -> int:
    """Print the table, of one prompt or of many."""
    import torch

    from ..bridge.looped_bridge import LoopedBridge

    check_writable(args.csv)
    texts = None if args.prompts is None else prompts_in(args.prompts)
    model = LoopedBridge.from_pretrained(args.checkpoint, n_loops=args.n_loops, revision=args.revision, device=args.device)
    prompts: Any = args.prompt if args.tokens is None else torch.tensor([args.tokens])
    if texts is not None:
        read = [read_prompt(model, text) for text in texts]
        prompts = [one if isinstance(one, str) else one[0] for one in read]
    else:
        print(lens_table(model, prompts, args.top_k))
    if texts is not None or args.csv is not None:
        found = model.answers(prompts, top_k=args.top_k)
        if texts is not None:
            print(answers_table(model, found))
        if args.csv is not None:
            write_text(args.csv, found.to_dataframe().to_csv(index=False))
    return 0


def answers_table(model: LoopedBridge, found: Answers) -> str:
    """For each prompt, the most probable next token after every loop and its probability.

    Args:
        model: the model.
        found: its answers.
    """
    from ..figures.tokens_shown import cut

    probs = found.probs.values[..., 0].tolist()
    rows = [["prompt", *(f"loop {loop}" for loop in found.probs.labels["loop"])]]
    for prompt, tops, row in zip(found.prompts, found.texts, probs, strict=True):
        shown = [repr(top[0]) if model.tokenizer is not None else top[0] for top in tops]
        rows.append([cut(prompt, 40, end=True), *(f"{token} {p:.3f}" for token, p in zip(shown, row, strict=True))])
    return "\n".join([_head(model), "", *_aligned(rows)])


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
    shown = model.to_str_tokens(tokens[0]) if model.tokenizer is not None else tokens[0].tolist()
    return "\n".join([_head(model), f"prompt: {shown}", "", *_aligned(rows)])


def _head(model: LoopedBridge) -> str:
    return f"{model.cfg.model_name} ({model.looped_cfg.family}): {model.schedule.describe()}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _show(model: LoopedBridge, token: int) -> str:
    return repr(model.tokenizer.decode([token])) if model.tokenizer is not None else str(token)
