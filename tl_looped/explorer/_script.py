"""The screen as a Python script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..looped import Looped
from ._asked import Asked
from ._edits import Call
from ._patches import patched_places

_PATCH = """
# Put activations of a run of the second prompt into the run of the first.
others = torch.tensor({others}, device=model.cfg.device)
places = {places}
_, other_run = model.run_with_cache(others, names_filter=list(places))


def put(x, hook, source, at):
    x = x.clone()
    x[at] = source[at]
    return x


for name, positions in places.items():
    hooks.append((name, partial(put, source=other_run[name], at={at})))
"""


def source_of(model: Looped) -> str:
    """How to load the model; a comment where nobody knows.

    Args:
        model: the model.
    """
    name = str(model.cfg.model_name)
    if model.made_for is not None and (name.startswith("toy:") or Path(name).is_dir() or name.count("/") == 1):
        return f"model = LoopedBridge.from_pretrained({name!r}, dtype={model.cfg.dtype})"
    return "# `model` is the model that was explored."


def script(
    model: Looped,
    asked: Asked,
    calls: Sequence[Call],
    repeats: Sequence[tuple[int, int]],
    others: Sequence[int] | None,
) -> str:
    """Python that gives the numbers on the screen, as `found`.

    Args:
        model: the model at the number of loops of the screen.
        asked: what is shown.
        calls: the interventions.
        repeats: loops that run again, the last first.
        others: the second prompt, if activations of its run are put in.
    """
    has_hooks = bool(calls or others)
    modules = [
        "from tl_looped import LoopedBridge" + (", interventions" if calls or repeats else ""),
        *(["from tl_looped.lenses import logit_lens"] if asked.lens != "readout" else []),
    ]
    text = asked.raw.get("prompt")
    said = f"  # {text!r}" if isinstance(text, str) and asked.raw.get("tokens") is None and len(text) <= 80 else ""
    lines = [
        *(["from functools import partial", ""] if others is not None else []),
        "import torch",
        *modules,
        "",
        "torch.set_grad_enabled(False)",
        source_of(model),
        f"model = model.unroll({model.n_loops})",
        f"tokens = torch.tensor({asked.tokens.tolist()}, device=model.cfg.device){said}",
    ]
    if has_hooks or repeats:
        lines += ["hooks = []", *(f"hooks += {call.source()}" for call in calls)]
    body = "\n".join(lines) + "\n"
    if others is not None and asked.patch is not None:
        places = patched_places(model, asked.patch, asked.tokens.shape[1])
        at = "(slice(None), positions" + (f", {asked.patch.head})" if asked.patch.site == "z" else ")")
        body += _PATCH.format(others=[list(others)], places=repr(places), at=at)
    for loop, times in repeats:
        body += f"model, hooks = interventions.repeat_loop(model, {loop}, times={times}, fwd_hooks=hooks)\n"
    targets = f", targets={list(asked.pins)}" if asked.pins else ""
    top_k = min(10, model.cfg.d_vocab)
    call = (
        'model.readout(tokens, loop="all")  # [loop, batch, pos, d_vocab]'
        if asked.lens == "readout"
        else f"logit_lens(model, tokens, lens={asked.lens!r}, top_k={top_k}{targets})"
    )
    if has_hooks or repeats:
        return f"{body}\nwith model.hooks(fwd_hooks=hooks):\n    found = {call}\nprint(found)\n"
    return f"{body}\nfound = {call}\nprint(found)\n"
