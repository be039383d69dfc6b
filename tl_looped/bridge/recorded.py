"""One run, kept so that parts of it can be run again, many copies at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LoopedError
from ..looped import require
from ..model.rerun import Recording, rerun
from ..record import InitialState
from .cache import LoopedCache


class Recorded:
    """A run that has been made, and can be entered before any layer.

    Args:
        model: a bridge.
        input: text or tokens.
        hooks: the activations that are kept.
        initial_state: as in `LoopedBridge.forward`.
        is_causal: keep keys and values too, so that copies may leave out the first positions.
        inputs: what else the run takes.
    """

    def __init__(
        self,
        model: Any,
        input: Any,
        hooks: Sequence[str],
        initial_state: InitialState,
        is_causal: bool,
        inputs: dict[str, Any],
    ):
        self.model: Any = model
        self.is_causal: bool = is_causal
        if is_causal:
            require(model, "causal runs", "copies of a run without its first positions")
        self._recording: Recording = Recording(initial_state, keys=is_causal)
        logits, cache = model.run_with_cache(
            input, names_filter=list(hooks), on_layer=self._recording, initial_state=initial_state, **inputs
        )
        self.logits: Float[Tensor, "batch pos d_vocab"] = logits
        self.cache: LoopedCache = cache
        first = model.schedule.passes[0]
        self.state: Float[Tensor, "batch pos d_model"] = self._recording.streams[first.first].carried[first.stack]

    @torch.no_grad()
    def again(self, entries: Sequence[int], start: int, fwd_hooks: Any) -> Float[Tensor, "row pos d_model"]:
        """Copies of the run to its end, side by side: copy `c` holds the rows `c * batch .. (c + 1) * batch - 1`.

        Args:
            entries: for every copy, the last layer whose input is as recorded, in ascending order; -1 for none.
            start: the first position that is run; the earlier ones are as recorded.
            fwd_hooks: what makes the copies differ.

        Returns:
            What `read` reads, from position `start` on.
        """
        if start and not self.is_causal:
            raise LoopedError(f"start={start} was asked of a run that was recorded without its keys; begin at position 0.")
        with self.model.hooks(fwd_hooks=fwd_hooks):
            return rerun(self.model.plain, self._recording, entries, start)

    def read(self, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_vocab"]:
        """The logits of what `again` returned.

        Args:
            x: some rows of it.
        """
        return self.model.plain._logits(x)
