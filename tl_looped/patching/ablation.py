"""Ablation over (loop, layer, head): what every part does for a metric, over many prompts, one part at a time or jointly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import add
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from .._old_calls import accepts_old
from .._precision import wide
from ..errors import LoopedError
from ..kinds import plain, shown
from ..looped import Looped, require, stopping
from ..metrics import Divergence, RowMetric, metric_name
from ..panels import Panel
from ..record import InitialState
from ..results import Estimate, Grid, Result
from ..schedule import Indices, LoopSelector, select_indices
from ..sites import Place, laid_out, swept_places
from ..tokens import refuse_unmarked_padding
from .batches import Cell, Edit, Patcher
from .clean_run import Metric

__all__ = ["AblationSweep", "ablation_sweep"]

Part = Literal["head", "attn", "mlp", "layer"]
Mode = Literal["zero", "mean"]
CellName = Any  # one label per axis, such as (2, 0, 1) or ("coda", 3, 0)

SITES: dict[str, tuple[str, ...]] = {
    "head": ("z",),
    "attn": ("attn_out",),
    "mlp": ("mlp_out",),
    "layer": ("attn_out", "mlp_out"),
}
ROWS = 32  # prompts of one length that run together


@dataclass(frozen=True, eq=False)
class AblationSweep(Result):
    """What ablations do to a metric; estimates over the prompts, whose standard errors are those of paired differences.

    Args:
        change: the metric with a cell removed minus that of the whole run; with `restore`, the metric with everything but the
            cell removed minus that with everything removed. NaN for layers that a stack lacks.
        joint: the same for the cells that were named together, axis "joint"; None if none were.
        whole: the metric of the run without ablation.
        removed: the metric with all cells of the sweep removed.
        part: what was removed.
        mode: by what it was replaced.
        restore: whether cells were restored.
        means: for "mean", a fingerprint of the means, which must be the same in results that are added.
        n_loops: loops of the run.
    """

    change: Estimate
    joint: Estimate | None
    whole: Estimate
    removed: Estimate
    part: str
    mode: str
    restore: bool
    means: str | None
    n_loops: int

    def normalised(self) -> Grid:
        """The change as a share of what removing (or restoring) all cells does, which is 1."""
        span = self.removed.values - self.whole.values
        values = self.change.values / (-span if self.restore else span)
        return Grid(values, self.change.axes, self.change.labels, f"share of the {self.change.name}")

    @accepts_old("title")
    def panels(self, *, title: str = "") -> list[Panel]:
        """The figure of the changes, as of a `Grid`.

        Args:
            title: above the figure; the name of the numbers if empty.
        """
        return self.change.panels(title=title)

    def to_dataframe(self) -> Any:
        """The changes with their standard errors, one row per cell."""
        return self.change.to_dataframe()


def ablation_sweep(
    model: Looped,
    prompts: str | Sequence[str | Tensor] | Tensor,
    metric: Metric,
    *,
    part: Part = "head",
    by: Sequence[str] | None = None,
    mode: Mode = "zero",
    joint: Sequence[Sequence[CellName]] | None = None,
    restore: bool = False,
    reference: Any = None,
    loops: LoopSelector = "all",
    layers: Indices = None,
    heads: Indices = None,
    positions: Indices = None,
    stack: str | None = None,
    at_loop: int | None = None,
    n_loops: int | None = None,
    attention_mask: Tensor | None = None,
    initial_state: InitialState = None,
    max_batch: int | None = None,
    verbose: bool = True,
) -> AblationSweep:
    """Remove parts of chosen layers and loops, cell by cell of a grid, and measure what each does, over many prompts.

    Every number is what hooks of `tl_looped.interventions.ablate` give, on each prompt by itself, up to rounding; prompts may
    have different lengths. A part that is needed but not alone shows in `joint`, or with `restore`.

    Args:
        model: the model. Hooks that are attached act in every run; cells are then run one by one.
        prompts: text, texts, tokens [pos] or [batch, pos], or a list of tokens [pos]; every row is an example.
        metric: from logits to one number per row; those of `tl_looped.metrics` take an answer for every prompt.
        part: "head" (its summand of the attention output, `attn.hook_z`), "attn" or "mlp" (what the branch adds), or "layer"
            (both).
        by: the axes of the grid, of "loop", "layer", for heads "head", and "pos". Along the others everything is removed at
            once. Default: all of them but "pos".
        mode: replace by "zero", or by the "mean" over all real positions of `reference`, for every loop by itself.
        joint: groups of cells that are removed (or restored) together, each a list of cells such as
            `[(2, 0, 1), (2, 0, 3)]`, along `by`; "all" stands for every label, as in `(2, 0, "all")`.
        restore: remove all cells of the sweep and restore one: whether it suffices, not whether it is needed.
        reference: prompts whose activations give the means; None for the prompts themselves. Results can be added if theirs
            are the same.
        loops: which loops. As in `patch_sweep`, "prelude" and "coda" are entries of the axis "loop" where no part is asked for.
        layers: which layers of the loop; None for all.
        heads: which heads; None for all.
        positions: at which positions of each prompt; None for all. With "pos" in `by` and prompts of different lengths, ints
            that every prompt has, such as `[-2, -1]`.
        stack: "core" for the loops alone; "L" or "H" for HRM-Text; "prelude" or "coda".
        at_loop: measure the answer after this loop, `model.unroll(at_loop + 1)`; None for the last.
        n_loops: of a run of this many loops; None for the model's own number.
        attention_mask: for padded tokens, 1 for real ones, [batch, pos]; pads are left out.
        initial_state: as in `LoopedBridge.forward`, but no tensor.
        max_batch: as in `patch_sweep`.
        verbose: show a progress bar.

    Raises:
        LoopedError: no prompts; a metric that is not one number per row; parts, axes or cells that do not exist.
        OutOfRangeError: loops, layers, heads or positions that a run does not have.

    Example:
        >>> from tl_looped import LoopedBridge
        >>> from tl_looped.patching import ablation_sweep
        >>> from tl_looped.metrics import prob
        >>> model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
        >>> found = ablation_sweep(model, ["A b B a ? A", "A b C a B c ? A"], prob(["a", "a"]), by=("loop",), verbose=False)
        >>> found.change.axes, found.change.count, found.whole.values.shape
        (('loop',), 2, torch.Size([]))
    """
    names = _check(part, by, mode, reference)
    model = stopping(model, at_loop, n_loops)
    rows = _rows(model, prompts, attention_mask, "prompts")
    _check_rows(metric, rows)
    if "pos" in names:
        positions = _common(positions, {len(row) for row in rows})
    plan = _Plan(model, part, names, loops, layers, heads, positions, stack, joint, restore)
    means = None
    if mode == "mean":
        means = _means(model, rows if reference is None else _rows(model, reference, None, "reference"), plan, initial_state)
    parts: list[tuple[list[int], Tensor]] = []
    with tqdm(total=len(rows), desc=f"ablating {part}", disable=not verbose) as bar:
        for chosen, tokens in _batches(rows):
            bound = metric.rows(chosen) if isinstance(metric, RowMetric) else metric
            patcher = Patcher(model, tokens, bound, plan.hooks, initial_state, {}, max_batch)
            cells = plan.cells(patcher, means)
            found = torch.cat((patcher.baseline[None], patcher.run(cells, False, "")))
            if found.ndim == 1 and len(chosen) > 1:
                raise LoopedError(
                    "the metric returned one number for several prompts, which have no standard error; return one per row, "
                    "[batch], as those of tl_looped.metrics do."
                )
            parts.append((chosen, wide(found.reshape(len(found), -1).T).double().cpu()))
            bar.update(len(chosen))
    order = torch.tensor([i for chosen, _ in parts for i in chosen], device="cpu").argsort()
    examples = torch.cat([values for _, values in parts])[order]  # [example, whole run, all removed, cell ..., joint ...]
    return plan.result(examples, metric_name(metric), mode, _fingerprint(means))


class _Plan:
    """Which cells a sweep has, and what is patched in each."""

    def __init__(
        self,
        model: Looped,
        part: Part,
        names: tuple[str, ...],
        loops: LoopSelector,
        layers: Indices,
        heads: Indices,
        positions: Indices,
        stack: str | None,
        joint: Sequence[Sequence[CellName]] | None,
        restore: bool,
    ):
        self.model, self.part, self.names, self.restore, self.positions = model, part, names, restore, positions
        if heads is not None and part != "head":
            raise LoopedError(f'heads={heads!r} was asked of part={part!r}; heads are those of part="head".')
        if part == "head":
            require(model, "equal heads", "a sweep over heads")
        self.heads = select_indices(heads, model.cfg.n_heads, "heads") if part == "head" else []
        self.places: dict[tuple[Any, ...], list[Place]] = {}
        for site in SITES[part]:
            for key, place in swept_places(model, site, names, loops, layers, stack):
                self.places.setdefault(key, []).append(place)
        self.hooks = [place.hook for group in self.places.values() for place in group]
        inner: list[Any] = [self.heads] if "head" in names else []
        inner += [positions] if "pos" in names else []
        self.keys = [(*key, *more) for key, more in product(self.places, product(*inner))]
        self.joint = {_label(group): self._keys_of(group) for group in map(self._group, joint or ())}

    def _group(self, asked: Any) -> list[Any]:
        """A group as a list of cells; a single cell is a group too."""
        group = plain(asked)
        if isinstance(group, tuple) and len(group) == len(self.names) > 1 and not isinstance(group[0], (list, tuple)):
            group = [group]
        if not isinstance(group, (list, tuple)) or not group or not all(isinstance(c, (list, tuple, int, str)) for c in group):
            raise LoopedError(
                f"joint= holds {shown(asked)}; pass a list of groups, each a list of cells, such as "
                f"joint=[[{self.keys[0]!r}, {self.keys[-1]!r}]]."
            )
        return [tuple(cell) if isinstance(cell, (list, tuple)) else (cell,) for cell in group]

    def _keys_of(self, group: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The cells of a group, whose labels may be text or ints, and "all" for every one on an axis."""
        keys: list[tuple[Any, ...]] = []
        for cell in group:
            asked = tuple(map(str, cell))
            found = [
                key
                for key in self.keys
                if len(key) == len(asked) and all(b in ("all", str(a)) for a, b in zip(key, asked, strict=True))
            ]
            if not found:
                raise LoopedError(
                    f"joint= names the cell {shown(cell)}, which this sweep does not have; a cell is "
                    f"({', '.join(self.names)}), such as {self.keys[0]!r}."
                )
            keys += found
        return list(dict.fromkeys(keys))

    def cells(self, patcher: Patcher, means: dict[str, Tensor] | None) -> list[Cell]:
        """All removed; every cell; every joint group."""
        values: dict[str, Tensor] = {}
        for hook in self.hooks:
            x = patcher.base[hook]
            new = x.new_zeros(()) if means is None else means[hook].to(x.device, x.dtype)
            values[hook] = new.expand_as(x)
        device, size = patcher.logits.device, len(self.heads) or 1
        chosen = select_indices(self.positions, patcher.n_pos, "positions")
        entries = {place.hook: place.entry for group in self.places.values() for place in group}

        def masks(keys: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
            """Where some cells are, [pos, head] of every hook."""
            found: dict[str, Tensor] = {}
            for key in keys:
                label = dict(zip(self.names, key, strict=True))
                at = select_indices(label["pos"], patcher.n_pos, "positions") if "pos" in label else chosen
                heads = [self.heads.index(label["head"])] if "head" in label else range(size)
                for place in self.places[tuple(label[axis] for axis in label if axis in ("loop", "layer"))]:
                    if place.hook not in found:
                        found[place.hook] = torch.zeros(patcher.n_pos, size, dtype=torch.bool, device=device)
                    found[place.hook][torch.tensor(at)[:, None], torch.tensor([*heads])] = True
            return found

        def cell(masks: dict[str, Tensor]) -> Cell:
            there = {hook: mask for hook, mask in masks.items() if bool(mask.any())}
            starts = [int(mask.any(1).nonzero()[0]) for mask in there.values()]
            edits = [Edit(hook, values[hook], self._where(mask)) for hook, mask in there.items()]
            return Cell(
                edits, min((entries[hook] for hook in there), default=patcher.model.schedule.n_layers), min(starts, default=0)
            )

        def all_but(kept: dict[str, Tensor]) -> dict[str, Tensor]:
            return {hook: mask & ~kept[hook] if hook in kept else mask for hook, mask in every.items()}

        every = masks(self.keys)
        groups = map(masks, [*([key] for key in self.keys), *self.joint.values()])
        return [cell(every), *(cell(all_but(group) if self.restore else group) for group in groups)]

    def _where(self, mask: Tensor) -> Tensor:
        """A mask of positions and chosen heads as one of the activation."""
        if self.part != "head":
            return mask
        where = torch.zeros(len(mask), self.model.cfg.n_heads, dtype=torch.bool, device=mask.device)
        where[:, self.heads] = mask
        return where[..., None]

    def result(self, examples: Float[Tensor, "example cell"], name: str, mode: str, means: str | None) -> AblationSweep:
        """The estimates."""
        whole, removed, values = examples[:, 0], examples[:, 1], examples[:, 2:]
        changes = values - (removed if self.restore else whole)[:, None]
        n = len(self.keys)
        grid, labels = laid_out(changes[:, :n].T, self.keys, self.names)
        what = f"{name} change"
        joint = None
        if self.joint:
            joint = Estimate.of(changes[:, n:], ("joint",), {"joint": list(self.joint)}, what)
        return AblationSweep(
            change=Estimate.of(grid.movedim(-1, 0), self.names, labels, what),
            joint=joint,
            whole=Estimate.of(whole, (), {}, name),
            removed=Estimate.of(removed, (), {}, name),
            part=self.part,
            mode=mode,
            restore=self.restore,
            means=means,
            n_loops=self.model.n_loops,
        )


def _label(group: list[tuple[Any, ...]]) -> str:
    return " + ".join(f"({', '.join(map(str, cell))})" for cell in group)


def _check(part: str, by: Sequence[str] | None, mode: str, reference: Any) -> tuple[str, ...]:
    if part not in SITES or mode not in get_args(Mode):
        raise LoopedError(
            f"part={part!r} and mode={mode!r} were asked; choose part from {', '.join(map(repr, SITES))} and mode from "
            f'"zero", "mean".'
        )
    if reference is not None and mode != "mean":
        raise LoopedError(f'reference= was given with mode={mode!r}; it is for mode="mean".')
    known = ("loop", "layer", "head", "pos") if part == "head" else ("loop", "layer", "pos")
    names = known[:-1] if by is None else (by,) if isinstance(by, str) else tuple(by)
    if "neuron" in names:
        raise LoopedError(
            f"by={names!r} was asked; every neuron would be a run of its own. Ablate chosen ones with hooks: "
            'tl_looped.interventions.ablate(model, "neuron", neurons=...).'
        )
    if not names or len(set(names)) < len(names) or set(names) - set(known):
        raise LoopedError(f"by={names!r} was asked; part={part!r} has the axes {', '.join(known)}, each at most once.")
    return tuple(axis for axis in known if axis in names)


def _common(positions: Indices, lengths: set[int]) -> list[int]:
    """The labels of positions that all prompts have: numbers from the start where all are as long, else as they were given."""
    if len(lengths) == 1:
        return select_indices(positions, max(lengths), "positions")
    asked: Any = plain(positions)
    if not isinstance(asked, (int, list, tuple, range)):
        raise LoopedError(
            f"positions={positions!r} were asked as an axis of prompts of {min(lengths)} to {max(lengths)} tokens; name "
            "positions that all have, such as positions=[-2, -1]."
        )
    for n in lengths:
        select_indices(asked, n, "positions")
    return [asked] if isinstance(asked, int) else list(dict.fromkeys(asked))


def _rows(model: Looped, prompts: Any, attention_mask: Tensor | None, what: str) -> list[Tensor]:
    """Every prompt as its real tokens, [pos]."""
    given: Any = [prompts] if isinstance(prompts, str) else prompts
    if isinstance(given, Tensor):
        given = given[None] if given.ndim == 1 else given
    if not isinstance(given, (list, tuple, Tensor)) or not len(given):
        raise LoopedError(f"{what}={shown(prompts)} was given; pass at least one text, or token ids.")
    mask: Any = attention_mask
    if mask is not None:
        mask = mask[None] if mask.ndim == 1 else mask
        if not isinstance(given, Tensor) or mask.shape != given.shape:
            raise LoopedError("attention_mask= was given with prompts that are no tokens of its shape; texts need none.")
        mask = mask.bool().to(given.device)
    elif isinstance(given, Tensor):
        refuse_unmarked_padding(model.tokenizer, given, "an ablation")
    rows = []
    for i, prompt in enumerate(given):
        if isinstance(prompt, str):
            tokens = model.to_tokens(prompt)[0]
        elif isinstance(prompt, Tensor) and prompt.ndim == 1 and not prompt.is_floating_point():
            tokens = prompt if mask is None else prompt[mask[i]]
        else:
            raise LoopedError(f"prompt {i} of {what} is {shown(prompt)}; pass texts, or tokens [pos].")
        if not len(tokens):
            raise LoopedError(f"prompt {i} of {what} is empty; leave it out.")
        rows.append(tokens.to(model.cfg.device))
    return rows


def _check_rows(metric: Any, rows: Sequence[Tensor]) -> None:
    if not isinstance(metric, RowMetric):
        return
    if metric.n_rows not in (None, len(rows)):
        raise LoopedError(f"{metric.n_rows} answers were given for {len(rows)} prompts; pass one for each, or one for all.")
    if isinstance(metric, Divergence) and metric.has_logits and len(set(map(len, rows))) > 1:
        raise LoopedError(
            "kl_to(logits) was asked of prompts of different lengths, whose last tokens lie elsewhere in padded logits; use "
            "kl_to(prompts)."
        )


def _batches(rows: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Prompts of one length together, so that none is padded; and which they are."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    for group in by_length.values():
        for start in range(0, len(group), ROWS):
            chosen = group[start : start + ROWS]
            yield chosen, torch.stack([rows[i] for i in chosen])


@torch.no_grad()
def _means(model: Looped, rows: Sequence[Tensor], plan: _Plan, initial_state: InitialState) -> dict[str, Tensor]:
    """The mean of every activation over all positions of some prompts."""
    sums: dict[str, Tensor] = {}
    for _, tokens in _batches(rows):
        _, cache = model.run_with_cache(tokens, names_filter=plan.hooks, initial_state=initial_state)
        for hook in plan.hooks:
            total = cache[hook].double().sum((0, 1))
            sums[hook] = total if hook not in sums else sums[hook] + total
    n = sum(map(len, rows))
    return {hook: total / n for hook, total in sums.items()}


def _fingerprint(means: dict[str, Tensor] | None) -> str | None:
    if means is None:
        return None
    flat = reduce(add, (f"{hook} {mean.float().cpu().flatten().tolist()}" for hook, mean in means.items()))
    return hashlib.sha256(flat.encode()).hexdigest()[:12]
