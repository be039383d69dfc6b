"""Train a toy, on one core: `python experiments/train_toys.py NAME [--seeds N] [--steps N] [--out DIRECTORY]`.

Every toy is trained from a fixed seed, saved as it is bundled, loaded again and measured. With `--seeds N` this is done for N
seeds, and the last table gives the mean over them and its standard error; seed 0 is the bundled one. Pointer chasing takes
two minutes, text eight. Another processor or version of PyTorch rounds differently: the figures change a little.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.checkpoints import save_model
from tl_looped.model import LoopedModel
from tl_looped.model.looped_model import initialise
from tl_looped.toys import TOYS, hop_accuracy, hop_prompts
from tl_looped.toys.hop import N_SYMBOLS, WORDS, hop_tokenizer
from tl_looped.toys.text import TEXT_STD, WINDOW, corpus, encode, held_out_windows, loss_by_loop, text_tokenizer, windows

_TOY = LoopedConfig(family="toy", d_model=64, n_heads=4, d_mlp=128, d_vocab=len(WORDS), n_prelude=1, n_core=2, n_loops=6)
_HOP = _TOY.replace(n_ctx=32, injection="concat", rope_theta=100.0)
_TEXT = _TOY.replace(d_vocab=1024, n_ctx=WINDOW, n_core=3, n_loops=4, n_coda=1, tied=True)
CONFIGS = {
    "hop": _HOP,
    "hop-noinject": _HOP.replace(injection="none"),
    "text": _TEXT,
    "text-feedforward": _TEXT.replace(n_prelude=0, n_core=14, n_loops=1, n_coda=0),
}
Trained = tuple[LoopedModel, Any]  # and its tokenizer


def train_hop(cfg: LoopedConfig, n_steps: int = 1000, seed: int = 0) -> Trained:
    """Train on pointer chasing, with a loss on every loop; a loop is added once the newest has less than 0.3 on 8 symbols.

    Args:
        cfg: the structure; `n_loops` is the number of hops that are learnt.
        n_steps: number of steps.
        seed: of initialisation and prompts.
    """
    model = initialise(LoopedModel(cfg), seed, std=0.1)
    generator = torch.Generator("cpu").manual_seed(seed)
    n_active = 1

    def loss() -> Tensor:
        nonlocal n_active
        n_symbols = int(torch.randint(2, N_SYMBOLS + 1, (), generator=generator, device="cpu"))
        kind = "cycle" if torch.rand((), generator=generator, dtype=torch.float32, device="cpu") < 0.5 else "function"
        prompts = hop_prompts(64, n_symbols, kind=kind, seed=generator)
        logits: list[Tensor] = []
        model(prompts.tokens, loop=n_active - 1, on_loop=lambda _, found: logits.append(found[:, prompts.query_pos]))
        losses = cross_entropy(torch.stack(logits).permute(3, 0, 1, 2)[None], prompts.answers(n_active)[None], reduction="none")
        by_loop = losses[0].mean((1, 2))
        if n_symbols == N_SYMBOLS and by_loop[-1] < 0.3 and n_active < cfg.n_loops:  # small mappings can be guessed
            n_active += 1
        return by_loop.mean()

    _optimise(model, loss, n_steps, lr=2e-3, weight_decay=0.0)
    return model, hop_tokenizer()


def train_text(cfg: LoopedConfig, n_steps: int = 2500, seed: int = 0) -> Trained:
    """Train on the text of `tl_looped.toys.text`, with a loss on the last output only (arXiv 2604.11791, section 5.1).

    Args:
        cfg: the structure.
        n_steps: number of steps, of 8 windows each.
        seed: of initialisation and windows.
    """
    text = corpus()
    tokenizer = text_tokenizer(text, cfg.d_vocab)
    tokens = encode(tokenizer, text)
    model = initialise(LoopedModel(cfg), seed, std=TEXT_STD)
    generator = torch.Generator("cpu").manual_seed(seed)

    def loss() -> Tensor:
        batch = windows(tokens, torch.randint(1, len(tokens) - WINDOW, (8,), generator=generator, device="cpu"))
        return cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    _optimise(model, loss, n_steps, lr=3e-3, weight_decay=0.1)
    return model, tokenizer


def _optimise(model: LoopedModel, loss: Callable[[], Tensor], n_steps: int, lr: float, weight_decay: float) -> None:
    """AdamW with clipped gradients, a warm-up over 50 steps and a cosine decay; `loss` draws a batch itself."""
    parameters = list(model.canonical_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    begin = time.process_time()
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 50, (1 + math.cos(math.pi * step / n_steps)) / 2)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == n_steps - 1:
            print(f"step {step:5}  loss {value.item():.4f}  {time.process_time() - begin:4.0f} s of one core", flush=True)


def save(trained: Trained, directory: Path) -> LoopedBridge:
    """Save with all parameters but the embedding rounded to half precision, and load again.

    The dtype of a checkpoint is that of its embedding, so everything is widened to fp32 when it is loaded.

    Args:
        trained: what a training function returned.
        directory: where to.
    """
    model, tokenizer = trained
    for name, parameter in model.canonical_parameters().items():
        if name != "embed.weight":
            model.set_parameter(name, nn.Parameter(parameter.detach().half()))
    save_model(model, directory, tokenizer)
    return LoopedBridge.from_pretrained(directory, device="cpu")


def measure(model: LoopedBridge, n_loops: int) -> Tensor:
    """By loop: accuracy in percent on 1,000 fresh mappings of 8 symbols, or loss in nats per token of the held-out text.

    Args:
        model: a toy.
        n_loops: how often to loop.
    """
    deep = model.unroll(n_loops)
    if model.looped_cfg.d_vocab == len(WORDS):
        return 100 * hop_accuracy(deep, hop_prompts(1000, seed=1_000_003))
    return loss_by_loop(deep, held_out_windows(model)).mean(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(prog="python experiments/train_toys.py", description="Train a toy, on one core.")
    parser.add_argument("name", choices=TOYS)
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="train with seeds 0 .. N-1 (default: 1)")
    parser.add_argument("--steps", metavar="N", type=int, help="a shorter or longer training")
    parser.add_argument("--out", metavar="DIRECTORY", type=Path, help="where to save (default: toy-NAME)")
    args = parser.parse_args(argv)
    train = train_hop if args.name.startswith("hop") else train_text
    n_loops = 1 if args.name == "text-feedforward" else 16
    out: Path = args.out or Path(f"toy-{args.name}")
    found: list[Tensor] = []
    for seed in range(args.seeds):
        begin = time.process_time()
        trained = train(CONFIGS[args.name], seed=seed, **({} if args.steps is None else {"n_steps": args.steps}))
        model = save(trained, out if seed == 0 else out.with_name(f"{out.name}-seed{seed}"))
        found.append(measure(model, n_loops))
        print(f"seed {seed}: {time.process_time() - begin:.0f} s of one core; by loop", *(f"{v:.2f}" for v in found[-1]))
    if args.seeds > 1:
        by_loop = torch.stack(found, dim=1)
        print("loop    mean  standard error")
        for loop, values in enumerate(by_loop):
            print(f"{loop:4}  {values.mean():6.2f}  {values.std() / args.seeds**0.5:6.2f}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
