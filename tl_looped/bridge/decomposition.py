"""What every component of a looped model contributes to its residual stream, exactly.

With the scale of every norm frozen at its value in a run, the way from anything that is written to the residual stream to any
later stream is linear and acts on each position separately: additions, norms of the stream, injections, anchored mixing, the
sum of two states. `walk` goes that way once, as `LoopedModel.forward` does, without attention and MLP. `Decomposition.carry`
sends vectors along it, one row per component; `Decomposition.pull_back` sends one direction back, without a component axis.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._together import joined
from ..errors import LoopedError, NotASumError, UnknownNameError
from ..looped import require
from ..model import LoopedModel
from ..model.crossings import crossings
from ..model.frozen import frozen
from ..model.loops import Apply, Parts, Stream
from ..schedule import virtual_layer

FINAL = "ln_final.hook_in"
REMAINDER = "remainder"
# An edited residual stream is no sum of its components. Rounding alone stays below these, relative to the largest entry.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.25


class Write(NamedTuple):
    """One write to the residual stream: its label, the hook that holds what is written, the virtual layer that writes it."""

    label: str
    hook: str
    layer: int | None = None


@dataclass(frozen=True)
class Fan:
    """Vectors that one write is the sum of (heads or neurons), as coefficients [..., k, i] of rows of a weight [k, i, d_model].

    Where the branch has a norm, `gain` [..., d_model] is what it multiplies its output by.
    """

    coefficients: Tensor
    weight: Tensor
    gain: Tensor | None

    def vectors(self) -> Float[Tensor, "k ... d_model"]:
        """The vectors as they are added to the stream."""
        out = torch.einsum("...ki,kid->k...d", self.coefficients, self.weight)
        return out if self.gain is None else out * self.gain

    def along(self, direction: Float[Tensor, "... d_model"]) -> Float[Tensor, "k ..."]:
        """Their products with a direction, without making the vectors."""
        direction = direction if self.gain is None else direction * self.gain
        return torch.einsum("...ki,...ki->k...", self.coefficients, torch.einsum("kid,...d->...ki", self.weight, direction))


def has_own_state(model: LoopedModel, cache: Any) -> bool:
    """Whether the first pass of a run starts from a state that is not the embedding."""
    state, before = model.loop.state_before
    return model.cfg.initial_state != "embedding" or not torch.equal(cache[state], cache[before].to(cache[state].device))


def walk(
    model: LoopedModel,
    apply: Apply,
    write: Callable[[Tensor | None, Write], Tensor],
    own_state: bool,
    injections: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Follow the residual stream of a run, and yield it wherever a component reads it.

    Args:
        model: the model; its attention and MLPs are not run.
        apply: runs a module that lies on the way of the stream.
        write: add what is written at one point to the stream, or begin a stream with it.
        own_state: the first pass does not start from the embedding but from a state of its own.
        injections: what is injected in a pass is written there, instead of following it back to where it came from.

    Yields:
        The name of the hook that holds this stream in a run, and the stream, [..., d_model].
    """
    schedule = model.cfg.schedule

    def around(module: Any, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
        place, _, last = name.rpartition(".")
        if name == FINAL.removesuffix(".hook_in"):
            return inputs[0]  # the stream ends where the last norm reads it
        if last == "hook_injection" and (injections or model.loop.lag):
            return write(None, Write(f"{place}.injection", name))
        if last == "hook_in":
            return inputs[0].clone()  # writes may be in place
        if last in model.loop.held:
            return apply(module, name, inputs)
        if getattr(getattr(module, "_original_component", module), "BESIDE", False):
            return inputs[0]  # no part of the stream goes through it
        return inputs[0] if last.startswith("hook_") else apply(module, name, inputs)

    def initial(default: Tensor | None, like: Tensor) -> Tensor:
        if own_state or default is None:
            return write(None, Write("initial_state", model.loop.state_before[0]))
        return default

    stream = Stream(write(None, Write("embed", "hook_embed")))
    parts = Parts(model, schedule.passes[0], around)
    for i in crossings(
        model, stream, range(schedule.n_layers), around, lambda x: model.loop.begin(parts, x, initial), gates=False
    ):
        if i == schedule.n_layers:
            continue
        block: Any = model.blocks[i]

        def here(module: Any, name: str, x: Tensor, i: int = i) -> Tensor:
            return apply(module, f"blocks.{i}.{name}", (x,))

        def written(x: Tensor | None, branch: str, i: int = i) -> Tensor:
            return write(x, Write(schedule.name(i, f"{branch}_out"), f"blocks.{i}.hook_{branch}_out", i))

        stream.x = yield from _named(f"blocks.{i}.hook_resid_", block.follow(stream.x, stream.carried, here, written))
    yield FINAL, stream.x


def _named(place: str, layer: Generator[tuple[str, Tensor], None, Tensor]) -> Generator[tuple[str, Tensor], None, Tensor]:
    """The streams of a layer by the names of their hooks; what leaves it is returned."""
    while True:
        try:
            at, x = next(layer)
        except StopIteration as end:
            return end.value
        yield f"{place}{at}", x


def check_sum(total: Tensor, of_run: Tensor, what: str) -> None:
    """Refuse a run in which a sum of components is not what the run had there, beyond rounding; `what` that is."""
    half = of_run.dtype in (torch.float16, torch.bfloat16)
    error = (total - of_run).abs().max() / of_run.abs().max().clamp(min=1e-30)
    if not error < (HALF_TOLERANCE if half else TOLERANCE):
        raise NotASumError(
            f"the components of {what} do not sum to it (relative error {error:.2g}): the residual stream was edited in this "
            "run, so that it is no sum of components. Decompose a run without such a hook; edits of attention and MLP outputs "
            "and of the initial state are fine."
        )


def check_activations(cache: Any) -> None:
    """Refuse gradients that stand in a cache under the names of activations."""
    if cache.cache_dict and all(name.endswith("_grad") for name in cache.cache_dict):
        raise gradients_instead(", ".join(list(cache.cache_dict)[:3]))
    scales = [value.flatten() for name, value in cache.cache_dict.items() if name.endswith("hook_scale")]
    if scales and bool((joined(scales) <= 0).any()):
        raise gradients_instead("norms with scales that are not positive")


def gradients_instead(found: str) -> LoopedError:
    """The error where activations were needed and a cache has gradients, as what was found shows."""
    return LoopedError(
        f"activations are needed, but the cache holds gradients ({found}), which are no sums of what components write. Read "
        "them one by one, or use tl_looped.attribution.attribution_sweep, which multiplies gradients with differences of "
        "activations."
    )


class Reader:
    """Reads what one cached run wrote, at chosen positions (a `Slice`), beside the weights that made it."""

    def __init__(self, cache: Any, positions: Any):
        cache.check_real(positions)
        check_activations(cache)
        self.cache: Any = cache
        self.positions: Any = positions
        self.bridge: Any = cache.model
        self.model: LoopedModel = self.bridge.plain
        self.device: Any = cache["hook_embed"].device if "hook_embed" in cache else None  # where layers' activations meet
        cache.check_weights("a decomposition")

    def get(self, name: str, dim: int = -2) -> Tensor:
        """A cached tensor at the positions asked for, in fp32 or wider, without gradient."""
        return self.positions.apply(self._everywhere(name, dim), dim=dim)

    def _everywhere(self, name: str, dim: int) -> Tensor:
        """A cached tensor at all positions, in fp32 or wider, without gradient."""
        value = self.cache[name].detach().to(self.device)
        if behind := self.behind(name):  # by the position that reads it in the end
            edge = value.narrow(dim, 0, min(behind, value.shape[dim]))
            edge = torch.ones_like(edge) if name.endswith("hook_scale") else torch.zeros_like(edge)
            value = torch.cat((edge, value.narrow(dim, 0, value.shape[dim] - edge.shape[dim])), dim)
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    def behind(self, name: str) -> int:
        """How many positions earlier a hook holds what is read where the reading ends."""
        return 0

    def heads(self, layer: int) -> Fan:
        """The heads of a layer; their sum is what the attention writes, without the bias of o."""
        result, gain = f"blocks.{layer}.attn.hook_result", self._gain(layer, "ln1_post")
        if result in self.cache:  # where it may have been edited
            z = self._everywhere(result, -3)
            weight = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand(z.shape[-2], -1, -1)
        else:
            z = self._everywhere(f"blocks.{layer}.attn.hook_z", -3)
            weight = self.bridge.blocks[layer].attn.W_O.detach().to(z.device, z.dtype)
        block: Any = self.model.blocks[layer]
        coefficients, rows = block.heads_written(z, weight, self.cache.padding())
        fan = Fan(self.positions.apply(coefficients, dim=-3), rows, gain)
        if rows is not weight:
            total = torch.einsum("...ki,kid->...d", fan.coefficients, rows)
            check_sum(
                total,
                self.get(f"blocks.{layer}.hook_attn_out").to(self.cache["hook_embed"].dtype),
                f"what the heads of layer {layer} write (which reads "
                "earlier positions, so that a cache of some positions cannot be split)",
            )
        return fan

    def neurons(self, layer: int, chosen: Any) -> Fan:
        """The chosen neurons of a layer (a `Slice` that keeps the axis)."""
        require(self.bridge, "neurons", "contributions of neurons")
        post = chosen.apply(self.get(f"blocks.{layer}.mlp.hook_post"), dim=-1)
        weight = chosen.apply(self.bridge.blocks[layer].mlp.W_out.detach(), dim=0).to(post.device, post.dtype)
        return Fan(post.unsqueeze(-1), weight.unsqueeze(-2), self._gain(layer, "ln2_post"))

    def _gain(self, layer: int, name: str) -> Tensor | None:
        norm: Any = getattr(self.model.blocks[layer], name)
        if norm is None:
            return None
        held = [self.get(f"blocks.{layer}.{name}.{hook}") for hook in norm.HELD]
        return norm.frozen(held[0].new_ones(self.model.cfg.d_model), *held)  # it acts on every entry by itself


class Decomposition(Reader):
    """The components of the residual stream at one point of a cached run.

    Args:
        cache: a `LoopedCache`.
        point: the hook that holds the stream: `blocks.{i}.hook_resid_pre`, `blocks.{i}.hook_resid_mid` or `ln_final.hook_in`.
        positions: a TransformerLens `Slice` of positions.
        injections: take what is injected in a pass as a component of that pass, instead of following it back.
        also: names of hooks that the caller will read beside those needed here.
    """

    def __init__(
        self,
        cache: Any,
        point: str,
        positions: Any,
        injections: bool = False,
        also: Callable[[Write], list[str]] | None = None,
    ):
        super().__init__(cache, positions)
        self.point: str = point
        self.injections: bool = injections
        if injections and (why := self.model.loop.not_injected) is not None:
            raise LoopedError(f"injections=True was asked, but {why}; leave it out.")
        self.own_state: bool = self._has_own_state()
        self.writes: list[Write] = []
        self.read: list[tuple[str, int]] = []  # every stream up to the point, and the number of writes before it
        needed: list[str] = []

        def scale(name: str) -> Tensor:
            needed.append(name)
            return torch.ones(1, 1, device="meta")

        def write(x: Tensor | None, at: Write) -> Tensor:
            self.writes.append(at)
            needed.extend([at.hook, *(also(at) if also else [])])
            return torch.zeros(1, self.model.cfg.d_model, device="meta") if x is None else x

        for name, _ in walk(self.model, frozen(scale), write, self.own_state, injections):
            self.read.append((name, len(self.writes)))
            if name == point:
                break
        self._require(needed)
        self.like: Tensor = self.get("hook_embed")

    def behind(self, name: str) -> int:
        """How many positions earlier a hook holds what is read at the point."""
        lag = self.model.loop.lag
        return lag and lag * (self._loop_of(self.point) - self._loop_of(name))

    def _loop_of(self, name: str) -> int:
        schedule = self.model.cfg.schedule
        loop = schedule.names.loop_of(name)
        return loop if loop is not None else 0 if name == "hook_embed" else schedule.n_loops - 1

    def _require(self, names: list[str]) -> None:
        missing = [name for name in dict.fromkeys(names) if name not in self.cache]
        if gradients := [f"{name}_grad" for name in missing if f"{name}_grad" in self.cache]:
            raise gradients_instead(", ".join(gradients[:3]))
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise UnknownNameError(
                f"a decomposition of {self.point} was asked, but the cache lacks {shown}; cache a whole run, or name these in "
                "names_filter. A run that began or stopped inside the model cannot be decomposed."
            )

    def _has_own_state(self) -> bool:
        """Whether the first pass starts from a state that is not the embedding."""
        cfg, layer = self.model.cfg, virtual_layer(self.point)
        if cfg.initial_state == "embedding":
            if layer is not None and layer < cfg.n_prelude:
                return False  # the point lies before the first pass
            self._require(list(self.model.loop.state_before))
        return has_own_state(self.model, self.cache)

    def _stream(self, held: Callable[[str], Tensor], write: Callable[[Tensor | None, Write], Tensor]) -> Tensor:
        """The stream at the point, on a walk with what norms held."""
        walked = walk(self.model, frozen(held), write, self.own_state, self.injections)
        return next(x for name, x in walked if name == self.point)

    def _check(self, total: Tensor) -> None:
        """Compare the sum of all components with the stream of the run, where it was cached."""
        if self.point not in self.cache:
            return
        try:
            of_run = self.positions.apply(self.cache[self.point].detach(), dim=-2)
            check_sum(total, of_run.to(total.device, self.cache["hook_embed"].dtype), self.point)  # which rounded its parts
        except LoopedError as error:
            if not self.model.loop.lag:
                raise
            raise LoopedError(
                f"{error} In this {self.model.cfg.family} model a loop reads what the loop before made of the position "
                "before, so that a cache of some positions (pos_slice), or of a text whose start was run earlier, cannot be "
                "decomposed either: cache all positions, and choose some with positions= here."
            ) from error

    @torch.no_grad()
    def carry(
        self, n_rows: int, parts: Callable[[Write], list[tuple[int | slice, Tensor]]]
    ) -> Float[Tensor, "component ... d_model"]:
        """Carry vectors to the point, `n_rows` of them.

        `parts` says what is written at a point: rows, and the vector or vectors [row, ..., d_model] added to them.
        """
        rows = (n_rows + 1, *self.like.shape)  # the last row is everything, to be compared with the run

        def write(x: Tensor | None, at: Write) -> Tensor:
            x = torch.zeros(rows, dtype=self.like.dtype, device=self.like.device) if x is None else x
            for row, value in parts(at):
                x[row] += value
            x[-1] += self.get(at.hook)
            return x

        stream = self._stream(self.get, write)
        self._check(stream[-1])
        return stream[:-1]

    def pull_back(self, direction: Float[Tensor, "... d_model"]) -> dict[str, Float[Tensor, "... d_model"]]:
        """For every component, the direction whose product with what it writes is its part of `direction . stream`."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves: dict[str, Tensor] = {}

            def scale(name: str) -> Tensor:
                return self.get(name).clone()  # a tensor made in inference mode could not be saved for the way back

            def write(x: Tensor | None, at: Write) -> Tensor:
                leaves[at.label] = leaf = self.get(at.hook).clone().requires_grad_()
                return leaf if x is None else x + leaf

            stream = self._stream(scale, write)
            self._check(stream.detach())
            aimed = direction.detach().clone().to(stream.device, stream.dtype).expand_as(stream)
            grads = torch.autograd.grad(stream, list(leaves.values()), aimed, allow_unused=True)
        return {
            label: torch.zeros_like(leaf, requires_grad=False) if grad is None else grad
            for (label, leaf), grad in zip(leaves.items(), grads, strict=True)
        }

    def components(self, chosen: list[Write]) -> Float[Tensor, "component ... d_model"]:
        """The contributions of whole components."""
        row = {at.label: i for i, at in enumerate(chosen)}
        return self.carry(len(chosen), lambda at: [(row[at.label], self.get(at.hook))] if at.label in row else [])


def branch_inputs(model: LoopedModel, cache: Any, heads: bool, neurons: bool) -> Callable[[Write], list[str]]:
    """The hooks that are needed to split what a layer writes into heads or neurons."""

    def names(at: Write) -> list[str]:
        if at.layer is None:
            return []
        block: Any = model.blocks[at.layer]
        prefix, is_attention = f"blocks.{at.layer}", at.hook.endswith("attn_out")
        if not (heads if is_attention else neurons):
            return []
        result = f"{prefix}.attn.hook_result"
        inner = f"{prefix}.mlp.hook_post" if not is_attention else result if result in cache else f"{prefix}.attn.hook_z"
        norm = "ln1_post" if is_attention else "ln2_post"
        return [inner, *(f"{prefix}.{norm}.{hook}" for hook in getattr(getattr(block, norm), "HELD", ()))]

    return names
