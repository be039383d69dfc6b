"""What a model would say after every loop: prompts by loops, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from .._precision import wide
from .._words import counted
from ..errors import LoopedError
from ..figures.token_grid import check_colour, lines, token_grid
from ..figures.tokens_shown import cut, token_texts, visible
from ..kinds import plain, shown
from ..looped import Looped
from ..metrics import one_token
from ..panels import Panel
from ..results import Grid, Result
from ..schedule import LoopSelector, check_count
from ..tokens import Mask, check_tokens, refuse_unmarked_padding

__all__ = ["Answers"]

Prompts = str | Sequence[str] | Int[Tensor, "*batch pos"] | Sequence[Int[Tensor, " _"]] | Sequence[Sequence[int]]
Targets = str | int | Sequence[str | int] | Int[Tensor, "*prompt"] | None
AT_ONCE = 2**26  # logits of one batch of prompts


@dataclass(frozen=True, eq=False, repr=False)
class Answers(Result):
    """The most probable next tokens of every prompt if the model stopped after each loop; made by `LoopedBridge.answers`.

    `a + b` has the prompts of both, numbered through.

    Args:
        prompts: every prompt as text; token ids where there is no tokenizer.
        texts: `texts[prompt][loop]` are the most probable tokens as text, best first; the loops are those of `probs`.
        tokens: their ids, with axes (prompt, loop, top).
        probs: their probabilities, with the same axes.
        targets: the target of every prompt as it was asked for; None without targets.
        target_probs: the probability of the target, with axes (prompt, loop).
        target_ranks: the 0-based rank of the target: how many tokens have a strictly larger logit.
        n_loops: the loops of the model that was asked.
    """

    prompts: tuple[str, ...]
    texts: tuple[tuple[tuple[str, ...], ...], ...]
    tokens: Grid
    probs: Grid
    targets: tuple[str | int, ...] | None
    target_probs: Grid | None
    target_ranks: Grid | None
    n_loops: int

    def __add__(self, other: Answers) -> Answers:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not isinstance(other, Answers):
            return NotImplemented
        for what, mine, theirs in (
            ("n_loops", self.n_loops, other.n_loops),
            ("loops", self.probs.labels["loop"], other.probs.labels["loop"]),
            ("top_k", len(self.probs.labels["top"]), len(other.probs.labels["top"])),
            ("targets", self.targets is not None, other.targets is not None),
        ):
            if mine != theirs:
                raise LoopedError(f"answers with {what}={mine!r} and {what}={theirs!r} were added; ask both alike.")
        grids = ("tokens", "probs", "target_probs", "target_ranks")
        joined = {name: _joined(getattr(self, name), getattr(other, name)) for name in grids}
        targets = None if self.targets is None or other.targets is None else self.targets + other.targets
        return replace(self, prompts=self.prompts + other.prompts, texts=self.texts + other.texts, targets=targets, **joined)

    def _described(self) -> list[str]:
        loops, n = self.probs.labels["loop"], len(self.prompts)
        said = [repr(cut(prompt[-1][0], 16)) for prompt in self.texts[:3]] + ["…"] * (n > 3)
        parts = [counted(n, "prompt"), counted(len(loops), "loop"), f"after loop {loops[-1]} " + " ".join(said)]
        if self.target_ranks is not None:
            parts.append(f"its target in {int((self.target_ranks.values[:, -1] == 0).sum())} of {n}")
        return parts

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per (prompt, loop).

        Columns: prompt (its number), text, loop; token_1, prob_1, token_2, ...; with targets also target, target_prob and
        target_rank.
        """
        import pandas as pd

        loops, n_top = self.probs.labels["loop"], len(self.probs.labels["top"])
        cells = [(p, r) for p in range(len(self.prompts)) for r in range(len(loops))]
        probs = self.probs.values.tolist()
        columns: dict[str, list[Any]] = {
            "prompt": [p for p, _ in cells],
            "text": [self.prompts[p] for p, _ in cells],
            "loop": [loops[r] for _, r in cells],
        }
        for k in range(n_top):
            columns[f"token_{k + 1}"] = [self.texts[p][r][k] for p, r in cells]
            columns[f"prob_{k + 1}"] = [probs[p][r][k] for p, r in cells]
        if self.targets is not None and self.target_probs is not None and self.target_ranks is not None:
            columns["target"] = [self.targets[p] for p, _ in cells]
            columns["target_prob"] = self.target_probs.values.flatten().tolist()
            columns["target_rank"] = self.target_ranks.values.flatten().tolist()
        return pd.DataFrame(columns)

    def panels(self, colour: Literal["prob", "rank"] = "prob", title: str = "") -> list[Panel]:
        """Prompt by loop: the most probable token in every cell.

        Args:
            colour: the probability of that token ("prob"), or the rank of the target ("rank").
            title: above the figure.

        Raises:
            LoopedError: the rank of targets that were not given.
        """
        check_colour(colour, {"prob": 0, "rank": 0})
        if colour == "rank" and self.target_ranks is None:
            raise LoopedError("colour='rank' was asked, but the answers have no targets; ask with targets=.")
        loops, probs = self.probs.labels["loop"], self.probs.values.tolist()
        z = [[row[0] for row in prompt] for prompt in probs]
        ranks = None if self.target_ranks is None else self.target_ranks.values.tolist()
        if colour == "rank" and ranks is not None:
            z = [[float(rank) for rank in prompt] for prompt in ranks]

        def said(p: int, r: int) -> str:
            found = [cut(self.prompts[p], 80, end=True), f"after loop {loops[r]}", *lines(self.texts[p][r], probs[p][r])]
            if ranks is not None and self.targets is not None:
                found.append(f"target {visible(str(self.targets[p]))}: rank {ranks[p][r]}")
            return "\n".join(found)

        places = range(len(self.prompts))
        panel = token_grid(
            [[top[0] for top in prompt] for prompt in self.texts],
            z,
            [[said(p, r) for r in range(len(loops))] for p in places],
            colour,
            rows=[cut(" ".join(self.prompts[p].split("\n")), 20, end=True) for p in places],
            columns=[str(loop) for loop in loops],
            titles=("loop", ""),
            title=title or "Most probable next token after each loop",
        )
        return [panel]


@torch.no_grad()
def ask(
    model: Looped,
    prompts: Prompts,
    *,
    loops: LoopSelector,
    top_k: int,
    targets: Targets,
    attention_mask: Mask,
    **inputs: Any,
) -> Answers:
    """As `LoopedBridge.answers`, of the model's own depth; `inputs` are what a run takes beside."""
    d_vocab = model.cfg.d_vocab
    if check_count("top_k", top_k) > d_vocab:
        raise LoopedError(f"top_k={top_k} was asked; the vocabulary has {d_vocab} tokens.")
    chosen = sorted(set(model.schedule.select_loops(loops, model.schedule.core_stacks[-1])))
    tokens, mask = _rows(model, prompts, attention_mask)
    asked = None if targets is None else _targets(targets, len(tokens))
    ids = None if asked is None else torch.tensor([one_token(model, one) for one in asked], device=model.cfg.device)
    found: list[tuple[Tensor, ...]] = []
    for rows in _batches(tokens, d_vocab, inputs):
        logits = _read(model, tokens[rows], None if mask is None else mask[rows], chosen, _of_rows(inputs, rows, len(tokens)))
        probs = wide(logits).softmax(-1)
        best = probs.topk(top_k)
        part: tuple[Tensor, ...] = (best.indices, best.values)
        if ids is not None:
            target = ids[rows, None, None].expand(-1, len(chosen), 1)
            part += (probs.gather(-1, target)[..., 0], (logits > logits.gather(-1, target)).sum(-1))
        found.append(tuple(value.cpu() for value in part))
    top, probs, *scores = (torch.cat(values) for values in zip(*found, strict=True))
    real = torch.ones_like(tokens) if mask is None else mask
    labels: dict[str, list[Any]] = {
        "prompt": list(range(len(tokens))), "loop": chosen, "top": list(range(1, top_k + 1)),
    }  # fmt: skip
    words = _words(model, top)
    few = {axis: labels[axis] for axis in ("prompt", "loop")}
    axes = ("prompt", "loop", "top")
    return Answers(
        prompts=tuple(_prompt_texts(model, prompts, tokens, real)),
        texts=tuple(tuple(tuple(words[i] for i in row) for row in prompt) for prompt in top.tolist()),
        tokens=Grid(top, axes, labels, "token"),
        probs=Grid(probs, axes, labels, "probability"),
        targets=None if asked is None else tuple(asked),
        target_probs=Grid(scores[0], axes[:2], few, "probability of the target") if scores else None,
        target_ranks=Grid(scores[1], axes[:2], few, "rank of the target") if scores else None,
        n_loops=model.n_loops,
    )


def _rows(model: Looped, prompts: Any, mask: Mask) -> tuple[Int[Tensor, "prompt pos"], Tensor | None]:
    """The prompts as tokens, padded on the right, and the mask of those that are real; None where all are."""
    device = model.cfg.device
    listed: Any = list(prompts) if isinstance(prompts, (list, tuple)) else prompts
    if isinstance(listed, Tensor):
        tokens = (listed[None] if listed.ndim == 1 else listed).to(device)
        check_tokens(tokens, model.cfg.d_vocab)
        if mask is None:
            refuse_unmarked_padding(model.tokenizer, tokens, "answers")
        mask = None if mask is None else torch.as_tensor(mask, device=device).reshape(tokens.shape)
    elif mask is not None:
        raise LoopedError("attention_mask= was given for prompts that are no tensor, whose padding is known; leave it out.")
    elif isinstance(listed, str) or (listed and isinstance(listed, list) and all(isinstance(one, str) for one in listed)):
        texts = [listed] if isinstance(listed, str) else listed
        if empty := [i for i, text in enumerate(texts) if not text.strip()]:
            raise LoopedError(f"prompt {empty[0]} is {texts[empty[0]]!r}, in which there is nothing to read; leave it out.")
        read, real = model.read(texts, padding_side="right")
        tokens, mask = read.to(device), None if real is None else real.to(device)
    else:
        tokens, mask = _padded(listed, device)
    lengths = [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(1).tolist()
    for i, n in enumerate(lengths):
        if n > model.cfg.n_ctx:
            raise LoopedError(
                f"prompt {i} has {n} tokens, but the context of this model is n_ctx={model.cfg.n_ctx}; shorten it."
            )
    return tokens, mask


def _padded(prompts: Any, device: Any) -> tuple[Tensor, Tensor | None]:
    """Lists or tensors of token ids as one batch."""
    if not isinstance(prompts, list) or not prompts:
        raise LoopedError(f"prompts={shown(prompts)} were given; pass a text, a list of texts, or token ids.")
    rows: list[Any] = [plain(one) for one in prompts]  # pyright: ignore[reportUnknownVariableType]
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not row or not all(isinstance(t, int) and not isinstance(t, bool) for t in row):
            raise LoopedError(f"prompt {i} is {shown(row)}; pass texts, or lists or tensors [pos] of token ids, all alike.")
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return tokens, None if bool(mask.all()) else mask


def _batches(tokens: Tensor, d_vocab: int, inputs: dict[str, Any]) -> list[slice]:
    """Which rows are run at a time, so that their logits fit in memory."""
    at_once = max(1, AT_ONCE // (tokens.shape[1] * d_vocab))
    if isinstance(inputs.get("initial_state"), torch.Generator):  # it would start later batches otherwise
        at_once = len(tokens)
    return [slice(i, i + at_once) for i in range(0, len(tokens), at_once)]


def _of_rows(inputs: dict[str, Any], rows: slice, n: int) -> dict[str, Any]:
    return {name: x[rows] if isinstance(x, Tensor) and len(x) == n else x for name, x in inputs.items()}


def _read(model: Looped, tokens: Tensor, mask: Tensor | None, loops: list[int], inputs: dict[str, Any]) -> Tensor:
    """The logits after every chosen loop at each row's last token, [prompt, loop, d_vocab]."""
    mask = None if mask is None or bool(mask.all()) else mask
    run = {name: value for name, value in {"attention_mask": mask, **inputs}.items() if value is not None}
    logits = model.readouts_at(tokens, loops, -1, run)[:, :, 0]
    if not bool(torch.isfinite(logits).all()):
        loop = next(t for t, one in zip(loops, logits, strict=True) if not bool(torch.isfinite(one).all()))
        raise LoopedError(f"the logits after loop {loop} are not finite; see the run with run_with_cache.")
    return logits.transpose(0, 1)


def _targets(targets: Any, n: int) -> list[str | int]:
    """One target per prompt, as it was asked for."""
    listed: Any = plain(targets)
    if isinstance(listed, (str, int)) and not isinstance(listed, bool):
        return [listed] * n
    if not isinstance(listed, (list, tuple)) or not all(
        isinstance(one, (str, int)) and not isinstance(one, bool) for one in listed
    ):
        raise LoopedError(f"targets={shown(targets)} were given; pass text that is one token or a token id, or one per prompt.")
    if len(listed) != n:
        raise LoopedError(
            f"{len(listed)} targets were given for {n} prompts; pass one for each, in their order, or one for all."
        )
    return list(listed)


def _words(model: Looped, ids: Tensor) -> dict[int, str]:
    known = ids.unique().tolist()
    return dict(zip(known, token_texts(model.tokenizer, known), strict=True))


def _prompt_texts(model: Looped, prompts: Any, tokens: Tensor, real: Tensor) -> list[str]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (list, tuple)) and isinstance(prompts[0], str):
        return list(prompts)
    rows = [row[keep.bool()].tolist() for row, keep in zip(tokens.cpu(), real.cpu(), strict=True)]
    return [" ".join(map(str, row)) if model.tokenizer is None else model.tokenizer.decode(row) for row in rows]


def _joined(a: Grid | None, b: Grid | None) -> Grid | None:
    """The prompts of both, one after the other."""
    if a is None or b is None:
        return None
    values = torch.cat((a.values, b.values))
    labels: dict[str, list[Any]] = {**a.labels, "prompt": list(range(len(values)))}
    return replace(a, values=values, labels=labels)
