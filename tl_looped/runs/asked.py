"""What a run was asked, as text that is the same in every process: by it a file knows whether it is of this run."""

from __future__ import annotations

import functools
import hashlib
import re
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..looped import Looped
from ..results import Grid

FIXED = (str, int, float, tuple, slice, Tensor, FunctionType)  # what a function may hold that makes it another one


def hooks_of(model: Looped) -> str:
    """Every hooked point of a model and what its hooks are; "None" without hooks."""
    points = {id(point): (name, point) for name, point in reversed([*model.hook_dict.items()])}  # an alias is no other point
    hooks = [
        f"{name} {described(getattr(handle, 'user_hook', None))}"
        for name, point in reversed(points.values())
        for handle in (*point.fwd_hooks, *point.bwd_hooks)
    ]
    return ", ".join(hooks) or "None"


def weights_of(model: Any) -> str:
    """A digest of the weights of a model, or of what has the fingerprint of one."""
    if hasattr(model, "fingerprint"):
        found = model.fingerprint()
        return digest([described(value) for value in getattr(found, "__dict__", {"": found}).values()])
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    return digest([[name, parameter.detach()] for name, parameter in named])


def described(value: Any) -> str:
    """The same text for the same value, in every process."""
    if isinstance(value, functools.partial):
        held = [value.func, *value.args, *(part for pair in sorted(value.keywords.items()) for part in pair)]
        return f"partial({', '.join(map(described, held))})"
    if isinstance(value, (Tensor, list, tuple)):
        return f"{type(value).__name__} {digest(value)}"
    if isinstance(value, dict):
        return f"dict {digest(list(value.items()))}"
    if isinstance(value, Grid):
        return f"{type(value).__name__} {digest([value.values, *value.axes])}"
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        code = getattr(value, "__code__", None)
        held = [] if code is None else [code.co_code.hex(), repr([c for c in code.co_consts if not isinstance(c, CodeType)])]
        held += [described(c) for c in _enclosed(value) if isinstance(c, FIXED)]
        tells = "<lambda>" in value.__qualname__ or "<locals>" in value.__qualname__  # what the name leaves open
        return f"{value.__module__}.{value.__qualname__}" + (f" {digest(held)}" if tells else "")
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is another in every process


def _enclosed(function: Any) -> list[Any]:
    """What a function holds from around it; what may change while it runs is no part of what was asked."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def digest(value: Any) -> str:
    """Of nested lists of texts and tensors."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            whole = part.detach().cpu().clone(memory_format=torch.contiguous_format)  # a row shares the storage of its batch
            found.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
            found.update(bytes(whole.untyped_storage()))
        elif isinstance(part, (list, tuple)):
            found.update(f"[{len(part)}".encode())
            for one in part:
                add(one)
        else:
            text = described(part) if not isinstance(part, str) else part
            # A bad text has a digest too: half of a character is refused by the tokenizer, prompt by prompt.
            found.update(f"{type(part).__name__}{len(text)}:{text}".encode(errors="surrogatepass"))

    add(value)
    return found.hexdigest()[:16]
