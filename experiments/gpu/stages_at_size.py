"""Stages of inference at the paper's size: `python experiments/gpu/stages_at_size.py TOKENS.xz [--seconds N] [--seeds N]`.

Trains the models of arXiv 2604.11791, section 5.1: (2, 4 x 4, 2) layers of width 512, pre-norm, with and without injection,
and a feed-forward model of 12 layers, with a loss on the last output only. All see the same batches, and as many as fit
into the time given. Every result is printed as a line of JSON as soon as it is there; the tables of docs/stages_on_text.md
come last.

TOKENS.xz holds token ids as 16-bit integers: a held-out text of `HELD_OUT` tokens, then the text to train on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.analysis import InferenceStages, inference_stages, output_neurons
from tl_looped.analysis.stage_order import repetition, resemblance, scores, spread
from tl_looped.model import LoopedModel
from tl_looped.model.looped_model import initialise
from tl_looped.toys.text import loss_by_loop

HELD_OUT, WINDOW, MEASURED, LR = 200_000, 512, 128, 1e-3
METRICS = ("colsum", "sink_rate", "mixing", "entropy", "norm")
_LOOPED = LoopedConfig(
    d_model=512, n_heads=8, d_mlp=1408, d_vocab=8192, n_ctx=WINDOW, n_prelude=2, n_core=4, n_loops=4, n_coda=2
)
CONFIGS = {
    "looped": _LOOPED,
    "injected": _LOOPED.replace(injection="concat"),
    "feed-forward": _LOOPED.replace(n_prelude=0, n_core=12, n_loops=1, n_coda=0),
}


def say(**values: Any) -> None:
    """Print a line of JSON."""
    print(json.dumps(values), flush=True)


class Trainer:
    """The text, the device, and how a model is trained."""

    def __init__(self, tokens: Tensor, device: torch.device, batch: int):
        self.held, self.text, self.device, self.batch = tokens[:HELD_OUT], tokens[HELD_OUT:], device, batch

    def windows(self, step: int, seed: int) -> Tensor:
        """The windows of one step, one longer than what the model reads; an epoch shows a part of the text at most once."""
        n_windows = len(self.text) // (WINDOW + 1)
        epoch, at = divmod(step, n_windows // self.batch)
        order = torch.randperm(n_windows, generator=torch.Generator().manual_seed(seed + 1000 * epoch))
        chosen = order[at * self.batch : (at + 1) * self.batch]
        found = self.text[(chosen[:, None] * (WINDOW + 1) + torch.arange(WINDOW + 1))]
        return found.to(self.device, torch.long, non_blocking=True)

    def train(self, model: LoopedModel, n_steps: int, seed: int, n_timed: int = 0) -> tuple[list[tuple[int, float]], float]:
        """AdamW with a warm-up and a cosine decay; the losses now and then, and the seconds (of the last `n_timed` steps)."""
        parameters = list(model.canonical_parameters().values())
        fused = self.device.type == "cuda"
        matrices, others = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=fused)
        losses, began, warm = [], time.perf_counter(), max(1, min(100, n_steps // 10))
        for step in range(n_steps):
            if n_timed and step == n_steps - n_timed:
                self.sync()
                began = time.perf_counter()
            for group in optimizer.param_groups:
                rest = max(0, step - warm) / max(1, n_steps - warm)
                group["lr"] = LR * min((step + 1) / warm, 0.1 + 0.9 * (1 + math.cos(math.pi * rest)) / 2)
            batch = self.windows(step, seed)
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = model(inputs_embeds=model.embed(batch[:, :-1])).logits
            loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 100 == 0 or step == n_steps - 1:
                losses.append((step, round(loss.item(), 4)))
        self.sync()
        return losses, time.perf_counter() - began

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def fresh(cfg: LoopedConfig, seed: int, device: torch.device, compiled: bool) -> LoopedModel:
    """A model as training begins."""
    torch._dynamo.config.recompile_limit = 64
    model = initialise(LoopedModel(cfg), seed).to(device)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


def measured(model: LoopedModel, trainer: Trainer, n_windows: int) -> tuple[LoopedBridge, list[InferenceStages]]:
    """Stages at the trained number of loops; of looped models also at four times as many, on a quarter of the windows."""
    with torch.device("meta"):
        plain = LoopedModel(model.cfg)  # without the compiled blocks, whose hooks do not fire
    for name, p in model.canonical_parameters().items():
        plain.set_parameter(name, nn.Parameter(p.detach(), requires_grad=False))
    bridge = LoopedBridge(plain)
    prompts = trainer.held[: n_windows * MEASURED].long().view(-1, MEASURED)
    found = [inference_stages(bridge, list(prompts.split(16)), verbose=False)]
    if model.cfg.n_loops > 1:
        few = list(prompts[: max(1, n_windows // 4)].split(16))
        found.append(inference_stages(bridge, few, n_loops=4 * model.cfg.n_loops, verbose=False))
    return bridge, found


def report(name: str, seed: int, bridge: LoopedBridge, found: list[InferenceStages], trainer: Trainer) -> None:
    """Print the curves, and the losses after every loop."""
    for stages in found:
        curves = {m: [float(f"{v:.5g}") for v in getattr(stages, m).values.tolist()] for m in METRICS}
        say(what="stages", model=name, seed=seed, loops=stages.schedule.n_loops, **curves)
    windows = trainer.held[: 4 * trainer.batch * WINDOW].long().view(-1, WINDOW).to(trainer.device)
    n_loops = 4 * bridge.n_loops if bridge.n_loops > 1 else 1
    losses = torch.stack(
        [loss_by_loop(bridge.unroll(n_loops), part).double().mean(1) for part in windows.split(trainer.batch)]
    ).mean(0)
    say(what="loss by loop", model=name, seed=seed, loss=[round(v, 4) for v in losses.tolist()])
    share = output_neurons(bridge).values
    say(what="share of output neurons", model=name, seed=seed, kind_layer=[[round(v, 5) for v in k] for k in share.tolist()])


def tables(kept: dict[tuple[str, int], list[InferenceStages]], start: dict[str, InferenceStages], seeds: list[int]) -> None:
    """What docs/stages_on_text.md shows, one line per metric: means over seeds, and each seed."""
    kinds = [name for name in ("looped", "injected") if (name, seeds[0]) in kept]
    names = ("colsum", "mixing", "entropy", "norm")

    def line(what: str, values: list[Tensor], **more: Any) -> None:  # one [metric] a seed
        shown = {m: [round(float(v[k]), 3) for v in values] for k, m in enumerate(names)}
        say(what=what, **more, **shown)

    plain = [kept["feed-forward", s][0] for s in seeds if ("feed-forward", s) in kept]
    line("spread", [spread(s) for s in plain], model="feed-forward")
    for name in kinds:
        trained = [kept[name, s][0] for s in seeds if (name, s) in kept]
        line("spread", [spread(s) for s in trained], model=name)
        line("spread", [spread(start[name])], model=f"{name}, step 0")
        again = [repetition(s) for s in trained]  # [order, loop, metric, score]
        before = repetition(start[name])[0, 1:].mean(0)
        for score, kind in enumerate(("correlation", "concordance")):
            for t in range(again[0].shape[1]):
                line("repetition", [a[0, t, :, score] for a in again], model=name, score=kind, loop=t + 1)
            best = [a[1:, 1:, :, score].mean(1).amax(0) for a in again]
            line("repetition", best, model=name, score=kind, loop="best wrong order, from pass 2")
            line("repetition", [before[:, score]], model=name, score=kind, loop="step 0, from pass 2")
        pairs = [(a, b) for a in trained for b in plain]
        found = [resemblance(a, b) for a, b in pairs]
        for score, kind in enumerate(("correlation", "concordance")):
            for t in range(found[0].shape[1]):
                line("resemblance", [f[0, t, :, score] for f in found], model=name, score=kind, loop=t)
            wrong = [f[1:, 1:, :, score].mean((0, 1)) for f in found]
            line("resemblance", wrong, model=name, score=kind, loop="wrong orders, from pass 1")
            worse = [(f[1:, 1:, :, score] < f[:1, 1:, :, score]).double().mean((0, 1)) for f in found]
            line("resemblance", worse, model=name, score=kind, loop="share of wrong orders below the true one")
            untrained = [resemblance(start[name], b)[0, 1:, :, score].mean(0) for b in plain]
            line("resemblance", untrained, model=name, score=kind, loop="step 0, from pass 1")
        for k, n in ((1, 4),):
            deep = [kept[name, s][k] for s in seeds if (name, s) in kept]
            last = [scores(s.repetition())[-1] for s in deep]
            for score, kind in enumerate(("correlation", "concordance")):
                line("last repetition", [v[:, score] for v in last], model=name, score=kind, times=n)
            for score, kind in enumerate(("correlation", "concordance")):
                line(
                    "last resemblance",
                    [scores(a.compare(b))[-1][:, score] for a in deep for b in plain],
                    model=name,
                    score=kind,
                    times=n,
                )
    if len(plain) > 1:
        between = [scores(a.compare(b))[0] for a in plain for b in plain if a is not b]
        for score, kind in enumerate(("correlation", "concordance")):
            line("between seeds", [v[:, score] for v in between], model="feed-forward", score=kind)


def main(argv: list[str] | None = None) -> int:
    """Train and measure."""
    parser = argparse.ArgumentParser(description="Stages of inference at the paper's size.")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="for the training of all models together")
    parser.add_argument("--steps", type=int, help="how many, whatever the time")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=[*CONFIGS], default=[*CONFIGS], help="default: all")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows that stages are measured on")
    parser.add_argument("--small", action="store_true", help="narrow models")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device, began = torch.device(args.device), time.perf_counter()
    raw = torch.frombuffer(bytearray(lzma.decompress(args.tokens.read_bytes())), dtype=torch.uint16).to(torch.int32)
    trainer = Trainer(raw, device, args.batch)
    configs = {name: CONFIGS[name] for name in args.models}
    if args.small:
        configs = {name: cfg.replace(d_model=32, n_heads=4, d_head=8, d_mlp=64) for name, cfg in configs.items()}
    say(what="text", train=len(trainer.text), held_out=len(trainer.held), device=str(device), torch=torch.__version__)
    seconds, compiled = 0.0, not args.no_compile
    for name, cfg in configs.items():  # what a step takes, compilation apart
        try:
            _, spent = trainer.train(fresh(cfg, 0, device, compiled), 20, 0, n_timed=10)
        except Exception as error:
            say(what="compile failed", error=f"{type(error).__name__}: {str(error)[:200]}")
            compiled = False
            _, spent = trainer.train(fresh(cfg, 0, device, False), 20, 0, n_timed=10)
        seconds += spent / 10
        say(what="step", model=name, seconds=round(spent / 10, 4), compiled=compiled,
            tokens_per_second=round(args.batch * WINDOW * 10 / spent), at=round(time.perf_counter() - began, 1))  # fmt: skip
    n_steps = args.steps or int(args.seconds / (args.seeds * seconds))
    epochs = n_steps * args.batch * (WINDOW + 1) / len(trainer.text)
    say(what="plan", steps=n_steps, tokens=n_steps * args.batch * WINDOW, epochs=round(epochs, 2))
    kept: dict[tuple[str, int], list[InferenceStages]] = {}
    start: dict[str, InferenceStages] = {}
    for seed in range(args.seeds):
        for name, cfg in configs.items():
            if seed == 0:
                start[name] = measured(fresh(cfg, seed, device, False), trainer, args.windows)[1][0]
            model = fresh(cfg, seed, device, compiled)
            n = sum(p.numel() for p in model.canonical_parameters().values())
            losses, spent = trainer.train(model, n_steps, seed)
            say(what="trained", model=name, seed=seed, parameters=n, seconds=round(spent, 1), losses=losses,
                at=round(time.perf_counter() - began, 1))  # fmt: skip
            bridge, kept[name, seed] = measured(model, trainer, args.windows)
            report(name, seed, bridge, kept[name, seed], trainer)
        tables(kept, start, list(range(seed + 1)))
    say(what="end", at=round(time.perf_counter() - began, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
