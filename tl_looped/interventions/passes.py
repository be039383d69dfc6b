"""Leaving out layers and loops, running a loop again, and freezing attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._old_calls import accepts_old
from ..errors import LoopedError
from ..looped import AnyLooped, Looped, check_model, require
from ..schedule import Indices, LoopSelector, Pass, Schedule, check_count, select_indices
from ..sites import select_layers
from ._hooks import Hooks, Seen, passes_from, unit_mask


@accepts_old("loops", "layers")
def skip_layer(model: Looped, *, loops: LoopSelector = "all", layers: Indices = None, stack: str | None = None) -> Hooks:
    """Make layers the identity on the residual stream in chosen loops: no branch, no norm on the stream.

    The layers are computed and their result is discarded, so a cache also holds what they would have written.

    Args:
        model: the model.
        loops: in which loops.
        layers: layers inside the loop (or inside the prelude or coda); None for all.
        stack: "L" or "H" for HRM-Text; "prelude" or "coda" (without `loops`).

    Raises:
        LoopedError: loops or layers that do not exist.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
        >>> hooks = skip_layer(model, loops="last", layers=0)
        >>> [name for name, _ in hooks]
        ['loops.2.blocks.0.hook_resid_pre', 'loops.2.blocks.0.hook_resid_post']
    """
    check_model(model)
    require(model, "one stream", "a layer that is left out")
    name = model.schedule.name
    pairs = [
        (name(i, "hook_resid_pre"), name(i, "hook_resid_post")) for i in select_layers(model.schedule, loops, layers, stack)
    ]
    return _identities(pairs)


def skip_loop(model: Looped, loops: LoopSelector, *, stack: str | None = None) -> Hooks:
    """Make passes the identity on the state: no injection, no layers, no norm after the pass.

    The next pass finds the state that entered, which is how a model without the pass would run; the exit gate of the pass, if
    there is one, reads that state. The pass is computed and its result is discarded. An anchored loop (`loop_layers`) mixes in
    what the layers of its first pass write, also if that pass is skipped.

    Args:
        model: the model.
        loops: which loops.
        stack: "L" or "H" for HRM-Text, whose passes are skipped one by one.

    Raises:
        LoopedError: loops that do not exist; the last loop, if the unembedding has absorbed the weight of its norm
            (compatibility mode).

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> torch.equal(model.run_with_hooks(tokens, fwd_hooks=skip_loop(model, 1)), model.unroll(2)(tokens))
        True
    """
    check_model(model)
    for ability in ("one stream", "state"):
        require(model, ability, "a loop that is left out")
    schedule = model.schedule
    chosen = schedule.passes_of(loops, stack)
    if schedule.passes[-1] in chosen:
        require(model, "equal passes", f"a run without the last loop (loops={loops!r})")
    prefixes = dict.fromkeys(schedule.pass_prefix(p) for p in chosen)
    return _identities([(f"{prefix}.{model.entrance}", f"{prefix}.hook_out") for prefix in prefixes])


def _identities(pairs: Iterable[tuple[str, str]]) -> Hooks:
    """Hooks that write what they saw at the first name of a pair to the second."""

    def identity(before: str, after: str) -> Hooks:
        seen = Seen()
        return [(before, seen.store), (after, lambda x, hook: seen.load(hook, before))]

    return [hook for pair in pairs for hook in identity(*pair)]


@accepts_old("times")
def repeat_loop(
    model: AnyLooped, loop: int, *, times: int = 1, fwd_hooks: Iterable[tuple[str, Callable[..., Any]]] = ()
) -> tuple[AnyLooped, Hooks]:
    """Run one loop several times in a row: the state that leaves it goes through the same loop again.

    A repeated loop needs activations, names, and keys and values of its own, which no hook can give it. So this returns another
    unroll, in which every execution is a loop, and the hooks that act in it as `fwd_hooks` act in `model`: those of loop `loop`
    in all its executions, those of later loops where these have moved to.

    All loops share their weights. What is special about a loop is what hooks do in it: without hooks, repeating any loop is the
    same as one loop more, `model.unroll(n_loops + times)`. (Also for the injection, which is the same in every pass; the exit
    gate counts the repetition as a loop; an anchored loop makes one more step of the same size.)

    Args:
        model: the model.
        loop: which loop; for HRM-Text an H cycle, which is repeated as a whole.
        times: how often it runs again.
        fwd_hooks: hooks of `model`, such as interventions made for it, under names in either spelling.

    Returns:
        The model with `n_loops + times` loops (the same parameters, no copy), and the hooks for it.

    Raises:
        LoopedError: a loop that does not exist; hooks under a function of names; weights that were processed.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> from tl_looped.interventions import steer
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
        >>> deeper, hooks = repeat_loop(model, 1, fwd_hooks=steer(model, torch.ones(8), loops=[1, 2]))
        >>> [name for name, _ in hooks]
        ['loops.1.hook_state', 'loops.2.hook_state', 'loops.3.hook_state']
        >>> deeper.run_with_hooks(torch.tensor([[1, 2, 3]]), fwd_hooks=hooks).shape
        torch.Size([1, 3, 10])
    """
    check_model(model)
    require(model, "equal loops", f"loop {loop} again")
    old, loop = model.schedule, model.schedule.loop(loop)
    deeper = model.unroll(old.n_loops + check_count("times", times))
    moved: Hooks = []
    for asked, function in fwd_hooks:
        if not isinstance(asked, str):
            raise LoopedError("fwd_hooks holds a function of names, which does not say where it acts in the repeated loop.")
        for name in model.expand_name(asked):
            name = old.loop_name(name)
            norm = f"{old.pass_prefix(old.passes[-1])}.norm.{name.removeprefix('ln_final.')}"
            if name.startswith("ln_final.") and model.hook_dict.get(norm) is model.hook_dict[name]:  # the norm of the last pass
                name = norm
            moved += [(new, function) for new in _executions(old, deeper.schedule, loop, name)]
    return deeper, moved


def _executions(old: Schedule, new: Schedule, loop: int, name: str) -> list[str]:
    """The names that a loop-indexed name gets when a loop runs several times in a row."""
    more = new.n_loops - old.n_loops

    def now(p: Pass) -> list[Pass]:
        at, run = old.in_loop(p)
        loops = range(loop, loop + more + 1) if at == loop else [at + more * (at > loop)]
        return [[q for q in new.passes_in(t) if q.stack == p.stack][run] for t in loops]

    for p in old.passes:
        prefix = f"{old.pass_prefix(p)}."
        if name.startswith(prefix):
            return [f"{new.pass_prefix(q)}.{name.removeprefix(prefix)}" for q in now(p)]
    return [name]


@accepts_old("layers", "heads")
def freeze_attention(
    model: Looped, from_loop: int, *, layers: Indices = None, heads: Indices = None, stack: str | None = None
) -> Hooks:
    """Let all loops after `from_loop` mix positions with the attention patterns of that loop.

    The causal test of "attention stabilises after a few loops" (arXiv 2604.11791, sec. 4): values and outputs of later loops
    are their own, only the weights between positions are those of `from_loop` in the same run.

    Args:
        model: the model.
        from_loop: the loop whose patterns stay; the last one leaves nothing to freeze.
        layers: layers inside the loop; None for all.
        heads: heads; None for all.
        stack: "L" or "H" for HRM-Text.

    Raises:
        LoopedError: a loop, layer or head that does not exist; when the hooks run, a run that did not compute the patterns.

    Example:
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3))
        >>> [name for name, _ in freeze_attention(model, from_loop=1, layers=0)]
        ['loops.1.blocks.0.attn.hook_pattern', 'loops.2.blocks.0.attn.hook_pattern']
    """
    check_model(model)
    for ability in ("one pattern", "every position"):
        require(model, ability, f"freeze_attention(from_loop={from_loop!r})")
    n_heads = model.cfg.n_heads
    mask = None if heads is None else unit_mask(select_indices(heads, n_heads, "heads"), n_heads, after=2)
    source, *later = passes_from(model, from_loop, stack)

    def freeze(seen: Seen, name: str) -> Callable[[Tensor, Any], Tensor]:
        def hook_function(x: Tensor, hook: Any) -> Tensor:
            frozen = seen.load(hook, name)
            return frozen if mask is None else torch.where(mask.to(x.device), frozen, x)

        return hook_function

    hooks: Hooks = []
    for j in select_indices(layers, source.n_layers, "layers") if later else ():
        name, seen = f"{model.schedule.pass_prefix(source)}.blocks.{j}.attn.hook_pattern", Seen()
        frozen = [model.schedule.name(p.layers[j], "attn.hook_pattern") for p in later]
        hooks += [(name, seen.store), *((later_name, freeze(seen, name)) for later_name in frozen)]
    return hooks
