"""Logit lens and native (coda) lens over every (loop, layer) of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..bridge.looped_bridge import LoopedBridge
from ..bridge.tokens import real_positions, refuse_unmarked_padding
from ..errors import LoopedError
from ..kinds import plain
from ..model import LoopedModel
from ..model.initial_state import InitialState
from ..model.looped_model import check_tokens
from ..model.passes import PassEnds
from ..schedule import Indices, LoopSelector, Schedule, Site, check_count, check_index
from ._prompts import at_depth

__all__ = ["Readout", "LogitLensResult", "logit_lens"]

Lens = Literal["logit", "native"]
Target = str | int
TargetInput = Target | Sequence[Target] | Int[Tensor, "..."] | None

# Tokens per block of logits: wide enough for an efficient product, so that a larger chunk takes more rows instead.
VOCAB_CHUNK = 2**14


@dataclass(frozen=True, eq=False)
class Readout:
    """What decoded states say about the next token.

    Args:
        log_probs: log-probability of each target, in nats.
        ranks: 0-based rank of each target: how many tokens have a strictly larger logit.
        entropy: entropy of the whole distribution, in nats.
        top_tokens: the most probable tokens, best first.
        top_log_probs: their log-probabilities, in nats.
    """

    log_probs: Float[Tensor, "*row batch pos target"]
    ranks: Int[Tensor, "*row batch pos target"]
    entropy: Float[Tensor, "*row batch pos"]
    top_tokens: Int[Tensor, "*row batch pos k"]
    top_log_probs: Float[Tensor, "*row batch pos k"]

    @property
    def probs(self) -> Float[Tensor, "*row batch pos target"]:
        """Probability of each target."""
        return self.log_probs.exp()

    @property
    def top_probs(self) -> Float[Tensor, "*row batch pos k"]:
        """Probabilities of `top_tokens`."""
        return self.top_log_probs.exp()


@dataclass(frozen=True, eq=False)
class LogitLensResult(Readout):
    """A lens over the virtual layers of a run; row `r` of every tensor is the output of virtual layer `layers[r]`.

    Args:
        lens: "logit" or "native".
        schedule: what ran.
        layers: the decoded virtual layers.
        positions: the decoded positions; the `pos` axis of every tensor follows them. Negative where they are other columns in
            every row, counted from its last real token.
        real: where a decoded position is no padding.
        targets: the token whose probability and rank is in the same place of `log_probs` and `ranks`.
        target_names: the targets as they were asked for, if they are the same everywhere; None if each position has its own.
    """

    lens: Lens
    schedule: Schedule
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    real: Bool[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos target"]
    target_names: tuple[Target, ...] | None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site of every row."""
        return tuple(self.schedule.site(i) for i in self.layers)

    @property
    def labels(self) -> tuple[str, ...]:
        """The loop-indexed name of every row's layer, such as "loops.2.blocks.5"; its `hook_resid_post` was read."""
        return tuple(self.schedule.name(i, "hook_resid_post").removesuffix(".hook_resid_post") for i in self.layers)

    def rank_trajectory(self, target: Target | None = None) -> Int[Tensor, "row batch pos"]:
        """The 0-based rank of one target at every row.

        Args:
            target: as it was asked for, or its id; None for the only one.

        Raises:
            LoopedError: the target was not decoded, or it is not clear which is meant.
        """
        if target is None and self.ranks.shape[-1] == 1:
            return self.ranks[..., 0]
        if self.target_names is None:
            raise LoopedError(f"target {target!r} was asked, but each position has its own target; leave target out.")
        found: list[Any] = list(self.target_names) if isinstance(target, str) else self.targets[0, 0].tolist()
        if target not in found:
            raise LoopedError(
                f"target {target!r} was asked, but this lens decoded the targets {list(self.target_names)}; name one."
            )
        return self.ranks[..., found.index(target)]

    def plot(self, example: int = 0, pos: int = -1) -> Any:
        """A plotly figure: the rank of every target over the layers, with a mark where a new pass begins.

        Args:
            example: which row of the batch.
            pos: which of the decoded positions of this row, by its place among those that are no padding.

        Raises:
            LoopedError: plotly is not installed.
            OutOfRangeError: an example or a position that was not decoded.
        """
        from ..plots import rank_trajectories

        example = check_index(example, self.ranks.shape[1], "example")
        real = self.real[example].nonzero().flatten().tolist()
        pos = real[check_index(pos, len(real), "decoded position")]
        ranks = self.ranks[:, example, pos].tolist()  # [row, target]
        names = self.target_names or [f"token {token}" for token in self.targets[example, pos].tolist()]
        lines = {str(name): [float(row[k]) for row in ranks] for k, name in enumerate(names)}
        where = f"{self.lens} lens, position {self.positions[pos]}"
        return rank_trajectories(lines, self.schedule, self.layers, f"Rank of the target by layer ({where})")

    def at(self, loop: int | None, layer: int, stack: str | None = None) -> Readout:
        """The readout of one layer, without the row axis.

        Args:
            loop: which run of the stack; None in prelude and coda.
            layer: the layer inside the stack.
            stack: "prelude" or "coda", "L" or "H"; not needed where one stack is looped.

        Raises:
            LoopedError: the stack is not clear, or the layer exists but was not decoded.
            OutOfRangeError: no such loop or layer.
        """
        looped = self.schedule.core_stacks
        if stack is None and (loop is None or len(looped) > 1):
            named = ("prelude", "coda") if loop is None else looped
            raise LoopedError(f"loop={loop}, layer={layer} was asked; say in which stack: {' or '.join(map(repr, named))}.")
        index = self.schedule.virtual(Site(stack or next(iter(looped)), loop, layer))
        if index not in self.layers:
            raise LoopedError(
                f"{self.schedule.site(index)} was asked, but this lens decoded {', '.join(self.labels)}; see loops=."
            )
        row = self.layers.index(index)
        parts = (self.log_probs, self.ranks, self.entropy, self.top_tokens, self.top_log_probs)
        return Readout(*(part[row] for part in parts))

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row for every (row, batch, position, target); padding is left out.

        Columns: site, stack, loop, layer, batch, pos, target, prob, log_prob (nats), rank, entropy (nats), top_token, top_prob;
        loop is missing in prelude and coda.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("to_dataframe() was called, but pandas is not installed; run `pip install pandas`.") from None
        shape = self.ranks.shape
        row, batch, pos, _ = torch.ones_like(self.ranks).nonzero().T.tolist()

        def column(values: Tensor) -> list[Any]:
            return values.expand(shape).flatten().tolist()

        sites, labels = self.sites, self.labels
        columns = {
            "site": [labels[r] for r in row],
            "stack": [sites[r].stack for r in row],
            "loop": pd.array([sites[r].loop for r in row], dtype="Int64"),
            "layer": [sites[r].layer for r in row],
            "batch": batch,
            "pos": [self.positions[p] for p in pos],
            "target": column(self.targets),
            "prob": column(self.probs),
            "log_prob": column(self.log_probs),
            "rank": column(self.ranks),
            "entropy": column(self.entropy[..., None]),
            "top_token": column(self.top_tokens[..., :1]),
            "top_prob": column(self.top_probs[..., :1]),
        }
        return pd.DataFrame(columns)[column(self.real[..., None])].reset_index(drop=True)


@torch.no_grad()
def logit_lens(
    model: LoopedBridge,
    tokens: str | list[str] | Int[Tensor, "*batch pos"],
    targets: TargetInput = None,
    lens: Lens = "logit",
    *,
    positions: Indices = None,
    loops: LoopSelector | None = "all",
    at_loop: int | None = None,
    n_loops: int | None = None,
    top_k: int = 5,
    initial_state: InitialState = None,
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    token_type_ids: Int[Tensor, "batch pos"] | None = None,
    chunk_size: int = 2**22,
) -> LogitLensResult:
    """Decode the residual stream leaving every virtual layer (`hook_resid_post`) into predictions of the next token.

    `lens="logit"` (nostalgebraist 2020, "interpreting GPT: the logit lens") applies the model's last norm and the unembedding,
    `unembed(ln_final(h))`, with the family's softcap; in Ouro, HRM-Text and Nanbeige the last norm is the norm of every pass.

    `lens="native"` (the coda lens of arXiv 2507.02199) takes the family's own way from a state to the output, as if the rest of
    the loop were not run. Each state is taken for the output of its pass, in the middle of a pass too:

    - looped layers: the pass norm (Ouro, HRM-Text, Nanbeige), the map after the loop (Huginn's norm, Parcae's `C`), the coda on
      the whole decoded sequence, the last norm, the unembedding. In an anchored loop, the step from the state that entered
      the pass and the mixture with the first pass, for which a state of the first pass stands in itself.
    - HRM-Text's L stack reaches the output only through the H stack: the state is taken for the output of its L pass, and the
      H stack runs once on it and on the H state that this L pass read.
    - prelude layers: the state is taken for the output of a pass. That is a run of no loops where the loop starts from the
      embedding; in families that inject it, no state of the loop ever looks like this, and the rows show how far that carries.
    - coda layers: the coda layers after it.

    At the last layer of a loop this is `model.readout(tokens, loop)`. Hooks on the model act on the run that is decoded, which
    ends at the last layer decoded, and never on the decoding. States are decoded while the run goes on: beside the run itself,
    `[row, batch, pos, d_model]` numbers are held for the chosen positions, and blocks of at most `chunk_size` logits.

    Args:
        model: the model; weights as loaded, not processed by compatibility mode.
        tokens: text or tokens. Texts of different lengths are padded on the right, whatever the tokenizer says.
        targets: whose probabilities and ranks; None for what the model (without hooks after its last layer) predicts at each
            position. A token id, a string that is one token, a list or a 1-D tensor of them for all positions alike, or a
            tensor [batch, pos] with one id for every position of `tokens`.
        lens: "logit" or "native".
        positions: which positions to decode, in ascending order; negative ones count from the last real token of each row. None
            for all; what is said of padding then means nothing, and `to_dataframe` leaves it out.
        loops: "all" for every layer, prelude and coda included. Otherwise the layers of these loops alone (of both stacks in
            these H cycles for HRM-Text): an int, a slice, several ints or "last".
        at_loop: read the run that stops after this loop (0-based; negative counts from the end): its coda follows this loop,
            and default targets are what the model would answer here. None for the last loop.
        n_loops: run another number of loops; None for the model's own.
        top_k: how many of the most probable tokens to keep.
        initial_state: as in `LoopedBridge.forward`.
        attention_mask: 1 for real tokens.
        token_type_ids: 1 for the tokens of a bidirectional prefix (HRM-Text).
        chunk_size: how many logits to hold at once.

    Returns:
        Tensors [row, batch, pos, ...], one row for every decoded virtual layer.

    Raises:
        LoopedError: an unknown lens; targets outside the vocabulary or not one token; tokens that do not fit the model;
            processed weights.
        OutOfRangeError: loops or positions that this run does not have.
            A position that is padding in some row is refused too.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.analysis import logit_lens
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> result = logit_lens(model, torch.tensor([[1, 2, 3]]), lens="native", loops=[0, 2], positions=-1)
        >>> result.labels
        ('loops.0.blocks.0', 'loops.0.blocks.1', 'loops.2.blocks.0', 'loops.2.blocks.1')
        >>> result.rank_trajectory()[-1].tolist()
        [[0]]
    """
    if lens not in ("logit", "native"):
        raise LoopedError(f"lens={lens!r} was asked; choose 'logit' or 'native'.")
    if model._weights_processed:
        raise LoopedError("the weights of this model were processed (compatibility mode); decode the model before that.")
    d_vocab = model.looped_cfg.d_vocab
    if check_count("top_k", top_k) > d_vocab:
        raise LoopedError(f"top_k={top_k} was asked; the vocabulary has {d_vocab} tokens.")
    check_count("chunk_size", chunk_size)
    model = at_depth(model, n_loops)
    schedule = model.schedule if at_loop is None else replace(model.schedule, n_loops=model.schedule.loop(at_loop) + 1)
    ids, mask = _token_ids(model, tokens, attention_mask)
    columns = real_positions(positions, mask, ids.shape[1]).expand(len(ids), -1).to(ids.device)  # [batch, chosen]
    rows = _rows(schedule, loops)
    asked = None if targets is None else _target_ids(model, targets, ids)

    inputs = {"attention_mask": mask, "token_type_ids": token_type_ids}
    decoder = Decoder(model, schedule, ids, {name: value for name, value in inputs.items() if value is not None})
    cells: list[tuple[Lens, int]] = [(lens, i) for i in rows]
    if asked is None:  # the last layer, the family's own way, is the model's prediction
        cells.append(("native", schedule.n_layers - 1))
    hidden = decoder.run(cells, columns, initial_state)  # [cell, batch, pos, d_model]
    grid = (len(rows), *columns.shape)
    if asked is None:
        none = ids.new_empty((grid[1] * grid[2], 0))
        target_ids, names = decoder.read(hidden[-1], none, 1, chunk_size).top_tokens.view(*grid[1:], 1), None
    else:
        target_ids, names = asked[0].gather(1, columns[..., None].expand(-1, -1, asked[0].shape[-1])), asked[1]
    flat_targets = target_ids.expand(grid[0], *target_ids.shape).flatten(0, 2)
    readout = decoder.read(hidden[: len(rows)], flat_targets, top_k, chunk_size)
    return LogitLensResult(
        *(part.unflatten(0, grid) for part in readout),
        lens=lens,
        schedule=schedule,
        layers=rows,
        positions=tuple(_places(columns, mask)),
        real=torch.ones_like(columns, dtype=torch.bool) if mask is None else mask.bool().gather(1, columns),
        targets=target_ids,
        target_names=names,
    )


class FlatReadout(NamedTuple):
    """The fields of a `Readout`, for states in one long list."""

    log_probs: Float[Tensor, "state target"]
    ranks: Int[Tensor, "state target"]
    entropy: Float[Tensor, " state"]
    top_tokens: Int[Tensor, "state k"]
    top_log_probs: Float[Tensor, "state k"]


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
        self.inputs: dict[str, Tensor] = inputs
        self.schedule: Schedule = schedule
        self.twin: LoopedModel = cast(LoopedModel, model.original_model).unrolled(1)
        # What the current pass began with: in an anchored loop its state, in HRM-Text's L passes the state of the H stack.
        self.entering: Tensor | None = None
        self.anchor: Tensor | None = None

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
                if layer == schedule.passes[0].layers[-1]:
                    self.anchor = resid
                for row, (lens, i) in enumerate(cells):
                    if i == layer:
                        hidden[row] = (self.native(i, resid) if lens == "native" else self.twin.ln_final(resid))[chosen]

            return hook

        def keep(state: Tensor, hook: object) -> None:
            self.entering = state

        last = max(i for _, i in cells)
        wanted = {i for _, i in cells} | {i for i in (schedule.passes[0].layers[-1],) if i <= last}
        hooks: list[tuple[str, Callable[..., None]]]
        hooks = [(schedule.name(i, "hook_resid_post"), decode(i)) for i in sorted(wanted)]  # in a shorter run, the same names
        for p in schedule.passes:
            if self.twin.cfg.strategy == "anchored":
                hooks.append((f"{schedule.pass_prefix(p)}.hook_state", keep))
            elif p.stack == "L":
                hooks.append((f"{schedule.pass_prefix(p)}.hook_injection", keep))
        run: Any = self.model.run_with_hooks
        in_coda = last >= schedule.first_coda_layer
        stop = last + 1 + (self.model.schedule.n_layers - schedule.n_layers if in_coda else 0)
        loop = schedule.n_loops - 1 if in_coda else None
        run(self.tokens, hooks, stop=stop, loop=loop, initial_state=initial_state, **self.inputs)
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
            state = self.entering if p is not None and cfg.strategy == "anchored" else None
            ends = cast(PassEnds, twin.passes[-1])
            if p is not None and p.stack == "L":
                z_l = cast(PassEnds, twin.passes[0]).leave(resid, None, None)[0]
                x, state = ends.enter(cast(Tensor, self.entering), z_l)
                resid = self._layers(x, "H", 0)
            x, _ = ends.leave(resid, state, twin.ln_final if cfg.pass_norm_is_final else None)
            anchor = resid if p is None or p.index == 0 else self.anchor
            x = self._layers(twin.loop_output(x, anchor), "coda", 0)
        return x if cfg.pass_norm_is_final else twin.ln_final(x)

    def _layers(self, x: Tensor, stack: str, first: int) -> Tensor:
        """The last layers of the twin, from layer `first` of a stack on."""
        schedule = self.twin.cfg.schedule
        if first == schedule.stacks[stack]:
            return x
        start = schedule.virtual(Site(stack, None if stack == "coda" else 0, first))
        return self.twin(self.tokens, inputs_embeds=x, start=start, stop=schedule.n_layers, **self.inputs).logits

    def read(
        self, hidden: Float[Tensor, "... d_model"], targets: Int[Tensor, "state target"], top_k: int, chunk_size: int
    ) -> FlatReadout:
        """Unembed states block by block of the vocabulary and keep what was asked.

        Args:
            hidden: what `run` returned, [..., d_model].
            targets: the tokens asked about at every state, [state, target].
            top_k: how many of the most probable tokens to keep.
            chunk_size: how many logits to hold at once.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        width = min(self.twin.cfg.d_vocab, VOCAB_CHUNK, chunk_size)
        rows = max(1, chunk_size // width)
        parts = [self._read_rows(x, t, top_k, width) for x, t in zip(flat.split(rows), targets.split(rows), strict=True)]
        return FlatReadout(*map(torch.cat, zip(*parts, strict=True)))

    def _read_rows(self, x: Tensor, targets: Tensor, top_k: int, width: int) -> FlatReadout:
        d_vocab, wide = self.twin.cfg.d_vocab, torch.promote_types(x.dtype, torch.float32)
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
            block = block - highest
            weights = block.exp()
            mass, moment = mass + weights.sum(1, keepdim=True), moment + (weights * block).sum(1, keepdim=True)
            peak = highest
        total = peak + mass.log()
        entropy = (mass.log() - moment / mass).squeeze(1).clamp(min=0)
        return FlatReadout(target_logits - total, ranks, entropy, top_ids, top - total)

    def _logits(self, x: Tensor, start: int, width: int) -> Tensor:
        """The logits of one block of the vocabulary, as the model computes them, in fp32 or wider."""
        logits = F.linear(x, self.twin.unembed.weight[start : start + width])
        cap = self.twin.cfg.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _token_ids(
    model: LoopedBridge, tokens: str | list[str] | Tensor, mask: Tensor | None
) -> tuple[Int[Tensor, "batch pos"], Tensor | None]:
    if not isinstance(tokens, Tensor):
        _need_tokenizer(model, tokens)
    elif mask is None:
        refuse_unmarked_padding(model.tokenizer, tokens, "logit_lens")
    read, mask = model._read(tokens, None, "right", mask)
    ids: Tensor = (read[None] if read.ndim == 1 else read).to(model.cfg.device)
    check_tokens(ids, model.looped_cfg.d_vocab)
    if mask is not None and mask.shape != ids.shape:
        raise LoopedError(f"attention_mask of shape {tuple(mask.shape)} was given for tokens {tuple(ids.shape)}.")
    return ids.long(), None if mask is None else mask.to(ids.device)


def _places(columns: Int[Tensor, "batch chosen"], mask: Tensor | None) -> list[int]:
    """The columns where they are those of every row; else what they are counted from the last real position."""
    if mask is None or bool((columns == columns[0]).all()):
        return columns[0].tolist()
    return (mask[0].long().cumsum(0)[columns[0]] - 1 - mask[0].long().sum()).tolist()


def _need_tokenizer(model: LoopedBridge, text: object) -> None:
    if model.tokenizer is None:
        raise LoopedError(f"{text!r} was given, but this model has no tokenizer; pass token ids, or give model.tokenizer one.")


def _target_ids(
    model: LoopedBridge, targets: Target | Sequence[Target] | Tensor, tokens: Tensor
) -> tuple[Int[Tensor, "batch pos target"], tuple[Target, ...] | None]:
    """The ids of the targets at every position, and the targets as asked if they are the same everywhere."""
    names: tuple[Target, ...] | None
    if isinstance(targets, Tensor) and targets.ndim > 1:
        if targets.shape != tokens.shape:
            raise LoopedError(
                f"targets of shape {tuple(targets.shape)} were given; pass [batch, pos] = {tuple(tokens.shape)}, one for every "
                "position of tokens, or one dimension for all positions alike."
            )
        ids, names = targets.to(tokens.device)[..., None], None
    else:
        asked: Any = plain(targets.reshape(-1) if isinstance(targets, Tensor) else targets)
        names = (asked,) if isinstance(asked, (str, int)) else tuple(asked)
        ids = torch.tensor([_target_id(model, name) for name in names], device=tokens.device).expand(*tokens.shape, -1)
    d_vocab = model.looped_cfg.d_vocab
    if ids.is_floating_point() or not ids.numel():
        raise LoopedError("targets must name at least one token: an int, a string, a list of them, or an int tensor.")
    if int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise LoopedError(f"target {bad} was asked, but the vocabulary of this model is 0..{d_vocab - 1}.")
    return ids.long(), names


def _target_id(model: LoopedBridge, target: object) -> int:
    if isinstance(target := plain(target), int) and not isinstance(target, bool):
        return target
    if not isinstance(target, str):
        raise LoopedError(f"target {target!r} was asked; a target is a token id or a string that is one token.")
    _need_tokenizer(model, target)
    found = model.to_tokens(target, prepend_bos=False).flatten().tolist()
    if len(found) != 1:
        raise LoopedError(f"target {target!r} was asked, but it is {len(found)} tokens {found}; pass the id of one token.")
    return found[0]


def _rows(schedule: Schedule, loops: LoopSelector | None) -> tuple[int, ...]:
    """The virtual layers to decode, in the order of the run."""
    if loops is None or (isinstance(loops, str) and loops == "all"):
        return tuple(range(schedule.n_layers))
    rows: list[int] = []
    for loop in sorted(set(schedule.select_loops(loops, schedule.core_stacks[-1]))):
        begin = 0 if loop == 0 else schedule.pass_of_loop(loop - 1).index + 1
        for p in schedule.passes[begin : schedule.pass_of_loop(loop).index + 1]:
            rows += p.layers
    return tuple(rows)
