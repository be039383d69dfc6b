"""TransformerLens components around the parts of the canonical model.

The canonical modules already have a slot wherever a hook belongs. A component only fires `hook_in` and `hook_out` around its
module and puts its own hook points into the module's slots, so nothing is computed twice and an unhooked run costs what the
plain model costs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import copy, deepcopy
from types import NoneType
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from ..errors import LoopedError
from ..model.layers import Inputs
from ..model.lean import Lean
from ..model.slots import observe
from .point import LightPoint, lighten


class InMemory(nn.Module):
    """A module that can be copied, but not pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with parameters, hook points and hooks of its own."""
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused: TransformerLens's hooks hold functions that cannot be pickled.

        Raises:
            LoopedError: always.
        """
        raise LoopedError(
            "a LoopedBridge, or something that holds one, was pickled, as torch.save(model) does; use "
            "model.save_pretrained(directory) and LoopedBridge.from_pretrained, torch.save(model.state_dict()), or for a cache "
            "torch.save(cache.cache_dict). In memory copy.deepcopy(model) makes a copy."
        )


class Around(InMemory, GeneralizedComponent, Lean):
    """Fire `hook_in`, run the module, fire `hook_out`; hook points of the component's names replace the module's slots."""

    __call__: Callable[..., Any] = nn.Module.__call__  # the parent's version looks for offloaded weights at every call

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        for name in [name for name in original_component._modules if name.startswith("hook_")]:
            if name not in self._modules:
                setattr(self, name, LightPoint())
            if (pos_dim := getattr(original_component._modules[name], "pos_dim", None)) is not None:
                self._modules[name].pos_dim = pos_dim  # type: ignore[union-attr,assignment]
            original_component._modules[name] = self._modules[name]

    def _register_hook(self, name: str, hook: HookPoint) -> None:
        lighten(hook)
        super()._register_hook(name, hook)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with hook points of its own.

        TransformerLens copies one template for every virtual layer, in which the usual way takes milliseconds.
        """
        if self.original_component is None:
            return _template_copy(self, memo)
        return super().__deepcopy__(memo)

    def forward(self, x: Tensor, *args: Any) -> Any:
        modules = self._modules
        hook_in, module, hook_out = modules["hook_in"], modules["_original_component"], modules["hook_out"]
        return hook_out(module(observe(hook_in, x), *args))  # type: ignore[misc,arg-type]


class LoopedLinear(Around, LinearBridge):
    """A projection."""


class LoopedUnembedding(Around, UnembeddingBridge):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The unembedding. Without the zero bias that TransformerLens would add: it would not move with the shared parameters."""

    def set_original_component(self, original_component: nn.Module) -> None:
        GeneralizedComponent.set_original_component(self, original_component)


class LoopedNorm(Around, RMSNormalizationBridge):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An RMS norm with `hook_scale` and `hook_normalized`."""


class LoopedGatedMLP(Around, GatedMLPBridge):
    """A gated MLP; unlike TransformerLens's, its inner hooks fire in every run."""


class LoopedMLP(Around, MLPBridge):
    """An MLP without gate."""


class LoopedExperts(Around):
    """A mixture of experts, which has no neurons that all positions go through."""


class LoopedPart(Around):
    """A module around the layers that has hook points of its own, and no others."""

    def set_original_component(self, original_component: nn.Module) -> None:
        for name in ("hook_in", "hook_out"):
            if name not in original_component._modules:
                self._modules.pop(name, None)
                self._hook_registry.pop(name, None)
        super().set_original_component(original_component)

    def forward(self, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._modules["_original_component"](*args)  # type: ignore[misc]


class PassBridge(Around):
    """The ends of a pass: `hook_state`, `hook_injection`, `hook_in`, `hook_out`, `hook_exit_logit`."""

    is_list_item = True


class InputProjection(LoopedLinear):
    """q, k or v: reads its own copy of the residual stream per head when `use_split_qkv_input` or `use_attn_in` is on."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        forked = self.__dict__["_owner"].forked_input(self.__dict__["_letter"], x)
        if forked is None:
            return super().forward(x)
        forked = self.hook_in(forked)
        linear: Any = self.original_component
        weight = linear.weight.unflatten(0, (forked.shape[2], -1))  # [head, d_head, d_model]
        out = torch.einsum("bphm,hdm->bphd", forked, weight).flatten(-2)
        return self.hook_out(out if linear.bias is None else out + linear.bias)


class OutputProjection(LoopedLinear):
    """o: sums `hook_result` over heads when `use_attn_result` is on."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        attention: LoopedAttention = self.__dict__["_owner"]
        if not attention.config.use_attn_result:
            return super().forward(x)
        z = self.hook_in(x).unflatten(-1, (attention.config.n_heads, -1))
        return self.hook_out(attention._compute_per_head_result(z, attention.config.n_heads, z.shape[-1]))


def check_attn_in(cfg: Any) -> None:
    """Refuse one input for query, key and value of a head where several heads share keys and values."""
    if cfg.n_key_value_heads != cfg.n_heads:
        raise LoopedError(
            f"use_attn_in was asked, which gives every head one input, but the {cfg.n_heads} heads of this model share "
            f"{cfg.n_key_value_heads} sets of keys and values; use set_use_split_qkv_input(True), where each set has an input "
            "of its own."
        )


class LoopedAttention(Around, AttentionBridge):
    """Attention with the hook names and shapes of TransformerLens."""

    supports_attn_result = True
    config: Any
    # How queries, keys, values and what heads read are split by head, by their widths: TransformerLens makes classes for it
    # in every layer.
    _conversions: ClassVar[dict[tuple[Any, ...], list[Any]]] = {}
    hook_aliases: dict[str, str | list[str]]

    def __init__(self, name: str, config: Any, submodules: dict[str, GeneralizedComponent]):
        super().__init__(name, config, submodules, maintain_native_attention=True)
        if "gate" in submodules:
            self.hook_aliases = {**self.hook_aliases, "hook_gate": "gate.hook_out"}
        if "q_norm" in submodules:
            self.hook_aliases = {**self.hook_aliases, "hook_q_normed": "q_norm.hook_out", "hook_k_normed": "k_norm.hook_out"}
        del self._modules["hook_hidden_states"], self._hook_registry["hook_hidden_states"]  # it would never fire

    def set_original_component(self, original_component: nn.Module) -> None:
        if (shape := getattr(original_component, "shape", None)) is not None:  # its own, not that of all layers
            self.config = copy(self.config)
            self.config.n_heads, self.config.n_key_value_heads = shape.n_heads, shape.n_kv_heads
            self.config.d_head = shape.d_head
        for name in ("hook_rot_q", "hook_rot_k"):
            if name not in original_component._modules:  # nothing is rotated
                self._modules.pop(name, None)
                self._hook_registry.pop(name, None)
        super().set_original_component(original_component)
        for letter in "qkvo":
            projection = self.submodules[letter]
            object.__setattr__(projection, "_owner", self)  # not a child module: attention owns its projections
            object.__setattr__(projection, "_letter", letter)

    def _setup_qkv_hook_reshaping(self) -> None:
        cfg = self.config
        parts: list[Any] = [self.submodules[letter] for letter in "qkvo"]
        points = [*(part.hook_out for part in parts[:3]), parts[3].hook_in]
        widths = [(part.original_component.in_features, part.original_component.out_features) for part in parts]
        asked = (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, *widths)
        if asked in self._conversions:
            for point, conversion in zip(points, self._conversions[asked], strict=True):
                point.hook_conversion = conversion
            return
        super()._setup_qkv_hook_reshaping()
        self._conversions[asked] = [point.hook_conversion for point in points]
        for name in ("hook_rot_q", "hook_rot_k"):
            hook = self._modules.get(name)
            if isinstance(hook, HookPoint):
                hook.hook_conversion = None  # these fire as [batch, pos, head, d_head] already

    def forked_input(self, letter: str, x: Tensor) -> Tensor | None:
        """The normed input of a projection, [batch, pos, head, d_model], after its fork hook; None when no switch is on."""
        cfg = self.config
        if not (cfg.use_split_qkv_input or cfg.use_attn_in):
            return None
        source = x if self._captured_pre_ln_residual is None else self._captured_pre_ln_residual
        n_heads = cfg.n_heads if letter == "q" else cfg.n_key_value_heads
        if cfg.use_split_qkv_input:
            return self._fork_and_norm_per_head(source, getattr(self, f"hook_{letter}_input"), n_heads)
        check_attn_in(cfg)
        if letter == "q":
            self.__dict__["_attn_in"] = self._fork_and_norm_per_head(source, self.hook_attn_in, n_heads)
        return self.__dict__["_attn_in"] if letter != "v" else self.__dict__.pop("_attn_in")

    def _apply_ln1_per_head(self, x: Tensor) -> Tensor:
        return x if self._ln1_module is None else self._ln1_module.unhooked(x)  # type: ignore[operator]


class LoopedBlock(Around, BlockBridge):
    """A virtual layer. `hook_resid_mid` sits on the stream itself, so a patch there reaches everything after it."""

    config: Any
    hook_aliases: dict[str, str | list[str]]

    def __init__(self, name: str, config: Any, submodules: dict[str, GeneralizedComponent]):
        super().__init__(name, config, submodules, mlp_reads_resid_directly="ln2" not in submodules)
        self.hook_aliases = {alias: hook for alias, hook in self.hook_aliases.items() if alias != "hook_resid_mid"}

    def forward(self, x: Tensor, *args: Inputs) -> Tensor:
        cfg = self.config
        if not (cfg.use_split_qkv_input or cfg.use_attn_in or cfg.use_hook_mlp_in):
            if self._capture_hooks_wired:
                self._teardown_capture_hooks()
            return super().forward(x, *args)
        self._maybe_wire_capture_hooks()
        try:
            return super().forward(x, *args)
        finally:
            self._clear_attention_capture()


_PLAIN = frozenset((NoneType, bool, str, float, int))
_CONTAINERS = frozenset((dict, OrderedDict, list, set))


def _template_copy(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a component that wraps no module yet: of its modules, containers and config; the rest is never changed."""
    kind: Any = type(value)
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        new = memo[id(value)] = object.__new__(kind)
        held = new.__dict__
        for key, part in value.__dict__.items():  # one by one: then all copies share one table of names
            part_kind: Any = type(part)
            if part_kind in _PLAIN:
                held[key] = part
            else:
                held[key] = part_kind() if not part and part_kind in _CONTAINERS else _template_copy(part, memo)
        return new
    if isinstance(value, dict):
        return kind((key, _template_copy(part, memo)) for key, part in value.items())
    if isinstance(value, (list, set, TransformerBridgeConfig)):
        return memo.setdefault(id(value), copy(value))
    return value
