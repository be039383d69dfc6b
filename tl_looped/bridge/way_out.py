"""The ways from a residual stream to the output: the last norm alone, or the family's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .._together import joined
from ..looped import Lens
from ..model import LoopedModel
from ..model.devices import Carried, device_of
from ..model.layers import Inputs
from ..model.loops import Parts, Stream, run_part
from ..record import InitialState
from ..schedule import Schedule, Site

TOGETHER = 512  # positions of states that go through the coda at once


class WayOut:
    """The ways from a residual stream to the output, on a plain twin of the model: same parameters, one loop, no hooks.

    Args:
        model: the bridge whose runs are decoded.
        schedule: what is decoded of it: its own, or that of its first loops, prelude and coda.
        tokens: [batch, pos].
        inputs: what the run takes beside the tokens.
    """

    def __init__(self, model: Any, schedule: Schedule, tokens: Int[Tensor, "batch pos"], inputs: dict[str, Any]):
        self.model: Any = model
        self.tokens: Int[Tensor, "batch pos"] = tokens
        self.inputs: dict[str, Any] = inputs
        self.schedule: Schedule = schedule
        self.twin: LoopedModel = model.plain.unrolled(1)
        self.stream: Stream | None = None  # of the run that is decoded, as it goes on

    def run(
        self, cells: Sequence[tuple[Lens, int]], positions: Int[Tensor, "batch chosen"], initial_state: InitialState
    ) -> Float[Tensor, "cell batch pos d_model"]:
        """Run the model once and bring each (lens, virtual layer) to the input of the unembedding, at the chosen positions.

        Args:
            cells: which lens to read which virtual layer with.
            positions: which positions of every row, [batch, chosen].
            initial_state: as in `LoopedBridge.forward`.
        """
        schedule, weight = self.schedule, self.twin.unembed.weight
        shape = (len(cells), *positions.shape, self.twin.cfg.d_model)
        hidden = torch.empty(shape, dtype=weight.dtype, device=positions.device)
        chosen = (torch.arange(len(positions), device=positions.device)[:, None], positions)

        def put(row: int, x: Tensor) -> None:
            hidden[row] = x.to(hidden.device)[chosen]

        waiting: list[tuple[int, Tensor, dict[str, Tensor]]] = []  # states of many layers that take the whole coda

        def through_coda() -> None:
            if waiting:
                carried = {name: joined(beside[name] for *_, beside in waiting) for name in waiting[0][2]}
                out = self._out(joined(x for _, x, _ in waiting), 0, carried).split(len(self.tokens))
                for (row, *_), x in zip(waiting, out, strict=True):
                    put(row, x)
                waiting.clear()

        def decode(layer: int) -> Callable[..., None]:
            def hook(resid: Tensor, hook: object) -> None:
                for row, (lens, i) in enumerate(cells):
                    if i == layer and lens == "logit":
                        put(row, self.twin.ln_final(resid.to(device_of(self.twin.ln_final))))
                    elif i == layer and schedule.site(i).stack == "coda":
                        put(row, self._out(resid, schedule.site(i).layer + 1, self._beside()))
                    elif i == layer:
                        state, carried = self._into_coda(i, resid)
                        if waiting and waiting[0][2].keys() != carried.keys():
                            through_coda()
                        waiting.append((row, state, carried))
                        if (len(waiting) + 1) * self.tokens.numel() > TOGETHER:
                            through_coda()

            return hook

        def keep(layer: int, stream: Stream, inputs: Inputs) -> None:
            self.stream = stream

        last = max(i for _, i in cells)
        hooks: list[tuple[str, Callable[..., None]]]
        hooks = [(schedule.name(i, "hook_resid_post"), decode(i)) for i in sorted({i for _, i in cells})]
        in_coda = last >= schedule.first_coda_layer
        stop = last + 1 + (self.model.schedule.n_layers - schedule.n_layers if in_coda else 0)
        loop = schedule.n_loops - 1 if in_coda else None
        self.model.run_with_hooks(
            self.tokens, hooks, stop=stop, loop=loop, on_layer=keep, initial_state=initial_state, **self.inputs
        )
        through_coda()
        return hidden

    def _beside(self) -> dict[str, Tensor]:
        """What the coda reads beside the stream where the run is now."""
        return dict(self.stream.carried) if self.stream is not None and self.twin.loop.mixes is not None else {}

    def _into_coda(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], dict[str, Tensor]]:
        """The family's own way from the output of a layer before the coda to the coda; and what that reads beside it."""
        twin, cfg = self.twin, self.twin.cfg
        p = self.schedule.pass_of_layer(layer)
        # A state before the loop is read as if a pass had left it as it was.
        carried = Carried({**self._beside(), "entered": resid}, twin.home)
        if p is not None and self.stream is not None:
            carried = Carried(self.stream.carried, twin.home)
        stack, x = cfg.schedule.core_stacks[-1] if p is None else p.stack, resid.to(twin.home)
        passes = cfg.schedule.passes
        for end in passes[cfg.schedule.passes_of("last", stack)[0].index :]:
            parts = Parts(twin, end, run_part)
            if end.stack != stack:
                x = self._layers(twin.loop.enter(parts, end, carried), end.stack, 0, {}).x
            twin.loop.leave(parts, end, x, carried)
        state = twin.loop.finish(Parts(twin, None, run_part), passes[-1], carried)
        return state, carried if twin.loop.mixes is not None else {}

    def _out(
        self, x: Float[Tensor, "many_batches pos d_model"], first: int, beside: dict[str, Tensor]
    ) -> Float[Tensor, "many_batches pos d_model"]:
        """From before layer `first` of the coda to the input of the unembedding."""
        stream = self._layers(x, "coda", first, beside)
        return self.twin.before_unembedding(
            self.twin.loop.read(Parts(self.twin, None, run_part), stream.x, Carried(stream.carried, self.twin.home))
        )

    def _layers(self, x: Tensor, stack: str, first: int, beside: dict[str, Tensor]) -> Stream:
        """What leaves the last layers of the twin, from layer `first` of a stack on."""
        schedule, ends = self.twin.cfg.schedule, list[Stream]()
        if first == schedule.stacks[stack]:
            return Stream(x, Carried(beside))
        start = schedule.virtual(Site(stack, None if stack == "coda" else 0, first))
        times = len(x) // len(self.tokens)
        tokens, inputs = self.tokens.repeat(times, 1), {name: value.repeat(times, 1) for name, value in self.inputs.items()}
        inputs |= {"carried": beside or None, "on_layer": lambda layer, stream, inputs: ends.append(stream)}
        self.twin(tokens, inputs_embeds=x, start=start, stop=schedule.n_layers, **inputs)
        return ends[-1]

    def logits(self, x: Float[Tensor, "row d_model"], start: int, width: int) -> Float[Tensor, "row width"]:
        """The logits of one block of the vocabulary, as the model computes them, in fp32 or wider.

        Args:
            x: what the unembedding reads.
            start: the first token of the block.
            width: how many tokens.
        """
        weight = self.twin.unembed.weight
        logits = F.linear(x.to(weight.device), weight[start : start + width]).to(x.device)
        cap = self.twin.cfg.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
