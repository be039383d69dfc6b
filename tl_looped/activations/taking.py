"""Running a batch of texts while hooks hand over what is collected."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import LoopedError
from ..looped import Looped
from ..schedule import Indices, select_indices
from .places import group_of
from .shards import runs
from .texts import Text

# Takes the name of an activation, the row where values begin, and the values, contiguous and on the CPU.
Put = Callable[[str, int, Tensor], None]


class Rows:
    """Which rows of a shard the positions of the texts of a batch have.

    Args:
        texts: of the batch, in the order of their rows.
        first: the row of the first position of the first text.
        positions: which positions have rows.
        extra: positions after the prompt that may have rows.
        pads_left: whether shorter texts begin later.
    """

    def __init__(self, texts: Sequence[Text], first: int, positions: Indices, extra: int, pads_left: bool):
        self.texts = texts
        self.width: int = max(len(text.tokens) for text in texts)
        self._at = torch.full((len(texts), self.width + extra), -1)  # the row of every column
        self.starts: list[int] = []
        for line, text in zip(self._at, texts, strict=True):
            n = len(text.tokens) + extra
            chosen = torch.tensor(select_indices(positions, n, "positions"))
            offset = self.width - len(text.tokens) if pads_left else 0
            line[chosen + offset] = torch.arange(first, first + len(chosen))
            self.starts.append(first)
            first += len(chosen)
        self.end = first
        self._known: dict[tuple[int, int], tuple[Tensor, list[tuple[int, int, int]]]] = {}

    @property
    def is_padded(self) -> bool:
        """Whether texts are of different lengths."""
        return any(len(text.tokens) < self.width for text in self.texts)

    def of_columns(self, start: int, stop: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Which of the flattened columns have rows, and the rows: (where among those, first row, how many)."""
        if (start, stop) not in self._known:
            at = self._at[:, start:stop].reshape(-1)
            columns = (at >= 0).nonzero().flatten()
            pieces, done = list[tuple[int, int, int]](), 0
            for row, n in runs(at[columns]):
                pieces.append((done, row, n))
                done += n
            self._known = {(start, stop): (columns, pieces)}  # one step of all activations, then the next
        return self._known[start, stop]


class Taking:
    """The hooks on a model that hand over activations.

    Args:
        model: the model.
        names: of the activations.
        dtype: in which they are kept; None for what they have.
        put: what takes them.
    """

    def __init__(self, model: Looped, names: Sequence[str], dtype: torch.dtype | None, put: Put):
        self.model: Looped = model
        self.names: list[str] = list(names)
        self.dtype: torch.dtype | None = dtype
        self.put: Put = put
        self.rows: Rows | None = None
        self.n_columns: dict[str, int] = {}  # how many columns every activation has been handed over of
        groups = dict.fromkeys(group_of(model.schedule, name) for name in names)
        marks = {group: f"{group.removesuffix('.blocks')}.hook_active" for group in groups if group.endswith(".blocks")}
        # Where a loop runs some tokens only: the hook that says which, by the group of activations that the others lack.
        known = set(model.hook_dict)  # asked for a name that it lacks, the dict itself would look for the nearest
        self.marks: dict[str, str] = {group: hook for group, hook in marks.items() if hook in known}
        self.active: dict[str, Tensor] = {}  # which rows of the shard have a group

    @contextmanager
    def hooked(self) -> Generator[None]:
        """Have the hooks on the model for a while."""
        hooks = [(name, partial(self._take, name)) for name in self.names]
        hooks += [(hook, partial(self._mark, group)) for group, hook in self.marks.items()]
        with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
            yield

    def begin_shard(self, n_rows: int) -> None:
        """Hand over the activations of another shard from now on."""
        self.active = {group: torch.ones(n_rows, dtype=torch.bool, device="cpu") for group in self.marks}

    def begin(self, rows: Rows) -> None:
        """Hand over the activations of a batch from now on."""
        self.rows, self.n_columns = rows, dict.fromkeys((*self.names, *self.marks), 0)

    def _mark(self, group: str, x: Tensor, hook: Any) -> None:
        if self.rows is not None and self.active:
            start = self.n_columns[group]
            self.n_columns[group] = start + x.shape[1]
            columns, pieces = self.rows.of_columns(start, start + x.shape[1])
            runs_here = x.detach().reshape(-1).bool().cpu()[columns]
            for at, row, n in pieces:
                self.active[group][row : row + n] = runs_here[at : at + n]

    def _take(self, name: str, x: Any, hook: Any) -> None:
        rows = self.rows
        if rows is None:
            return
        start = self.n_columns[name]
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != len(rows.texts) or not x.is_floating_point():
            raise LoopedError(f"{name} was asked, which holds {_what(x)} and not numbers for every token, [batch, pos, ...].")
        self.n_columns[name] = stop = start + x.shape[1]
        if stop > rows._at.shape[1]:
            raise LoopedError(f"{name} was asked, which is computed several times for a token, or not for every token.")
        columns, pieces = rows.of_columns(start, stop)
        if not len(columns):
            return
        found = x.detach().reshape(-1, *x.shape[2:])
        if len(columns) < len(found):
            found = found.index_select(0, columns.to(x.device))
        values = torch.empty(found.shape, dtype=self.dtype or x.dtype, device="cpu")
        values.copy_(found)
        if values.dtype == torch.float16 and not bool(values.isfinite().all()) and bool(found.isfinite().all()):
            raise LoopedError(f"{name} has numbers beyond 65504, the greatest in fp16; collect with dtype=torch.bfloat16.")
        for at, row, n in pieces:
            self.put(name, row, values[at : at + n])


def _what(x: Any) -> str:
    return f"a tensor of shape {tuple(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def run(taking: Taking, rows: Rows, stop: int | None, inputs: dict[str, Any]) -> None:
    """Run a batch of prompts once, up to where the last activation is computed."""
    tokens, mask = padded(rows, left=False)
    given: dict[str, Any] = {**inputs, **({} if stop is None else {"stop_at_layer": stop})}
    model, device = taking.model, taking.model.cfg.device
    if rows.is_padded:
        given["attention_mask"] = mask.to(device)
    taking.begin(rows)
    model(tokens.to(device), return_type=None, **given)
    for name, n in taking.n_columns.items():
        if n != rows.width and name in taking.names:
            raise LoopedError(f"{name} was asked, which {f'has {n} of {rows.width} positions' if n else 'did not run'}.")


def generate(
    taking: Taking, rows: Rows, max_new_tokens: int, settings: dict[str, Any]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Write on after a batch of prompts; the tokens with the padding before them, and how many are new in every row."""
    model: Any = taking.model
    tokens, mask = padded(rows, left=True)
    device = model.cfg.device
    if rows.is_padded:
        settings = settings | {"attention_mask": mask.to(device)}
    taking.begin(rows)
    output = model.generate(
        tokens.to(device), max_new_tokens, return_type="tokens", verbose=False, **{"do_sample": False, **settings}
    )
    n_new = (model.generation_report.loops_per_token > 0).sum(1)
    return output.cpu(), n_new.cpu()


def padded(rows: Rows, left: bool) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """The tokens of a batch, and which are real."""
    tokens = torch.zeros(len(rows.texts), rows.width, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(tokens)
    for line, real, text in zip(tokens, mask, rows.texts, strict=True):
        n = len(text.tokens)
        where = slice(rows.width - n, None) if left else slice(n)
        line[where], real[where] = text.tokens, 1
    return tokens, mask
