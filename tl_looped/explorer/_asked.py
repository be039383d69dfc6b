"""What is asked for: the state of the screen, read from JSON and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import LoopedError
from ..figures.tokens_shown import token_texts
from ..kinds import choice, count, flag, number, shown, text
from ..looped import Looped
from ..metrics import one_token
from ..schedule import LoopSelector

LENSES = ("native", "logit", "readout")
SITES = ("resid_pre", "attn_out", "mlp_out", "z", "state")
MOST_LOOPS = 1024
MOST_EDITS = 32
_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?")


@dataclass(frozen=True)
class Asked:
    """What the screen shows; see `docs/explorer.md` for the keys of its JSON.

    Args:
        tokens: the prompt, [1, pos].
        n_loops: how often to loop.
        lens: one of `LENSES`.
        pins: token ids that are followed.
        edits: the interventions that are switched on, as JSON.
        patch: which activations of the second prompt are put in; None if none are.
        at: the pinned position.
        raw: the JSON.
    """

    tokens: Int[Tensor, "1 pos"]
    n_loops: int
    lens: str
    pins: tuple[int, ...]
    edits: tuple[dict[str, Any], ...]
    patch: Patch | None
    at: int
    raw: dict[str, Any]


@dataclass(frozen=True)
class Patch:
    """Activations of a run of the second prompt that go into that of the first.

    Args:
        site: one of `SITES`.
        head: for "z", which head.
        cells: names of layers (of passes for "state"), such as "loops.1.blocks.0", each with a position.
    """

    site: str
    head: int
    cells: tuple[tuple[str, int], ...]


def read_asked(model: Looped, raw: object) -> Asked:
    """Check the state of the screen.

    Args:
        model: the model.
        raw: its JSON, as Python's objects.

    Raises:
        LoopedError: something in it is of the wrong kind, or does not fit the model.
    """
    if not isinstance(raw, dict):
        raise LoopedError(f"state={shown(raw)} was given; the state of the screen is an object.")
    state: dict[str, Any] = raw
    tokens = read_prompt(model, state.get("prompt", ""), state.get("tokens"))
    edits = [edit for edit in listed("edits", state.get("edits"), MOST_EDITS) if _object("edits", edit).get("on", True)]
    pins = [token_id(model, "pins", pin) for pin in listed("pins", state.get("pins"), 16)]
    at = count(least=0)("at", state["at"]) if state.get("at") is not None else tokens.shape[1] - 1
    return Asked(
        tokens,
        model.n_loops if state.get("loops") is None else count(most=MOST_LOOPS)("loops", state["loops"]),
        choice(*LENSES)("lens", state.get("lens", "native")),
        tuple(dict.fromkeys(pins)),
        tuple(edits),
        _patch(state.get("patch")),
        min(at, tokens.shape[1] - 1),
        state,
    )


def _patch(raw: object) -> Patch | None:
    if raw is None:
        return None
    given = _object("patch", raw)
    if not flag("patch.on", given.get("on", True)):
        return None
    cells = [tuple(listed("patch.cells", cell, 2)) for cell in listed("patch.cells", given.get("cells"), 20_000)]
    if any(len(cell) != 2 for cell in cells):
        raise LoopedError("patch.cells holds a cell that is no name and position, such as ['loops.1.blocks.0', 4].")
    found = tuple((text("patch.cells", name), count(least=0)("patch.cells", pos)) for name, pos in cells)
    site = choice(*SITES)("patch.site", given.get("site", "resid_pre"))
    return Patch(site, count(least=0)("patch.head", given.get("head", 0)), found) if found else None


def read_prompt(model: Looped, prompt: object, tokens: object = None, which: str = "The prompt") -> Int[Tensor, "1 pos"]:
    """A prompt as tokens: the ids if there are any, else the text; where there is no tokenizer, the ids that it lists.

    Args:
        model: the model.
        prompt: what was typed.
        tokens: token ids, or None.
        which: what errors call it.

    Raises:
        LoopedError: an empty prompt, a longer one than the context, text that the tokenizer cannot read, ids that are none.
    """
    n_ctx, d_vocab = model.cfg.n_ctx, model.cfg.d_vocab
    if tokens is not None:
        ids = [count(least=0, most=d_vocab - 1)("tokens", token) for token in listed("tokens", tokens, 2**20)]
    else:
        typed = text("prompt", prompt)
        if not typed.strip():
            raise LoopedError(f"{which} is empty; type one.")
        if re.search("[\ud800-\udfff]", typed):
            raise LoopedError(f"{which} holds half of a character (a lone surrogate); type it again.")
        if model.tokenizer is None:
            if not re.fullmatch(r"\s*\d{1,9}(?:[\s,]+\d{1,9})*[\s,]*", typed, flags=re.ASCII):
                raise LoopedError(
                    f"{model.cfg.model_name} has no tokenizer: type token ids from 0 to {d_vocab - 1}, such as 5, 17, 3."
                )
            ids = [count(least=0, most=d_vocab - 1)("a token id", int(one)) for one in re.findall(r"\d+", typed)]
        else:
            ids = model.to_tokens(typed)[0].tolist()
    if not ids:
        raise LoopedError(f"{which} holds no token; type one.")
    if len(ids) > n_ctx:
        raise LoopedError(f"{which} has {len(ids)} tokens, and the context of this model is {n_ctx}; shorten it.")
    return torch.tensor([ids], device=model.cfg.device)


def words_of(model: Looped, ids: Sequence[int]) -> dict[str, str]:
    """Tokens as text, by their ids as JSON has them.

    Args:
        model: the model.
        ids: token ids, with repetitions.
    """
    known = sorted(set(ids))
    return dict(zip(map(str, known), token_texts(model.tokenizer, known), strict=True))


def selector(name: str, raw: object) -> LoopSelector:
    """Which loops (or positions, or layers) a text means: "all", "last", "2", "1,3", "2:" or "1:4".

    Args:
        name: what it was given for.
        raw: the text, or an int.

    Raises:
        LoopedError: it is none of these.

    Example:
        >>> selector("loops", "1,3"), selector("loops", "2:"), selector("loops", 4)
        ([1, 3], slice(2, None, None), 4)
    """
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    asked = text(name, raw).strip()
    if asked in ("all", "last"):
        return asked
    if match := _RANGE.fullmatch(asked):
        start, stop = (None if end is None else int(end) for end in match.groups())
        return slice(start, stop)
    try:
        numbers = [int(one) for one in asked.split(",")]
    except ValueError:
        raise LoopedError(f"{name}={shown(asked)} was asked; write all, last, 2, 1,3 or 2:4.") from None
    return numbers[0] if len(numbers) == 1 else numbers


def optional(name: str, raw: object) -> Any:
    """As `selector`, where nothing or "all" means all of them, which the library calls None."""
    return None if raw is None or raw == "" or raw == "all" else selector(name, raw)


def listed(name: str, raw: object, most: int) -> list[Any]:
    """A list of JSON, of at most so many entries; None is an empty one."""
    if raw is None:
        return []
    if not isinstance(raw, (list, tuple)) or len(raw) > most:
        raise LoopedError(f"{name}={shown(raw)} was given; it is a list of at most {most} entries.")
    return list(raw)


def _object(name: str, raw: object) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise LoopedError(f"{name} holds {shown(raw)}; its entries are objects.")
    return raw


def _token(name: str, raw: object) -> str | int:
    return raw if isinstance(raw, int) and not isinstance(raw, bool) else text(name, raw)


def token_id(model: Looped, name: str, raw: object) -> int:
    """The id of a token that was typed: text, or the number of the token where there is no tokenizer.

    Args:
        model: the model.
        name: what it was given for.
        raw: what was typed.

    Raises:
        LoopedError: it is not one token.
    """
    token = _token(name, raw)
    if isinstance(token, str) and model.tokenizer is None and token.strip().isdecimal():
        token = int(token)
    return one_token(model, token)


def a_number(name: str, raw: object, low: float = -1e6) -> float:
    """A finite number."""
    return number(low=low)(name, raw)
