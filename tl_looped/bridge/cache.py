"""`LoopedCache`: an ActivationCache that knows the schedule, and decomposes residual stream and logits exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..kinds import plain
from ..tokens import real_positions
from .decomposition import FINAL, REMAINDER, Decomposition, branch_inputs
from .logit_attribution import LogitAttribution
from .named_cache import as_slice
from .residual_cache import ResidualCache, Stack

Tokens = str | int | Int[Tensor, ""] | Int[Tensor, "batch"] | Int[Tensor, "batch pos"]
Unit = Literal["component", "layer", "head"]


class LoopedCache(ResidualCache):
    """The activations of one run, under TransformerLens names and under loop-indexed ones.

    The residual stream of a looped model is not one running sum: it is normed, mixed and injected into between passes, and in
    some families inside blocks. The methods that decompose it therefore return what a component contributes *to the stream at
    `layer`*, carried there through everything in between with the norms' scales frozen at their values in this run. The
    contributions sum to that stream.

    Methods that are TransformerLens's label components as it does, by virtual layer: `embed`, `5_attn_out`, `L5H7`, `L5N12`,
    `5_pre`, `final_post`, and what only looped models have, `initial_state` and `loops.2.injection`. `attribute_logits` and
    everything else of this package labels them by where they are: `loops.2.blocks.1.attn_out`, `coda.blocks.0.mlp_out`,
    `L.loops.3.blocks.1.head.7`. `model.schedule.loop_label` translates.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> logits, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
        >>> cache["loops.2.blocks.1.attn.hook_z"] is cache["z", 5] is cache.at(loop=2, layer=1)["z"]
        True
        >>> tuple(cache.stack_loops("resid_post").shape)
        (3, 2, 1, 3, 8)
        >>> parts, labels = cache.decompose_resid(return_labels=True)
        >>> labels[-1]
        '5_mlp_out'
        >>> torch.allclose(cache.logit_attrs(parts, 7).sum(0), logits[..., 7], atol=1e-5)
        True
    """

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Stack:
        """What every row of a stack adds to the logit of a token, or to a difference of logits.

        With `decompose_resid` the sum is the logit: before the soft cap where the family has one (Parcae), and without the bias
        of the unembedding, if any.

        Args:
            residual_stack: contributions to the stream entering `ln_final`, from `decompose_resid` and its like.
            tokens: as in TransformerLens: one token, [batch], or [batch, pos] of which an axis may be 1; also [pos] of another
                length than the batch. Where rows and positions are equally many, name the axis: `tokens[:, None]` is one token
                for each row, `tokens[None]` one for each position.
            incorrect_tokens: subtract the logits of these.
            pos_slice: the positions that the stack has.
            batch_slice: rows of the batch.
            has_batch_dim: whether the stack has a batch axis.

        Raises:
            LoopedError: tokens that may be one for each row or one for each position; the stack is one of streams as they are
                (`accumulated_resid` made it, or it is a slice of such), which contribute no such thing; the weights were
                changed since.
        """
        self.check_weights("logit_attrs")
        whole = residual_stack if residual_stack._base is None else residual_stack._base  # of which it may be a slice
        if any(whole is streams() for streams in self._streams):
            raise LoopedError(
                "logit_attrs was asked of streams as they are, which in a looped model are no parts of the final one; use "
                "accumulated_resid(carried=True) for parts, or cache.logit_lens for a lens."
            )
        rows = as_slice(batch_slice)
        if has_batch_dim and residual_stack.ndim == 4 and rows.mode != "int":
            _check_which_axis(tokens, rows.apply(residual_stack, dim=1).shape[1], residual_stack.shape[2])
        stack = residual_stack.to(self.model.plain.unembed.weight.device)
        found = super().logit_attrs(stack, tokens, incorrect_tokens, pos_slice, batch_slice, has_batch_dim)
        return found.to(residual_stack.device)

    @accepts_old("unit", "positions", "injections", pos="positions")
    def attribute_logits(
        self,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        *,
        unit: Unit = "component",
        positions: Any = -1,
        injections: bool = False,
    ) -> LogitAttribution:
        """What every component adds to the logit of a token, by pulling the unembedding direction back; no vector is carried.

        Args:
            tokens: as in `logit_attrs`: one token, [batch], [batch, pos], or [pos].
            incorrect_tokens: subtract the logits of these.
            unit: "component" (attention and MLP outputs), "layer" (the two of a layer together) or "head" (and a remainder).
            positions: as a TransformerLens `Slice` or what one is made of; None for all, where padding has NaN. A negative int
                counts from the last real token of each row.
            injections: as in `decompose_resid`.

        Of a run that stopped after a loop (`run_with_cache(x, loop=t)`), it is the logit that the model answers there.

        Returns:
            A `LogitAttribution` whose values sum to the logit in each unit (see `logit_attrs`).

        Raises:
            LoopedError: the cache lacks what is needed, or the residual stream was edited in the run; tokens that do not fit
                rows and positions, or fit both.

        Example:
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
            >>> logits, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
            >>> parts = cache.attribute_logits(tokens=7, unit="layer")
            >>> parts.labels[-1]
            'loops.2.blocks.1'
            >>> torch.allclose(parts.values.sum(0), logits[:, -1, 7], atol=1e-5)
            True
        """
        if unit not in ("component", "layer", "head"):
            raise LoopedError(f'unit={unit!r} was asked; choose "component", "layer" or "head".')
        pos = plain(positions)
        if self.loop is not None:
            return self._of_the_shorter_model().attribute_logits(
                tokens, incorrect_tokens, unit=unit, positions=positions, injections=injections
            )
        if (mask := self.padding()) is not None and isinstance(pos, int) and pos < 0 and not bool(mask[:, pos:][:, 0].all()):
            own = real_positions(pos, mask, mask.shape[1]).to(mask.device)
            everywhere = self._everywhere(tokens), self._everywhere(incorrect_tokens)
            whole = self.attribute_logits(*everywhere, unit=unit, positions=None, injections=injections)
            index = (own if self.has_batch_dim else own[0]).to(whole.values.device)
            own_values = whole.values.gather(-1, index.expand(len(whole.labels), *index.shape))[..., 0]
            return replace(whole, values=own_values, axes=whole.axes[:-1])
        inner = branch_inputs(self.model.plain, self, heads=unit == "head", neurons=False)
        decomposition = Decomposition(self, FINAL, as_slice(pos), injections, inner)
        grads = decomposition.pull_back(self._direction(tokens, incorrect_tokens, pos, decomposition.like))
        values: dict[str, Tensor] = {}
        for at in decomposition.writes:
            value = (grads[at.label] * decomposition.get(at.hook)).sum(-1)
            if unit == "head":
                if at.hook.endswith("attn_out") and at.layer is not None:
                    parts = decomposition.heads(at.layer).along(grads[at.label])
                    values |= dict(zip(self._names(at.layer, "head", len(parts)), parts, strict=True))
                    value = value - parts.sum(0)
                label = REMAINDER
            else:
                label = at.label.rsplit(".", 1)[0] if unit == "layer" and at.layer is not None else at.label
            values[label] = values[label] + value if label in values else value
        if unit == "head":
            values[REMAINDER] = values.pop(REMAINDER)
        stack = torch.stack(list(values.values()))
        if mask is not None and as_slice(pos).mode == "identity":
            stack = stack.masked_fill(~(mask if self.has_batch_dim else mask[0]).to(stack.device), math.nan)
        axes = ("component", *(["example"] if self.has_batch_dim else []), "pos")[: stack.ndim]
        return LogitAttribution(stack, tuple(values), unit, axes)

    def _of_the_shorter_model(self) -> LoopedCache:
        """The cache of a run that stopped after a loop, as one of a whole run of the model that has no further loop."""
        self.check_weights("a decomposition")
        schedule, short = self.model.schedule, self.model.unroll(cast(int, self.loop) + 1, cut=True)
        names = {short.expand_name(schedule.loop_name(name))[0]: value for name, value in self.cache_dict.items()}
        cache = LoopedCache(names, short, self.has_batch_dim)
        cache.attention_mask = self.attention_mask
        return cache

    def _everywhere(self, tokens: Any) -> Any:
        """One token for each row as one for each position of each row."""
        one_for_each_row = self.has_batch_dim and isinstance(tokens, Tensor) and tokens.ndim == 1
        return tokens[:, None].expand(cast(Tensor, self.attention_mask).shape) if one_for_each_row else tokens

    def _direction(self, tokens: Any, incorrect_tokens: Any, pos: Any, like: Tensor) -> Tensor:
        """The direction in the stream entering `ln_final` whose product is the logit, broadcastable to `like`."""
        direction = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            other = self.model.tokens_to_residual_directions(incorrect_tokens)
            if direction.shape != other.shape:
                raise LoopedError(
                    f"tokens {tuple(direction.shape[:-1])} and incorrect_tokens {tuple(other.shape[:-1])} were given; "
                    "they must have the same shape."
                )
            direction = direction - other
        if like.ndim == 3 and self.has_batch_dim:
            _check_which_axis(tokens, *like.shape[:2])
        n_pos = self[self._cached_stream(FINAL)].shape[-2]
        if direction.ndim == 2 + self.has_batch_dim and direction.shape[-2] == n_pos:  # one token for each position
            direction = as_slice(pos).apply(direction, dim=-2)
        if like.ndim == 3 and direction.ndim == 2 and self.has_batch_dim and direction.shape[0] == like.shape[0]:
            direction = direction.unsqueeze(-2)  # one token for each row of the batch
        try:
            direction = direction.detach().to(like.device, like.dtype).expand_as(like)
        except RuntimeError as error:
            raise LoopedError(
                f"tokens of shape {tuple(direction.shape[:-1])} were given for logits at {tuple(like.shape[:-1])} "
                f"({'batch, pos' if like.ndim == 3 else 'batch or pos'}); pass one token, [batch] or [batch, pos]."
            ) from error
        return self.apply_ln_to_stack(direction[None], pos_slice=pos, has_batch_dim=self.has_batch_dim)[0]


def _check_which_axis(tokens: Any, n_rows: int, n_pos: int) -> None:
    """Refuse one axis of tokens where it may stand for rows as well as for positions."""
    if isinstance(tokens, Tensor) and tokens.ndim == 1 and len(tokens) == n_rows == n_pos > 1:
        raise LoopedError(
            f"{n_rows} tokens were given for {n_rows} rows of {n_pos} positions, and may be one for each row or one for each "
            "position; pass tokens[:, None] or tokens[None]."
        )
