"""`TracedBridge`: any module that calls its layers several times, with TransformerLens's hooks at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss
from transformer_lens.utilities.logits_utils import sample_logits
from transformer_lens.utilities.slice import Slice

from ..errors import LoopedError, UnknownNameError
from ..kinds import plain
from ..record import Run
from ..running import Running, is_observed
from ..schedule import Schedule, check_count
from ..traced.depth import looping
from ..traced.feed import Feed
from ..traced.places import PLAIN, STREAM, Place
from ..traced.trace import Trace, check_module, trace
from ..traced.watch import Watch
from .hooking import without_leftovers
from .names import Hook, HookDict, Named, NamesFilter
from .point import Point
from .readouts import ReadingOut
from .tokens import Reading, check_real
from .traced_cache import TracedCache

UNKNOWN_CONTEXT = 2**31 - 1  # positions, of a module that does not say how many it has


@dataclass(frozen=True, eq=False)
class Asked:
    """What a trace was asked with, so that it can be repeated at another depth."""

    tokens: Tensor
    own: Mapping[str, Any]
    layers: Any = None
    prelude: int | None = None
    norm: Any = None
    head: Any = None
    parts: Mapping[str, str] | None = None
    set_loops: str | Callable[[nn.Module, int], object] | None = None
    seed: int | None = None


class HookedTrace(  # pyright: ignore[reportIncompatibleMethodOverride]
    Named, Reading, ReadingOut, HookedRootModule
):
    """The part of a `TracedBridge` that runs.

    Args:
        module: what is run; it is left as it is, hooks are on it only while it runs.
        feed: how it is called.
        asked: the example, and what the user said of the module.
        tokenizer: its tokenizer.
        n_loops: how often it is set to loop; None for as often as it does.
        like: its schedule at another depth, if that is known.
    """

    to_str_tokens: Any = TransformerBridge.to_str_tokens
    to_string: Any = TransformerBridge.to_string
    to_single_token: Any = TransformerBridge.to_single_token
    to_single_str_token: Any = TransformerBridge.to_single_str_token
    get_token_position: Any = TransformerBridge.get_token_position

    def __init__(
        self,
        module: nn.Module,
        feed: Feed,
        asked: Asked,
        tokenizer: Any,
        n_loops: int | None = None,
        like: Schedule | None = None,
    ):
        super().__init__()
        self.module: nn.Module = module
        self.feed: Feed = feed
        self.asked: Asked = asked
        self._depth: int | None = n_loops
        found = trace(
            check_module(module),
            feed,
            self._run,
            asked.tokens,
            asked.own,
            layers=asked.layers,
            n_prelude=asked.prelude,
            like=like,
            norm=asked.norm,
            head=asked.head,
            parts=asked.parts,
        )
        self.trace: Trace = found
        self.schedule: Schedule = found.schedule
        self._hooked: dict[int, Point] = {}
        hooks = {place.name: Point(place, self._hooked) for place in found.places.places}
        by_name = HookDict(hooks)
        by_name.expand_name = self.expand_name
        self.__dict__["hook_dict"] = self.__dict__["mod_dict"] = by_name
        self.__dict__["cfg"] = _config(module, found)
        self._tokenizer: Any = None
        self.tokenizer = tokenizer

    def _also_called(self, names: list[str]) -> list[str]:
        """What a pass takes and returns is what its layers do."""
        return [self.trace.places.also.get(name, name) for name in names]

    def unknown_name(self, name: str) -> UnknownNameError:
        """The error for a hook name that this model does not have, with the reason where there is one.

        Args:
            name: the name.
        """
        last, error = name.rpartition(".")[2], super().unknown_name(name)
        why = {
            "hook_state": "Something is mixed into the state between its passes; what enters the layers of a pass is at "
            "hook_in.",
            "hook_out": "Something is made of what the layers of a pass return, where no hook acts.",
            "hook_resid_mid": "No module of a layer is given the stream between attention and MLP alone.",
        }.get(last, "")
        if last in ("hook_attn_out", "hook_mlp_out") or ".attn." in name or ".mlp." in name:
            why = "Which part of a layer that is could not be told; name it by parts=, or use the path of the submodule."
        if last in (*STREAM, *PLAIN, "hook_state") and self.trace.places.unnamed:
            why = f"Of {self.trace.places.unnamed}."
        return UnknownNameError(f"{error} {why}") if why else error

    @property
    def cfg(self) -> Any:
        """TransformerLens's config; dtype and device are those of the parameters."""
        cfg, weight = self.__dict__["cfg"], next(self.module.parameters(), None)
        if weight is not None:
            cfg.dtype, cfg.device = weight.dtype, str(weight.device)
        return cfg

    def _run(self, tokens: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Run the module once; the same run each time, also where it draws random numbers."""
        if self.asked.seed is None:
            with looping(self.module, self.asked.set_loops, self._depth):
                return self.feed(self.module, tokens, inputs)
        devices = [tokens.device] if tokens.device.type == "cuda" else []
        with looping(self.module, self.asked.set_loops, self._depth), torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.asked.seed)
            return self.feed(self.module, tokens, inputs)

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        *,
        stop_at_layer: int | None = None,
        stop: int | None = None,
        loop: int | None = None,
        initial_state: Any = None,
        **inputs: Any,
    ) -> Any:
        """Run the module, as TransformerBridge runs a model.

        Args:
            input: text or tokens.
            return_type: "logits", "loss", "both" or None.
            loss_per_token: the loss of every next token rather than their mean.
            prepend_bos: as in `to_tokens`.
            padding_side: as in `to_tokens`.
            attention_mask: [batch, pos], 1 for real tokens; given to the module, if it takes one.
            stop_at_layer: run up to this virtual layer, exclusive, and return what enters it.
            stop: likewise.
            loop: the readout after this loop (0-based; negative counts from the end).
            initial_state: refused; the module makes its own.
            **inputs: what else the module's forward takes.

        Raises:
            LoopedError: padding that the module takes no mask for; hooks are on, and it loops more or less often than traced.
        """
        if initial_state is not None:
            raise LoopedError(
                f"initial_state={initial_state!r} was given, but a traced module begins by itself; hook its state."
            )
        tokens, mask = self.read(input, prepend_bos, padding_side, attention_mask)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        given = {**self._masked(mask), **inputs}
        if loop is not None:
            asked = self.schedule.loop(loop)
            reading: Any = self
            read = reading.readouts(tokens, lambda t, logits: logits if t == asked else None, **given)
            logits = read[asked]
        else:
            stop = stop if stop_at_layer is None else plain(stop_at_layer)
            last = None if stop is None or stop == self.schedule.n_layers else self.schedule.layer(stop)
            entered = None if last is None else cast(Point, self.hook_dict[f"blocks.{last}.hook_in"]).place
            output = self._watched(partial(self._run, tokens, given), entered)
            if last is not None:
                return output
            logits = self.feed.logits(output, tokens.shape[:2])
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        if return_type not in ("loss", "both"):
            raise LoopedError(f'return_type={return_type!r} was asked; a traced module returns "logits", "loss" or "both".')
        loss = lm_cross_entropy_loss(logits, tokens, mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _watched(self, run: Callable[[], Any], stop: Place | None) -> Any:
        """What a run returns, in which the hooks act that there are."""
        for key in [key for key, point in self._hooked.items() if not is_observed(point)]:
            del self._hooked[key]
        if stop is None and not self._hooked:
            return run()
        going_on = Running()  # by which hooks know one run from another
        going_on.enter()
        return Watch(self.module, self.trace.order, [(point.place, point) for point in self._hooked.values()], stop).run(run)

    def _masked(self, mask: Tensor | None) -> dict[str, Any]:
        """The arguments by which the module hears of padding."""
        if mask is None or bool(mask.all()):
            return {}
        if not self.feed.takes("attention_mask"):
            raise LoopedError(
                f"{int((~mask.bool()).sum())} positions are padding, but the module takes no attention_mask; pass prompts of "
                "one length, or one by one."
            )
        if bool(mask[:, 0].all()):
            return {"attention_mask": mask}
        if not self.feed.takes("position_ids"):
            raise LoopedError("the prompts are padded on the left, but the module takes no position_ids; pad on the right.")
        return {"attention_mask": mask, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}

    @property
    def n_loops(self) -> int:
        """How often it loops."""
        return self.schedule.n_loops

    def run_with_hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Any,
        fwd_hooks: Iterable[Hook] = (),
        bwd_hooks: Iterable[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run with hooks, as in TransformerBridge; names may be loop-indexed and may be patterns.

        Args:
            input: as in `forward`.
            fwd_hooks: as in `hooks`.
            bwd_hooks: as in `hooks`.
            reset_hooks_end: take these hooks off at the end.
            clear_contexts: clear the contexts of their hook points then, too.
            **kwargs: what `forward` takes.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            return self.forward(input, **kwargs)

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        *,
        pos_slice: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache, as in TransformerBridge; returns (output, cache).

        Args:
            input: as in `forward`.
            return_cache_object: False for a plain dict.
            remove_batch_dim: drop a batch dimension of 1 from the cache.
            names_filter: a name, names or patterns in either spelling, or a function of names.
            stop_at_layer: as in `forward`.
            pos_slice: positions to keep, as in TransformerBridge.
            **kwargs: as in TransformerBridge, and what `forward` takes.
        """
        mask = kwargs.pop("attention_mask", None)
        tokens, mask = self.read(input, kwargs.pop("prepend_bos", None), kwargs.pop("padding_side", None), mask)
        given = kwargs | ({} if stop_at_layer is None else {"stop_at_layer": stop_at_layer})
        record = Run.of(self, tokens, given)
        if mask is not None:
            given["attention_mask"] = mask
            check_real(Slice.unwrap(pos_slice), mask)
        chosen = self._expand_filter(names_filter)
        run: Any = super().run_with_cache
        options = {"names_filter": chosen, "remove_batch_dim": remove_batch_dim, "pos_slice": pos_slice}
        output, activations = without_leftovers(self, partial(run, tokens, **options, **given))
        if not return_cache_object:
            return output, activations
        cache = TracedCache(activations, self, has_batch_dim=not remove_batch_dim)
        cache.run = record
        if mask is not None and Slice.unwrap(pos_slice).mode in ("identity", "slice"):
            cache.attention_mask = Slice.unwrap(pos_slice).apply(mask, dim=1)
        return output, cache

    @torch.no_grad()
    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        return_type: str | None = "input",
        verbose: bool = False,
        **inputs: Any,
    ) -> Any:
        """Write text, one whole run for every token, so that hooks act in every loop of every run.

        Args:
            input: text or tokens; texts of one length.
            max_new_tokens: how many tokens to write at most.
            stop_at_eos: end a row with the tokenizer's last token.
            eos_token_id: the token that ends a row; None for the tokenizer's.
            do_sample: draw tokens; False takes the most probable.
            top_k: draw from so many most probable tokens.
            top_p: draw from the most probable tokens of so much mass.
            temperature: by which logits are divided.
            return_type: "str", "tokens", or "input" for what was given.
            verbose: accepted as in TransformerBridge; there is no progress bar.
            **inputs: what else the module's forward takes.

        Returns:
            A text or texts, or tokens [batch, pos], the prompt included.
        """
        tokens, mask = self.read(input)
        if mask is not None and not bool(mask.all()):
            raise LoopedError("generate was asked of prompts of different lengths; pass them one by one.")
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if eos_token_id is None and self.tokenizer is not None:
            eos_token_id = self.tokenizer.eos_token_id
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(check_count("max_new_tokens", max_new_tokens)):
            last = self.forward(tokens, **inputs)[:, -1]
            new = sample_logits(last, top_k, top_p, temperature) if do_sample else last.argmax(-1)
            if stop_at_eos and eos_token_id is not None:
                new = torch.where(ended, torch.full_like(new, eos_token_id), new)
                ended |= new == eos_token_id
            tokens = torch.cat([tokens, new[:, None].to(tokens)], 1)
            if bool(ended.all()):
                break
        if return_type == "tokens" or (return_type == "input" and not isinstance(input, (str, list))):
            return tokens
        tokenizer: Any = self.tokenizer
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        return texts[0] if isinstance(input, str) else texts


def _config(module: nn.Module, found: Trace) -> TransformerBridgeConfig:
    """TransformerLens's view of a traced module: one layer for every virtual layer."""
    config = getattr(module, "config", None)

    def said(*names: str) -> int | None:
        values = [getattr(config, name, None) for name in names]
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    n_heads, d_head = found.attention or (1, 0)
    return TransformerBridgeConfig(
        d_model=found.d_model,
        d_head=d_head or found.d_model // n_heads,
        n_layers=found.schedule.n_layers,
        n_ctx=said("max_position_embeddings", "n_positions", "block_size", "n_ctx") or UNKNOWN_CONTEXT,
        n_heads=n_heads,
        n_key_value_heads=said("num_key_value_heads", "n_kv_heads") or n_heads,
        d_mlp=said("intermediate_size", "n_inner") or 4 * found.d_model,
        d_vocab=found.d_vocab,
        d_vocab_out=found.d_vocab,
        architecture="Traced",
        model_name=type(module).__name__,
        act_fn="gelu",
    )
