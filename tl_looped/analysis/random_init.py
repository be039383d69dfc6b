"""Which looped layouts settle at random initialisation: norms of three kinds, with and without injection."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .._precision import wide
from .._words import aligned, counted
from ..errors import LoopedError
from ..kinds import plain
from ..looped import Looped
from ..panels import Axis, Panel
from ..record import InitialState
from ..results import Estimate, Result, table
from ..schedule import check_count
from ._directions import SETTLED, cosine, relative_distance
from ._streaming import check_finite, layer_hooks, need_loops

__all__ = ["RandomInitSweep", "random_init_sweep"]

Std = float | Literal["fan_in"]
NORMS: dict[str, dict[str, Any]] = {
    "pre-norm": {"norm": "pre"},
    "Huginn norm": {"norm": "stream"},
    "Ouro norm": {"norm": "sandwich", "pass_norm": True, "final_norm": False},
}
INJECTIONS: dict[str, dict[str, Any]] = {
    "injection": {"injection": "concat", "initial_state": "noise"},
    "none": {"injection": "none"},
}
ALIGNED, SHARED = 0.9, 0.999  # what the verdicts mean; our choice


@dataclass(frozen=True, eq=False)
class RandomInitSweep(Result):
    """What `random_init_sweep` measured; estimates over the seeds. `a + b` has the seeds of both.

    Args:
        distance: `|X[t] - X*| / |X*|`, mean over tokens, prompts and layers, axes (layout, loop); 0 in the last loop by
            construction.
        cosine: cosine of X[t] and X*, mean alike, axes (layout, loop).
        norm: norm of X[t], mean alike, axes (layout, loop). It may grow while the cosine says that nothing changes.
        degeneracy: lowest cosine between the fixed points of layer 0 and of another layer, axis (layout).
        n_layers: layers in the loop.
        d_model: width.
        std: of the weights.
        embed_std: of the embedding, and of the initial state where it is noise.
    """

    distance: Estimate
    cosine: Estimate
    norm: Estimate
    degeneracy: Estimate
    n_layers: int
    d_model: int
    std: Std
    embed_std: float

    @property
    def verdicts(self) -> dict[str, str]:
        """What the state of every layout does, seen after half of the loops; the thresholds are our choice.

        "fixed point" if X is within 1 % of X*, "direction only" if just their cosine is above 0.9, else "does not settle". A
        fixed point or direction that all layers have in common (degeneracy above 0.999) is called "shared".
        """
        half = self.distance.values.shape[1] // 2 - 1
        found = {}
        for k, layout in enumerate(self.distance.labels["layout"]):
            if self.distance.values[k, half] < SETTLED:
                verdict = "fixed point"
            elif self.cosine.values[k, half] > ALIGNED:
                verdict = "direction only"
            else:
                found[layout] = "does not settle"
                continue
            lowest = float(self.degeneracy.values[k])  # NaN in a loop of one layer
            found[layout] = verdict + (", shared" if lowest > SHARED else ", one per layer" if lowest == lowest else "")
        return found

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per (layout, loop)."""
        return table(self.distance, self.cosine, self.norm)

    def summary(self) -> str:
        """A table as text: distance, cosine and norm after half of the loops, degeneracy and verdict of every layout."""
        half, n_loops = self.distance.values.shape[1] // 2 - 1, self.distance.values.shape[1]
        head = ["layout", f"distance at {half + 1}", "cosine", "norm", f"norm at {n_loops}", "degeneracy", "verdict"]
        rows = [head]
        for k, (layout, verdict) in enumerate(self.verdicts.items()):

            def show(estimate: Estimate, *at: int) -> str:
                error = estimate.stderr[at].item()
                return f"{estimate.values[at].item():.3g}" + (f" ± {error:.1g}" if error == error else "")

            cells = [show(e, k, half) for e in (self.distance, self.cosine, self.norm)]
            rows.append([layout, *cells, show(self.norm, k, n_loops - 1), show(self.degeneracy, k), verdict])
        std = "1/sqrt(fan_in)" if self.std == "fan_in" else self.std
        size = f"{counted(self.n_layers, 'layer')} of width {self.d_model}, {counted(n_loops, 'loop')}"
        title = f"{size}, {counted(self.distance.count, 'seed')}, weights of std {std}, embedding of std {self.embed_std:g}"
        return "\n".join([title, "", *aligned(rows)])

    def panels(self) -> list[Panel]:
        """Distance to X* over the loops, one line per layout."""
        colours, lines = ("#2166ac", "#1a9850", "#d73027"), list[dict[str, Any]]()
        for k, (name, row) in enumerate(zip(self.distance.labels["layout"], self.distance.values.tolist(), strict=True)):
            dash = "solid" if k < len(NORMS) else "dot"
            y = row[:-1]  # the last is 0 by construction
            lines.append({"name": name, "x": list(range(len(y))), "y": y, "ink": colours[k % len(NORMS)], "dash": dash})
        roles = {"x": Axis("loop"), "y": Axis("relative distance to X*", scale="log")}
        title = f"Distance to X*, mean over {self.distance.count} initialisations"
        return [Panel("lines", lines, roles, caption=title)]


def random_init_sweep(
    *,
    n_layers: int = 12,
    d_model: int = 128,
    n_loops: int = 128,
    seeds: int | Sequence[int] = 3,
    std: Std = 0.02,
    embed_std: float = 1.0,
    verbose: bool = True,
) -> RandomInitSweep:
    """Which of six layouts reach a fixed point at random initialisation (arXiv 2604.11791, figure 6).

    Pre-norm, Huginn's norms on the stream, and Ouro's sandwich norms with a norm after every pass; each with and without
    concat-linear injection of the embedding. No prelude, no coda, no positions; 4 heads; 4 prompts of 16 random tokens. X* is
    the last loop. With injection the initial state is noise as large as the embedding (the paper's is not known), drawn anew
    for every seed; without, it is the embedding. The prompts are the same for all seeds. The result depends on the scale of the
    weights and of the embedding, so look at more than one: what is injected has to be as large as the state that it is to hold.

    Args:
        n_layers: layers in the loop; the paper's 12, also 4 and 16.
        d_model: width, a multiple of 4.
        n_loops: how many loops to run.
        seeds: how many initialisations, of weights and of initial noise, or which.
        std: of every matrix; "fan_in" for 1/sqrt of its number of inputs.
        embed_std: of the embedding; 1 is our choice.
        verbose: show a progress bar.

    Raises:
        LoopedError: fewer than four loops; no seeds; a std that is no positive number.

    Example:
        >>> found = random_init_sweep(n_layers=2, d_model=16, n_loops=8, seeds=2, verbose=False)
        >>> found.distance.values.shape, found.distance.count
        (torch.Size([6, 8]), 2)
        >>> found.verdicts["pre-norm, injection"].split(",")[0]
        'fixed point'
    """
    from .. import LoopedBridge, LoopedConfig

    need_loops(check_count("n_loops", n_loops), 4, "random_init_sweep", "a look at half of the loops")
    chosen = list(range(check_count("seeds", seeds))) if isinstance(seeds := plain(seeds), int) else list(seeds)
    if not chosen:
        raise LoopedError("random_init_sweep was asked of no seeds; name at least one.")
    if std != "fan_in" and (isinstance(std, (bool, str)) or not 0 < std < float("inf")):
        raise LoopedError(f'std={std!r} was asked; pass a positive number or "fan_in".')
    if isinstance(embed_std, bool) or not 0 < embed_std < float("inf"):
        raise LoopedError(f"embed_std={embed_std!r} was asked; pass a positive number.")
    layouts = {f"{n}, {i}": NORMS[n] | INJECTIONS[i] for i in INJECTIONS for n in NORMS}
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    drawn = d_model**-0.5 if std == "fan_in" else std  # of the embedding matrix, before its scale
    common: dict[str, Any] = {"d_model": d_model, "n_heads": 4, "d_vocab": 256, "n_core": n_layers, "n_loops": 2}
    progress = tqdm(total=len(layouts) * len(chosen), desc="random_init_sweep", disable=not verbose)
    measured: dict[str, list[dict[str, Tensor]]] = {}
    for name, layout in layouts.items():
        cfg = LoopedConfig(**common, rope_layout="none", embed_scale=embed_std / drawn, noise_std=embed_std, **layout)
        bridge = LoopedBridge.from_config(cfg)
        for seed in chosen:
            draw(bridge.plain, seed, std)
            state = seed if cfg.initial_state == "noise" else None
            measured.setdefault(name, []).append(_curves(streams(bridge, tokens, n_loops, state)))
            progress.update()
        del bridge
        gc.collect()  # a model and its hooks refer to each other, and the next has as many weights
    progress.close()

    def of_seed(k: int) -> RandomInitSweep:
        labels = {"layout": list(layouts), "loop": list(range(n_loops))}
        estimates = {}
        for key in ("distance", "cosine", "norm", "degeneracy"):
            values = torch.stack([runs[k][key] for runs in measured.values()])[None]
            axes = ("layout",) if key == "degeneracy" else ("layout", "loop")
            estimates[key] = Estimate.of(values, axes, {axis: labels[axis] for axis in axes}, key)
        return RandomInitSweep(**estimates, n_layers=n_layers, d_model=d_model, std=std, embed_std=embed_std)

    return reduce(add, map(of_seed, range(len(chosen))))


@torch.no_grad()
def draw(model: Any, seed: int, std: Std) -> None:
    """Draw all matrices in place, of a given std or 1/sqrt of their number of inputs, in the order of their names."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _, parameter in sorted(model.canonical_parameters().items()):
        if parameter.ndim == 2:
            parameter.normal_(0, 1.0 if std == "fan_in" else std, generator=generator)
            if std == "fan_in":
                parameter /= parameter.shape[1] ** 0.5


@torch.no_grad()
def streams(
    model: Looped, tokens: Int[Tensor, "batch pos"], n_loops: int, state: int | None
) -> Float[Tensor, "loop layer batch pos d_model"]:
    """What leaves the layers in every loop of a model of two loops or more that are all alike.

    Its first loop is run again and again, each time from the state that it left: many loops need no more modules than two.
    """
    (first,) = model.schedule.passes_in(0)
    seen: list[Tensor] = []
    names = [*layer_hooks(model.schedule, [first], "hook_resid_post"), f"{model.schedule.pass_prefix(first)}.hook_out"]
    hooks = [(name, lambda value, hook: seen.append(value)) for name in names]
    begins: InitialState = state
    size = (n_loops, first.n_layers, *tokens.shape, model.cfg.d_model)
    found = torch.empty(size, dtype=model.cfg.dtype, device=model.cfg.device)  # in one piece, apart from what is freed
    for t in range(n_loops):
        model.run_with_hooks(tokens, hooks, stop=first.layers.stop, initial_state=begins)
        begins = seen.pop()
        torch.stack(seen, out=found[t])
        check_finite(found[t], f"the residual stream of loop {t}")
        seen.clear()
    return found


def _curves(found: Float[Tensor, "loop layer batch pos d_model"]) -> dict[str, Tensor]:
    """Distance to the last loop, cosine and norm by loop, and the degeneracy; means over tokens, prompts and layers."""

    def of_prompts(x: Float[Tensor, "layer batch pos"]) -> Float[Tensor, "layer batch"]:
        return x.nanmean(-1).double()

    end = wide(found[-1])
    curves = {name: torch.empty(len(found), dtype=torch.float64, device="cpu") for name in ("distance", "cosine", "norm")}
    for t, x in enumerate(map(wide, found)):
        parts = (relative_distance(x, end), cosine(x, end), x.norm(dim=-1))
        for curve, part in zip(curves.values(), parts, strict=True):
            curve[t] = of_prompts(part).mean(1).mean()
    others = of_prompts(torch.stack([cosine(end[0], other) for other in end[1:]])) if len(end) > 1 else end[:0]
    lowest = others.amin(0).mean() if len(others) else torch.tensor(torch.nan, dtype=torch.float64)
    return curves | {"degeneracy": lowest.cpu()}
