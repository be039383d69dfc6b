"""Logit lens and native (coda) lens over every (loop, layer) of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..figures.tokens_shown import token_texts
from ..kinds import plain
from ..looped import Lens, Looped, at_depth, check_model, require
from ..metrics import one_token
from ..record import InitialState
from ..schedule import Indices, LoopSelector, Schedule, check_count
from ..tokens import check_tokens, real_positions, refuse_unmarked_padding
from ._read import read
from .lens_result import LogitLensResult, Target

__all__ = ["logit_lens"]

TargetInput = Target | Sequence[Target] | Int[Tensor, "..."] | None


@torch.no_grad()
@accepts_old("targets", "lens")
def logit_lens(
    model: Looped,
    tokens: str | list[str] | Int[Tensor, "*batch pos"],
    *,
    targets: TargetInput = None,
    lens: Lens = "logit",
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
        >>> from tl_looped.lenses import logit_lens
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> result = logit_lens(model, torch.tensor([[1, 2, 3]]), lens="native", loops=[0, 2], positions=-1)
        >>> result.labels
        ('loops.0.blocks.0', 'loops.0.blocks.1', 'loops.2.blocks.0', 'loops.2.blocks.1')
        >>> result.rank_trajectory()[-1].tolist()
        [[0]]
    """
    if lens not in get_args(Lens):
        raise LoopedError(f"lens={lens!r} was asked; choose 'logit' or 'native'.")
    check_model(model)
    for ability in ("lens", "every position"):
        require(model, ability, "a lens")
    if lens == "logit":
        require(model, "one stream", "the logit lens")
    d_vocab = model.cfg.d_vocab
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
    out = model.way_out(schedule, ids, {name: value for name, value in inputs.items() if value is not None})
    cells: list[tuple[Lens, int]] = [(lens, i) for i in rows]
    if asked is None:  # the last layer, the family's own way, is the model's prediction
        cells.append(("native", schedule.n_layers - 1))
    hidden = out.run(cells, columns, initial_state)  # [cell, batch, pos, d_model]
    if asked is None:
        none = ids.new_empty((columns.numel(), 0))
        target_ids, names = read(out, d_vocab, hidden[-1:], none, 1, chunk_size).top_tokens.view(*columns.shape, 1), None
    else:
        target_ids, names = asked[0].gather(1, columns[..., None].expand(-1, -1, asked[0].shape[-1])), asked[1]
    readout = read(out, d_vocab, hidden[: len(rows)], target_ids.flatten(0, 1), top_k, chunk_size)
    at = ids.gather(1, columns)
    named = torch.cat([part.flatten() for part in (at, target_ids, readout.top_tokens)]).unique().tolist()
    return LogitLensResult(
        *(part.unflatten(1, columns.shape) for part in readout),
        lens=lens,
        schedule=schedule,
        layers=rows,
        positions=tuple(_places(columns, mask)),
        real=torch.ones_like(columns, dtype=torch.bool) if mask is None else mask.bool().gather(1, columns),
        targets=target_ids,
        target_names=names,
        tokens=at,
        words=dict(zip(map(str, named), token_texts(model.tokenizer, named), strict=True)),
    )


def _token_ids(
    model: Looped, tokens: str | list[str] | Tensor, mask: Tensor | None
) -> tuple[Int[Tensor, "batch pos"], Tensor | None]:
    if not isinstance(tokens, Tensor):
        _need_tokenizer(model, tokens)
    elif mask is None:
        refuse_unmarked_padding(model.tokenizer, tokens, "logit_lens")
    read, mask = model.read(tokens, None, "right", mask)
    if read is None:
        raise LoopedError("tokens=None were given; pass a text, texts or a tensor of token ids.")
    ids: Tensor = (read[None] if read.ndim == 1 else read).to(model.cfg.device)
    check_tokens(ids, model.cfg.d_vocab)
    if mask is not None and mask.shape != ids.shape:
        raise LoopedError(f"attention_mask of shape {tuple(mask.shape)} was given for tokens {tuple(ids.shape)}.")
    return ids.long(), None if mask is None else mask.to(ids.device)


def _places(columns: Int[Tensor, "batch chosen"], mask: Tensor | None) -> list[int]:
    """The columns where they are those of every row; else what they are counted from the last real position."""
    if mask is None or bool((columns == columns[0]).all()):
        return columns[0].tolist()
    return (mask[0].long().cumsum(0)[columns[0]] - 1 - mask[0].long().sum()).tolist()


def _need_tokenizer(model: Looped, text: object) -> None:
    if model.tokenizer is None:
        raise LoopedError(f"{text!r} was given, but this model has no tokenizer; pass token ids, or give model.tokenizer one.")


def _target_ids(
    model: Looped, targets: Target | Sequence[Target] | Tensor, tokens: Tensor
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
    d_vocab = model.cfg.d_vocab
    if ids.is_floating_point() or not ids.numel():
        raise LoopedError("targets must name at least one token: an int, a string, a list of them, or an int tensor.")
    if int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise LoopedError(f"target {bad} was asked, but the vocabulary of this model is 0..{d_vocab - 1}.")
    return ids.long(), names


def _target_id(model: Looped, target: object) -> int:
    if not isinstance(target := plain(target), (str, int)) or isinstance(target, bool):
        raise LoopedError(f"target {target!r} was asked; a target is a token id or a string that is one token.")
    return one_token(model, target)


def _rows(schedule: Schedule, loops: LoopSelector | None) -> tuple[int, ...]:
    """The virtual layers to decode, in the order of the run."""
    if loops is None or (isinstance(loops, str) and loops == "all"):
        return tuple(range(schedule.n_layers))
    chosen = sorted(set(schedule.select_loops(loops, schedule.core_stacks[-1])))
    return tuple(i for loop in chosen for p in schedule.passes_in(loop) for i in p.layers)
