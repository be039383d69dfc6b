"""What every (layer, position) of a run would say: the lenses as one kind of grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._precision import wide
from ..lenses import logit_lens
from ..looped import Lens, Looped
from ..schedule import Schedule
from ._asked import words_of
from ._edits import Hooks
from ._packing import packed
from ._progress import Progress

TOP_K = 10
MOST_ENTRIES = 600_000  # of the most probable tokens of all cells
LOGITS_AT_ONCE = 2**28  # between two looks at whether to go on


@dataclass(frozen=True)
class Said:
    """What the cells of a grid say.

    Args:
        layers: the virtual layer of every row.
        top: the most probable tokens, [row, pos, k], best first.
        top_log_probs: their log-probabilities, in nats.
        entropy: of the whole distribution, in nats.
        kl: KL(last row || this row), in nats.
        log_probs: of the tokens that are followed, or of the model's own answer at each position, [row, pos, target].
        ranks: of the same tokens; 0 is the most probable.
        targets: which tokens these are, [pos, target].
        change: how far the stream moved since the same layer of the loop before, as a share of its length; NaN in a first loop.
    """

    layers: list[int]
    top: Int[Tensor, "row pos k"]
    top_log_probs: Float[Tensor, "row pos k"]
    entropy: Float[Tensor, "row pos"]
    kl: Float[Tensor, "row pos"]
    log_probs: Float[Tensor, "row pos target"]
    ranks: Int[Tensor, "row pos target"]
    targets: Int[Tensor, "pos target"]
    change: Float[Tensor, "row pos"]

    def message(self, model: Looped, loops: Sequence[int], base: Schedule, made_for: int | None) -> dict[str, Any]:
        """The grid as a dict that JSON can hold.

        Args:
            model: the model that ran.
            loops: which loop of the unedited run each of its loops is.
            base: the unedited run.
            made_for: how many loops it was made for; loops beyond are marked.
        """
        arrays = ("top", "top_log_probs", "entropy", "kl", "log_probs", "ranks", "targets", "change")
        ids = torch.cat([self.top.flatten(), self.targets.flatten()]).unique().tolist()
        return {
            "rows": [_row(model, layer, loops, base, made_for) for layer in self.layers],
            "words": words_of(model, ids),
            "n_loops": model.n_loops,
            **{name: packed(getattr(self, name)) for name in arrays},
        }


def _row(model: Looped, layer: int, loops: Sequence[int], base: Schedule, made_for: int | None) -> dict[str, Any]:
    """What a row is: its place, its names, whether the model was made for its loop, and its twin in the unedited run."""
    schedule = model.schedule
    site, p = schedule.site(layer), schedule.pass_of_layer(layer)
    loop, again, beyond = site.loop, 0, False
    if p is not None:
        at, run = schedule.in_loop(p)
        loop = [q for q in base.passes_in(loops[at]) if q.stack == p.stack][run].loop
        again, beyond = loops[:at].count(loops[at]), made_for is not None and at >= made_for
    where = site._replace(loop=loop).where + (f" again{'' if again == 1 else f' ({again})'}" if again else "")
    return {
        "stack": site.stack,
        "where": where,
        "layer": site.layer,
        "name": schedule.layer_name(layer),
        "pass": None if p is None else schedule.pass_prefix(p),
        "beyond": beyond,
        "twin": base.layer_name(base.virtual(site._replace(loop=loop))),
    }


@torch.no_grad()
def read_grid(
    model: Looped,
    tokens: Int[Tensor, "1 pos"],
    lens: str,
    pins: Sequence[int],
    hooks: Hooks,
    progress: Progress,
    most: int = MOST_ENTRIES,
) -> Said:
    """Run once (or for long prompts several times, some positions each) and read every cell.

    Args:
        model: the model that runs.
        tokens: the prompt.
        lens: "native", "logit", or "readout", which has a row for every loop.
        pins: the tokens that are followed; for none, the model's own answer at each position.
        hooks: what acts in the run.
        progress: is told how far it is, and may end it.
        most: of the most probable tokens of all cells.
    """
    return (_readouts if lens == "readout" else _lens)(model, tokens, lens, pins, hooks, progress, most)


def _lens(model: Looped, tokens: Tensor, lens: str, pins: Sequence[int], hooks: Hooks, progress: Progress, most: int) -> Said:
    n_pos, n_rows, d_vocab = tokens.shape[1], model.schedule.n_layers, model.cfg.d_vocab
    k = max(1, min(TOP_K, d_vocab, most // (n_rows * n_pos)))
    at_once = max(1, LOGITS_AT_ONCE // (n_rows * d_vocab))
    parts: list[Any] = []
    change = torch.full((n_rows, n_pos), torch.nan)
    for start in range(0, n_pos, at_once):
        chosen = list(range(start, min(n_pos, start + at_once)))
        watch = _watch(model.schedule, progress.part(start / n_pos, (chosen[-1] + 1) / n_pos), None if start else change)
        with model.hooks(fwd_hooks=[*hooks, *watch]):
            targets = list(pins) or None
            parts.append(logit_lens(model, tokens, lens=cast(Lens, lens), positions=chosen, targets=targets, top_k=k))

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name)[:, 0] for part in parts], 1)

    return Said(
        list(parts[0].layers),
        top=joined("top_tokens"),
        top_log_probs=joined("top_log_probs"),
        entropy=joined("entropy"),
        kl=joined("kl"),
        log_probs=joined("log_probs"),
        ranks=joined("ranks"),
        targets=torch.cat([part.targets[0] for part in parts]),
        change=change,
    )


def _readouts(
    model: Looped, tokens: Tensor, lens: str, pins: Sequence[int], hooks: Hooks, progress: Progress, most: int
) -> Said:
    """The same numbers of the logits after every loop, with everything that acts on the coda."""
    schedule, n_pos, d_vocab = model.schedule, tokens.shape[1], model.cfg.d_vocab
    layers = [schedule.pass_of_loop(t).layers[-1] for t in range(model.n_loops)]
    every = torch.full((schedule.n_layers, n_pos), torch.nan)
    k = max(1, min(TOP_K, d_vocab, most // (len(layers) * n_pos)))
    with model.hooks(fwd_hooks=[*hooks, *_watch(schedule, progress.part(0.0, 0.5), every)]):
        last = wide(model(tokens)[0]).log_softmax(-1)
    targets = torch.tensor([list(pins)], device=last.device).expand(n_pos, -1) if pins else last.argmax(-1, keepdim=True)

    def read(loop: int, logits: Tensor) -> tuple[Tensor, ...]:
        log_probs = wide(logits[0]).log_softmax(-1)
        top = log_probs.topk(k)
        asked = log_probs.gather(1, targets)
        ranks = torch.stack([(logits[0] > logits[0].gather(1, t[:, None])).sum(1) for t in targets.T], 1)
        entropy = -torch.where(log_probs > -torch.inf, log_probs.exp() * log_probs, 0.0).sum(-1)
        kl = torch.where(last > -torch.inf, last.exp() * (last - log_probs), 0.0).sum(-1).clamp(min=0)
        return top.indices, top.values, entropy, kl, asked, ranks

    with model.hooks(fwd_hooks=[*hooks, *_watch(schedule, progress.part(0.5, 1.0), None)]):
        found = model.readouts(tokens, read)
    top, top_log_probs, entropy, kl, asked, ranks = (torch.stack(part) for part in zip(*found, strict=True))
    return Said(layers, top, top_log_probs, entropy, kl, asked, ranks, targets, every[layers])


def _watch(schedule: Schedule, progress: Progress, change: Tensor | None) -> Hooks:
    """Hooks that change nothing: after every layer they say how far the run is, and how far its output moved since last loop.

    Args:
        schedule: what runs.
        progress: is told.
        change: what they fill, [virtual layer, pos]; None to leave that out.
    """
    before: dict[tuple[str, int], Tensor] = {}

    def watch(layer: int) -> Hooks:
        site = schedule.site(layer)

        def hook_function(x: Tensor, hook: object) -> None:
            progress(layer / schedule.n_layers, f"{site.where}, layer {site.layer}")
            if change is None or site.loop is None:
                return
            now, place = wide(x[0]), (site.stack, site.layer)
            # The measure of `exits.StateChange`, at every layer.
            if place in before:
                change[layer] = ((now - before[place]).norm(dim=-1) / now.norm(dim=-1)).cpu()
            before[place] = now

        return [(f"blocks.{layer}.hook_resid_post", hook_function)]

    return [hook for layer in range(schedule.n_layers) for hook in watch(layer)]
