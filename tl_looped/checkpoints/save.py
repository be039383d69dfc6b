"""From a `LoopedModel` to a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..model import LoopedModel


def save_model(model: LoopedModel, directory: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json and model.safetensors (above `max_shard_bytes`: shards and their index), every parameter once.

    Args:
        model: the model.
        directory: created if needed; weights that an earlier save left there are replaced.
        max_shard_bytes: size above which the weights are split.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = model.canonical_parameters()
    config = {
        "model_type": "tl_looped",
        "dtype": str(parameters["embed.weight"].dtype).removeprefix("torch."),
        "looped_config": model.cfg.to_dict(),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for old in directory.glob("model*.safetensors*"):
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name):
            old.unlink()
    shards = list(_shards(parameters, max_shard_bytes))
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: parameters[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(parameter.nbytes for parameter in parameters.values())
        index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        content = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(content + "\n", encoding="utf-8")


def _shards(parameters: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, parameter in parameters.items():
        if names and size + parameter.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += parameter.nbytes
    yield names
