"""On which device every part of a model is loaded: as asked, or as accelerate plans it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from ..errors import LoopedError
from ..model.config import LoopedConfig
from ..model.devices import layer_parts, part_of
from ..model.parameters import Shape

PLANS = ("auto", "balanced")
Device = torch.device | str | int
DeviceMap = str | Mapping[str, Device]
MaxMemory = Mapping[int | str, int | str]


def usable(device: Device, asked: str) -> torch.device:
    """A device that values can be put on.

    Args:
        device: the device, or the number of one of the accelerators.
        asked: what was asked, for the error.

    Raises:
        LoopedError: there is no such device here, or it keeps no values.
    """
    if device == "disk":
        raise LoopedError(
            f"{asked} was asked, but a looped layer runs in every loop, and would be read from the disk each time. Choose a "
            'device for it ("cpu" is one), a smaller dtype, or more devices.'
        )
    try:
        found = _accelerator(device) if isinstance(device, int) else torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise LoopedError(f"{asked} was asked, which cannot be used here ({error}). Choose another.") from error
    if found.type == "meta":
        raise LoopedError(f"{asked} was asked, which holds no values; choose a device to compute on.")
    return found


def _accelerator(index: int) -> torch.device:
    kind = torch.accelerator.current_accelerator()
    return torch.device("cuda" if kind is None else kind.type, index)


def place(
    cfg: LoopedConfig, shapes: Mapping[str, Shape], device_map: DeviceMap, dtype: torch.dtype, max_memory: MaxMemory | None
) -> dict[str, torch.device]:
    """The device of every parameter, by canonical name.

    Args:
        cfg: the structure.
        shapes: the shape of every parameter, by canonical name.
        device_map: "auto" or "balanced", or devices by part: "embed", "prelude", "core.2", ...; "" is everything else.
        dtype: that of the parameters.
        max_memory: as accelerate takes it: how much every device may hold, such as `{0: "20GiB", "cpu": "60GiB"}`.

    Raises:
        LoopedError: names that are no parts of this model, parts without a device, devices that cannot be used; a plan that
            does not fit.
    """
    parts = dict.fromkeys(part_of(cfg, name) for name in shapes)
    if isinstance(device_map, str):
        if device_map not in PLANS:
            raise LoopedError(
                f"device_map={device_map!r} was asked; choose {' or '.join(map(repr, PLANS))}, or pass a dict of parts and "
                "devices. For the whole model on one device use device=."
            )
        asked = planned(cfg, shapes, dtype, max_memory)
    elif not isinstance(device_map, Mapping) or not all(isinstance(part, str) for part in device_map):
        raise LoopedError(
            f"device_map={device_map!r} was asked; pass a dict of devices by the names of parts. For the whole model on one "
            "device use device=."
        )
    elif max_memory is not None:
        raise LoopedError(f"max_memory={max_memory!r} was given with a device_map that says where everything goes.")
    else:
        asked = _as_asked(cfg, list(parts), device_map)
    devices = {one: usable(one, f"device_map={device_map!r}, with {one!r},") for one in dict.fromkeys(asked.values())}
    return {name: devices[asked[part_of(cfg, name)]] for name in shapes}


def _as_asked(cfg: LoopedConfig, parts: list[str], device_map: Mapping[str, Device]) -> dict[str, Device]:
    """The device of every part; of several entries that name it, the longest counts."""
    names = f"The parts of this {cfg.family} model are {', '.join(_shown(cfg, parts))}"
    tied = {"unembed": "embed"} if cfg.tied else {}  # as checkpoints of tied models call it
    aimed = {key: tied.get(key, key) for key in device_map}
    if wrong := [key for key, at in aimed.items() if at and not any(_covers(at, part) for part in parts)]:
        within = next((part for part in parts for key in wrong if key.startswith(f"{part}.")), None)
        why = "which is no part of this model" if within is None else f"which lies inside {within}: a part lies on one device"
        raise LoopedError(f"device_map has {wrong[0]!r}, {why}. {names}.")
    found: dict[str, Device] = {}
    for part in parts:
        keys = [key for key, at in aimed.items() if _covers(at, part)]
        if not keys:
            raise LoopedError(f'device_map says no device for {part}. {names}; "" is everything that is not named.')
        longest = max(len(aimed[key]) for key in keys)
        devices = {str(device_map[key]): device_map[key] for key in keys if len(aimed[key]) == longest}
        if len(devices) > 1:
            raise LoopedError(f"device_map has {' and '.join(devices)} for {part}, which is tied; it is one tensor.")
        found[part] = next(iter(devices.values()))
    return found


def _covers(key: str, part: str) -> bool:
    return not key or key == part or part.startswith(f"{key}.")


def _shown(cfg: LoopedConfig, parts: Iterable[str]) -> list[str]:
    """The parts, those of a stack as one."""
    counts = cfg.schedule.stacks
    shown = [
        f"{p.split('.')[0]}.0 to {p.split('.')[0]}.{counts[p.split('.')[0]] - 1}" if p.split(".")[0] in counts else p
        for p in parts
    ]
    return list(dict.fromkeys(shown))


def planned(
    cfg: LoopedConfig, shapes: Mapping[str, Shape], dtype: torch.dtype, max_memory: MaxMemory | None = None
) -> dict[str, Device]:
    """Where accelerate would put every part: balanced over the accelerators, then the CPU.

    What stands between the layers of the loop goes with the loop's first layer, where it is read.

    Args:
        cfg: the structure.
        shapes: the shape of every parameter, by canonical name.
        dtype: that of the parameters.
        max_memory: how much every device may hold; None for what is free.

    Raises:
        LoopedError: the model does not fit.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    units = _units(cfg, shapes)
    skeleton = nn.Module()
    for i, names in enumerate(units.values()):
        skeleton.add_module(f"unit{i}", _Unit([shapes[name] for name in names], dtype))
    whole = [_Unit.__name__]
    try:
        limits = None if max_memory is None else dict(max_memory)
        memory: Any = get_balanced_memory(skeleton, limits, whole, dtype=dtype)
    except (ValueError, TypeError, RuntimeError) as error:
        raise LoopedError(
            f"max_memory={max_memory!r} was asked, which accelerate cannot read ({error}); pass what accelerators, by their "
            'numbers, and the CPU may hold, such as {0: "20GiB", "cpu": "60GiB"}.'
        ) from error
    plan = infer_auto_device_map(skeleton, memory, whole, dtype=dtype, clean_result=False)
    found = {
        part: cast(Device, plan[f"unit{i}"])
        for i, names in enumerate(units.values())
        for part in dict.fromkeys(part_of(cfg, name) for name in names)
    }
    if "disk" in found.values():
        size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        room = ", ".join(f"{device}: {held / 1e9:.2f} GB" for device, held in memory.items())
        raise LoopedError(
            f"a model of {size / 1e9:.2f} GB in {dtype} was asked, which does not fit: the devices may hold {room}. Choose a "
            "smaller dtype, free memory, or raise max_memory; the disk is not used, as every loop would read it again."
        )
    return found


class _Unit(nn.Module):
    """What goes to one device together, without its values."""

    def __init__(self, shapes: list[Shape], dtype: torch.dtype):
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(str(i), nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))


def _units(cfg: LoopedConfig, shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """The parameters by what they go with, in the order of the run."""
    schedule = cfg.schedule
    first = layer_parts(cfg, schedule.core_stacks[0], 0)[0]
    layers = [(stack, j) for stack, n in schedule.stacks.items() for j in range(n)]
    tables = {f"value_embeds.{i}": layer_parts(cfg, *layer)[0] for i, layer in enumerate(layers)}
    in_order = [name for layer in layers for name in layer_parts(cfg, *layer)]
    order = ["embed", *in_order, "after_loop", "ln_final", "unembed"]
    units: dict[str, list[str]] = {name: [] for name in order}
    for name in shapes:
        part = part_of(cfg, name)
        units[tables.get(part, part if part in units else first)].append(name)
    return {part: names for part, names in units.items() if names}
