"""The parameters of a bridge: moved, loaded and processed once for all passes, and what TransformerLens asks of them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import LoopedError
from ..looped import require
from ..model.layers import each_module
from ..model.undo import Snapshot, undone, whole
from .processing import check_options, check_running_sum, check_shared, has_output_bias, process_weights
from .registry import NamedBridge

T = TypeVar("T")
Self = TypeVar("Self", bound="WeightsBridge")


class WeightsBridge(NamedBridge):
    """The part of a `LoopedBridge` that holds parameters."""

    def _apply(self: Self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        def apply() -> None:
            super(WeightsBridge, self)._apply(fn, recurse)
            self.plain._apply(fn, recurse)

        whole(apply, Snapshot(self, self.plain, tensors_only=True).restore)
        return self

    def _put_back(self) -> Callable[[], None]:
        """What makes the modules hold again what they hold now."""
        return without_collections(partial(Snapshot, self, self.plain)).restore

    def to(self: Self, *args: Any, print_details: bool = False, **kwargs: Any) -> Self:
        """Move the model or change its dtype; other unrolls of the same parameters move with it.

        Args:
            *args: as in `torch.nn.Module.to`.
            print_details: say where the model is now.
            **kwargs: as in `torch.nn.Module.to`.

        Raises:
            LoopedError: the model lies on several devices, and is to be moved to one.
        """
        device = cast(Any, torch._C)._nn._parse_to(*args, **kwargs)[0]
        if device is not None and self.cfg.n_devices > 1:
            places = ", ".join(sorted({str(place) for place in self.device_map.values()}))
            raise LoopedError(
                f"to({str(device)!r}) was asked, but this model was loaded on several devices ({places}), where it stays; "
                "load it with device= instead of device_map=. Its dtype can be changed: to(torch.bfloat16)."
            )
        nn.Module.to(self, *args, **kwargs)
        if print_details:
            print(f"Model on {self.cfg.device} in {self.cfg.dtype}")
        return self

    def train(self: Self, mode: bool = True) -> Self:
        """Training or evaluation mode, of the wrapped model too.

        Args:
            mode: False for evaluation.
        """
        for module in each_module(self, self.plain):
            module.__dict__["training"] = mode
        return self

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """Every module, as in PyTorch.

        Args:
            remove_duplicate: each once; many stand in several places.
        """
        return each_module(self) if remove_duplicate else super().modules(remove_duplicate)

    @property
    def device_map(self) -> dict[str, torch.device]:
        """Where every part of the model lies, by its name: "embed", "core.0", "ln_final", ...

        Example:
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
            >>> list(model.device_map)
            ['embed', 'core.0', 'core.1', 'ln_final', 'unembed']
        """
        return self.plain.device_map

    def _stack_block_params(self, attr_path: str, reshape_fn: Any = None) -> Any:
        """The weights of all layers as one tensor, as in TransformerBridge."""
        asked: Any = self  # what a model lacks is told by the whole bridge
        require(asked, "equal heads" if attr_path.startswith("attn.") else "neurons", f"{attr_path} of all layers")
        return super()._stack_block_params(attr_path, reshape_fn)

    @property
    def core_weights(self) -> dict[str, nn.Parameter]:
        """Every parameter of the looped layers once, uncopied, as in "core.3.attn.q.weight" (HRM-Text: "L.3", "H.3")."""
        stacks = tuple(f"{stack}." for stack in self.schedule.core_stacks)
        return {name: p for name, p in self.plain.canonical_parameters().items() if name.startswith(stacks)}

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerLens's compatibility mode: legacy names, and weights processed by `process_weights`.

        Args:
            disable_warnings: as in TransformerBridge.
            no_processing: leave the weights alone.
            fold_ln: this and what follows as in `process_weights`.
            center_writing_weights: see there.
            center_unembed: see there.
            fold_value_biases: see there.
            refactor_factored_attn_matrices: see there.

        Raises:
            LoopedError: processing that would change what the model computes; nothing is switched on then.
        """
        options = (fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices)
        enable = super().enable_compatibility_mode
        whole(partial(enable, disable_warnings, no_processing, *options), self._put_back())

    def process_weights(
        self,
        verbose: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Process the weights, each parameter once: all passes still share them, and the log-probabilities stay.

        In families whose last norm is the norm of every pass (Ouro, Nanbeige), the state leaving the last pass is then without
        the weight of that norm, and earlier loops cannot be read out.

        Args:
            verbose: ignored.
            fold_ln: fold the norms before attention, MLP and unembedding into what reads them. Norms on branch outputs, on the
                stream and between passes stay.
            center_writing_weights: nothing to do for RMS norms, as in TransformerBridge.
            center_unembed: centre the unembedding over the vocabulary, unless it is tied or a softcap follows.
            fold_value_biases: move the biases of v into the biases of o.
            refactor_factored_attn_matrices: refused.

        Raises:
            LoopedError: processing that would change what the model computes.
        """
        if self._weights_processed:
            logging.warning("The weights were processed already; load the model again to process them with other options.")
            return
        check_options(self.looped_cfg, fold_value_biases, refactor_factored_attn_matrices)

        def process() -> None:
            process_weights(self.plain, fold_ln=fold_ln, center_unembed=center_unembed, fold_value_biases=fold_value_biases)
            self._weights_processed = True

        whole(process, self._put_back())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned, as in TransformerBridge.

        Args:
            state_dict: tensors under TransformerLens's names; those of one layer repeat in every pass.
            strict: raise if names are missing or unknown.
            assign: as in `torch.nn.Module.load_state_dict`.

        Raises:
            LoopedError: the tensors differ where this model has one parameter.
        """
        check_shared(self.plain, self._tl_key_to_actual_keys(), state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _is_valid_bridge_path(self, hf_path: str) -> bool:
        return True  # TransformerLens would leave out what it has no component for: injections, exit gates, value gates

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases written to the residual stream before a virtual layer, as in TransformerBridge.

        Args:
            layer: virtual layer; `n_layers` for the end of the stream.
            mlp_input: include the attention bias of the layer itself.
            include_mlp_biases: include the biases of the MLPs.

        Raises:
            LoopedError: biases that the stream does not simply add up on the way to that layer.
        """
        layer = self._stop(layer)
        if not has_output_bias(self.plain):
            return torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=self.cfg.dtype)
        check_running_sum(self.looped_cfg, range(layer + mlp_input), "accumulated_bias")
        return super().accumulated_bias(layer, mlp_input, include_mlp_biases)

    def all_composition_scores(self, mode: str) -> Any:
        """Composition scores of all pairs of heads, as in TransformerBridge; labels are virtual layers.

        Args:
            mode: "Q", "K" or "V".

        Raises:
            LoopedError: between two layers the stream is more than a running sum, so products of weights mean nothing.
        """
        check_running_sum(self.looped_cfg, range(self.schedule.n_layers), "all_composition_scores")
        return super().all_composition_scores(mode)


def without_collections(make: Callable[[], T]) -> T:
    """What is made, without garbage collections, each of which would scan all virtual layers made so far; it stays alive."""

    def made() -> T:
        gc.disable()
        found = make()
        if not gc.get_freeze_count():  # what was made counts as old, or the next collection of new objects would scan it all
            gc.freeze()
            gc.unfreeze()
        return found

    return undone(made, gc.enable if gc.isenabled() else gc.disable)
