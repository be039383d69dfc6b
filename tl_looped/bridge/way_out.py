"""The ways from a residual stream to the output: the last norm alone, or the family's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..looped import Lens
from ..model import LoopedModel
from ..model.layers import Inputs
from ..model.loops import Parts, Stream, run_part
from ..record import InitialState
from ..schedule import Schedule, Site


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
        self.carried: dict[str, Tensor] = {}  # into the first layer of the current pass

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
        hidden = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        chosen = (torch.arange(len(positions), device=weight.device)[:, None], positions.to(weight.device))

        def decode(layer: int) -> Callable[..., None]:
            def hook(resid: Tensor, hook: object) -> None:
                for row, (lens, i) in enumerate(cells):
                    if i == layer:
                        hidden[row] = (self.native(i, resid) if lens == "native" else self.twin.ln_final(resid))[chosen]

            return hook

        first = {p.first for p in schedule.passes}

        def keep(layer: int, stream: Stream, inputs: Inputs) -> None:
            if layer in first:
                self.carried = dict(stream.carried)

        last = max(i for _, i in cells)
        hooks: list[tuple[str, Callable[..., None]]]
        hooks = [(schedule.name(i, "hook_resid_post"), decode(i)) for i in sorted({i for _, i in cells})]
        in_coda = last >= schedule.first_coda_layer
        stop = last + 1 + (self.model.schedule.n_layers - schedule.n_layers if in_coda else 0)
        loop = schedule.n_loops - 1 if in_coda else None
        self.model.run_with_hooks(
            self.tokens, hooks, stop=stop, loop=loop, on_layer=keep, initial_state=initial_state, **self.inputs
        )
        return hidden

    def native(self, layer: int, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The family's own way from the output of a virtual layer to the input of the unembedding.

        Args:
            layer: the virtual layer.
            resid: the residual stream leaving it, [batch, pos, d_model].
        """
        twin, cfg, site = self.twin, self.twin.cfg, self.schedule.site(layer)
        if site.stack == "coda":
            x = self._layers(resid, "coda", site.layer + 1)
        else:
            p = self.schedule.pass_of_layer(layer)
            # A state before the loop is read as if a pass had left it as it was.
            carried = {"entered": resid} if p is None else dict(self.carried)
            stack, x = cfg.schedule.core_stacks[-1] if p is None else p.stack, resid
            passes = cfg.schedule.passes
            for end in passes[cfg.schedule.passes_of("last", stack)[0].index :]:
                parts = Parts(twin, end, run_part)
                if end.stack != stack:
                    x = self._layers(twin.loop.enter(parts, end, carried), end.stack, 0)
                twin.loop.leave(parts, end, x, carried)
            x = self._layers(twin.loop.finish(Parts(twin, None, run_part), passes[-1], carried), "coda", 0)
        return x if cfg.pass_norm_is_final else twin.ln_final(x)

    def _layers(self, x: Tensor, stack: str, first: int) -> Tensor:
        """The last layers of the twin, from layer `first` of a stack on."""
        schedule = self.twin.cfg.schedule
        if first == schedule.stacks[stack]:
            return x
        start = schedule.virtual(Site(stack, None if stack == "coda" else 0, first))
        return self.twin(self.tokens, inputs_embeds=x, start=start, stop=schedule.n_layers, **self.inputs).logits

    def logits(self, x: Float[Tensor, "row d_model"], start: int, width: int) -> Float[Tensor, "row width"]:
        """The logits of one block of the vocabulary, as the model computes them, in fp32 or wider.

        Args:
            x: what the unembedding reads.
            start: the first token of the block.
            width: how many tokens.
        """
        logits = F.linear(x, self.twin.unembed.weight[start : start + width])
        cap = self.twin.cfg.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
