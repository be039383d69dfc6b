"""The ways from a residual stream to the output, and what the logits there say, block by block of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..bridge.looped_bridge import LoopedBridge
from ..model import LoopedModel
from ..model.initial_state import InitialState
from ..model.layers import Inputs
from ..model.loops import Parts, Stream, run_part
from ..schedule import Schedule, Site

Lens = Literal["logit", "native"]

# Tokens per block of logits: wide enough for an efficient product, so that a larger chunk takes more rows instead.
VOCAB_CHUNK = 2**14


class FlatReadout(NamedTuple):
    """The fields of a `Readout`, for the states of every row in one long list."""

    log_probs: Float[Tensor, "row state target"]
    ranks: Int[Tensor, "row state target"]
    entropy: Float[Tensor, "row state"]
    top_tokens: Int[Tensor, "row state k"]
    top_log_probs: Float[Tensor, "row state k"]
    kl: Float[Tensor, "row state"]


class Decoder:
    """The ways from a residual stream to the output, on a plain twin of the model: same parameters, one loop, no hooks.

    Args:
        model: the model whose runs are decoded.
        schedule: what is decoded of it: its own, or that of its first loops, prelude and coda.
        tokens: [batch, pos].
        inputs: what the run takes beside the tokens.
    """

    def __init__(self, model: LoopedBridge, schedule: Schedule, tokens: Int[Tensor, "batch pos"], inputs: dict[str, Tensor]):
        self.model: LoopedBridge = model
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

    def read(
        self, hidden: Float[Tensor, "row ... d_model"], targets: Int[Tensor, "state target"], top_k: int, chunk_size: int
    ) -> FlatReadout:
        """Unembed states block by block of the vocabulary and keep what was asked.

        Args:
            hidden: what `run` returned, [row, ..., d_model].
            targets: the tokens asked about at every state, in all rows alike, [state, target].
            top_k: how many of the most probable tokens to keep.
            chunk_size: how many logits to hold at once.
        """
        x = hidden.reshape(len(hidden), -1, hidden.shape[-1])
        width = min(self.twin.cfg.d_vocab, VOCAB_CHUNK, max(1, chunk_size // len(x)))
        states = max(1, chunk_size // (width * len(x)))
        chunks = zip(x.split(states, 1), targets.split(states), strict=True)
        parts = [self._read_states(some, asked, top_k, width) for some, asked in chunks]
        return FlatReadout(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

    def _read_states(
        self, x: Float[Tensor, "row state d_model"], targets: Int[Tensor, "state target"], top_k: int, width: int
    ) -> FlatReadout:
        """All rows of some states, side by side: the last row is what the others are compared with."""
        shape, d_vocab, wide = x.shape[:2], self.twin.cfg.d_vocab, torch.promote_types(x.dtype, torch.float32)
        x, targets = x.flatten(0, 1), targets.repeat(len(x), 1)
        starts = range(0, d_vocab, width)
        # A target's logit comes from the same product as the logits it is compared with; another kernel may round differently.
        target_logits = torch.empty(targets.shape, dtype=wide, device=x.device)
        for start in starts:
            inside = (targets >= start) & (targets < start + width)
            if inside.any():
                block = self._logits(x, start, width)
                picked = block.gather(1, (targets - start).clamp(0, block.shape[1] - 1))
                target_logits = torch.where(inside, picked, target_logits)
        ranks = torch.zeros_like(targets)
        peak = torch.full((len(x), 1), -torch.inf, dtype=wide, device=x.device)
        mass = moment = torch.zeros_like(peak)  # sums of exp(logit - peak), alone and times (logit - peak)
        apart = peak.new_zeros(shape)  # sums over the last row's exp(logit - peak) times (its logit - this row's)
        top, top_ids = peak[:, :0], targets.new_empty(len(x), 0)
        for start in starts:
            block = self._logits(x, start, width)
            for t in range(targets.shape[1]):
                ranks[:, t] += (block > target_logits[:, t : t + 1]).sum(1)
            best, best_ids = block.topk(min(top_k, block.shape[1]))
            top, order = torch.cat((top, best), 1).topk(min(top_k, top.shape[1] + best.shape[1]))
            top_ids = torch.cat((top_ids, best_ids + start), 1).gather(1, order)
            highest = torch.maximum(peak, best[:, :1])
            if start:  # what was summed so far, relative to the new peak
                shift = peak - highest
                mass, moment = shift.exp() * mass, shift.exp() * (moment + shift * mass)
                apart = apart * shift.exp().view(shape)[-1]
            rows = block.view(*shape, -1)
            last = (rows[-1] - highest.view(*shape, 1)[-1]).exp()
            apart = apart + torch.stack([(last * (rows[-1] - row)).sum(-1) for row in rows])
            block = block - highest
            weights = block.exp()
            mass, moment = mass + weights.sum(1, keepdim=True), moment + (weights * block).sum(1, keepdim=True)
            peak = highest
        total = peak + mass.log()
        entropy = (mass.log() - moment / mass).squeeze(1).clamp(min=0)
        totals = total.view(shape)
        kl = (apart / mass.view(shape)[-1] - totals[-1] + totals).clamp(min=0)
        found = target_logits - total, ranks, entropy, top_ids, top - total
        return FlatReadout(*(part.unflatten(0, shape) for part in found), kl=kl)

    def _logits(self, x: Tensor, start: int, width: int) -> Tensor:
        """The logits of one block of the vocabulary, as the model computes them, in fp32 or wider."""
        logits = F.linear(x, self.twin.unembed.weight[start : start + width])
        cap = self.twin.cfg.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
