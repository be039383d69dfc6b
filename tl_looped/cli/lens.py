"""`tl-looped lens`: what the model would answer if it stopped after each loop."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._words import aligned
from .._writing import write_text
from ._devices import add_devices, devices
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
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; token ids where the checkpoint has no tokenizer")
    prompt.add_argument("--prompts", metavar="FILE", help="a file with a prompt in every line: one row of the table for each")
    prompt.add_argument("--tokens", metavar="5,17,3", type=token_ids, help="the prompt as token ids")
    parser.add_argument("--top-k", metavar="K", type=int, default=5, help="answers per loop (default: 5)")
    parser.add_argument("--n-loops", metavar="N", type=int, help="how often to loop (default: what the checkpoint says)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write every (prompt, loop) as a table")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_devices(parser)
    parser.add_old("--loops", "--n-loops")


def run(args: argparse.Namespace) -> int:
    """Print the table, of one prompt or of many."""
    import torch

    from ..bridge.looped_bridge import LoopedBridge

    check_writable(args.csv)
    texts = [args.prompt] if args.prompts is None else prompts_in(args.prompts)
    model = LoopedBridge.from_pretrained(args.checkpoint, n_loops=args.n_loops, revision=args.revision, **devices(args))
    prompts = [read_prompt(model, text) for text in texts] if args.tokens is None else [torch.tensor([args.tokens])]
    asked: Any = [one if isinstance(one, str) else one[0] for one in prompts]
    found = model.answers(asked, top_k=args.top_k)
    print(lens_table(model, prompts[0], found) if args.prompts is None else answers_table(model, found))
    if args.csv is not None:
        write_text(args.csv, found.to_dataframe().to_csv(index=False))
    return 0


def answers_table(model: LoopedBridge, found: Answers) -> str:
    """For each prompt, the most probable next token after every loop and its probability."""
    from ..figures.tokens_shown import cut

    rows = [["prompt", *(f"loop {loop}" for loop in found.probs.labels["loop"])]]
    for p, prompt in enumerate(found.prompts):
        rows.append([cut(prompt, 40, end=True), *(cells[0] for cells in _cells(model, found, p))])
    return "\n".join([_head(model), "", *aligned(rows)])


def lens_table(model: LoopedBridge, prompt: str | Tensor, found: Answers) -> str:
    """For each loop, the most probable next tokens if the model stopped there, by the family's own way to its output."""
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else prompt
    rows = [[str(loop), *cells] for loop, cells in zip(found.probs.labels["loop"], _cells(model, found, 0), strict=True)]
    head = ["loop", *(f"top {k}" for k in found.probs.labels["top"])]
    if model.looped_cfg.exit_gate:
        _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter="loops.*.hook_exit_logit")
        head.insert(1, "exit gate")
        for loop, row in enumerate(rows):
            row.insert(1, f"{cache[f'loops.{loop}.hook_exit_logit'][0, -1].float().sigmoid():.3f}")
    shown = model.to_str_tokens(tokens[0]) if model.tokenizer is not None else tokens[0].tolist()
    return "\n".join([_head(model), f"prompt: {shown}", "", *aligned([head, *rows])])


def _head(model: LoopedBridge) -> str:
    return f"{model.cfg.model_name} ({model.looped_cfg.family}): {model.schedule.describe()}"


def _cells(model: LoopedBridge, found: Answers, prompt: int) -> list[list[str]]:
    """The tokens and their probabilities after every loop, best first."""
    shown = str if model.tokenizer is None else repr
    loops = zip(found.texts[prompt], found.probs.values[prompt].tolist(), strict=True)
    return [[f"{shown(token)} {p:.3f}" for token, p in zip(texts, probs, strict=True)] for texts, probs in loops]
