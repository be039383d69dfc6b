"""Gradients of shared weights, split by the pass they come from, and what training examples owe to each loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._old_calls import accepts_old
from .._together import joined
from ..errors import LoopedError
from ..looped import Looped, check_model, require, stopping
from ..metrics import RowMetric
from ..patching.clean_run import Metric
from ..results import Grid
from ..schedule import LoopSelector
from ..tokens import refuse_unmarked_padding

PASS_PARAMETERS = ("inject.", "pass_norm.", "exit_gate.")
Loss = Callable[[Tensor, Tensor], Tensor]


def weight_gradients_by_pass(
    model: Looped,
    tokens: str | list[str] | Int[Tensor, "*batch pos"],
    metric: Metric | None = None,
    *,
    at_loop: int | None = None,
    n_loops: int | None = None,
    **run: Any,
) -> dict[str, Float[Tensor, "loop ..."]]:
    """The gradient of every looped parameter, split by the pass that used it; the sum over passes is autograd's gradient.

    This is the decomposition of arXiv 2602.10097 (Proposition 1): the derivative for the weights of pass `t` alone, as if each
    pass had weights of its own that happen to be equal. No weight is copied: for the run, every pass holds its own views.

    Args:
        model: the model; its hooks act as in any run.
        tokens: text, texts or tokens.
        metric: from logits [batch, pos, d_vocab] to a number, such as a loss; None for the mean next-token cross-entropy. Those
            of `tl_looped.metrics` count as their mean over the rows.
        at_loop: differentiate the answer after this loop, `model.unroll(at_loop + 1)`; None for the last.
        n_loops: of a run of this many loops; None for the model's own number.
        **run: what `model.forward` takes, such as `initial_state` or `attention_mask`.

    Returns:
        By canonical name ("core.0.attn.q.weight", HRM-Text "L.0..." and "H.0..."; "inject.weight", "pass_norm.weight",
        "exit_gate.weight"), a tensor [loop, *shape of the parameter]. What every pass has (the last three) has one entry per
        pass in the order of the run; a pass norm that is also the model's last norm counts there for the last pass.

    Raises:
        LoopedError: the metric is no scalar, or has no gradient; passes whose norms differ (weight processing).

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> gradients = weight_gradients_by_pass(model, torch.tensor([[1, 2, 3]]))
        >>> tuple(gradients["core.1.attn.q.weight"].shape)
        (3, 8, 8)
    """
    model = stopping(model, at_loop, n_loops)
    with torch.inference_mode(False), torch.enable_grad():
        run = {name: x.clone() if isinstance(x, Tensor) else x for name, x in run.items()}
        asked = {"return_type": "loss" if metric is None else "logits", **run}
        measure: Any = metric
        if isinstance(metric, RowMetric):
            _, mask = model.read(tokens, run.get("prepend_bos"), run.get("padding_side"), run.get("attention_mask"))
            rows = metric.bind(model, mask)
            measure = lambda logits: rows(logits).mean()  # noqa: E731

        def gradients_of(views: dict[str, list[nn.Parameter]]) -> list[Tensor | None]:
            output = model(tokens.clone() if isinstance(tokens, Tensor) else tokens, **asked)
            value = output if metric is None else measure(output)
            if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
                found = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise LoopedError(
                    f"the metric returned {found}; it must return a scalar tensor that is computed from the logits it is given."
                )
            flat = [view for uses in views.values() for view in uses]
            return list(torch.autograd.grad(value, flat, allow_unused=True))

        require(model, "equal passes", "a gradient for every pass")
        require(model, "shared weights", "a gradient of the same weights for every pass")
        views, found = model.with_weights_of_their_own(gradients_of)
    gradients = iter(found)
    by_name = {name: [(view, next(gradients)) for view in uses] for name, uses in views.items()}
    return {
        name: torch.stack([torch.zeros_like(view, requires_grad=False) if g is None else g for view, g in uses])
        for name, uses in by_name.items()
    }


@accepts_old("loss_fn")
def influence(
    model: Looped,
    train_tokens: Int[Tensor, "train pos"],
    query_tokens: Int[Tensor, "query query_pos"],
    *,
    loss_fn: Loss | None = None,
    loops: LoopSelector = "all",
    stack: str | None = None,
    at_loop: int | None = None,
    n_loops: int | None = None,
    by_train_loop: bool = False,
    verbose: bool = False,
) -> Grid:
    """How much a gradient step on a training example lowers the loss of a query, split by the loop of the query's run.

    Step-Decomposed Influence (arXiv 2602.10097): the inner product of the training example's gradient of the looped weights
    with the query's gradient in one loop. The sum over loops is TracIn's (arXiv 2002.08484) at this checkpoint, for a learning
    rate of 1, in units of the loss; positive numbers mean that the step helps. Gradients are exact; those of all queries, loop
    by loop, are held at once (the paper's sketches are for more than that).

    Args:
        model: the model.
        train_tokens: one example per row, all of one length.
        query_tokens: one query per row, all of one length.
        loss_fn: from logits [1, pos, d_vocab] and tokens [1, pos] to the loss of that example, a number; None for the mean
            next-token cross-entropy.
        loops: which loops.
        stack: "L" or "H" for HRM-Text, whose weights are then meant; elsewhere the weights are those of the looped layers, the
            injection, the pass norm and the exit gate.
        at_loop: of the answer after this loop, `model.unroll(at_loop + 1)`; None for the last.
        n_loops: of runs of this many loops; None for the model's own number.
        by_train_loop: split by the loop of the training example's run too.
        verbose: show a progress bar.

    Returns:
        A `Grid` [train, query, loop], or [train, query, train_loop, loop].

    Raises:
        LoopedError: the loss is no scalar, or a loop is outside the run; rows that look padded.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = influence(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 3, 4]]))
        >>> found.axes, tuple(found.values.shape)
        (('train', 'query', 'loop'), (2, 1, 3))
    """
    check_model(model)
    for rows in (train_tokens, query_tokens):
        if not isinstance(rows, Tensor):
            raise LoopedError(f"influence was asked of a {type(rows).__name__}; pass tokens [row, pos], one example per row.")
        refuse_unmarked_padding(model.tokenizer, rows, "influence")
    model = stopping(model, at_loop, n_loops)
    chosen = model.schedule.select_loops(loops, stack)
    kept = (f"{model.schedule.looped_stack(stack)}.", *(PASS_PARAMETERS if len(model.schedule.core_stacks) == 1 else ()))

    def by_loop(tokens: Tensor) -> Float[Tensor, "loop weight"]:
        metric = None if loss_fn is None else partial(_loss_of, loss_fn, tokens)
        gradients = weight_gradients_by_pass(model, tokens, metric)
        return joined((g.flatten(1) for name, g in gradients.items() if name.startswith(kept)), dim=1)

    queries = [by_loop(row[None])[chosen] for row in query_tokens]
    rows = []
    for row in tqdm(train_tokens, desc="influence", disable=not verbose):
        trained = by_loop(row[None])
        trained = trained[chosen] if by_train_loop else trained.sum(0, keepdim=True)
        rows.append(torch.stack([trained @ query.T for query in queries]))
    labels = {"train": list(range(len(train_tokens))), "query": list(range(len(query_tokens)))}
    labels |= {axis: list(chosen) for axis in ("train_loop", "loop")}
    if by_train_loop:
        return Grid(torch.stack(rows), ("train", "query", "train_loop", "loop"), labels, "influence")
    return Grid(torch.stack(rows).squeeze(2), ("train", "query", "loop"), labels, "influence")


def _loss_of(loss_fn: Loss, tokens: Tensor, logits: Tensor) -> Tensor:
    return loss_fn(logits, tokens)
