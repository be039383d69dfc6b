"""Runs: forward, readouts after loops, with hooks, with a cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeVar, overload

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.slice import Slice

from ..errors import LoopedError
from ..record import Run
from ..tokens import refuse_unmarked_padding
from .cache import LoopedCache
from .generation import GeneratingBridge
from .hooking import without_leftovers
from .names import Hook, NamesFilter
from .readouts import ReadingOut
from .tokens import check_real

T = TypeVar("T")


class RunningBridge(ReadingOut, GeneratingBridge):
    """The part of a `LoopedBridge` that runs."""

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"] | Float[Tensor, "batch pos d_model"],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        loop: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; `TransformerBridge.forward` with loops.

        Texts of different lengths are padded; the pads are masked and do not count in the loss. Tokens are all real unless
        `attention_mask` says otherwise, whatever their ids.

        Args:
            input: text, tokens, scaled embeddings (`hook_embed`), or with `start_at_layer` the residual stream entering it.
            return_type: "logits", "loss", "both", "logits_and_cache" (the second is the key-value cache, to be given to the
                next call as `past_key_values`) or None.
            loss_per_token: the loss of every next token, [batch, pos - 1], with 0 where it is padding, rather than their mean.
            prepend_bos: as in `to_tokens`.
            padding_side: as in `to_tokens`.
            attention_mask: [batch, pos], 1 for real tokens, over cached and new positions.
            *args: as in TransformerBridge.
            start_at_layer: first virtual layer to run; the ones before are skipped. For families that inject, later passes need
                `injection=cache["loops.{t}.hook_injection"]` of that pass, and Parcae needs `input_ids=`.
            stop_at_layer: run up to this virtual layer, exclusive, and return the residual stream entering it,
                [batch, pos, d_model]; `n_layers` for the one leaving the last layer.
            loop: stop looping after this loop (0-based; negative counts from the end) and go on to the coda and the logits, as
                `unroll(loop + 1)` does; the loss too is of these logits. What runs has its own hooks and names, and
                `run_with_cache` caches that: the prelude, the loops up to this one, the coda, the unembedding. In families
                whose last norm is the norm of every pass (Ouro, HRM-Text, Nanbeige), the logits are then read from
                `loops.{loop}.norm`, and `ln_final` does not fire.
            **kwargs: `initial_state` (tensor [batch, pos, d_model], int seed, torch.Generator or "zero"),
                `position_ids`, `token_type_ids` (HRM-Text's prefix), `past_key_values`, and the rest of TransformerBridge's;
                `on_loop`, called as `on_loop(loop, logits)` with the readout after every loop of one run; with
                `start_at_layer` also `injection` [batch, pos, d_model] and `input_ids` [batch, pos].

        Raises:
            LoopedError: inputs that do not fit the model; layers out of range; tokens of which some rows begin with pad tokens
                (with a loss, or end with them) without `attention_mask`, so that what is padding is not known.
        """
        attention_mask = kwargs.pop("one_zero_attention_mask", None) if attention_mask is None else attention_mask
        input, attention_mask = self.read(input, prepend_bos, padding_side, attention_mask)
        kwargs |= self._generation_arguments(input, kwargs)
        if isinstance(loop, str):
            raise LoopedError(f"loop={loop!r} was asked of one run; for every loop use readout(input, loop='all').")
        if loop is not None:
            kwargs["loop"] = self.schedule.loop(loop)
        if start_at_layer is not None:
            kwargs["start"] = self.schedule.layer(start_at_layer)
            if not isinstance(input, Tensor) or not input.is_floating_point():
                raise LoopedError(
                    f"start_at_layer={start_at_layer} needs the residual-stream tensor entering that layer, "
                    f"[batch, pos, d_model], such as cache['blocks.{kwargs['start']}.hook_resid_pre']."
                )
        if stop_at_layer is not None:
            kwargs["stop"] = self._stop(stop_at_layer)
            return_type = "logits"
        if return_type == "logits_and_cache":
            kwargs["use_cache"] = True
        if attention_mask is None and isinstance(input, Tensor) and not self._given and kwargs.get("past_key_values") is None:
            has_loss = return_type in ("loss", "both") and kwargs.get("labels") is None
            sides = ("left", "right") if has_loss else ("left",)
            refuse_unmarked_padding(self.tokenizer, input, "the loss" if has_loss else "a run", sides)
        return super().forward(input, return_type, loss_per_token, None, None, attention_mask, *args, **kwargs)

    def readouts(
        self,
        input: str | list[str] | Tensor,
        read: Callable[[int, Tensor], T],
        fwd_hooks: Iterable[Hook] = (),
        **kwargs: Any,
    ) -> list[T]:
        """What a function makes of the readout after every loop of one run, in which one loop's logits are held at a time.

        Args:
            input: as in `forward`.
            read: called with the loop and the logits that `readout` has there, [batch, pos, d_vocab].
            fwd_hooks: as in `hooks`; those on the coda act once for every loop.
            **kwargs: what `forward` takes.

        Returns:
            What `read` returned, one for each loop.

        Example:
            >>> from tl_looped import LoopedBridge
            >>> model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
            >>> model.readouts("A b B c C a ? A", lambda loop, logits: model.to_string(logits[0, -1].argmax()))
            ['b', 'c', 'a', 'b', 'c', 'a']
        """
        found: list[T] = []
        kwargs |= {"return_type": None, "on_loop": lambda loop, logits: found.append(read(loop, logits))}
        self.run_with_hooks(input, fwd_hooks, **kwargs)
        return found

    def run_with_hooks(
        self,
        input: str | list[str] | Tensor,
        fwd_hooks: Iterable[Hook] = (),
        bwd_hooks: Iterable[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run with hooks, as in TransformerBridge; names may be loop-indexed and may be patterns.

        Args:
            input: as in `forward`.
            fwd_hooks: as in `hooks`.
            bwd_hooks: as in `hooks`.
            reset_hooks_end: take these hooks off at the end.
            clear_contexts: clear the contexts of their hook points then, too.
            return_type: as in `forward`.
            stop_at_layer: as in `forward`.
            start_at_layer: as in `forward`.
            remove_batch_dim: give hooks activations without a batch dimension of 1.
            **kwargs: what `forward` takes.

        Raises:
            LoopedError: no such hook; a loop or layer that this run does not have; inputs that do not fit the model.
        """
        run = partial(
            super().run_with_hooks, input, self._expand_hooks(fwd_hooks), self._expand_hooks(bwd_hooks), reset_hooks_end,
            clear_contexts, return_type, stop_at_layer, start_at_layer, remove_batch_dim, **kwargs,
        )  # fmt: skip
        return without_leftovers(self, run)

    @overload
    def run_with_cache(
        self,
        input: Any,
        return_cache_object: Literal[True] = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, LoopedCache]: ...

    @overload
    def run_with_cache(
        self,
        input: Any,
        return_cache_object: Literal[False],
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]: ...

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, LoopedCache | dict[str, Tensor]]:
        """Run and cache, as in TransformerBridge; returns (output, `LoopedCache`).

        Args:
            input: as in `forward`.
            return_cache_object: False for a plain dict under TransformerLens names.
            remove_batch_dim: drop a batch dimension of 1 from the cache.
            names_filter: a name, names or patterns in either spelling, or a function of names (see `hooks`).
            stop_at_layer: as in `forward`.
            *args: as in TransformerBridge.
            **kwargs: as in TransformerBridge, and what `forward` takes.

        Raises:
            UnknownNameError: a name that no hook point has; the message has the nearest ones.
            OutOfRangeError: a loop or layer that this run does not have.
            LoopedError: `incl_bwd` of a run that stops.
        """
        if stop_at_layer is not None:  # the model stops by itself; TransformerLens would unwind with an exception
            if kwargs.get("incl_bwd", args[0] if args else False):
                raise LoopedError(
                    f"stop_at_layer={stop_at_layer} and incl_bwd=True were asked, but a run that stops has no loss to go back "
                    "from; leave one of them out."
                )
            kwargs |= {"stop": self._stop(stop_at_layer), "return_type": "logits"}
        mask = kwargs.pop("attention_mask", kwargs.pop("one_zero_attention_mask", None))
        input, mask = self.read(input, kwargs.pop("prepend_bos", None), kwargs.pop("padding_side", None), mask)
        if mask is not None:
            kwargs["attention_mask"] = mask
            mask = mask[:, -input.shape[1] :].clone()  # of the positions that are run
            asked = kwargs.get("pos_slice", args[1] if len(args) > 1 else None)
            positions = asked if isinstance(asked, Slice) else Slice(asked)
            check_real(positions, mask)
            mask = positions.apply(mask, dim=1) if positions.mode in ("identity", "slice") else None
        chosen = self._expand_filter(names_filter)
        record = Run.of(self, input, kwargs)
        run: Any = super().run_with_cache
        arguments = (input, return_cache_object, remove_batch_dim, chosen, None, *args)
        with warnings.catch_warnings():
            # It says that device= is ignored on several devices, where it acts as on one.
            warnings.filterwarnings("ignore", r"run_with_cache\(device=.* ignored: model is dispatched")
            output, cache = without_leftovers(self, partial(run, *arguments, **kwargs))
        if not return_cache_object:
            return output, cache
        cache.run, cache.attention_mask = record, mask
        asked = None if kwargs.get("loop") is None else self.schedule.loop(kwargs["loop"])
        cache.loop = None if asked == self.n_loops - 1 else asked
        return output, cache
