"""The registry of hook points that TransformerLens fills, with loop-indexed names for passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent, alias_generation

from ..errors import LoopedError
from ..schedule import is_pattern
from .names import HookDict, Named
from .tokens import ReadingBridge


class NamedBridge(Named, ReadingBridge):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The part of a `LoopedBridge` that finds hook points."""

    def _also_called(self, names: list[str]) -> list[str]:
        """The last pass's norm is the model's last norm in some families."""
        if not self.looped_cfg.pass_norm_is_final:
            return names
        last = f"{self.schedule.pass_prefix(self.schedule.passes[-1])}.norm."
        return [f"ln_final.{n.removeprefix(last)}" if n.startswith(last) else n for n in names]

    def block_hooks(self, layer_idx: int) -> list[str]:
        """The hook names of a virtual layer, relative to it.

        Args:
            layer_idx: the virtual layer; negative indices count from the end.
        """
        return super().block_hooks(self.schedule.layer(layer_idx))

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of a name in either spelling, or None.

        Args:
            hook_name: the name.
        """
        try:
            names = self.expand_name(hook_name, check=False) if not is_pattern(hook_name) else [hook_name]
        except LoopedError:
            return None
        return super().get_hook_point(names[0])

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point under its TransformerLens names; indexing also understands loop-indexed names."""
        version = (len(self._hook_registry), alias_generation())
        if self.__dict__["_hook_dict"][0] != version:
            hooks = HookDict(super().hook_dict)
            hooks.expand_name = self.expand_name
            self.__dict__["_hook_dict"] = (version, hooks)
        return self.__dict__["_hook_dict"][1]

    def _collect_hook_aliases_from_registry(self) -> dict[str, str]:
        """As in TransformerBridge, which looks for the aliases of a block among all names; here every block is asked."""
        aliases = self._collect_component_aliases(self.adapter.component_mapping)
        outside = tuple(sorted(name for name in self._hook_registry if not name.startswith("blocks.")))
        found = dict(self._compute_hook_aliases_cached(outside, tuple(sorted(aliases.items()))))
        return found | self._collect_block_instance_aliases()

    def _initialize_hook_registry(self) -> None:
        """As in TransformerBridge, whose constructor scans once more when aliases are known: then once is enough."""
        if self.compatibility_mode:
            super()._initialize_hook_registry()
        self._hook_registry_initialized = True

    def _scan_existing_hooks(self, module: nn.Module, prefix: str = "") -> None:
        """Fill the hook registry; passes get their loop-indexed names, which are the only ones they have.

        A hook point is called what it is found as first. As in TransformerBridge, that is where it lies, and in compatibility
        mode the legacy name, which belongs to a component above.
        """
        named = {id(hook) for hook in self._hook_registry.values()}
        components = list(self._components(self, ""))

        def points(held: dict[str, Any]) -> list[tuple[str, HookPoint]]:
            return [(name, point) for name, point in held.items() if isinstance(point, HookPoint)]

        own = [(path, points(component._modules)) for path, component in components]
        aliases = [(path, sorted(points(component.__dict__))) for path, component in components]
        legacy = [found for both in zip(own, aliases, strict=True) for found in both]
        for path, hooks in legacy if self.compatibility_mode else own + aliases:
            for name, hook in hooks:
                full_name = f"{path}.{name}" if path else name
                if id(hook) not in named:
                    object.__setattr__(hook, "name", full_name)  # PyTorch's own looks for parameters and modules first
                    named.add(id(hook))
                self._hook_registry[full_name] = hook

    def _components(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        """All components with their paths; the modules they wrap hold the same hook points and are left out."""
        yield path, module
        for name, child in module._modules.items():
            if isinstance(child, (GeneralizedComponent, nn.ModuleList)) and name != "_original_component":
                child_path = f"{path}.{name}" if path else name
                if path == "passes":
                    child_path = self.schedule.pass_prefix(self.schedule.passes[int(name)])
                yield from self._components(child, child_path)

    def _register_all_aliases_recursive(self) -> None:
        """As in TransformerBridge, which asks every module whether it is a component."""
        self._register_aliases()
        for _, component in self._components(self, ""):
            if isinstance(component, GeneralizedComponent):
                component._register_aliases()

    def _enumerate_blocks(self) -> list[tuple[int, Any]]:
        """The virtual layers; TransformerLens would count the ends of passes as layers without attention."""
        return list(enumerate(self.blocks))
