"""The parameters of a looped model, each of which many modules hold, and the layers, which run where theirs lie."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import LoopedError
from ..schedule import Pass, Site
from .config import LoopedConfig
from .devices import part_of
from .layers import Inputs


class PlacedModel(nn.Module):
    """The part of a `LoopedModel` that knows where its parameters are held, and on which devices they lie."""

    cfg: LoopedConfig
    blocks: nn.ModuleList
    pass_ending: dict[int, Pass]
    parameter_slots: dict[str, list[tuple[nn.Module, str]]]

    def layer_name(self, site: Site) -> str:
        """What the parameters of the layer at a site are called by."""
        names = self.cfg.layer_names(site.stack, site.layer)
        return names[site.loop if len(names) > 1 and site.loop is not None else 0]

    def set_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """Put one parameter wherever its canonical name stands."""
        for owner, attribute in self.parameter_slots[name]:
            owner._parameters[attribute] = parameter  # as setattr does, which looks for the name everywhere else first

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Every distinct parameter once, by canonical name."""
        return {name: getattr(*holders[0]) for name, holders in self.parameter_slots.items()}

    def find_layers(self) -> None:
        """Remember one parameter of every layer, which says where it lies."""
        of_part = {part_of(self.cfg, name): holders[0] for name, holders in self.parameter_slots.items()}
        self._in_layer: list[tuple[nn.Module, str]] = [
            of_part[part_of(self.cfg, f"{self.layer_name(site)}.")] for site in self.cfg.schedule.sites
        ]

    def device_of_layer(self, i: int) -> torch.device:
        """Where a virtual layer lies.

        Args:
            i: the virtual layer.
        """
        owner, attribute = self._in_layer[i]
        return getattr(owner, attribute).device

    @property
    def home(self) -> torch.device:
        """Where what happens between the layers of the loop happens: where its first layer lies."""
        return self.device_of_layer(self.cfg.schedule.n_prelude)

    @property
    def device_map(self) -> dict[str, torch.device]:
        """Where every part of the model lies: every layer, and whatever has a name outside the layers.

        Raises:
            LoopedError: a part lies on several devices.
        """
        found: dict[str, torch.device] = {}
        for name, parameter in self.canonical_parameters().items():
            part = part_of(self.cfg, name)
            if found.setdefault(part, parameter.device) != parameter.device:
                raise LoopedError(
                    f"{part} lies on {found[part]} and, with {name}, on {parameter.device}; a layer, and every other part of "
                    "a model, lies whole on one device. Load it with a device_map of whole parts."
                )
        return found

    def layer(self, i: int, x: Float[Tensor, "batch pos d_model"], inputs: Inputs) -> Float[Tensor, "batch pos d_model"]:
        """The stream after a virtual layer, which runs where it lies; after the last of a pass, the stream is back home.

        Args:
            i: the virtual layer.
            x: the stream before it.
            inputs: what it reads beside the stream.
        """
        at, home = self.device_of_layer(i), self.home
        inputs.move(at)
        x = self.blocks[i](x.to(at), inputs)
        inputs.carried.device = home
        return x.to(home) if i in self.pass_ending else x
