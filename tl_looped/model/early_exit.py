"""Generating under an exit policy: every token is read after as few loops as the policy wants.

Exact, with and without keeping what was computed: a token read after loop `t` gets the logits that the whole text has when all
of it is run for `t + 1` loops and read out. A position that left early lacks the later passes. When a later token loops
further, the positions that lack a pass are always the last ones, and they are caught up together, as in a prefill.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from ..errors import LoopedError
from ..exits import ExitPolicy, LoopHistory
from ..record import InitialState
from ..schedule import Pass
from .devices import Carried
from .inputs import masks_of, positions_of
from .layers import Inputs
from .loops import Parts, run_part


class EarlyExit:
    """One generation: the policy, what has been computed of every position, and after how many loops tokens were read.

    Args:
        policy: when to stop looping.
        keep: keep what was computed for the next step, which is then given new tokens only.
    """

    def __init__(self, policy: ExitPolicy, keep: bool):
        self.policy = policy
        self.keep = keep
        self.alive: Bool[Tensor, " batch"] | None = None  # rows that still write; the others decide nothing
        # After how many loops every row was read, one entry per step; 0 for rows that had ended.
        self.passes: list[Int[Tensor, " batch"]] = []
        self.n_computed: int = 0  # executed (row, position, pass) triples
        self.n_full: int = 0  # those of the same steps without a policy
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[Any, Tensor] = {}  # by what it is (with its index, where a pass has changed it), [batch, pos, ...]
        self._after: dict[int, dict[str, Any]] = {}  # the keys of what is carried after a pass
        self._n_read: dict[int, int] = {}  # for every loop, how many positions went through the coda after it
        self.key_values: DynamicCache | None = DynamicCache() if self.keep else None

    @property
    def n_positions(self) -> int:
        """How many positions of the text were run and kept."""
        return self._length("positions") if self.keep else 0

    def step(
        self,
        model: Any,  # a LoopedModel, whose file imports this one
        x: Float[Tensor, "batch new_pos d_model"],
        input_ids: Int[Tensor, "batch new_pos"] | None,
        attention_mask: Tensor | None,
        position_ids: Int[Tensor, "#batch new_pos"] | None,
        token_type_ids: Int[Tensor, "batch new_pos"] | None,
        initial_state: InitialState,
    ) -> Float[Tensor, "batch 1 d_vocab"]:
        """Run new positions, and what earlier ones lack, until the policy lets every row go; logits of the last position."""
        if not self.keep:
            self._forget()
        self._model, self._attention_mask, self._inputs = model, attention_mask, cast(dict[int, Inputs], {})
        schedule, last_stack = model.cfg.schedule, model.cfg.schedule.core_stacks[-1]
        past = self._length("positions")
        self._grow("positions", positions_of(model.cfg, x, position_ids, attention_mask, past))
        for key, value in (("input_ids", input_ids), ("token_type_ids", token_type_ids)):
            if value is not None:
                self._grow(key, value)
        inputs = self._inputs_from(past)
        inputs.carried = carried = Carried()
        for i in range(schedule.n_prelude):
            x = model.layer(i, x, inputs)
        carried |= model.begin(x, initial_state, self._kept["positions"][:, past:])
        for name, value in carried.items():
            self._grow(name, value)
        self.n_full += x.shape[0] * x.shape[1] * len(schedule.passes)

        history = LoopHistory([], [], cache(lambda loop: self._readout(loop, history.loop)))
        at = self._kept["positions"].device
        waiting = torch.ones(len(x), dtype=torch.bool, device=at) if self.alive is None else self.alive.to(at, copy=True)
        passes = torch.zeros(len(x), dtype=torch.long, device=at)
        logits = x.new_zeros(len(x), model.cfg.d_vocab, device=at)
        latest: dict[str, Any] = {name: name for name in carried}  # under which keys what is carried now is kept
        for p in schedule.passes:
            entered, exit_logit = self._run_pass(p, latest)
            if p.stack != last_stack:
                continue
            if not history.states:
                history.states.append(entered[:, -1])
            history.states.append(self._kept[latest[p.stack]][:, -1])
            if exit_logit is not None:
                history.exit_logits.append(exit_logit[:, -1])
            leaving = waiting if schedule.is_last(p) else waiting & self.policy(history).to(at)
            if bool(leaving.any()):
                logits = torch.where(leaving[:, None], history.readout(p.loop), logits)
                passes = passes.masked_fill(leaving, p.loop + 1)
                waiting = waiting & ~leaving
            if not bool(waiting.any()):
                break
        self.passes.append(passes)
        return logits[:, None]

    def _run_pass(self, p: Pass, latest: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Run a pass on the positions that lack it; the state that entered it there, and the exit logits if there is a gate."""
        model, start = self._model, self._length((p.index, p.stack))
        parts, inputs = Parts(model, p, run_part), self._inputs_from(start)
        whole = model.loop.is_whole
        before = {name: self._kept[key] if whole(name) else self._kept[key][:, start:] for name, key in latest.items()}
        inputs.carried = carried = Carried(before, model.home)
        x = model.loop.enter(parts, p, carried)
        entered = carried["entered"]
        for i in p.layers:
            x = model.layer(i, x, inputs)
        self.n_computed += x.shape[0] * x.shape[1]
        model.loop.leave(parts, p, x, carried)
        for name, value in carried.items():
            if value is not before.get(name):
                latest[name] = (p.index, name)
                if whole(name):
                    self._kept.pop(latest[name], None)
                self._grow(latest[name], value)
        self._after[p.index] = dict(latest)
        return entered, model.loop.exit_logit(parts, p, carried)

    def _readout(self, loop: int, latest: int) -> Float[Tensor, "batch d_vocab"]:
        """What the model answers at the last position if it stops after a loop, one of those up to the latest."""
        if not 0 <= loop <= latest:
            raise LoopedError(f"a policy asked for the readout of loop {loop}; up to now there are those of 0..{latest}.")
        model, coda = self._model, self._model._coda
        start = self._n_read.get(loop, 0) if coda else self._length("positions") - 1
        p = model.cfg.schedule.pass_of_loop(loop)
        kept = {name: key for name, key in self._after[p.index].items() if not model.loop.is_whole(name)}
        carried = Carried({name: self._kept[key][:, start:] for name, key in kept.items()}, model.home)
        parts = Parts(model, None, run_part)
        x = model.loop.finish(parts, p, carried)
        if coda:
            inputs = self._inputs_from(start)
            inputs.carried = carried
            if self.key_values is not None:  # every readout has keys and values of its own
                self._n_read[loop] = self._length("positions")
                inputs = replace(inputs, cache=_Shifted(self.key_values, loop * len(coda)))
                inputs.enter()
            for i in coda:
                x = model.layer(i, x, inputs)
        return model._logits(model.loop.read(parts, x, carried)[:, -1:])[:, 0]

    def _inputs_from(self, start: int) -> Inputs:
        """What the layers read beside the stream, for the positions from `start` on."""
        if start not in self._inputs:
            model, positions = self._model, self._kept["positions"][:, start:]
            input_ids, types = self._kept.get("input_ids"), self._kept.get("token_type_ids")
            self._inputs[start] = Inputs(
                rope=model.rotary(positions),
                masks=masks_of(model.cfg, positions, self._attention_mask, types if start == 0 else None, start),
                cache=self.key_values,
                value_embeds=model._value_embeds(None if input_ids is None else input_ids[:, start:]),
                past=start,
                real=None if self._attention_mask is None else self._attention_mask != 0,
                positions=positions,
            )
        self._inputs[start].enter()
        return self._inputs[start]

    def _length(self, key: Any) -> int:
        return self._kept[key].shape[1] if key in self._kept else 0

    def _grow(self, key: Any, new: Tensor) -> None:
        self._kept[key] = torch.cat((self._kept[key], new), dim=1) if key in self._kept else new


class _Shifted:
    """A key-value cache whose layers are those of another, some slots further on."""

    def __init__(self, cache: DynamicCache, shift: int):
        self.cache, self.shift = cache, shift

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.cache.update(key_states, value_states, layer_idx + self.shift)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length(layer_idx + self.shift)
