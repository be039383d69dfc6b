"""What a lens says at every (loop, layer) and position."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..figures.tokens_shown import visible
from ..looped import Lens
from ..panels import Panel, rank_trajectories
from ..results import Grid, Result
from ..results.grid import Selection
from ..results.showing import MOST_ROWS
from ..schedule import Indices, Schedule, Site, check_index, select_indices
from ._lens_grid import lens_grid

__all__ = ["LogitLensResult", "Readout"]

Target = str | int


@dataclass(frozen=True, eq=False)
class Readout:
    """What decoded states say about the next token.

    Args:
        log_probs: log-probability of each target, in nats.
        ranks: 0-based rank of each target: how many tokens have a strictly larger logit.
        entropy: entropy of the whole distribution, in nats.
        top_tokens: the most probable tokens, best first.
        top_log_probs: their log-probabilities, in nats.
        kl: KL(last row || this row), in nats: what this readout lacks of the last one that was decoded.
    """

    log_probs: Float[Tensor, "*row batch pos target"]
    ranks: Int[Tensor, "*row batch pos target"]
    entropy: Float[Tensor, "*row batch pos"]
    top_tokens: Int[Tensor, "*row batch pos k"]
    top_log_probs: Float[Tensor, "*row batch pos k"]
    kl: Float[Tensor, "*row batch pos"]

    @property
    def probs(self) -> Float[Tensor, "*row batch pos target"]:
        """Probability of each target."""
        return self.log_probs.exp()

    @property
    def top_probs(self) -> Float[Tensor, "*row batch pos k"]:
        """Probabilities of `top_tokens`."""
        return self.top_log_probs.exp()


@dataclass(frozen=True, eq=False)
class LogitLensResult(Result, Readout):
    """A lens over the virtual layers of a run; row `r` of every tensor is the output of virtual layer `layers[r]`.

    `lens[row, batch, pos]` selects by place and `sel` by label; what is selected is a smaller lens with the same axes. `a + b`
    has the rows of both batches.

    Args:
        lens: "logit" or "native".
        schedule: what ran.
        layers: the decoded virtual layers.
        positions: the decoded positions; the `pos` axis of every tensor follows them. Negative where they are other columns in
            every row, counted from its last real token.
        real: where a decoded position is no padding.
        targets: the token whose probability and rank is in the same place of `log_probs` and `ranks`.
        target_names: the targets as they were asked for, if they are the same everywhere; None if each position has its own.
        tokens: the token at every decoded position.
        words: the text of every token in `tokens`, `targets` and `top_tokens`, by its id as a string; see `text`.
    """

    lens: Lens
    schedule: Schedule
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    real: Bool[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos target"]
    target_names: tuple[Target, ...] | None
    tokens: Int[Tensor, "batch pos"]
    words: dict[str, str]

    def text(self, token: int) -> str:
        """A token of this result as text; its id where the model has no tokenizer.

        Args:
            token: its id.
        """
        return self.words.get(str(int(token)), str(int(token)))

    def __add__(self, other: LogitLensResult) -> LogitLensResult:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not isinstance(other, LogitLensResult):
            return NotImplemented
        for name in ("lens", "schedule", "layers", "positions", "target_names"):
            if getattr(self, name) != getattr(other, name):
                raise LoopedError(
                    f"a lens with {name}={getattr(self, name)} was added to one with {name}={getattr(other, name)}; add lenses "
                    "of the same layers and positions of one model."
                )
        found: dict[str, Any] = {name: (getattr(self, name), getattr(other, name)) for name in self._tensors()}
        for name, (mine, theirs) in found.items():
            axis = self._batch_axis(name)
            if mine.shape[axis + 1 :] != theirs.shape[axis + 1 :]:
                raise LoopedError(f"a lens with {name} {list(mine.shape)} was added to one with {list(theirs.shape)}.")
            found[name] = torch.cat((mine, theirs.to(mine.device)), axis)
        return replace(self, **found, words=self.words | other.words)

    def sel(
        self,
        *,
        loop: Selection | None = None,
        layer: Selection | None = None,
        stack: Selection | None = None,
        batch: Selection | None = None,
        pos: Selection | None = None,
    ) -> LogitLensResult:
        """Select by label: a label, several of them, or a slice, as in `Grid.sel`. Every axis stays.

        Args:
            loop: of looped layers, and "prelude" or "coda"; None for all.
            layer: the layer inside its stack.
            stack: its name.
            batch: the row of the batch.
            pos: as in `positions`.

        Raises:
            LoopedError: no such label, or no layer that has them all.

        Example:
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> from tl_looped.lenses import logit_lens
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
            >>> lens = logit_lens(model, torch.tensor([[1, 2, 3]]))
            >>> lens.sel(loop=slice(1, None), layer=-1, pos=2).labels
            ('loops.1.blocks.1', 'loops.2.blocks.1')
        """
        sites = self.sites
        rows = set(range(len(sites)))
        of_sites: tuple[tuple[str, Any, list[Any]], ...] = (
            ("loop", loop, [site.stack if site.loop is None else site.loop for site in sites]),
            ("layer", layer, [site.layer for site in sites]),
            ("stack", stack, [site.stack for site in sites]),
        )
        for name, asked, labels in of_sites:
            known = list(dict.fromkeys(labels))
            kept = [known[k] for k in _chosen(name, asked, sorted(known) if name == "layer" else known)]
            rows &= {r for r, label in enumerate(labels) if label in kept}
        if not rows:
            raise LoopedError(f"sel(loop={loop!r}, layer={layer!r}, stack={stack!r}) was asked; no layer of this lens is so.")
        n_batch = list(range(self.ranks.shape[1]))
        return self._take(sorted(rows), _chosen("batch", batch, n_batch), _chosen("pos", pos, list(self.positions)))

    def __getitem__(self, index: Any) -> LogitLensResult:
        """Select by place among (row, batch, pos): ints, slices, `...` and lists."""
        shape = self.ranks.shape[:3]
        places: dict[str, list[Any]] = dict(zip(("row", "batch", "pos"), map(list, map(range, shape)), strict=True))
        given = index if isinstance(index, tuple) else (index,)
        kept = Grid(torch.zeros(shape), tuple(places), places)[tuple([k] if isinstance(k, int) else k for k in given)]
        return self._take(*kept.labels.values())

    def _take(self, rows: list[int], batch: list[int], pos: list[int]) -> LogitLensResult:
        """The lens at some places."""
        found: dict[str, Any] = {}
        for name, x in self._tensors().items():
            axis = self._batch_axis(name)
            found[name] = x[:, batch][:, :, pos].clone() if axis else x[batch][:, pos].clone()
            found[name] = found[name][rows] if axis else found[name]
        return replace(
            self, **found, layers=tuple(self.layers[r] for r in rows), positions=tuple(self.positions[p] for p in pos)
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    def _batch_axis(self, name: str) -> int:
        return int(name in Readout.__dataclass_fields__)  # behind the rows, where there are any

    def _described(self) -> list[str]:
        rows, batch, pos, _ = self.ranks.shape
        last = self.real[0].nonzero().flatten().tolist()[-1:]
        says = [
            f"{self.labels[-1]} says {self.text(int(self.top_tokens[-1, 0, p, 0]))!r} ({self.top_probs[-1, 0, p, 0]:.3f})"
            for p in last
        ]
        return [f"{self.lens} lens [row {rows}, batch {batch}, pos {pos}]", *says]

    def _few(self, frame: Any) -> Any:
        """The last position of the first text, at layers from all over the run."""
        frame = frame[frame.batch == 0]
        frame = frame[frame.pos == frame.pos.iloc[-1]] if len(frame) else frame
        sites = frame.site.unique()[:: -max(1, -(-len(frame) // MOST_ROWS))]
        return frame[frame.site.isin(sites)][["site", "token", "top_text", "top_prob", "target_text", "prob", "rank"]]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site of every row."""
        return tuple(self.schedule.site(i) for i in self.layers)

    @property
    def labels(self) -> tuple[str, ...]:
        """The loop-indexed name of every row's layer, such as "loops.2.blocks.5"; its `hook_resid_post` was read."""
        return tuple(self.schedule.name(i, "hook_resid_post").removesuffix(".hook_resid_post") for i in self.layers)

    def rank_trajectory(self, target: Target | None = None) -> Int[Tensor, "row batch pos"]:
        """The 0-based rank of one target at every row.

        Args:
            target: as it was asked for, or its id; None for the only one.

        Raises:
            LoopedError: the target was not decoded, or it is not clear which is meant.
        """
        if target is None and self.ranks.shape[-1] == 1:
            return self.ranks[..., 0]
        if self.target_names is None:
            raise LoopedError(f"target {target!r} was asked, but each position has its own target; leave target out.")
        found: list[Any] = list(self.target_names) if isinstance(target, str) else self.targets[0, 0].tolist()
        if target not in found:
            raise LoopedError(
                f"target {target!r} was asked, but this lens decoded the targets {list(self.target_names)}; name one."
            )
        return self.ranks[..., found.index(target)]

    @accepts_old("positions", pos="positions")
    def panels(
        self,
        kind: Literal["rank", "tokens"] = "rank",
        *,
        example: int = 0,
        positions: Indices = None,
        colour: Literal["prob", "entropy", "rank", "kl"] = "prob",
        target: Target | None = None,
    ) -> list[Panel]:
        """One row of the batch.

        Args:
            kind: "rank" for the rank of every target over the layers, at one position; "tokens" for a grid, virtual layer by
                position, with the most probable token in every cell. Lines part loops, thick ones prelude and coda.
            example: which row of the batch.
            positions: which of the decoded positions of this row, by their places among those that are no padding. None for
                all in a grid, and for the last one otherwise.
            colour: of a grid: the probability of the token in the cell ("prob"), the entropy of the whole distribution
                ("entropy", nats), the rank of a target ("rank"), or KL(last row || this row) ("kl", nats).
            target: whose rank colours a grid, as it was asked for or its id; None for the only one.

        Raises:
            LoopedError: another kind or colour; a target that was not decoded.
            OutOfRangeError: an example or a position that was not decoded.
        """
        if isinstance(kind, int):
            raise LoopedError(f"plot({kind}) was asked; name the example: plot(example={kind}).")
        if kind not in ("rank", "tokens"):
            raise LoopedError(f"plot({kind!r}) was asked; choose 'rank' or 'tokens'.")
        example = check_index(example, self.ranks.shape[1], "example")
        real = self.real[example].nonzero().flatten().tolist()
        if kind == "tokens":
            places = [real[k] for k in select_indices(positions, len(real), "decoded positions")]
            return [lens_grid(self, example, places, colour, target)]
        chosen = select_indices(-1 if positions is None else positions, len(real), "decoded positions")
        if len(chosen) > 1:
            raise LoopedError(f"positions={positions!r} are {len(chosen)}; ranks are drawn of one, or ask for plot('tokens').")
        pos = real[chosen[0]]
        ranks = self.ranks[:, example, pos].tolist()  # [row, target]
        names = self.target_names or [self.text(token) for token in self.targets[example, pos].tolist()]
        lines = {self._shown(name): [float(row[k]) for row in ranks] for k, name in enumerate(names)}
        where = f"{self.lens} lens, position {self.positions[pos]}, {self._shown(int(self.tokens[example, pos]))}"
        title = f"Rank of the target by layer ({where})"
        return [rank_trajectories(lines, self.schedule, layers=self.layers, title=title)]

    def _shown(self, token: Target) -> str:
        return visible(token if isinstance(token, str) else self.text(token))

    @accepts_old("stack")
    def at(self, loop: int | None, layer: int, *, stack: str | None = None) -> Readout:
        """The readout of one layer, without the row axis.

        Args:
            loop: which run of the stack; None in prelude and coda.
            layer: the layer inside the stack.
            stack: "prelude" or "coda", "L" or "H"; not needed where one stack is looped.

        Raises:
            LoopedError: the stack is not clear, or the layer exists but was not decoded.
            OutOfRangeError: no such loop or layer.
        """
        looped = self.schedule.core_stacks
        if stack is None and (loop is None or len(looped) > 1):
            named = ("prelude", "coda") if loop is None else looped
            raise LoopedError(f"loop={loop}, layer={layer} was asked; say in which stack: {' or '.join(map(repr, named))}.")
        index = self.schedule.virtual(Site(stack or next(iter(looped)), loop, layer))
        if index not in self.layers:
            raise LoopedError(
                f"{self.schedule.site(index)} was asked, but this lens decoded {', '.join(self.labels)}; see loops=."
            )
        row = self.layers.index(index)
        parts = (self.log_probs, self.ranks, self.entropy, self.top_tokens, self.top_log_probs, self.kl)
        return Readout(*(part[row] for part in parts))

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row for every (row, batch, position, target); padding is left out.

        Columns: site, stack, loop, layer, batch, pos, token (the text there), target (its id), target_text, prob, log_prob
        (nats), rank, entropy (nats), kl (nats), top_token (its id), top_text, top_prob; loop is missing in prelude and coda.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("to_dataframe() was called, but pandas is not installed; run `pip install pandas`.") from None
        shape = self.ranks.shape
        row, batch, pos, _ = torch.ones_like(self.ranks).nonzero().T.tolist()

        def column(values: Tensor) -> list[Any]:
            return values.expand(shape).flatten().tolist()

        sites, labels = self.sites, self.labels
        columns = {
            "site": [labels[r] for r in row],
            "stack": [sites[r].stack for r in row],
            "loop": pd.array([sites[r].loop for r in row], dtype="Int64"),
            "layer": [sites[r].layer for r in row],
            "batch": batch,
            "pos": [self.positions[p] for p in pos],
            "token": [self.text(token) for token in column(self.tokens[..., None])],
            "target": column(self.targets),
            "target_text": [self.text(token) for token in column(self.targets)],
            "prob": column(self.probs),
            "log_prob": column(self.log_probs),
            "rank": column(self.ranks),
            "entropy": column(self.entropy[..., None]),
            "kl": column(self.kl[..., None]),
            "top_token": column(self.top_tokens[..., :1]),
            "top_text": [self.text(token) for token in column(self.top_tokens[..., :1])],
            "top_prob": column(self.top_probs[..., :1]),
        }
        return pd.DataFrame(columns)[column(self.real[..., None])].reset_index(drop=True)


def _chosen(axis: str, asked: Selection | None, labels: list[Any]) -> list[int]:
    """The places of labels on an axis; all if none are asked for."""
    every = list(range(len(labels)))
    return (
        every
        if asked is None
        else Grid(torch.tensor(every), (axis,), {axis: labels}).sel(**{axis: asked}).values.reshape(-1).tolist()
    )
