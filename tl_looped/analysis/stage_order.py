"""Whether stages of inference hang on the order of the layers: scores of the true order beside those of every wrong one."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import torch
from jaxtyping import Float
from torch import Tensor

from ..results import Grid
from ..schedule import Schedule
from .inference_stages import InferenceStages

METRICS = ("colsum", "mixing", "entropy", "norm")  # no head of the toys is a sink, so the sink rate is 0 in every layer


def repetition(stages: InferenceStages) -> Float[Tensor, "order loop metric score"]:
    """`InferenceStages.repetition`, first as it is, then as if every second pass had run its layers in another order.

    Args:
        stages: of a looped model.
    """
    return torch.stack([scores(_reorder(stages, order, every=2).repetition()) for order in _orders(stages)])


def resemblance(stages: InferenceStages, feed_forward: InferenceStages) -> Float[Tensor, "order loop metric score"]:
    """`InferenceStages.compare`, first as it is, then as if every pass had run its layers in another order.

    Args:
        stages: of a looped model.
        feed_forward: what to compare with.
    """
    return torch.stack([scores(_reorder(stages, order).compare(feed_forward)) for order in _orders(stages)])


def as_one_pass(stages: InferenceStages) -> InferenceStages:
    """The same curves, taken for one pass over all executed layers: stages that are spread over the run, not repeated.

    Args:
        stages: of a looped model.
    """
    return replace(stages, schedule=Schedule(stages.schedule.n_layers, 1))


def spread(stages: InferenceStages) -> Float[Tensor, " metric"]:
    """How far the layers of the last pass are apart: the highest of their values minus the lowest.

    Args:
        stages: of any model.
    """
    last = torch.stack([stages.curves(metric)[-1] for metric in METRICS])
    return last.amax(-1) - last.amin(-1)


def scores(grid: Grid) -> Float[Tensor, "loop metric score"]:
    """The scores of `METRICS` in what `repetition` or `compare` of `InferenceStages` returned.

    Args:
        grid: the scores of all metrics.
    """
    return grid.values[:, [grid.labels["metric"].index(metric) for metric in METRICS]]


def _orders(stages: InferenceStages) -> list[tuple[int, ...]]:
    return list(permutations(range(stages.schedule.n_core)))  # the first is the true one


def _reorder(stages: InferenceStages, order: tuple[int, ...], every: int = 1) -> InferenceStages:
    index = torch.arange(stages.schedule.n_layers, device="cpu")
    for one in stages.schedule.passes[every - 1 :: every]:
        index[one.first : one.layers.stop] = one.first + torch.tensor(order, device="cpu")
    moved = {m: replace(getattr(stages, m), values=getattr(stages, m).values[index]) for m in METRICS}
    return replace(stages, **moved)
