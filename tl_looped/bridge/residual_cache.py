"""The residual stream of a cached run, as the sum of what its components contribute."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities.slice import Slice

from .._together import stacked
from ..errors import LoopedError
from ..looped import require
from ..model.devices import device_of
from .decomposition import FINAL, REMAINDER, Decomposition, Reader, Write, branch_inputs, check_activations
from .named_cache import NamedCache, as_slice

Part = tuple[int | slice, Tensor]
Stack = Float[Tensor, "component ..."]


class Asked(NamedTuple):
    """The stream that is decomposed, and in which form: what the methods of `ResidualCache` have in common."""

    layer: int | None
    mlp_input: bool = False
    pos_slice: Any = None
    apply_ln: bool = False
    return_labels: bool = False


class ResidualCache(NamedCache):
    """The part of a `LoopedCache` that decomposes the residual stream."""

    _streams: Sequence[Callable[[], Tensor | None]] = ()

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
        asked = Asked(layer, mlp_input, pos_slice, apply_ln, return_labels)
        decomposition = self._decomposition(asked, injections)
        other = {"attn": "mlp_out", "mlp": "attn_out"}.get(mode)
        chosen = [
            at
            for at in decomposition.writes
            if (incl_embeds if at.layer is None else other is None or not at.hook.endswith(other))
        ]
        return self._finish(asked, decomposition.components(chosen), [at.label for at in chosen])

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
        if apply_ln and not carried:
            require(self.model, "one stream", "a lens on the streams as they are")
        asked = Asked(layer, mlp_input, pos_slice, apply_ln, return_labels)
        positions, point = as_slice(pos_slice), self._point(asked)
        self.check_real(positions)

        def is_shown(name: str) -> bool:
            return incl_mid or name == point or not name.endswith("mid")

        if carried:
            decomposition = self._decomposition(asked)
            counts = {name: count for name, count in decomposition.read if is_shown(name)}
            total = decomposition.components(decomposition.writes).cumsum(0)
            stack = total[torch.tensor([count - 1 for count in counts.values()], device=total.device)]
            names = list(counts)
        else:
            layers = range(self.model.cfg.n_layers)
            every = [*(f"blocks.{i}.hook_resid_{where}" for i in layers for where in ("pre", "mid")), FINAL]
            names = [name for name in every[: every.index(point) + 1] if is_shown(name)]
            stack = stacked(positions.apply(self[self._cached_stream(name)], dim=-2) for name in names)
        if not (carried or apply_ln):
            self._streams = [*(ref for ref in self._streams if ref() is not None), weakref.ref(stack)]
        labels = ["final" if name == FINAL else self.model.schedule.loop_name(name).replace("hook_", "") for name in names]
        return self._finish(asked, stack, labels, recompute_ln=not carried and point == FINAL)

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """One activation of the first layers, stacked, as in TransformerLens, on the device of the first.

        Args:
            activation_name: its short name.
            layer: up to this virtual layer, exclusive; None or -1 for all.
            sublayer_type: as in TransformerLens.
        """
        names = ((activation_name, i, sublayer_type) for i in range(self._layer(layer)))
        return stacked(self[name] for name in names)

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
        asked = Asked(layer, False, pos_slice, apply_ln, return_labels)
        return self._split(asked, REMAINDER if incl_remainder else None, heads=True)

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
        asked, rest = Asked(layer, mlp_input, pos_slice, apply_ln, return_labels), REMAINDER if incl_remainder else None
        return self._split(asked, rest, neurons=_keeping(neuron_slice), project=project_output_onto)

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
        asked, neurons = Asked(layer, mlp_input, pos_slice, apply_ln, return_labels), Slice() if expand_neurons else None
        project = project_output_onto
        return self._split(asked, "bias", heads=True, embeds=True, neurons=neurons, mlps=not expand_neurons, project=project)

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
        index, neurons = self.model.schedule.layer(layer), as_slice(neuron_slice)
        fan = Reader(self, as_slice(pos_slice)).neurons(index, _keeping(neuron_slice))
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
        return self._normed(Asked(layer, mlp_input, pos_slice), residual_stack, batch_slice, has_batch_dim, recompute_ln)

    def _normed(
        self, asked: Asked, stack: Stack, batch_slice: Any = None, has_batch_dim: bool | None = None, recompute_ln: bool = False
    ) -> Stack:
        check_activations(self)
        if self._point(asked) != FINAL:
            require(self.model, "one stream", f"what the norm of layer {asked.layer} makes of a stream")
        point, has_batch_dim = self._point(asked), self.has_batch_dim if has_batch_dim is None else has_batch_dim
        if recompute_ln:
            if point != FINAL:
                raise LoopedError(
                    f"recompute_ln=True was asked at layer {asked.layer}, but it belongs to ln_final: pass layer=None."
                )
            there = stack.to(device_of(self.model.plain.ln_final))
            normed = super().apply_ln_to_stack(there, None, False, asked.pos_slice, batch_slice, has_batch_dim, True)
            return normed.to(stack.device)
        rows = as_slice(batch_slice)
        stack = rows.apply(stack, dim=1) if has_batch_dim else stack
        name, owner = "ln_final", self.model.plain
        if point != FINAL:
            name, owner = f"ln{2 if asked.mlp_input else 1}", self.model.plain.blocks[self._layer(asked.layer)]
        norm: Any = getattr(owner, name)
        if norm is None:
            return stack
        place = name if point == FINAL else f"{point.rpartition('.')[0]}.{name}"
        held = [as_slice(asked.pos_slice).apply(self[f"{place}.{hook}"], dim=-2).to(stack.device) for hook in norm.HELD]
        return norm.frozen(stack, *((rows.apply(x, dim=0) for x in held) if self.has_batch_dim else held))

    def _ensure_head_results(self) -> bool:
        self.check_weights("compute_head_results")
        return super()._ensure_head_results()

    def _layer(self, layer: int | None) -> int:
        n_layers = self.model.cfg.n_layers
        return n_layers if layer is None or layer in (-1, n_layers) else self.model.schedule.layer(layer)

    def _point(self, asked: Asked) -> str:
        """The hook that holds the stream."""
        target = self._layer(asked.layer)
        if target != self.model.cfg.n_layers:
            return f"blocks.{target}.hook_resid_{'mid' if asked.mlp_input else 'pre'}"
        if asked.mlp_input:
            raise LoopedError("mlp_input=True was asked of the final stream, which no MLP reads; pass a layer.")
        return FINAL

    def _cached_stream(self, name: str) -> str:
        """The name of a stream in the cache; the final one is the output of the last layer too, in most families."""
        cfg = self.model.looped_cfg
        last_layer_is_last = cfg.n_coda or self.model.plain.loop.between(cfg.schedule.passes[-1]) is None
        last = f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"
        return last if name == FINAL and name not in self and last_layer_is_last else name

    def _names(self, layer: int, kind: str, indices: int | list[int]) -> list[str]:
        chosen = range(indices) if isinstance(indices, int) else indices
        return [self.model.schedule.name(layer, f"{kind}.{i}") for i in chosen]

    def _decomposition(
        self, asked: Asked, injections: bool = False, also: Callable[[Write], list[str]] | None = None
    ) -> Decomposition:
        return Decomposition(self, self._point(asked), as_slice(asked.pos_slice), injections, also)

    def _finish(
        self, asked: Asked, stack: Tensor, labels: list[str], recompute_ln: bool = False
    ) -> Stack | tuple[Stack, list[str]]:
        """The stack in the form that was asked for; labels are what TransformerLens calls components, which its users parse."""
        stack = self._normed(asked, stack, recompute_ln=recompute_ln) if asked.apply_ln else stack
        return (stack, [self.model.schedule.names.tl_label(label) for label in labels]) if asked.return_labels else stack

    def _split(
        self,
        asked: Asked,
        rest: str | None,
        *,
        heads: bool = False,
        neurons: Slice | None = None,
        mlps: bool = False,
        embeds: bool = False,
        project: Tensor | None = None,
    ) -> Stack | tuple[Stack, list[str]]:
        """Contributions of heads, of neurons or MLPs, of embeddings, and under the label `rest` of everything else."""
        model, schedule = self.model.plain, self.model.schedule
        if neurons is not None:
            require(self.model, "neurons", "contributions of neurons")
        inner = branch_inputs(model, self, heads, neurons is not None)
        decomposition = self._decomposition(asked, also=inner)
        numbers = [] if neurons is None else neurons.apply(torch.arange(model.cfg.d_mlp, device="cpu")).tolist()
        attention = [at for at in decomposition.writes if at.layer is not None and at.hook.endswith("attn_out")]
        mlp = [at for at in decomposition.writes if at.layer is not None and at.hook.endswith("mlp_out")]
        names: dict[str, list[str]] = {}  # of the rows of every write, in the order of the rows
        if heads:
            names |= {
                at.label: self._names(at.layer or 0, "head", len(self.model.blocks[at.layer].attn.W_O)) for at in attention
            }
        if neurons is not None:
            names |= {at.label: self._names(at.layer or 0, "neuron", numbers) for at in mlp}
        whole = [at for at in decomposition.writes if (mlps and at in mlp) or (embeds and at.layer is None)]
        whole.sort(key=lambda at: at.layer is None)
        names |= {at.label: [at.label] for at in whole}
        labels = [name for group in names.values() for name in group]
        start, count = {}, 0
        for label, group in names.items():
            start[label], count = count, count + len(group)
        labels += [] if rest is None else [rest]

        def fan(at: Write) -> Any:
            layer = schedule.layer(at.layer)
            return decomposition.heads(layer) if at.hook.endswith("attn_out") else decomposition.neurons(layer, neurons)

        def parts(at: Write) -> list[Part]:
            value = decomposition.get(at.hook)
            if at.label not in names:
                return [] if rest is None else [(count, value)]
            if at in whole:
                return [(start[at.label], value)]
            vectors = fan(at).vectors()
            rows: list[Part] = [(slice(start[at.label], start[at.label] + len(vectors)), vectors)]
            return rows if rest is None else [*rows, (count, value - vectors.sum(0))]

        if project is None:
            return self._finish(asked, decomposition.carry(len(labels), parts), labels)
        columns = []
        for column in project.detach().reshape(len(project), -1).T:
            aim = column.to(decomposition.like.device, decomposition.like.dtype).expand_as(decomposition.like)
            aim = self._normed(asked, aim[None])[0] if asked.apply_ln else aim
            grads = decomposition.pull_back(aim)
            out = aim.new_zeros(len(labels), *aim.shape[:-1])
            for at in decomposition.writes:
                total = (grads[at.label] * decomposition.get(at.hook)).sum(-1)
                if at.label in names:
                    along = total[None] if at in whole else fan(at).along(grads[at.label])
                    out[start[at.label] : start[at.label] + len(along)] = along
                    total = total - along.sum(0)
                if rest is not None:
                    out[count] += total
            columns.append(out)
        stack = columns[0] if project.ndim == 1 else torch.stack(columns, dim=-1)
        return self._finish(asked._replace(apply_ln=False), stack, labels)  # the directions went through it


def _keeping(chosen: Any) -> Slice:
    """A slice that keeps its axis: an int selects a range of one."""
    found = as_slice(chosen)
    index: Any = found.slice
    return Slice([index]) if found.mode == "int" else found
