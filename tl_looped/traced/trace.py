"""Tracing: one run of a module is recorded, understood, and compared with further runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._words import aligned, counted
from ..errors import LoopedError
from ..schedule import Schedule
from .attention import FUSED, PATTERN, SCORES, Attention, is_pattern
from .calls import Call, record
from .feed import Feed
from .out import Map, Out, way_out
from .places import Place, Places, is_over, places_of
from .streams import settle
from .structure import Found, find, named
from .watch import Watch, attention_in

WRAPPED = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True, eq=False)
class Trace:
    """What is known of a module that loops.

    Args:
        schedule: the order of its layers.
        order: the module of every virtual layer.
        places: what gets a name.
        out: the way from the stream to the logits.
        d_model: width of the stream.
        d_vocab: size of the vocabulary.
        attention: heads and width of a head; None where no attention was seen.
        ungraded: the passes, as prefixes of names, whose entering state no gradient reaches.
        recomputes: layers run again for gradients, as in checkpointing.
        is_causal: no position sees later ones.
        rows_apart: a row does not depend on the others of its batch.
        is_whole: every layer takes and returns every position.
        is_closed: what follows the loops depends on what their last layer returned, and on nothing else of them.
        shape: of the example.
    """

    schedule: Schedule
    order: list[str]
    places: Places
    out: Out
    d_model: int
    d_vocab: int
    attention: tuple[int, int] | None
    ungraded: list[str]
    recomputes: bool
    is_causal: bool
    rows_apart: bool
    is_whole: bool
    is_closed: bool
    shape: tuple[int, ...]

    def rows(self) -> list[list[str]]:
        """What was found, as the rows of a table."""
        schedule = self.schedule
        stacks = {"prelude": range(schedule.n_prelude)}
        stacks |= {stack: schedule.passes_of(0, stack)[0].layers for stack in schedule.core_stacks}
        stacks |= {"coda": range(schedule.first_coda_layer, schedule.n_layers)}
        rows = [["runs", schedule.describe()]]
        for stack, layers in stacks.items():
            if layers:
                rows.append([stack, ", ".join(self.order[i] for i in layers)])
        rows += [["norm", self.out.names[0]], ["head", self.out.names[1]]]
        rows += [[hook, where] for hook, where in self.places.parts.items()]
        if self.attention is not None:
            rows.append(["attention", counted(self.attention[0], "head")])
        if any(name.endswith(f".{self.places.entrance}") and "loops." in name for name in self.places.also):
            rows.append(["state entering a pass", f"loops.*.{self.places.entrance}"])
        copied = {place.path for place in self.places.places if place.copies}
        if copied:
            rows.append(
                ["changed in place later", f"{', '.join(sorted(copied)[:4])}{', ...' * (len(copied) > 4)}: hooks see a copy"]
            )
        if self.ungraded:
            rows.append(["no gradient reaches", ", ".join(self.ungraded)])
        if self.places.unnamed:
            rows.append(["stream", self.places.unnamed])
        if self.recomputes:
            rows.append(["gradients", "layers run again for them, where no hook acts: refused"])
        if not self.is_causal:
            rows.append(["causal", "no: positions see later ones"])
        if not self.is_whole:
            rows.append(["positions", "not every layer takes all of them: activations of others have hook_in, hook_out"])
        if not self.rows_apart:
            rows.append(["rows of a batch", "depend on each other: sweeps run one patch at a time"])
        return rows

    def table(self) -> str:
        """What was found, as a table."""
        return "\n".join(aligned(self.rows()))


def check_module(module: object) -> nn.Module:
    """Refuse what cannot be traced.

    Args:
        module: what was given.

    Raises:
        LoopedError: it is no module, or one whose calls cannot be seen.
    """
    if not isinstance(module, nn.Module):
        raise LoopedError(f"a {type(module).__name__} was given to be traced; pass a torch.nn.Module that returns logits.")
    if hasattr(module, "hook_dict"):
        raise LoopedError(
            f"a {type(module).__name__} was given to be traced, which has hooks of TransformerLens already; pass the module "
            "inside, such as model.original_model."
        )
    for path, submodule in module.named_modules():
        kind, where = type(submodule).__name__, path or "the module"
        if kind in WRAPPED or kind.startswith("FSDP"):
            raise LoopedError(f"{where} is a {kind}, which hides the calls inside; pass the module that it wraps.")
        if isinstance(submodule, torch.jit.ScriptModule):
            raise LoopedError(f"{where} is a {kind}, whose calls cannot be seen; pass the module that was scripted.")
        if getattr(submodule, "_compiled_call_impl", None) is not None:
            raise LoopedError(f"{where} is compiled, and compiled code does not see hooks; trace it before module.compile().")
        if submodule.training and getattr(submodule, "gradient_checkpointing", False):
            raise LoopedError(
                f"{where} uses gradient checkpointing, which would run its layers again without hooks; call module.eval(), or "
                "module.gradient_checkpointing_disable()."
            )
    return module


@torch.no_grad()
def trace(
    module: nn.Module,
    feed: Feed,
    run: Callable[[Tensor, Mapping[str, Any]], Any],
    tokens: Tensor,
    own: Mapping[str, Any],
    *,
    layers: object = None,
    n_prelude: int | None = None,
    like: Schedule | None = None,
    norm: str | Map | None = None,
    head: str | Map | None = None,
    parts: Mapping[str, str] | None = None,
) -> Trace:
    """Run a module on an example and find what loops in it.

    Args:
        module: the module.
        feed: how it is called.
        run: runs it.
        tokens: of the example, [batch, pos].
        own: what else the example is given.
        layers: as in `LoopedBridge.trace`.
        n_prelude: likewise.
        like: of the same module at another depth, where that is known.
        norm: likewise.
        head: likewise.
        parts: likewise.

    Raises:
        LoopedError: nothing loops, or runs are not repeatable, or hooks change what they do not touch.
    """
    shape = tokens.shape[:2]
    attended: list[tuple[int, Attention]] = []
    calls: list[Call] = []

    def seen(func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        inner = next((c for c in reversed(calls) if c.is_open), None)
        attention = _attention(func, args, kwargs, out, inner)
        if attention is not None:
            attended.append((len(calls), attention))

    recorded = record(module, lambda: attention_in(module, lambda: run(tokens, own), seen), into=calls)
    seen_logits = feed.logits(recorded.output, shape)
    logits, again = (feed.logits(run(tokens, own), shape) for _ in range(2))
    settle(recorded.calls, shape)
    found = find(recorded, None if layers is None else named(module, layers), n_prelude, like)
    by_layer = _by_layer(found, [a for _, a in attended])
    places = places_of(module, recorded, found, by_layer, shape, parts or {})
    out = way_out(module, recorded, found.calls[-1], seen_logits, norm, head)
    order = [call.path for call in found.calls]

    if not torch.equal(again, logits):
        hint = "call module.eval()" if module.training else "pass seed= if it draws random numbers"
        raise LoopedError(f"two runs of the module on the same input differ by {_apart(again, logits):.2g}; {hint}.")
    fired: set[str] = set()
    points = [(place, _firing(place, fired)) for place in places.places if place.side not in (SCORES, PATTERN)]
    watched = feed.logits(Watch(module, order, points, None).run(lambda: run(tokens, own)), shape)
    if not (_close(watched, logits) and _close(seen_logits, logits)):  # it may have a faster way where nobody looks
        raise LoopedError(
            f"with hooks that change nothing, the module's logits differ by {_apart(watched, logits):.2g}: it changes tensors "
            "in place and relies on others seeing it, or it looks at its own hooks. Write the in-place step as a new tensor."
        )
    if silent := [place.name for place, _ in points if place.name not in fired]:
        raise LoopedError(
            f"{silent[0]}{' and others' * (len(silent) > 1)} did not fire in a second run on the same input: which "
            "submodules the module calls is not a function of its input."
        )
    for stack in _mixing(module, found.schedule, order, places, lambda: run(tokens, own)):
        for p in found.schedule.passes:
            if p.stack == stack:
                del places.also[f"{found.schedule.pass_prefix(p)}.hook_out"]
    is_causal, rows_apart = _relations(feed, run, tokens, own, logits)
    takes = found.calls[found.schedule.passes[0].first].takes
    first = next((a for _, a in attended if a.call is not None), None)
    ungraded, recomputes = _ungraded(module, found, order, lambda: feed.logits(run(tokens, own), shape))
    return Trace(
        found.schedule,
        order,
        places,
        out,
        d_model=logits.shape[-1] if takes is None else takes.shape[-1],
        d_vocab=logits.shape[-1],
        attention=None if first is None else (first.n_heads, first.d_head),
        ungraded=ungraded,
        recomputes=recomputes,
        is_causal=is_causal,
        rows_apart=rows_apart,
        is_closed=_is_closed(module, found.schedule, order, places, lambda: feed.logits(run(tokens, own), shape), logits),
        is_whole=all(is_over(x, shape) for call in found.calls for x in (call.takes, call.gives)),
        shape=tuple(shape),
    )


def _mixing(module: nn.Module, schedule: Schedule, order: list[str], places: Places, run: Callable[[], Any]) -> list[str]:
    """The stacks whose next pass is not given what the last one returned, and something added: a gate is between, or a norm.

    What a pass returns is changed a little; if the state entering the next pass does not change by as much, it is not the state
    that leaves the pass.
    """
    by_name = {place.name: place for place in places.places}
    mixing: list[str] = []
    for stack in schedule.core_stacks:
        passes = schedule.passes_of("all", stack)
        pairs = [(p, q) for p, q in pairwise(passes) if q.index == p.index + 1]
        if not pairs or places.entrance == "hook_state":
            continue
        (p, q), entered = pairs[0], list[Tensor]()
        left = by_name.get(places.also.get(f"{schedule.pass_prefix(p)}.hook_out", ""))
        enters = by_name.get(f"blocks.{q.first}.hook_resid_pre")
        if left is None or enters is None:
            continue
        change: list[Tensor] = []

        def nudge(x: Tensor, change: list[Tensor] = change) -> Tensor:
            step = torch.linspace(-0.1, 0.1, x.shape[-1], dtype=x.dtype, device=x.device) * x.abs().max().clamp(min=1.0)
            change.append(step.expand_as(x))
            return x + step

        def keep(x: Tensor, entered: list[Tensor] = entered) -> Tensor:
            entered.append(x)
            return x

        Watch(module, order, [(enters, keep)], None).run(run)
        Watch(module, order, [(left, nudge), (enters, keep)], None).run(run)
        before, after = entered
        scale = max(float(before.abs().max()), 1.0)
        if (
            before.shape != change[0].shape
            or float((after - before - change[0]).abs().max()) > max(1e-3, _rounding(before.dtype)) * scale
        ):
            mixing.append(stack)
    return mixing


def _is_closed(
    module: nn.Module, schedule: Schedule, order: list[str], places: Places, run: Callable[[], Tensor], logits: Tensor
) -> bool:
    """Whether the logits stay if all loops change but what their last layer returns."""
    by_name = {place.name: place for place in places.places}
    first = by_name.get(f"blocks.{schedule.passes[0].first}.hook_resid_pre")
    last = by_name.get(f"blocks.{schedule.first_coda_layer - 1}.hook_resid_post")
    if first is None or last is None:
        return False
    left: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        left.append(x.clone())
        return x

    Watch(module, order, [(last, keep)], None).run(run)
    changed = Watch(module, order, [(first, lambda x: x + x.flip(-1)), (last, lambda x: left[0])], None).run(run)
    return _close(changed, logits)


def _firing(place: Place, fired: set[str]) -> Callable[[Tensor], Tensor]:
    def see(x: Tensor) -> Tensor:
        fired.add(place.name)
        return x

    return see


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.shape == other.shape else float("inf")


def _attention(func: Any, args: Any, kwargs: Any, out: Tensor, call: Call | None) -> Attention | None:
    """What was computed, if it is attention."""
    if func is FUSED:
        q, k, v = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        return Attention(call, q.shape[1], q.shape[-1], q, k, v, out) if q.ndim == 4 else None
    return Attention(call, out.shape[1], 0) if is_pattern(out) else None


def _by_layer(found: Found, attended: list[Attention]) -> dict[int, list[Attention]]:
    """What was attended in every layer, by the index of its call."""
    layers = {id(call): call for call in found.calls}
    result: dict[int, list[Attention]] = {}
    for attention in attended:
        call = attention.call
        while call is not None and id(call) not in layers:
            call = call.parent
        if call is not None:
            result.setdefault(call.index, []).append(attention)
    return result


def _relations(
    feed: Feed, run: Callable[[Tensor, Mapping[str, Any]], Any], tokens: Tensor, own: Mapping[str, Any], logits: Tensor
) -> tuple[bool, bool]:
    """Whether the last token changes nothing before it, and whether rows say the same beside others."""
    shape, other = tokens.shape[:2], tokens.clone()
    other[:, -1] = tokens[:, -1] + 1 if tokens.is_floating_point() else (tokens[:, -1] + 1) % logits.shape[-1]
    twice = {key: torch.cat([value, value]) if isinstance(value, Tensor) else value for key, value in own.items()}
    try:
        changed = feed.logits(run(other, own), shape)
        both = feed.logits(run(torch.cat([tokens, other]), twice), torch.Size((2 * shape[0], shape[1])))
    except Exception:  # whatever the module raises: it does not take one of the two
        return False, False
    is_causal = shape[1] > 1 and _close(changed[:, :-1], logits[:, :-1])
    return is_causal, _close(both, torch.cat([logits, changed]))


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two runs say the same, up to sums in another order: 1e-4 of the largest logit, a few units of half precision."""
    scale = float(other.detach().abs().max()) if other.numel() else 1.0
    return bool((one - other).abs().max() <= _rounding(other.dtype) * max(scale, 1e-30)) if one.numel() else True


def _rounding(dtype: torch.dtype) -> float:
    """How far numbers of a dtype may be apart, in units of the largest, that differ by the order of sums alone."""
    eps = torch.finfo(dtype).eps
    return 8 * eps if eps > 1e-4 else 1e3 * eps


def _ungraded(module: nn.Module, found: Found, order: list[str], logits: Callable[[], Tensor]) -> tuple[list[str], bool]:
    """The passes whose entering state no gradient of the logits reaches: run under no_grad, or cut off by detach.

    And whether layers run again for gradients.
    """
    entered: dict[str, Tensor] = {}
    firsts = {found.schedule.pass_prefix(p): found.calls[p.first] for p in found.schedule.passes}
    passes = {
        prefix: Place(prefix, call.path, call.number, "in", at=call.taken.at)
        for prefix, call in firsts.items()
        if call.taken is not None
    }

    def keep(prefix: str) -> Callable[[Tensor], Tensor]:
        def point(x: Tensor) -> Tensor:
            if not x.requires_grad and torch.is_grad_enabled():
                x = x.detach().requires_grad_()
            entered[prefix] = x
            return x

        return point

    points = [(place, keep(prefix)) for prefix, place in passes.items()]
    with torch.inference_mode(False), torch.enable_grad():
        value = Watch(module, order, points, None).run(logits)
        graded = [prefix for prefix in entered if entered[prefix].requires_grad]
        if not value.requires_grad or not graded:
            return list(passes), False
        again: list[int] = []
        handles = [module.get_submodule(path).register_forward_pre_hook(lambda *_: again.append(1)) for path in set(order)]
        try:
            grads = torch.autograd.grad(value.float().sum(), [entered[prefix] for prefix in graded], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
    reached = {prefix for prefix, grad in zip(graded, grads, strict=True) if grad is not None}
    return [prefix for prefix in passes if prefix not in reached], bool(again)
