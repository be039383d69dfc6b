"""Whether stages of inference organise themselves: `python experiments/stages_on_text.py [--looped ...] [--feedforward ...]`.

The claim is that of arXiv 2604.11791 (section 5.1, figure 10). The tables are those of docs/stages_on_text.md, which says what
they mean; with several checkpoints of each kind, trained from different seeds, every mean has a standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped import LoopedBridge
from tl_looped._words import counted
from tl_looped.analysis import InferenceStages, inference_stages
from tl_looped.analysis.stage_order import METRICS, as_one_pass, repetition, resemblance, scores, spread
from tl_looped.toys.text import held_out_windows, loss_by_loop, untrained

SCORES = ("correlation", "concordance")
Runs = Sequence[InferenceStages]  # one per training seed


def _cell(values: Tensor, digits: int = 2) -> str:
    """Mean and standard error over seeds [seed], or over both seeds of pairs [seed, seed of the other]."""
    by_seed = [values] if values.ndim == 1 else [values.mean(1), values.mean(0)]
    variance = sum(float(means.var()) / len(means) for means in by_seed if len(means) > 1)
    return f"{values.mean():.{digits}f}" + (f" ± {variance**0.5:.{digits}f}" if variance else "")


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def _pairs(runs: Runs, others: Runs) -> Float[Tensor, "seed other order loop metric score"]:
    return torch.stack([torch.stack([resemblance(a, b) for b in others]) for a in runs])


def _print_losses(looped: Sequence[LoopedBridge], plain: Sequence[LoopedBridge], tokens: Tensor) -> None:
    n_loops = 4 * looped[0].n_loops
    losses = torch.stack([loss_by_loop(model.unroll(n_loops), tokens).mean(1) for model in looped])
    rows = {counted(n, "loop"): [_cell(losses[:, n - 1])] for n in (1, 2, 3, 4, 5, 6, 8, 12, 16)}
    last = torch.stack([loss_by_loop(model, tokens)[-1].mean() for model in plain])
    _table("Loss, nats per token", ["loss"], {**rows, "feed-forward": [_cell(last)]})


def _print_spread(kinds: Mapping[str, Runs]) -> None:
    found = [torch.stack([spread(stages) for stages in runs]) for runs in kinds.values()]
    rows = {m: [_cell(f[:, k], 4) for f in found] for k, m in enumerate(METRICS)}
    _table("Spread of the layers of the last pass; of all layers where there is one pass", [*kinds], rows)


def _print_repetition(trained: Runs, controls: Mapping[str, Runs]) -> None:
    found = torch.stack([repetition(stages) for stages in trained])  # [seed, order, loop, metric, score]
    others = [torch.stack([repetition(stages)[0, 1:].mean(0) for stages in runs]) for runs in controls.values()]
    passes = range(found.shape[2])
    for score, name in enumerate(SCORES):
        rows = {
            m: [
                *(_cell(found[:, 0, t, k, score]) for t in passes),
                _cell(found[:, 1:, 1:, k, score].amax(1).mean(1)),  # the mean over all orders is 0 whatever the curves
                *(_cell(other[:, k, score]) for other in others),
            ]
            for k, m in enumerate(METRICS)
        }
        columns = [*(f"pass {t + 1}" for t in passes), "best wrong order", *controls]
        _table(f"Repetition of the pass before, {name}; controls without pass 1", columns, rows)


def _print_resemblance(trained: Runs, plain: Runs, start: Runs) -> None:
    found = _pairs(trained, plain)
    untrained_ = _pairs(start, plain)[:, :, 0, 1:].mean(2)  # [seed, other, metric, score]
    one = torch.stack([torch.stack([scores(as_one_pass(a).compare(b))[0] for b in plain]) for a in trained])
    between = [torch.stack([scores(a.compare(b))[0] for b in plain if b is not a]).mean(0) for a in plain if len(plain) > 1]
    passes = range(found.shape[3])
    for score, name in enumerate(SCORES):
        worse = (found[:, :, 1:, 1:, :, score] < found[:, :, :1, 1:, :, score]).double().sum(2).mean(2)
        rows = {
            m: [
                *(_cell(found[:, :, 0, t, k, score]) for t in passes),
                _cell(found[:, :, 1:, 1:, k, score].mean((2, 3))),
                _cell(worse[:, :, k], 1),
                _cell(one[:, :, k, score]),
                _cell(untrained_[:, :, k, score]),
                *([_cell(torch.stack(between)[:, k, score])] if between else []),
            ]
            for k, m in enumerate(METRICS)
        }
        columns = [*(f"pass {t}" for t in passes), "wrong orders", "of 5 worse", "one pass", "step 0"]
        columns += ["between seeds"] * bool(between)
        _table(f"Resemblance to feed-forward, {name}; controls without pass 0", columns, rows)


def _print_beyond(deep: Runs, plain: Runs, n_trained: int) -> None:
    again, found = torch.stack([repetition(stages)[0, -1] for stages in deep]), _pairs(deep, plain)
    n_loops = found.shape[3]
    rows = {
        m: [
            *(_cell(again[:, k, score]) for score in (0, 1)),
            *(_cell(found[:, :, 0, t, k, 0]) for t in (n_trained - 1, n_loops - 1)),
            _cell(found[:, :, 1:, -1, k, 0].mean(2)),
        ]
        for k, m in enumerate(METRICS)
    }
    resembles = [f"resemblance, pass {t}" for t in (n_trained - 1, n_loops - 1)]
    _table(f"{n_loops} loops", ["repetition, correlation", "concordance", *resembles, "wrong orders"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python experiments/stages_on_text.py", description="Stages of inference on text.")
    one_per_seed = "checkpoints, one per training seed (default: the bundled one)"
    parser.add_argument("--looped", metavar="MODEL", nargs="+", default=["toy:text"], help=one_per_seed)
    parser.add_argument("--feedforward", metavar="MODEL", nargs="+", default=["toy:text-feedforward"], help="the same")
    parser.add_argument("--every", metavar="N", type=int, default=1, help="keep every N-th window (default: 1)")
    args = parser.parse_args(argv)
    looped, plain = ([LoopedBridge.from_pretrained(name) for name in names] for names in (args.looped, args.feedforward))
    tokens, n_loops = held_out_windows(looped[0], args.every), looped[0].n_loops

    def measure(models: Iterable[LoopedBridge], n_loops: int | None = None) -> list[InferenceStages]:
        return [inference_stages(model, tokens, n_loops=n_loops, verbose=False) for model in models]

    print(f"{len(tokens)} windows; {len(looped)} looped models, {len(plain)} feed-forward")
    _print_losses(looped, plain, tokens)
    trained, references = measure(looped), measure(plain)
    controls = {
        "step 0": measure(untrained(model, seed) for seed, model in enumerate(looped)),
        "std 0.02": measure(LoopedBridge.from_config(model.looped_cfg, seed=seed) for seed, model in enumerate(looped)),
    }
    _print_spread({"looped": trained, "feed-forward": references, **controls})
    _print_repetition(trained, controls)
    _print_resemblance(trained, references, controls["step 0"])
    for n in (2 * n_loops, 4 * n_loops):
        _print_beyond(measure(looped, n), references, n_loops)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
