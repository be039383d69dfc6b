"""How alike the residual streams leaving any two executed layers are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .._precision import wide
from ..looped import Looped, at_depth
from ..record import InitialState, rehearsal
from ..results import Estimate
from ..runs.driver import over_prompts
from ..runs.prompts import Prompts
from ._streaming import Look, Plan, carry_out

LOOPS_HELD = 16  # so many loops' worth of residual streams


def state_similarity(
    model: Looped,
    prompts: Prompts,
    *,
    n_loops: int | None = None,
    initial_state: InitialState = None,
    verbose: bool = True,
) -> Estimate:
    """Cosines between the residual streams leaving all pairs of executed layers (arXiv 2604.11791, figure 19).

    The cosine of each token's two states, mean over tokens, then over examples (our choice; the paper does not say). Tokens
    whose state is zero in one of the two have no cosine and are left out; if all are, the mean is NaN. Pairs need all states at
    once: where those are more than 16 loops', each batch is run again for every such share of its positions.

    Args:
        model: the model.
        prompts: a text, tokens [pos] or [batch, pos], or an iterable of these; every row is an example.
        n_loops: loops to run (H cycles for HRM-Text); None for the model's own. The paper shows 8 and 32.
        initial_state: as in `LoopedBridge.forward`.
        verbose: show a progress bar.

    Returns:
        An estimate with the axes (layer, other). Layers are named as in "loops.2.blocks.5"; prelude, coda and both stacks of
        HRM-Text are included.

    Raises:
        LoopedError: no prompts; a state that is not finite.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> found = state_similarity(model, torch.tensor([[1, 2, 3]]), verbose=False)
        >>> tuple(found.values.shape), bool((found.values.diagonal() - 1).abs().max() < 1e-6)
        ((6, 6), True)
    """
    measure = StateSimilarityMeasure(initial_state)
    return over_prompts(measure, at_depth(model, n_loops), prompts, what="state_similarity", verbose=verbose)


@dataclass(frozen=True)
class StateSimilarityMeasure:
    """What `state_similarity` measures of a batch, between all virtual layers or between some."""

    initial_state: InitialState
    layers: tuple[int, ...] | None = None

    def __call__(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> Estimate:
        """Measure one batch."""
        return carry_out(model, tokens, self.plan(model, tokens))

    def plan(self, model: Looped, tokens: Int[Tensor, "batch pos"]) -> Plan[Estimate]:
        """The runs of one batch that it takes."""
        schedule, (batch, n_pos) = model.schedule, tokens.shape
        names = [schedule.layer_name(i) for i in (range(schedule.n_layers) if self.layers is None else self.layers)]
        n = len(names)
        hooks = {f"{name}.hook_resid_post": i for i, name in enumerate(names)}
        width = min(n_pos, max(1, LOOPS_HELD * sum(schedule.stacks.values()) * n_pos // n))
        held = torch.empty(batch, n, width, model.cfg.d_model, dtype=model.cfg.dtype, device=tokens.device)
        total, count = (torch.zeros(batch, n, n, dtype=torch.float64, device="cpu") for _ in range(2))
        for start in range(0, n_pos, width):
            here = slice(start, min(start + width, n_pos))

            def keep(i: int, state: Tensor, here: slice = here) -> None:
                held[:, i, : here.stop - here.start] = state[:, here]

            last = here.stop == n_pos
            yield Look(hooks, keep, schedule.n_layers, self.initial_state if last else rehearsal(self.initial_state))
            for k in range(here.stop - here.start):
                x = wide(held[:, :, k])
                size = x.norm(dim=-1, keepdim=True)
                x = (x / size).where(size > 0, 0.0)
                total += (x @ x.mT).cpu()
                there = (size > 0).double().cpu()
                count += there @ there.mT
        labels = {"layer": names, "other": names}
        return Estimate.of((total / count).clamp(-1, 1), ("layer", "other"), labels, "cosine")
