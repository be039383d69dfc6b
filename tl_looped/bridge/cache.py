"""`LoopedCache`: an ActivationCache that knows the schedule, and decomposes the residual stream exactly."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name
from transformer_lens.utilities.slice import Slice

from .._old_calls import accepts_old
from ..errors import LoopedError, UnknownNameError
from ..kinds import plain
from ..schedule import LoopSelector, Site, is_pattern, virtual_layer
from .decomposition import FINAL, REMAINDER, Decomposition, LogitAttribution, Reader, Write, branch_inputs, check_activations
from .fingerprint import Fingerprint
from .run import Run
from .tokens import check_real, real_positions

Tokens = str | int | Int[Tensor, ""] | Int[Tensor, "batch"] | Int[Tensor, "batch pos"]
Unit = Literal["component", "layer", "head"]
Part = tuple[int | slice, Tensor]
Stack = Float[Tensor, "component ..."]
_SWITCHES = {  # hook points that fire only with a setting of TransformerLens
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}


class LoopedCache(ActivationCache):
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

    model: Any  # a LoopedBridge; TransformerLens's own annotation knows less
    run: Run | None = None  # what made these activations, where a whole run did
    attention_mask: Tensor | None = None  # [batch, pos], 1 for real positions; None where all are
    loop: int | None = None  # after which the run stopped; None after the last one
    _streams: Sequence[Callable[[], Tensor | None]] = ()

    def __init__(
        self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True, weights: Fingerprint | None = None
    ):
        super().__init__(cache_dict, model, has_batch_dim)
        # Nothing is known of a cache that somebody makes by hand; it is taken for one of the model as it is.
        self.weights: Fingerprint = Fingerprint.of(model.plain) if weights is None else weights

    def __getitem__(self, key: Any) -> Tensor:
        if not isinstance(key, (str, tuple)) or not key:
            raise LoopedError(
                f'cache[{key!r}] was asked; pass a name, or a short name and a virtual layer: cache["pattern", 3].'
            )
        asked = key
        if isinstance(key, tuple):
            short, layer, *more = map(plain, (*key, None) if len(key) == 1 else key)
            if any(isinstance(part, int) for part in more):
                raise LoopedError(
                    f"cache[{key!r}] was asked; a short name goes with one virtual layer, cache[{short!r}, {layer!r}]. A loop "
                    f"and a layer: cache.at(loop={layer!r}, layer={more[0]!r})[{short!r}]."
                )
            key = get_act_name(short, None if layer is None else self.model.schedule.layer(layer), *more)
        name = key if key in self.cache_dict else self._one_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        if name.removesuffix("_grad") not in self.model.hook_dict:
            raise self.model.unknown_name(asked if isinstance(asked, str) else name)
        raise UnknownNameError(
            f"{asked!r} exists, but was not cached in this run; {self._way_to(name)}. The cache holds {len(self.cache_dict)} "
            "entries."
        )

    def _way_to(self, name: str) -> str:
        """How a hook point gets into a cache: some fire only after a switch."""
        switch = next((switch for hook, switch in _SWITCHES.items() if name.removesuffix("_grad").endswith(hook)), None)
        if switch is None or getattr(self.model.cfg, switch):
            return "name it in names_filter, and run that far"
        return f"it fires after model.set_{switch}(True)"

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and (key in self.cache_dict or self._one_name(key) in self.cache_dict)
        except LoopedError:
            return False

    def _one_name(self, key: str) -> str:
        if is_pattern(key):
            raise LoopedError(f"{key!r} may stand for several activations; use cache.stack_loops(name, layer, loops).")
        name = self.model.expand_name(key, check=False)[0]
        name = name if name in self.cache_dict else get_act_name(name)
        if name in self.cache_dict:
            return name
        hooks, end = self.model.hook_dict, "_grad" * name.endswith("_grad")
        point = hooks.get(name.removesuffix("_grad"))  # which may be cached under another of its names only
        others = [] if point is None else [f"{other}{end}" for other in hooks.names_of(point)]
        return next((other for other in others if other in self.cache_dict), name)

    def at(self, loop: int | None = None, layer: int | None = None, stack: str | None = None) -> CacheView:
        """The activations of one layer or of one pass, under names without indices.

        Args:
            loop: the loop; None in prelude and coda.
            layer: the layer inside the loop, prelude or coda; None for the hooks of the pass itself (`hook_out`, ...).
            stack: "prelude", "coda", or "L" or "H" for HRM-Text; None for the one looped stack.

        Raises:
            LoopedError: no such loop, layer or stack.

        Example:
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
            >>> _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
            >>> cache.at(loop=-1, layer=0)["attn.hook_pattern"] is cache["pattern", 4]
            True
            >>> list(cache.at(loop=1))
            ['hook_state', 'hook_in', 'hook_out']
        """
        schedule = self.model.schedule
        if stack in ("prelude", "coda"):
            if loop is not None or layer is None:
                raise LoopedError(f"stack={stack!r} runs once: pass layer= and no loop=.")
            return CacheView(self, f"blocks.{schedule.virtual(Site(stack, None, layer))}")
        looped = schedule.looped_stack(stack)
        if loop is None:
            raise LoopedError(f"the stack {looped!r} runs {schedule.n_loops_of(looped)} times: pass loop=, or stack='prelude'.")
        index = schedule.virtual(Site(looped, loop, 0 if layer is None else layer))
        if layer is not None:
            return CacheView(self, f"blocks.{index}")
        return CacheView(self, next(schedule.pass_prefix(p) for p in schedule.passes if index in p.layers))

    def stack_loops(
        self, name: str, layer: int | None = None, loops: LoopSelector = "all", stack: str | None = None
    ) -> Float[Tensor, "loop ..."]:
        """One activation of every loop, stacked.

        Args:
            name: as in `at`: TransformerLens's short name ("pattern", "resid_post", ...) or a hook ("attn.hook_z"). Without
                `layer`, a name that passes have is the pass's: "hook_state", "hook_injection", "hook_in", "hook_out",
                "hook_exit_logit", "norm.hook_scale".
            layer: one layer inside the loop; None for all, with a layer axis after the loop axis, or for the pass itself.
            loops: which loops: an int, a slice, several ints, "all" or "last".
            stack: "L" or "H" for HRM-Text; not needed elsewhere.

        Returns:
            [loop, ...] or [loop, layer, ...], followed by the shape of the activation.

        Raises:
            LoopedError: the stack is ambiguous; a loop or layer is out of range; the activation was not cached.
        """
        schedule, looped = self.model.schedule, self.model.schedule.looped_stack(stack)
        chosen = schedule.select_loops(loops, looped)
        a_pass = schedule.pass_prefix(schedule.passes_of(0, looped)[0])
        if layer is None and f"{a_pass}.{_hook(name)}" in self.model.hook_dict:
            return torch.stack([self.at(loop=loop, stack=looped)[name] for loop in chosen])
        layers = range(schedule.stacks[looped]) if layer is None else [layer]
        rows = []
        for loop in chosen:
            cells = [self.at(loop, j, looped)[name] for j in layers]
            rows.append(cells[0] if layer is not None else torch.stack(cells))
        return torch.stack(rows)

    def select_loops(self, loops: LoopSelector) -> LoopedCache:
        """A cache without the activations of other loops; the tensors are shared, not copied.

        Args:
            loops: the loops to keep, as in `stack_loops`; for HRM-Text H cycles, each with its L passes. Prelude,
                coda and the rest are kept too.

        Raises:
            OutOfRangeError: a loop that this run does not have.
        """
        schedule = self.model.schedule
        kept = set(schedule.select_loops(loops, schedule.core_stacks[-1]))
        per_loop = len(schedule.passes) // schedule.n_loops
        others = [p for p in schedule.passes if p.index // per_loop not in kept]
        dropped = tuple(f"blocks.{i}." for p in others for i in p.layers) + tuple(f"{schedule.pass_prefix(p)}." for p in others)
        entries = {name: value for name, value in self.cache_dict.items() if not name.startswith(dropped)}
        selected = LoopedCache(entries, self.model, self.has_batch_dim, self.weights)
        selected.run, selected.attention_mask = self.run, self.attention_mask
        return selected

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """A cache of chosen rows, as in TransformerLens.

        Args:
            batch_slice: which rows, as a TransformerLens `Slice` or what one is made of.
        """
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        chosen = LoopedCache(sliced.cache_dict, self.model, sliced.has_batch_dim, self.weights)
        if self.attention_mask is not None:
            mask = _slice(batch_slice).apply(self.attention_mask, dim=0)
            chosen.attention_mask = mask if mask.ndim == 2 else mask[None]
        return chosen

    def check_weights(self, what: str) -> None:
        """Refuse to use the weights that the model has now beside these activations, if others made them.

        Args:
            what: what was asked.

        Raises:
            LoopedError: the weights were changed since.
        """
        self.weights.check(self.model.plain, what)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
        injections: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """What every component contributes to the residual stream, through all passes; sums to the stream.

        Args:
            layer: the stream entering this virtual layer; None, -1 or `n_layers` for the one entering `ln_final`.
            mlp_input: the stream entering the MLP of `layer`.
            mode: "attn" or "mlp" leaves the other kind out.
            apply_ln: apply the norm that reads the stream, with its frozen scale and its weight.
            pos_slice: positions, as a TransformerLens `Slice` or what one is made of.
            incl_embeds: include what is neither attention nor MLP: `embed`, `initial_state` and injections.
            return_labels: also return the labels.
            injections: what is injected in a pass is a component `loops.{t}.injection` (for HRM-Text, the other stack's state).
                Components that reach the stream only through injections then contribute nothing. By default they are followed
                through all injections back to the components that wrote them.

        Returns:
            [component, batch, pos, d_model] in the order of the run, with the labels if asked for; no gradient, fp32 at least.

        Raises:
            LoopedError: the cache lacks what is needed, or the residual stream was edited in the run.
        """
        if mode not in ("all", "mlp", "attn"):
            raise LoopedError(f'mode={mode!r} was asked; choose "all", "mlp" or "attn".')
        decomposition = self._decomposition(layer, mlp_input, pos_slice, injections)
        other = {"attn": "mlp_out", "mlp": "attn_out"}.get(mode)
        chosen = [
            at
            for at in decomposition.writes
            if (incl_embeds if at.layer is None else other is None or not at.hook.endswith(other))
        ]
        stack = decomposition.components(chosen)
        return self._finish(stack, [at.label for at in chosen], layer, mlp_input, apply_ln, pos_slice, return_labels)

    def accumulated_resid(
        self,
        layer: int | None = -1,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
        carried: bool | None = None,
    ) -> Stack | tuple[Stack, list[str]]:
        """The residual stream at every layer: as it is, or as the part of the stream at `layer` that was written by then.

        In an ordinary transformer the two are the same. Here differences of parts are contributions, and streams as they are go
        through a lens that recomputes the norm.

        Args:
            layer: up to the stream entering this virtual layer; None, -1 or `n_layers` for the one entering `ln_final`.
            incl_mid: include the streams between attention and MLP.
            apply_ln: apply the norm that reads the stream at `layer`: with its frozen scale; with recomputed scales where the
                streams are taken as they are and go into `ln_final`, as in TransformerLens.
            pos_slice: positions, as a TransformerLens `Slice` or what one is made of.
            mlp_input: end with the stream entering the MLP of `layer`.
            return_labels: also return the labels, such as `5_pre`, `5_mid` and `final_post`.
            carried: True for parts, False for the streams as they are. None: as they are where TransformerLens means the logit
                lens (`apply_ln=True`, or an explicit `layer=None`, which is how its `logit_lens` asks), otherwise parts.

        Returns:
            [stream, batch, pos, d_model], with the labels if asked for. The last entry is the stream at `layer` in both cases.

        Raises:
            LoopedError: the cache lacks what is needed, or the residual stream was edited in the run.
        """
        self.check_weights("accumulated_resid")
        if carried is None:
            carried = not apply_ln and layer is not None
        positions, point = _slice(pos_slice), self._point(layer, mlp_input)
        self.check_real(positions)
        if carried:
            decomposition = self._decomposition(layer, mlp_input, pos_slice)
            counts = {name: count for name, count in decomposition.read if self._is_shown(name, incl_mid, point)}
            total = decomposition.components(decomposition.writes).cumsum(0)
            stack = total[torch.tensor([count - 1 for count in counts.values()], device=total.device)]
            names = list(counts)
        else:
            layers = range(self.model.cfg.n_layers)
            every = [*(f"blocks.{i}.hook_resid_{where}" for i in layers for where in ("pre", "mid")), FINAL]
            names = [name for name in every[: every.index(point) + 1] if self._is_shown(name, incl_mid, point)]
            stack = torch.stack([positions.apply(self[self._cached_stream(name)], dim=-2) for name in names])
        if apply_ln:
            recompute = not carried and point == FINAL
            stack = self._normed(stack, layer, mlp_input, pos_slice, has_batch_dim=self.has_batch_dim, recompute_ln=recompute)
        elif not carried:
            self._streams = [*(ref for ref in self._streams if ref() is not None), weakref.ref(stack)]
        return (stack, self._tl_labels(map(self._stream_label, names))) if return_labels else stack

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """What every attention head contributes to the residual stream, through all passes.

        Args:
            layer: the stream entering this virtual layer; None, -1 or `n_layers` for the one entering `ln_final`.
            return_labels: also return the labels, such as `L5H3`.
            incl_remainder: end with one row for everything else, so that the sum is the stream.
            pos_slice: positions, as a TransformerLens `Slice` or what one is made of.
            apply_ln: apply the norm that reads the stream, with its frozen scale and its weight.

        Returns:
            [component, batch, pos, d_model], with the labels if asked for.

        Raises:
            LoopedError: the cache lacks what is needed, or the residual stream was edited in the run.
        """
        stack, labels = self._split(layer, False, pos_slice, heads=True, rest=incl_remainder)
        labels += [REMAINDER] if incl_remainder else []
        return self._finish(stack, labels, layer, False, apply_ln, pos_slice, return_labels)

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """What every neuron contributes to the residual stream, through all passes.

        Args:
            layer: the stream entering this virtual layer; None, -1 or `n_layers` for the one entering `ln_final`.
            pos_slice: positions, as a TransformerLens `Slice` or what one is made of.
            neuron_slice: which neurons of every layer.
            return_labels: also return the labels, such as `L5N17`.
            incl_remainder: end with one row for everything else, so that the sum is the stream.
            apply_ln: apply the norm that reads the stream, with its frozen scale and its weight.
            project_output_onto: [d_model] or [d_model, n]: the products with these directions instead of vectors. The
                directions are pulled back, so that no vector per neuron is made.
            mlp_input: the stream entering the MLP of `layer`.

        Returns:
            [component, batch, pos, d_model], or the products instead of the last axis; with the labels if asked for.

        Raises:
            LoopedError: the cache lacks what is needed, or the residual stream was edited in the run.
        """
        stack, labels = self._split(
            layer, mlp_input, pos_slice, neurons=_keeping(neuron_slice), rest=incl_remainder,
            project=project_output_onto, apply_ln=apply_ln,
        )  # fmt: skip
        labels += [REMAINDER] if incl_remainder else []
        apply_ln = apply_ln and project_output_onto is None
        return self._finish(stack, labels, layer, mlp_input, apply_ln, pos_slice, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Stack | tuple[Stack, list[str]]:
        """What heads, neurons (or MLPs), embedding, initial state and biases contribute; sums to the stream.

        Args:
            layer: the stream entering this virtual layer; None, -1 or `n_layers` for the one entering `ln_final`.
            mlp_input: the stream entering the MLP of `layer`.
            expand_neurons: neurons, rather than whole MLPs.
            apply_ln: apply the norm that reads the stream, with its frozen scale and its weight.
            pos_slice: positions, as a TransformerLens `Slice` or what one is made of.
            return_labels: also return the labels.
            project_output_onto: [d_model] or [d_model, n]: the products with these directions instead of vectors.

        Returns:
            [component, batch, pos, d_model], or the products instead of the last axis: heads, neurons or MLPs, `embed`,
            `initial_state` where there is one, and `bias`, all that attention and MLPs write beside their heads and neurons.

        Raises:
            LoopedError: the cache lacks what is needed, or the residual stream was edited in the run.
        """
        stack, labels = self._split(
            layer, mlp_input, pos_slice, heads=True, neurons=Slice() if expand_neurons else None, mlps=not expand_neurons,
            embeds=True, rest=True, project=project_output_onto, apply_ln=apply_ln,
        )  # fmt: skip
        apply_ln = apply_ln and project_output_onto is None
        return self._finish(stack, [*labels, "bias"], layer, mlp_input, apply_ln, pos_slice, return_labels)

    def get_neuron_results(
        self, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_output_onto: Tensor | None = None
    ) -> Float[Tensor, ...]:
        """What every neuron of one layer adds to the stream there, not carried further.

        Args:
            layer: virtual layer.
            neuron_slice: which neurons; an int drops the axis.
            pos_slice: positions, as a TransformerLens `Slice` or what one is made of.
            project_output_onto: [d_model] or [d_model, n]: the products with these directions instead of vectors.

        Returns:
            [batch, pos, neuron, d_model], or the products instead of the last axis.
        """
        index, neurons = self.model.schedule.layer(layer), _slice(neuron_slice)
        fan = Reader(self, _slice(pos_slice)).neurons(index, _keeping(neuron_slice))
        if project_output_onto is None:
            out = fan.vectors().movedim(0, -2)
            return out[..., 0, :] if neurons.mode == "int" else out
        columns = project_output_onto.detach().to(fan.weight.device, fan.weight.dtype)
        out = torch.stack([fan.along(column) for column in columns.reshape(len(columns), -1).T], dim=-1).movedim(0, -2)
        out = out[..., 0] if project_output_onto.ndim == 1 else out
        return out.select(-1 if project_output_onto.ndim == 1 else -2, 0) if neurons.mode == "int" else out

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        """Apply the norm that reads the stream at `layer` to contributions: its frozen scale and its weight.

        Unlike TransformerLens this includes the weight, which compatibility mode folds away; either way the result is what the
        contributions are to the input of the attention, of the MLP or of the unembedding. A layer without such a norm
        (Recurrent-OLMo) reads the stream itself, so there the stack comes back unchanged.

        Args:
            residual_stack: [component, batch, pos, d_model] at the positions of `pos_slice`.
            layer: virtual layer; None, -1 or `n_layers` for `ln_final`.
            mlp_input: the norm before the MLP of `layer`.
            pos_slice: the positions that the stack has, to slice the scale.
            batch_slice: rows of the batch, to slice stack and scale.
            has_batch_dim: whether the stack has a batch axis.
            recompute_ln: norm every entry by itself (logit lens); for `ln_final` only.

        Raises:
            LoopedError: the scale was not cached; `recompute_ln` at another norm; the weights were changed since.
        """
        self.check_weights("apply_ln_to_stack")
        return self._normed(residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln)

    def _normed(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        check_activations(self)
        point = self._point(layer, mlp_input)
        if recompute_ln:
            if point != FINAL:
                raise LoopedError(f"recompute_ln=True was asked at layer {layer}, but it belongs to ln_final: pass layer=None.")
            return super().apply_ln_to_stack(residual_stack, None, False, pos_slice, batch_slice, has_batch_dim, True)
        rows = _slice(batch_slice)
        stack = rows.apply(residual_stack, dim=1) if has_batch_dim else residual_stack
        name = "ln_final" if point == FINAL else f"blocks.{self._layer(layer)}.ln{2 if mlp_input else 1}"
        blocks: Any = self.model.plain.blocks
        norm = self.model.plain.ln_final if point == FINAL else getattr(blocks[self._layer(layer)], name[-3:])
        if norm is None:
            return stack
        scale = _slice(pos_slice).apply(self[f"{name}.hook_scale"], dim=-2)
        scale = rows.apply(scale, dim=0) if self.has_batch_dim else scale
        stack = stack / scale.to(stack.device)
        return stack if norm.weight is None else stack * norm.weight.to(stack.device, stack.dtype)

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
        rows = _slice(batch_slice)
        if has_batch_dim and residual_stack.ndim == 4 and rows.mode != "int":
            _check_which_axis(tokens, rows.apply(residual_stack, dim=1).shape[1], residual_stack.shape[2])
        return super().logit_attrs(residual_stack, tokens, incorrect_tokens, pos_slice, batch_slice, has_batch_dim)

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
        decomposition = Decomposition(self, FINAL, _slice(pos), injections, inner)
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
        if mask is not None and _slice(pos).mode == "identity":
            stack = stack.masked_fill(~(mask if self.has_batch_dim else mask[0]).to(stack.device), math.nan)
        axes = ("component", *(["example"] if self.has_batch_dim else []), "pos")[: stack.ndim]
        return LogitAttribution(stack, tuple(values), unit, axes)

    def _of_the_shorter_model(self) -> LoopedCache:
        """The cache of a run that stopped after a loop, as one of a whole run of the model that has no further loop."""
        self.check_weights("a decomposition")
        schedule, short = self.model.schedule, self.model.unroll(cast(int, self.loop) + 1)
        names = {short.expand_name(schedule.loop_name(name))[0]: value for name, value in self.cache_dict.items()}
        cache = LoopedCache(names, short, self.has_batch_dim)
        cache.attention_mask = self.attention_mask
        return cache

    def _everywhere(self, tokens: Any) -> Any:
        """One token for each row as one for each position of each row."""
        one_for_each_row = self.has_batch_dim and isinstance(tokens, Tensor) and tokens.ndim == 1
        return tokens[:, None].expand(cast(Tensor, self.attention_mask).shape) if one_for_each_row else tokens

    def padding(self) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are real, where some are padding; None where all are real."""
        mask = None if self.attention_mask is None else self.attention_mask.bool()
        return None if mask is None or bool(mask.all()) else mask

    def check_real(self, positions: Slice) -> None:
        """Refuse positions which are padding in some row (`tokens.check_real`).

        Args:
            positions: which positions.

        Raises:
            LoopedError: they are.
        """
        check_real(positions, self.padding())

    def _ensure_head_results(self) -> bool:
        self.check_weights("compute_head_results")
        return super()._ensure_head_results()

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
            direction = _slice(pos).apply(direction, dim=-2)
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

    def _layer(self, layer: int | None) -> int:
        n_layers = self.model.cfg.n_layers
        return n_layers if layer is None or layer in (-1, n_layers) else self.model.schedule.layer(layer)

    def _point(self, layer: int | None, mlp_input: bool) -> str:
        """The hook that holds the stream at `layer`."""
        target = self._layer(layer)
        if target == self.model.cfg.n_layers:
            if mlp_input:
                raise LoopedError("mlp_input=True was asked of the final stream, which no MLP reads; pass a layer.")
            return FINAL
        return f"blocks.{target}.hook_resid_{'mid' if mlp_input else 'pre'}"

    def _is_shown(self, name: str, incl_mid: bool, point: str) -> bool:
        return incl_mid or name == point or not name.endswith("mid")

    def _stream_label(self, name: str) -> str:
        if name == FINAL:
            return "final"
        return self.model.schedule.loop_name(name).replace("hook_", "")

    def _cached_stream(self, name: str) -> str:
        """The name of a stream in the cache; the final one is the output of the last layer too, in most families."""
        cfg = self.model.looped_cfg
        last_layer_is_last = cfg.n_coda or (
            cfg.after_loop == "none" and cfg.strategy == "naive" and (not cfg.pass_norm or cfg.pass_norm_is_final)
        )
        last = f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"
        return last if name == FINAL and name not in self and last_layer_is_last else name

    def _names(self, layer: int, kind: str, indices: int | list[int]) -> list[str]:
        chosen = range(indices) if isinstance(indices, int) else indices
        return [self.model.schedule.name(layer, f"{kind}.{i}") for i in chosen]

    def _decomposition(
        self,
        layer: int | None,
        mlp_input: bool,
        pos_slice: Any,
        injections: bool = False,
        also: Callable[[Write], list[str]] | None = None,
    ) -> Decomposition:
        return Decomposition(self, self._point(layer, mlp_input), _slice(pos_slice), injections, also)

    def _finish(
        self,
        stack: Tensor,
        labels: list[str],
        layer: int | None,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: Any,
        return_labels: bool,
    ) -> Stack | tuple[Stack, list[str]]:
        if apply_ln:
            stack = self._normed(stack, layer, mlp_input, pos_slice, has_batch_dim=self.has_batch_dim)
        return (stack, self._tl_labels(labels)) if return_labels else stack

    def _tl_labels(self, labels: Iterable[str]) -> list[str]:
        """What TransformerLens's own methods call components: code that reads their labels parses these."""
        return [self.model.schedule.tl_label(label) for label in labels]

    def _split(
        self,
        layer: int | None,
        mlp_input: bool,
        pos_slice: Any,
        heads: bool = False,
        neurons: Slice | None = None,
        mlps: bool = False,
        embeds: bool = False,
        rest: bool = False,
        project: Tensor | None = None,
        apply_ln: bool = False,
    ) -> tuple[Tensor, list[str]]:
        """Contributions of heads, of neurons or MLPs, of embeddings, and of the rest in a last row without label."""
        model, schedule = self.model.plain, self.model.schedule
        inner = branch_inputs(model, self, heads, neurons is not None)
        decomposition = self._decomposition(layer, mlp_input, pos_slice, also=inner)
        numbers = [] if neurons is None else neurons.apply(torch.arange(model.cfg.d_mlp, device="cpu")).tolist()
        attention = [at for at in decomposition.writes if at.layer is not None and at.hook.endswith("attn_out")]
        mlp = [at for at in decomposition.writes if at.layer is not None and at.hook.endswith("mlp_out")]
        names: dict[str, list[str]] = {}  # of the rows of every write, in the order of the rows
        if heads:
            names |= {at.label: self._names(at.layer or 0, "head", model.cfg.n_heads) for at in attention}
        if neurons is not None:
            names |= {at.label: self._names(at.layer or 0, "neuron", numbers) for at in mlp}
        whole = [at for at in decomposition.writes if (mlps and at in mlp) or (embeds and at.layer is None)]
        whole.sort(key=lambda at: at.layer is None)
        names |= {at.label: [at.label] for at in whole}
        labels = [name for group in names.values() for name in group]
        start, count = {}, 0
        for label, group in names.items():
            start[label], count = count, count + len(group)
        n_rows = count + rest

        def fan(at: Write) -> Any:
            layer = schedule.layer(at.layer)
            return decomposition.heads(layer) if at.hook.endswith("attn_out") else decomposition.neurons(layer, neurons)

        def parts(at: Write) -> list[Part]:
            value = decomposition.get(at.hook)
            if at.label not in names:
                return [(count, value)] if rest else []
            if at in whole:
                return [(start[at.label], value)]
            vectors = fan(at).vectors()
            rows: list[Part] = [(slice(start[at.label], start[at.label] + len(vectors)), vectors)]
            return [*rows, (count, value - vectors.sum(0))] if rest else rows

        if project is None:
            return decomposition.carry(n_rows, parts), labels
        columns = []
        for column in project.detach().reshape(len(project), -1).T:
            aim = column.to(decomposition.like.device, decomposition.like.dtype).expand_as(decomposition.like)
            if apply_ln:
                aim = self._normed(aim[None], layer, mlp_input, pos_slice, has_batch_dim=self.has_batch_dim)[0]
            grads = decomposition.pull_back(aim)
            out = aim.new_zeros(n_rows, *aim.shape[:-1])
            for at in decomposition.writes:
                total = (grads[at.label] * decomposition.get(at.hook)).sum(-1)
                if at.label in names:
                    along = total[None] if at in whole else fan(at).along(grads[at.label])
                    out[start[at.label] : start[at.label] + len(along)] = along
                    total = total - along.sum(0)
                if rest:
                    out[count] += total
            columns.append(out)
        stacked = torch.stack(columns, dim=-1)
        return (stacked.squeeze(-1) if project.ndim == 1 else stacked), labels


class CacheView(Mapping[str, Tensor]):
    """The activations of one layer or pass of a `LoopedCache`; made by `LoopedCache.at`.

    Keys are hook names without indices (`hook_resid_post`, `attn.hook_z`); short names (`resid_post`, `z`) work too.
    """

    def __init__(self, cache: LoopedCache, prefix: str):
        self.cache: LoopedCache = cache
        self.prefix: str = prefix

    def __getitem__(self, name: str) -> Tensor:
        layer = virtual_layer(self.prefix)
        short = _hook(name) != name
        return self.cache[name, layer] if short and layer is not None else self.cache[f"{self.prefix}.{_hook(name)}"]

    def __iter__(self) -> Iterator[str]:
        start = f"{self.prefix}."
        inside = (name.removeprefix(start) for name in self.cache.cache_dict if name.startswith(start))
        return (name for name in inside if not name.startswith("blocks."))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"CacheView({self.cache.model.schedule.loop_name(f'{self.prefix}.hook')[:-5]!r}, {list(self)})"


def _hook(name: str) -> str:
    """A hook's name; "out" is short for "hook_out"."""
    return name if "." in name or name.startswith("hook_") else f"hook_{name}"


def _check_which_axis(tokens: Any, n_rows: int, n_pos: int) -> None:
    """Refuse one axis of tokens where it may stand for rows as well as for positions."""
    if isinstance(tokens, Tensor) and tokens.ndim == 1 and len(tokens) == n_rows == n_pos > 1:
        raise LoopedError(
            f"{n_rows} tokens were given for {n_rows} rows of {n_pos} positions, and may be one for each row or one for each "
            "position; pass tokens[:, None] or tokens[None]."
        )


def _slice(positions: Any) -> Slice:
    return positions if isinstance(positions, Slice) else Slice(plain(positions))


def _keeping(chosen: Any) -> Slice:
    """A slice that keeps its axis: an int selects a range of one."""
    found = _slice(chosen)
    index: Any = found.slice
    return Slice([index]) if found.mode == "int" else found
