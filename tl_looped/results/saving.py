"""Results in files: tensors as safetensors, the rest as JSON beside them. Reading one runs nothing that stands in the file."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from hashlib import sha256
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._writing import Put, write_bytes
from ..errors import LoopedError
from .showing import Shown

if TYPE_CHECKING:
    from ..looped import Looped

FORMAT = 1
KEY = "tl_looped"  # in the metadata of the file
SEAL = '{"sha256": "'  # how that begins: files of safetensors do not notice a flipped bit
HOMES = (
    "activations.record",
    "analysis",
    "analysis.side_by_side",
    "attribution",
    "bridge.logit_attribution",
    "lenses",
    "paper",
    "patching",
    "runs",
)  # of the classes of results
PARTS = (  # of results, and of what files say of their model
    ("analysis", "BehaviourRule"),
    ("analysis", "TokenBehaviour"),
    ("analysis.trajectories", "Path"),
    ("bridge.fingerprint", "Fingerprint"),
    ("model.config", "LoopedConfig"),
    ("schedule", "Schedule"),
)
# Classes and fields that had other names, in files of before.
FORMER: dict[Any, str] = {"Stability": "MoreLoops", ("Trajectories", "pos"): "positions"}
PLAIN = (str, int, float, bool, type(None))


def save_result(result: Any, path: str | Path, model: Looped | None = None, *, put: Put | None = None) -> Path:
    """Write a result into one file.

    Args:
        result: a grid or a result.
        path: the file.
        model: whose fingerprint is kept, for `load_result` to compare.
        put: what brings the finished file to its place; None to replace what is there.

    Raises:
        LoopedError: the file cannot be written, or a field is of a kind that files do not keep.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    content = _encode(result, tensors, type(result).__name__)
    found = {"format": FORMAT, "result": content, "versions": versions()}
    if model is not None:
        found["model"] = _encode(model.fingerprint(), tensors, "model")
    text = json.dumps(found)
    return write_bytes(path, save(tensors, {KEY: f'{SEAL}{_digest(text, tensors)}", {text[1:]}'}), put=put)


def load_result(path: str | Path, model: Looped | None = None) -> Any:
    """Read what `result.save(path)` wrote, bit for bit.

    Args:
        path: the file.
        model: refuse a result that was saved with another model than this one.

    Raises:
        LoopedError: the file cannot be read, is damaged, was written by a later version, or is of another model.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from tl_looped.results import Grid, load_result
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     grid = Grid(torch.tensor([1.0, 2.0]), ("loop",), {"loop": [0, 1]}, "norm")
        ...     load_result(grid.save(Path(folder) / "norm.safetensors"))
        Grid(norm [loop 2]: 1 to 2)
    """
    text, tensors = read_whole(path)
    try:
        found = json.loads(text)
        later = found["versions"]["tl_looped"] if found["format"] > FORMAT else None
        held: dict[str, Any] = {}
        if later is None:
            held = {key: _decode(found[key], tensors, _classes()) for key in ("result", "model") if key in found}
        result: Any = held.get("result")
        saved: Any = held.get("model")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, LoopedError) as error:
        raise LoopedError(f"{str(path)!r} holds no result of this package, or a damaged one ({error!r}).") from error
    if later is not None:
        raise LoopedError(f"{str(path)!r} was written by tl_looped {later}, a later version than this; update it.")
    if result is None:
        raise LoopedError(f"{str(path)!r} holds no result of this package.")
    if model is not None and saved is None:
        raise LoopedError(f"{str(path)!r} does not say which model it is of; save it with save(path, model=model).")
    if model is not None and (why := saved.difference(model.fingerprint())) is not None:
        raise LoopedError(f"{str(path)!r} is a result of another model: {why}.")
    return result


def read_text(path: str | Path) -> str:
    """What a file of a result says of itself; whether it is whole is not looked at.

    Args:
        path: the file.

    Raises:
        LoopedError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(KEY, "")
    except (OSError, SafetensorError) as error:
        raise LoopedError(f"{str(path)!r} cannot be read as a result: {error}.") from error


def read_whole(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """What a file of a result says of itself, and its tensors.

    Args:
        path: the file.

    Raises:
        LoopedError: the file cannot be read, or is not what was written.
    """
    from safetensors import SafetensorError, safe_open

    text = read_text(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise LoopedError(f"{str(path)!r} cannot be read as a result: {error}.") from error
    digest, _, rest = text.removeprefix(SEAL).partition('", ')
    if text.startswith(SEAL) and digest != _digest(f"{{{rest}", tensors):  # files of before have none
        raise LoopedError(f"{str(path)!r} is damaged: it is not what was written. Remove it, and measure or copy it again.")
    return text, tensors


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    found = sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        found.update(content)
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Of what computed a result."""
    from .. import __version__

    of_others = {name.replace("-", "_"): metadata.version(name) for name in ("torch", "transformer-lens")}
    return {"tl_looped": __version__, **of_others}


def _classes() -> dict[str, type]:
    """Every class that a file may hold, by name."""
    for home in HOMES:
        import_module(f"..{home}", __package__)
    found: list[type] = [getattr(import_module(f"..{home}", __package__), name) for home, name in PARTS]
    more = [Shown]
    while more:
        found += (more := [sub for cls in more for sub in cls.__subclasses__()])
    return {cls.__name__: cls for cls in found}


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON for a value; tensors are put aside under their names."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if is_dataclass(value) and type(value).__name__ in _classes():
        parts = {f.name: _encode(getattr(value, f.name), tensors, f"{name}.{f.name}") for f in fields(value)}
        return {"class": type(value).__name__, "fields": parts}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors, ""), _encode(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(v, tensors, f"{name}.{k}") for k, v in enumerate(value)]}
    if type(value) in PLAIN:
        return value
    raise LoopedError(f"{name} is a {type(value).__name__}, {value!r}, which a file of results does not keep.")


def _decode(content: Any, tensors: dict[str, Tensor], classes: dict[str, type]) -> Any:
    if not isinstance(content, dict):
        return content
    ((kind, held), *rest) = content.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dtype":
        dtype = getattr(torch, held)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{held} is no dtype")
        return dtype
    if kind == "class":
        parts: dict[Any, Any] = {
            FORMER.get((held, name), name): _decode(value, tensors, classes) for name, value in rest[0][1].items()
        }
        name: Any = FORMER.get(held, held)
        return classes[name](**parts)
    if kind == "dict":
        return {_decode(k, tensors, classes): _decode(v, tensors, classes) for k, v in held}
    made = [_decode(v, tensors, classes) for v in held]
    return tuple(made) if kind == "tuple" else made
