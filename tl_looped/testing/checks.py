"""The checks, each from a run to what it compared; a fault is raised."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..attribution.weights import weight_gradients_by_pass
from ..errors import LoopedError, NotASumError
from ..looped import at_depth, require
from ..patching import patch_sweep
from ..running import first_hooked
from ..schedule import virtual_layer
from ..sites import KINDS
from .case import Case, Fault, apart, close, copied

_SITES = ("resid_pre", "mlp_out", "z", "v")


def names(case: Case) -> str:
    """Every hook by its own name and by that with its loop, and by patterns over loops."""
    model, schedule = case.model, case.model.schedule
    for name in model.hook_dict:
        for spelled in dict.fromkeys((name, schedule.loop_name(name))):
            if (found := model.expand_name(spelled)) != [name]:
                raise Fault(f"{spelled!r} stands for {found[:3]}, not for {name!r}")
    if strangers := [name for name in case.cache if name not in model.hook_dict]:
        raise Fault(f"{strangers[0]!r} was cached, but no hook has that name")
    for p in schedule.passes:
        expected = [f"blocks.{i}.hook_resid_pre" for i in range(p.first, p.first + p.n_layers)]
        pattern = f"{schedule.pass_prefix(p)}.blocks.*.hook_resid_pre"
        if (found := model.expand_name(pattern)) != expected:
            raise Fault(f"{pattern!r} stands for {found}, not for {expected}")
        if silent := [name for name in expected if name not in case.cache]:
            raise Fault(f"{silent[0]!r} did not fire in a run")
    return f"{len(model.hook_dict)} hooks"


def own_cache(case: Case) -> str:
    """Caching changes nothing, nor do activations put back where they were, in one pass or in all."""
    said = close(case, "logits of runs with and without a cache", case.model(case.tokens), case.logits)
    groups: dict[str | None, list[Any]] = {}
    for name in dict.fromkeys(case.cache):
        groups.setdefault(case.pass_of(name), []).append((name, copied(case.cache[name])))
    groups["everything"] = [hook for hooks in groups.values() for hook in hooks]
    for where, hooks in groups.items():
        found = case.model.run_with_hooks(case.tokens, fwd_hooks=hooks)
        said = close(
            case, f"logits of a run with its own activations put back in {where or 'prelude and coda'}", found, case.logits
        )
    return said.replace("a run with its own activations put back in everything", "all runs")


def one_pass(case: Case) -> str:
    """A patch of a pass fires once, acts there and leaves what ran before as it was."""
    model, schedule = case.model, case.model.schedule
    generator = torch.Generator().manual_seed(5)
    for k, p in enumerate(schedule.passes):
        name, after = (f"blocks.{p.first}.hook_resid_{side}" for side in ("pre", "post"))
        noise = torch.randn(case.cache[name].shape, generator=generator).to(case.cache[name])
        fired: list[str] = []

        def patch(x: Tensor, hook: Any, noise: Tensor = noise, fired: list[str] = fired) -> Tensor:
            fired.append(str(getattr(hook, "name", "")))
            return x + noise

        with model.hooks(fwd_hooks=[(name, patch)]):
            _, cache = model.run_with_cache(case.tokens)
        spelled = schedule.loop_name(name)
        if len(fired) != 1:
            raise Fault(f"a hook at {spelled} fired {len(fired)} times in a run, not once")
        if apart(cache[after], case.cache[after]) <= case.tolerance:
            raise Fault(f"a patch at {spelled} does not reach {schedule.loop_name(after)}")
        earlier = case.passes[:k]
        for other in case.cache:
            layer = virtual_layer(other)
            is_earlier = case.pass_of(other) in earlier if layer is None else layer < p.first
            if is_earlier and not (distance := apart(cache[other], case.cache[other])) <= case.tolerance:
                raise Fault(f"a patch at {spelled} changes the earlier {schedule.loop_name(other)} by {distance:.2g}")
    return f"{len(schedule.passes)} passes patched"


def sweeps(case: Case) -> str:
    """Cells of `patch_sweep` are runs with one patch made by hand."""
    schedule = case.model.schedule
    stack = schedule.core_stacks[0]
    passes = schedule.passes_of("all", stack)
    chosen = [passes[0], passes[-1]] if len(passes) > 1 else passes
    layers, positions = sorted({0, chosen[0].n_layers - 1}), [1, case.tokens.shape[1] - 1]
    refused: list[str] = []
    swept = 0
    for site in _SITES:
        hook = KINDS[site].hook
        try:
            found = patch_sweep(
                case.model, case.other, case.cache, case.metric, site=site, axes=("loop", "layer", "pos"), stack=stack,
                loops=[p.loop for p in chosen], layers=layers, positions=positions, verbose=False,
            )  # fmt: skip
        except LoopedError as why:
            refused.append(f"{site}: {why}")
            continue
        for t, j, k in product(range(len(chosen)), range(len(layers)), range(len(positions))):
            if (t + j + k) % 2:  # half of them, in every loop, layer and position
                continue
            p, layer, pos = chosen[t], layers[j], positions[k]
            name = f"{schedule.pass_prefix(p)}.blocks.{layer}.{hook}"
            logits = case.model.run_with_hooks(case.other, fwd_hooks=[(name, _at(case.cache[name], pos))])
            what = f"the cell (loop {p.loop}, layer {layer}, pos {pos}) of {site} and a run with that patch"
            close(case, what, torch.as_tensor(found.values)[t, j, k].to(logits), case.metric(logits))
            swept += 1
    if not swept:
        raise LoopedError("; ".join(refused))
    return f"{swept} cells of {len(_SITES) - len(refused)} sites" + (f"; refused: {'; '.join(refused)}" if refused else "")


def _at(value: Tensor, pos: int) -> Callable[[Tensor, Any], Tensor]:
    def patch(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, pos] = value[:, pos]
        return x

    return patch


def kv_cache(case: Case) -> str:
    """A text run piece by piece has the logits of the whole text."""
    require(case.model, "causal runs", "a text in pieces")
    first, *others = case.tokens.split([2, 1, case.tokens.shape[1] - 3], dim=1)
    logits, state = case.model(first, return_type="logits_and_cache")
    found = [logits]
    for piece in others:
        try:
            logits, state = case.model(piece, return_type="logits_and_cache", past_key_values=state)
        except LoopedError as why:
            raise Fault(f"the cache that the model made is refused when the text goes on: {why}") from why
        found.append(logits)
    return close(case, "logits of a text in three pieces and at once", torch.cat(found, dim=1), case.logits)


def padding(case: Case) -> str:
    """A padded row answers as it does alone, beside one that is not padded."""
    model, n, said = case.model, case.tokens.shape[1], ""
    whole = torch.cat((case.tokens[1:2], case.other[1:2, :3]), dim=1)
    alone = {0: model(case.tokens[:1]), 1: model(whole)}
    pads = case.tokens[:1, :1].expand(1, 3)
    for side in ("left", "right"):
        parts = (pads, case.tokens[:1]) if side == "left" else (case.tokens[:1], pads)
        real = slice(3, None) if side == "left" else slice(n)
        mask = torch.zeros_like(torch.cat((whole, whole)))
        mask[0, real], mask[1] = 1, 1
        logits = model(torch.cat((torch.cat(parts, dim=1), whole)), attention_mask=mask)
        said = close(case, f"logits of a row padded on the {side} and alone", logits[:1, real], alone[0])
        close(case, f"logits of a row beside one padded on the {side} and alone", logits[1:], alone[1])
    return said


def attribution(case: Case) -> str:
    """What components and heads add is the logit before a cap: carried to the end, and along the direction pulled back."""
    cache: Any = case.cache
    before, token = (cache["unembed.hook_out"] if "unembed.hook_out" in cache else case.logits), 1
    try:
        carried = cache.logit_attrs(cache.decompose_resid(), tokens=token).sum(0)
    except NotASumError as why:
        raise Fault(str(why).partition(": ")[0]) from why  # no hook has edited this run
    said = close(case, "the sum over what is carried to the end and the logit", carried.to(before), before[..., token])
    for unit, positions in (("component", -1), ("component", None), ("head", -1)):
        values = cache.attribute_logits(token, unit=unit, positions=positions).values.sum(0)
        expected = before[..., token] if positions is None else before[:, -1, token]
        close(case, f"the sum over every {unit} and the logit", values.to(expected), expected)
    return said


def sharing(case: Case) -> str:
    """Passes use the same weights, and gradients of single passes sum up to autograd's."""
    model: Any = case.model
    require(model, "shared weights", "the same weights in every pass")
    physical: dict[tuple[str, int, str], tuple[str, int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (layer := virtual_layer(name)) is not None:
            site = model.schedule.site(layer)
            own = name.split(".", 2)[2]
            first, place = physical.setdefault((site.stack, site.layer, own), (name, parameter.data_ptr()))
            if parameter.data_ptr() != place:
                raise Fault(f"{name} is another weight than {first}, though both are of layer {site.layer} of {site.stack}")
    held, pointers = model.with_weights_of_their_own(lambda views: {n: [w.data_ptr() for w in v] for n, v in views.items()})
    for name, places in pointers.items():
        if len(set(places)) != 1:
            raise Fault(f"{name} lies in {len(set(places))} places, one for several passes each")
    by_pass = weight_gradients_by_pass(model, case.tokens, lambda logits: case.metric(logits).sum())
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    wanted = {name: parameters[places[0]] for name, places in pointers.items() if places[0] in parameters}
    if not wanted:
        raise Fault("no looped weight is a parameter of the model")
    required = {parameter: parameter.requires_grad for parameter in wanted.values()}
    try:
        for parameter in required:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            value = case.metric(model(case.tokens)).sum()
            whole = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    finally:
        for parameter, asked in required.items():
            parameter.requires_grad_(asked)
    for name, gradient in zip(wanted, whole, strict=True):
        found = by_pass[name].sum(0)
        expected = torch.zeros_like(found) if gradient is None else gradient
        scale = max(1.0, float(expected.abs().max()))
        if not (distance := apart(found, expected)) <= case.tolerance * scale:
            raise Fault(f"the gradients of {name} by pass sum up to one that differs from autograd's by {distance:.2g}")
    uses = {len(views) for views in held.values()}
    return f"{len(wanted)} weights, used in {', '.join(map(str, sorted(uses)))} passes"


def depth(case: Case) -> str:
    """A model with another number of loops is the same in the loops that both have."""
    model: Any = case.model
    require(model, "other depths", "another number of loops")
    said = close(case, "logits of an unroll to the same depth", model.unroll(model.n_loops)(case.tokens), case.logits)
    cut = model.lacks("equal loops") is not None
    for loops in range(1, model.n_loops):
        shorter = at_depth(model, loops, cut=cut)(case.tokens)
        said = close(
            case, f"the readout after loop {loops - 1} and {loops} loops", model.readout(case.tokens, loops - 1), shorter
        )
    if not cut:
        deeper = model.unroll(model.n_loops + 1).readout(case.tokens, model.n_loops - 1)
        said = close(case, "logits and the same loop of a deeper unroll", deeper, case.logits)
    return said


def saving(case: Case) -> str:
    """What is saved and loaded is the same model."""
    model: Any = case.model
    if not hasattr(model, "save_pretrained"):
        raise LoopedError(f"a {type(model).__name__} is not saved; save the module that it runs.")
    from ..bridge.looped_bridge import LoopedBridge

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = LoopedBridge.from_pretrained(directory, device=model.cfg.device, dtype=model.cfg.dtype)
        return close(case, "logits of the model and of what was saved of it", again(case.tokens), case.logits)


def left_alone(case: Case) -> str:
    """After all this no hook is left, and the model still says the same."""
    if hooked := first_hooked(case.model):
        raise Fault(f"a hook is left at {hooked}")
    return close(case, "logits before and after", case.model(case.tokens), case.logits)


# By name, what each asks and the function that asks it; in this order.
CHECKS: dict[str, tuple[str, Callable[[Case], str]]] = {
    "names": ("every hook has a name, and every name its hook", names),
    "own cache": ("a run is patched with its own activations", own_cache),
    "one pass": ("a patch of a pass leaves earlier ones as they were", one_pass),
    "sweep": ("a sweep's cells are runs with one patch", sweeps),
    "kv cache": ("a text in pieces is the text at once", kv_cache),
    "padding": ("padded rows answer as they do alone", padding),
    "attribution": ("contributions sum up to the logit", attribution),
    "sharing": ("passes share weights, and split their gradient", sharing),
    "depth": ("other numbers of loops agree in the loops that both have", depth),
    "saving": ("a model that is saved and loaded is the same", saving),
    "left alone": ("the checks leave the model as it was", left_alone),
}
