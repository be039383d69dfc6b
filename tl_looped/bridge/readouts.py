"""What a model would answer after each of its loops."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..record import InitialState
from ..schedule import Indices
from ..tokens import counts_from_end, real_positions, refuse_unmarked_padding


class ReadingOut:
    """What reads out loops; a model with `read`, `forward(loop=)` and `readouts`."""

    @accepts_old("initial_state", "attention_mask")
    def readout(
        self: Any,
        input: str | list[str] | Int[Tensor, "*batch pos"],
        loop: int | Literal["all"],
        *,
        positions: Indices = None,
        initial_state: InitialState = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Float[Tensor, "*loop batch chosen d_vocab"]:
        """What the model would answer if it stopped after one of its loops; the later passes are not run.

        Equals `model.unroll(loop + 1)(input)` and `model(input, loop=loop)`: the family's own way from the state to the logits.

        Args:
            input: text, texts or tokens. Texts of different lengths are padded on the right, and need `positions`.
            loop: which loop, 0-based; negative counts from the end. "all" for every loop of one run.
            positions: which positions to return, in ascending order; negative ones count from the last real token of each row,
                so that -1 is every prompt's answer. None for all.
            initial_state: as in `forward`.
            attention_mask: as in `forward`.
            token_type_ids: 1 for the tokens of a bidirectional prefix (HRM-Text).

        Returns:
            Logits, [batch, chosen, d_vocab]; for "all", [loop, batch, chosen, d_vocab].

        Raises:
            OutOfRangeError: a loop or a position that the run does not have.
            LoopedError: the weights were processed, in families where earlier readouts then differ; texts of different lengths,
                and positions that are padding in some.

        Example:
            >>> import torch
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
            >>> tokens = torch.tensor([[1, 2, 3]])
            >>> torch.equal(model.readout(tokens, loop=-1), model(tokens))
            True
            >>> model.readout(tokens, loop="all", positions=-1).shape
            torch.Size([3, 1, 1, 10])
        """
        if isinstance(loop, str) and loop != "all":
            raise LoopedError(f"loop={loop!r} was asked; pass an int, or 'all' for every loop.")
        loops = list(range(self.n_loops)) if isinstance(loop, str) else [self.schedule.loop(loop)]
        tokens, mask = self.read(input, None, "right" if attention_mask is None else None, attention_mask)
        if mask is None and counts_from_end(positions):
            refuse_unmarked_padding(self.tokenizer, tokens, f"a readout at positions={positions!r}")
        if positions is None and mask is not None and attention_mask is None:
            raise LoopedError(
                f"texts of {', '.join(map(str, mask.sum(1).tolist()))} tokens were given, some of which would end with "
                "padding; pass positions=-1 for each one's last token, read them out one by one, or pass tokens with "
                "attention_mask=."
            )
        given = {"attention_mask": mask, "initial_state": initial_state, "token_type_ids": token_type_ids}
        found = self.readouts_at(tokens, loops, positions, {name: value for name, value in given.items() if value is not None})
        return found if isinstance(loop, str) else found[0]

    def readouts_at(
        self: Any, tokens: Int[Tensor, "*batch pos"], loops: list[int], positions: Indices, inputs: dict[str, Any]
    ) -> Float[Tensor, "loop batch chosen d_vocab"]:
        """The readouts after several loops of one run, which ends with the last of them.

        Args:
            tokens: what it runs on.
            loops: after which loops.
            positions: as in `readout`.
            inputs: what else the run takes, such as `attention_mask`.
        """
        chosen = None
        if positions is not None:
            columns = real_positions(positions, inputs.get("attention_mask"), tokens.shape[-1])
            rows = torch.arange(1 if tokens.ndim == 1 else len(tokens), device="cpu")[:, None]
            chosen = rows, columns.expand(len(rows), -1)

        def keep(loop: int, logits: Tensor) -> Tensor | None:
            if loop in loops:
                return logits if chosen is None else logits[tuple(index.to(logits.device) for index in chosen)]
            return None

        if len(loops) == 1:  # also of processed weights, where every earlier readout is refused
            return torch.stack([cast(Tensor, keep(loops[0], self.forward(tokens, loop=loops[0], **inputs)))])
        found = self.readouts(tokens, keep, loop=max(loops), **inputs)
        return torch.stack([cast(Tensor, found[t]) for t in loops])
