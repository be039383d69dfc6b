"""Running parts of a run again, many copies at once: from the first layer that differs, at the positions that can differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..record import InitialState
from .devices import Carried
from .layers import Inputs
from .looped_model import LoopedModel
from .loops import Stream


class Recording:
    """One run, kept so that it can be entered before any layer; pass it to `LoopedModel.forward` as `on_layer`.

    Args:
        initial_state: what the run is given as its initial state.
        keys: keep keys and values too, so that runs may leave out the first positions.
    """

    def __init__(self, initial_state: InitialState, keys: bool):
        self.given_state: bool = initial_state is not None
        self.cache: RecordedKeys | None = RecordedKeys() if keys else None
        self.streams: dict[int, Stream] = {}  # by the layer they enter; -1: the embedding
        self.inputs: Inputs = Inputs({}, {})

    def __call__(self, layer: int, stream: Stream, inputs: Inputs) -> None:
        inputs.cache = self.cache
        self.inputs = inputs
        self.streams[layer] = Stream(stream.x, Carried(stream.carried))


class RecordedKeys:
    """A key-value cache that passes on what it is given, and remembers it by virtual layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.layers[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@dataclass(frozen=True)
class KeysBefore:
    """A key-value cache that puts the recorded keys and values of the first positions before new ones."""

    recorded: RecordedKeys
    start: int
    copies: int

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        before = (_copied(t[:, :, : self.start], self.copies) for t in self.recorded.layers[layer_idx])
        keys, values = (torch.cat(pair, dim=2) for pair in zip(before, (key_states, value_states), strict=True))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start


@torch.no_grad()
def rerun(model: LoopedModel, recording: Recording, entries: Sequence[int], start: int) -> Float[Tensor, "row pos d_model"]:
    """Run a recorded run to its end once per entry, all copies side by side; hooks make them differ.

    A copy is in the batch from its entry on only, so nothing before it is computed again. In every layer, copy `c` holds the
    rows `c * batch .. (c + 1) * batch - 1`.

    Args:
        model: the model of the recorded run.
        recording: the run, recorded with `keys=True` if `start` is not 0.
        entries: for every copy, the first layer to run, in ascending order; -1: from the embedding.
        start: the first position to run; the earlier ones are as recorded.

    Returns:
        What the last norm reads (the unembedding, where the last pass has that norm), from position `start` on.
    """
    n_layers = model.cfg.schedule.n_layers
    joining = {layer: list(entries).count(layer) for layer in entries}
    copies = joining.pop(entries[0])

    def entering(layer: int, n: int) -> Stream:
        stream, whole = recording.streams[layer], model.loop.is_whole
        carried = {name: _copied(t if whole(name) else t[:, start:], n) for name, t in stream.carried.items()}
        return Stream(_copied(stream.x[:, start:], n), Carried(carried))

    stream, inputs = entering(entries[0], copies), replace(recording.inputs)
    _set_inputs(inputs, recording, copies, start)

    def begin(x: Tensor) -> dict[str, Tensor]:
        cfg, first = model.cfg, model.cfg.schedule.passes[0]
        asked = None
        if recording.given_state or cfg.initial_state != "embedding":
            asked = _copied(recording.streams[first.first].carried[first.stack][:, start:], copies)
        nowhere = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)  # not read: the state is given, or the embedding
        return model.begin(x, asked, nowhere)

    layers = range(max(entries[0], 0), n_layers)
    for i in model.steps(stream, layers, inputs, entries[0] >= 0, begin):
        if more := joining.pop(i, 0):
            _join(stream, entering(i, more))
            copies += more
            _set_inputs(inputs, recording, copies, start)
    return stream.x


def _set_inputs(inputs: Inputs, recording: Recording, copies: int, start: int) -> None:
    """What the layers read beside the stream, for so many copies of the recorded rows from a position on."""

    def rows(t: Tensor) -> Tensor:
        return t if len(t) == 1 else _copied(t, copies)

    whole = recording.inputs
    inputs.rope = {base: (rows(cos[:, start:]), rows(sin[:, start:])) for base, (cos, sin) in whole.rope.items()}
    masks = {window: _mask(mask, recording, start) for window, mask in whole.masks.items()}
    inputs.masks = {window: None if mask is None else rows(mask) for window, mask in masks.items()}
    inputs.value_embeds = {i: _copied(t[:, start:], copies) for i, t in whole.value_embeds.items()}
    inputs.positions = None if whole.positions is None else rows(whole.positions[:, start:])
    inputs.past, inputs.device = start, None  # masks may be new, and lie elsewhere than the rest
    inputs.cache = KeysBefore(cast(RecordedKeys, recording.cache), start, copies) if start else None


def _mask(mask: Tensor | None, recording: Recording, start: int) -> Tensor | None:
    n_pos = recording.streams[-1].x.shape[1]
    if mask is not None:
        return mask[:, :, start:]
    if start == 0 or start == n_pos - 1:
        return None  # plain causal, or one query that may look everywhere
    device = recording.streams[-1].x.device
    return torch.ones(n_pos, n_pos, dtype=torch.bool, device=device).tril()[None, None, start:]


def _copied(t: Tensor, copies: int) -> Tensor:
    return t.repeat(copies, *[1] * (t.ndim - 1))


def _join(stream: Stream, more: Stream) -> None:
    """Append the rows of another stream, in place."""
    stream.x = torch.cat((stream.x, more.x))
    stream.carried.update({name: torch.cat((value, more.carried[name])) for name, value in list(stream.carried.items())})
