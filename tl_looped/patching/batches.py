"""One run, made once, and patches of it, many in one batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import LoopedError
from ..looped import Looped, Recorded
from ..metrics import bound
from ..record import INPUTS, InitialState, Run
from ..running import first_hooked
from ..schedule import check_count
from ..sites import axes_of
from .clean_run import Metric, measured

MEMORY_SHARE = 0.25  # of the free memory, for a batch of patches
CPU_TOKENS = 2048  # rows x positions: on a CPU, matrix products gain nothing from more
LOGITS_AT_ONCE = 2**24


class Edit(NamedTuple):
    """A patch of one activation: its hook, what replaces it, and where (a mask of the axes after the batch)."""

    hook: str
    value: Float[Tensor, "batch ..."]
    where: Bool[Tensor, ...]


class Cell(NamedTuple):
    """Patches that are made together.

    Args:
        edits: the patches.
        entry: the last layer whose input they do not touch; -1 for none.
        start: the first position that they touch.
    """

    edits: list[Edit]
    entry: int
    start: int


class Patcher:
    """A run to patch.

    Args:
        model: the model. Hooks that are attached act in every run; each patch is then a whole run, as it is in a model whose
            rows depend on each other.
        tokens: text or tokens.
        metric: logits -> a scalar, or one number per row of the batch.
        hooks: the activations that will be patched.
        initial_state: of the run.
        inputs: what else the run takes, such as `attention_mask`.
        max_batch: how many rows (patches x batch) to run at once; None for what memory allows and the CPU gains from.

    Raises:
        LoopedError: the metric returns neither a scalar nor [batch]; `inputs` of a run that is not whole.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Looped,
        tokens: Any,
        metric: Metric,
        hooks: Sequence[str],
        initial_state: InitialState,
        inputs: dict[str, Any],
        max_batch: int | None,
    ):
        if wrong := sorted(set(inputs) - set(INPUTS)):
            raise LoopedError(f"{', '.join(wrong)} was given; patches are made in whole runs, which take {', '.join(INPUTS)}.")
        self.model: Looped = model
        self.max_batch: int | None = max_batch if max_batch is None else check_count("max_batch", max_batch)
        self.is_hooked: bool = first_hooked(model) is not None
        self.one_by_one: bool = self.is_hooked or model.lacks("rows apart") is not None
        # A bidirectional prefix lets early positions see late ones.
        self.is_causal: bool = (
            inputs.get("token_type_ids") is None
            and not self.one_by_one
            and model.lacks("causal runs") is None
            and model.lacks("entry") is None
        )
        self.recorded: Recorded = model.record(tokens, hooks, initial_state, self.is_causal, inputs)
        self.logits: Tensor = self.recorded.logits
        self.base: Any = self.recorded.cache
        self.n_rows: int = self.logits.shape[0]
        self.n_pos: int = self.logits.shape[1]
        self.metric: Metric = bound(metric, model, self.base.attention_mask)
        self.baseline: Tensor = self.score(self.logits)
        self._different: dict[str, tuple[Tensor, Tensor]] = {}

    def score(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "*example"]:
        """The metric, checked."""
        return measured(self.metric, logits).detach()

    def run_arguments(self) -> dict[str, Any]:
        """The keyword arguments that repeat the run."""
        return cast(Run, self.base.run).arguments()

    def is_idle(self, cell: Cell) -> bool:
        """Whether the patches change nothing; what they would measure is the run itself."""
        return not any(bool((self._differs(edit) & edit.where.to(edit.value.device)).any()) for edit in cell.edits)

    def _differs(self, edit: Edit) -> Bool[Tensor, ...]:
        """Where the value of an edit differs from the run, in some row."""
        known = self._different.get(edit.hook)
        if known is None or known[0] is not edit.value:
            differs = (edit.value != self.base[edit.hook]).any(0)
            known = (edit.value, differs.any(-1, keepdim=True) if edit.where.shape[-1] == 1 else differs)
            self._different[edit.hook] = known
        return known[1]

    @torch.no_grad()
    def run(self, cells: Sequence[Cell], verbose: bool, what: str) -> Float[Tensor, "cell ..."]:
        """The metric after each cell."""
        values: list[Tensor] = [self.baseline] * len(cells)
        with tqdm(total=len(cells), desc=what, disable=not verbose) as bar:
            changing = [c for c, cell in enumerate(cells) if not self.is_idle(cell)]
            bar.update(len(cells) - len(changing))
            for chunk in self._chunks(cells, changing):
                for c, value in zip(chunk, self._run([cells[c] for c in chunk]), strict=True):
                    values[c] = value
                bar.update(len(chunk))
        return torch.stack(values)

    def _chunks(self, cells: Sequence[Cell], changing: list[int]) -> Iterator[list[int]]:
        """Batches of cells that share first positions, each in the order of their entries."""
        if self.is_causal:
            changing = sorted(changing, key=lambda c: (cells[c].start, cells[c].entry))
        else:
            changing = sorted(changing, key=lambda c: cells[c].entry)
        while changing:
            size = self._size(cells[changing[0]])
            yield sorted(changing[:size], key=lambda c: cells[c].entry)
            changing = changing[size:]

    def _size(self, first: Cell) -> int:
        if self.one_by_one:
            return 1
        if self.max_batch is not None:
            return max(1, self.max_batch // self.n_rows)
        n_pos = self.n_pos - (first.start if self.is_causal else 0)
        size = int(MEMORY_SHARE * self._free_memory()) // (self.n_rows * self._row_bytes(n_pos))
        if self.logits.device.type == "cpu":
            size = min(size, CPU_TOKENS // (self.n_rows * n_pos))
        return max(1, size)

    def _free_memory(self) -> int:
        """Of the device that has least, among those of the run."""
        devices = {self.logits.device, *(activation.device for activation in self.base.values())}
        return min(map(free_memory, devices))

    def _row_bytes(self, n_pos: int) -> int:
        """Upper estimate of the memory that a row needs while it runs through a layer."""
        cfg = self.model.cfg
        widths = 8 * cfg.d_model + 3 * cfg.d_mlp + 4 * cfg.n_heads * cfg.d_head + 4 * cfg.n_heads * self.n_pos
        return self.logits.element_size() * (n_pos * widths + 4 * self.n_pos * cfg.n_key_value_heads * cfg.d_head)

    def _run(self, cells: list[Cell]) -> Iterator[Tensor]:
        """The metric after each of the cells, which are in the order of their entries, from one batch."""
        start = min(cell.start for cell in cells) if self.is_causal else 0
        by_hook: dict[str, list[tuple[int, Edit]]] = {}
        for c, cell in enumerate(cells):
            for edit in cell.edits:
                by_hook.setdefault(edit.hook, []).append((c, edit))
        hooks: list[Any] = [(name, self._patch(edits, start)) for name, edits in by_hook.items()]
        if self.one_by_one:  # hooks may look anywhere in a run, and pass on what they see
            yield self.score(self.model.run_with_hooks(cast(Run, self.base.run).input, fwd_hooks=hooks, **self.run_arguments()))
            return
        x = self.recorded.again([cell.entry for cell in cells], start, hooks)
        per_cell = x.unflatten(0, (len(cells), self.n_rows))
        at_once = max(1, LOGITS_AT_ONCE // (self.n_rows * x.shape[1] * self.model.cfg.d_vocab))
        for group in per_cell.split(at_once):
            logits = self.recorded.read(group.flatten(0, 1)).unflatten(0, (-1, self.n_rows))
            for part in logits:
                yield self.score(torch.cat((self.logits[:, :start], part), dim=1) if start else part)

    def _patch(self, edits: list[tuple[int, Edit]], start: int) -> Callable[..., Tensor]:
        def patch(activation: Tensor, hook: object) -> Tensor:
            patched = activation.clone()
            for c, edit in edits:
                axis = axes_of(edit.hook).index("pos")
                value, where = edit.value.to(activation.device), edit.where.to(activation.device)
                if start:
                    value = value.narrow(axis + 1, start, value.shape[axis + 1] - start)
                    where = where.narrow(axis, start, where.shape[axis] - start)
                rows = slice(c * self.n_rows, (c + 1) * self.n_rows)
                patched[rows] = torch.where(where, value, activation[rows])
            return patched

        return patch


def free_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # systems that do not say
        return 2**31
