"""Attribution patching: every estimate against the patch that it estimates."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import near, per_row, run, total
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint
from zoo import FAMILIES, FEW, random_bridge, random_tokens, shared_bridge, slow_but

from tl_looped import LoopedBridge, LoopedCache, LoopedError
from tl_looped.attribution import attribution_sweep as whole_sweep
from tl_looped.errors import OutOfRangeError, UnknownNameError
from tl_looped.sites import HEADS, PASSES, STREAMS

CLEAN, CORRUPTED = random_tokens(pos=5), random_tokens(pos=5, seed=1)


Cell = tuple[str, int | None]  # a hook and a head


def patched(bridge: LoopedBridge, cache: LoopedCache, cells: list[Cell]) -> Tensor:
    """What patching each cell changes, [cell, row]; all cells side by side in one batch."""

    def patch(cell: int, head: int | None, x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        mine, clean = x.unflatten(0, (len(cells), -1))[cell], cache[str(hook.name)]
        dim = 1 if str(hook.name).endswith("pattern") else 2
        mine, clean = (mine, clean) if head is None else (mine.select(dim, head), clean.select(dim, head))
        mine[:] = clean
        return x

    hooks = [(name, partial(patch, i, head)) for i, (name, head) in enumerate(cells)]
    with torch.no_grad():
        logits = bridge.run_with_hooks(CORRUPTED.repeat(len(cells), 1), hooks)
        return per_row(logits).view(len(cells), -1) - per_row(bridge(CORRUPTED))


attribution_sweep = partial(whole_sweep, stack="core")


def prefixes(bridge: LoopedBridge) -> list[tuple[str | None, str]]:
    """Every looped stack, and how its hook names begin."""
    return [("L", "L."), ("H", "H.")] if bridge.looped_cfg.l_cycles else [("core", "")]


def sites_of(bridge: LoopedBridge) -> list[str]:
    every = [*STREAMS, *HEADS, *PASSES]
    return every if bridge.looped_cfg.injection != "none" else [site for site in every if site != "injection"]


def worst_errors(
    bridge: LoopedBridge, cache: LoopedCache, sites: list[str], stack: str | None, prefix: str
) -> dict[str, float]:
    """For every site, the largest difference between estimates and patches of all cells, relative to the largest patch."""
    estimates: dict[str, Tensor] = {}
    cells: list[Cell] = []
    for site in sites:
        has_heads = site in ("q", "k", "v", "z", "pattern")
        axes = ("loop", *(("layer",) if site not in PASSES else ()), *(("head",) if has_heads else ()))
        found = attribution_sweep(bridge, CORRUPTED, cache, per_row, site=site, axes=axes, stack=stack)
        assert found.axes == (*axes, "example")
        estimates[site] = found.values.flatten(0, -2)
        for cell in torch.cartesian_prod(*(torch.arange(n) for n in found.values.shape[:-1])).reshape(-1, len(axes)).tolist():
            at = dict(zip(axes, cell, strict=True))
            layer = f"blocks.{at['layer']}." if "layer" in at else ""
            cells.append((f"{prefix}loops.{at['loop']}.{layer}{'attn.' if has_heads else ''}hook_{site}", at.get("head")))
    patches = patched(bridge, cache, cells).split([len(estimate) for estimate in estimates.values()])
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in zip(estimates.values(), patches, strict=True)]
    return {site: error.item() for site, error in zip(sites, errors, strict=True)}


@FAMILIES
def test_estimates_tend_to_the_patches(name: str) -> None:
    bridge = shared_bridge(name, torch.float64)
    close = near(run(bridge, CLEAN), run(bridge, CORRUPTED), 1e-7)
    for stack, prefix in prefixes(bridge):
        # the next order is 1e-7 times a curvature that is below 1e3 in these models
        errors = worst_errors(bridge, close, sites_of(bridge), stack, prefix)
        assert max(errors.values()) < 1e-4, errors


def test_the_error_is_of_the_next_order() -> None:
    bridge = random_bridge("huginn", torch.float64)
    clean, corrupted = run(bridge, CLEAN), run(bridge, CORRUPTED)
    sites = ["q", "resid_mid", "pattern", "state"]
    coarse, fine = (worst_errors(bridge, near(clean, corrupted, eps), sites, "core", "") for eps in (1e-5, 1e-6))
    for site in sites:
        assert coarse[site] / fine[site] == pytest.approx(10, rel=0.1)


def test_axes_are_sums_in_the_order_asked() -> None:
    bridge = random_bridge("looped_qwen", torch.float64)
    cache = run(bridge, CLEAN)
    full = attribution_sweep(
        bridge, CORRUPTED, cache, per_row, site="pattern", axes=("loop", "layer", "pos", "head", "src_pos")
    )
    assert full.values.shape == (3, 2, 5, 3, 5, 2)
    one = attribution_sweep(bridge, CORRUPTED, cache, total, site="pattern", axes=("src_pos", "head", "loop"))
    assert one.axes == ("src_pos", "head", "loop") and one.labels["src_pos"] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(one.values, full.values.sum((1, 2, 5)).permute(2, 1, 0))
    keys = attribution_sweep(bridge, CORRUPTED, cache, total, site="k")
    assert keys.values.shape == (3, 2, 1)  # one key-value head
    by_position = attribution_sweep(bridge, CORRUPTED, cache, total, site="resid_post", axes=["pos"])
    whole = attribution_sweep(bridge, CORRUPTED, cache, total, site="resid_post", axes=("layer", "pos", "loop"))
    torch.testing.assert_close(by_position.values, whole.values.sum((0, 2)))
    some = attribution_sweep(bridge, CORRUPTED, cache, total, site="resid_post", axes=("loop", "layer", "pos"), loops=[2, 0])
    torch.testing.assert_close(some.values, whole.values.permute(2, 0, 1)[[2, 0]])
    assert some.labels["loop"] == [2, 0]
    assert {"loop", "layer", "pos", "attribution"} == set(some.to_dataframe().columns)


def test_layers_before_and_after_the_loop() -> None:
    bridge = random_bridge("parcae", torch.float64)
    close = near(run(bridge, CLEAN), run(bridge, CORRUPTED), 1e-6)
    every = whole_sweep(bridge, CORRUPTED, close, per_row)
    parts = [attribution_sweep(bridge, CORRUPTED, close, per_row, stack=stack).values for stack in ("prelude", "core", "coda")]
    torch.testing.assert_close(every.values, torch.cat(parts))
    assert list(map(str, every.labels["loop"])) == ["prelude", "0", "1", "2", "coda"]
    summed = whole_sweep(bridge, CORRUPTED, close, per_row, axes=("head", "loop"))
    torch.testing.assert_close(summed.values, every.values.sum(1).transpose(0, 1))
    for stack in ("prelude", "coda"):
        found = attribution_sweep(bridge, CORRUPTED, close, per_row, stack=stack)
        assert found.values.shape == (1, 2, 3, 2) and found.labels["loop"] == [stack]
        for layer in range(2):
            expected = patched(bridge, close, [(f"{stack}.blocks.{layer}.attn.hook_z", 1)])[0]
            torch.testing.assert_close(found.values[0, layer, 1], expected, rtol=1e-3, atol=1e-12)


def test_integrated_gradients_average_over_the_way_of_the_embedding() -> None:
    bridge = random_bridge("huginn", torch.float64)
    clean, corrupted = run(bridge, CLEAN), run(bridge, CORRUPTED)
    name, gradients = "loops.1.blocks.2.hook_mlp_out", []
    for k in (1, 2, 3):
        way = corrupted["hook_embed"] + k / 3 * (clean["hook_embed"] - corrupted["hook_embed"])
        seen: list[Tensor] = []
        total(bridge.run_with_hooks(way, bwd_hooks=[(name, lambda g, hook, seen=seen: seen.append(g.clone()))])).backward()
        gradients += seen
    expected = ((clean[name] - corrupted[name]) * torch.stack(gradients).mean(0)).sum()
    found = attribution_sweep(bridge, CORRUPTED, clean, total, site="mlp_out", axes=("loop", "layer"), steps=3)
    torch.testing.assert_close(found.values[1, 2], expected)


def test_integrated_gradients_are_complete() -> None:
    """Where everything passes through the embedding, the parts sum to the whole, up to the rectangles of the sum."""
    bridge = random_bridge("ouro", torch.float64)
    close = near(run(bridge, CLEAN), run(bridge, CORRUPTED), 1e-3)
    whole = (total(bridge(close["hook_embed"])) - total(bridge(CORRUPTED))).item()
    errors = []
    for steps in (10, 20):
        found = attribution_sweep(bridge, CORRUPTED, close, total, site="state", axes=("loop", "pos"), loops=0, steps=steps)
        errors.append(abs(found.values.sum().item() - whole))
    assert errors[1] < 0.05 * abs(whole) and errors[0] / errors[1] == pytest.approx(2, rel=0.2)


def test_the_same_prompt_has_no_attribution_and_a_linear_end_is_exact() -> None:
    bridge = random_bridge("ouro", torch.float64)
    cache = run(bridge, CORRUPTED)
    assert not attribution_sweep(bridge, CORRUPTED, cache, total).values.any()
    clean = run(bridge, CLEAN)  # the state leaving the last pass goes into the unembedding, with nothing between
    out = attribution_sweep(bridge, CORRUPTED, clean, total, site="out", axes=["loop"], loops="last")
    torch.testing.assert_close(out.values[0], total(bridge(CLEAN)) - total(bridge(CORRUPTED)))


def test_text_and_rows_and_half_precision() -> None:
    bridge = random_bridge("retrofit_llama", torch.bfloat16)
    found = attribution_sweep(bridge, CORRUPTED[0], run(bridge, CLEAN[0]), lambda logits: logits[0, -1, 3])
    assert found.values.dtype == torch.float32 and found.axes == ("loop", "layer", "head")


def test_steps_are_refused_where_token_ids_are_read_beside_the_embedding() -> None:
    bridge = random_bridge("parcae")
    with pytest.raises(LoopedError, match=r"steps=2 was asked.*value embeddings\)\. Leave steps out\."):
        attribution_sweep(bridge, CORRUPTED, run(bridge, CLEAN), total, steps=2)


def test_grad_modes_and_frozen_parameters_make_no_difference() -> None:
    bridge = random_bridge("parcae")
    cache = run(bridge, CLEAN)
    expected = attribution_sweep(bridge, CORRUPTED, cache, total).values
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(CLEAN)
        state = torch.zeros(2, 5, 24)
        _, other = bridge.run_with_cache(CLEAN, initial_state=state)
        found = attribution_sweep(bridge, CORRUPTED.clone(), cache, total).values
        attribution_sweep(bridge, CORRUPTED, other, total, initial_state=state)
    assert torch.equal(found, expected)
    bridge.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(attribution_sweep(bridge, CORRUPTED, cache, total).values, expected)
    assert not any(p.grad is not None for p in bridge.parameters())


def test_hooks_of_the_user_stay_and_ours_go(unchecked: None) -> None:
    bridge = random_bridge("ouro", torch.float64)
    clean = run(bridge, CLEAN)
    plain = attribution_sweep(bridge, CORRUPTED, clean, total).values
    bridge.add_hook("loops.1.blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    ablated = attribution_sweep(bridge, CORRUPTED, clean, total).values
    assert not torch.allclose(ablated, plain)
    bridge.reset_hooks()
    with pytest.raises(LoopedError):
        attribution_sweep(bridge, CORRUPTED, clean, lambda logits: logits[0])
    assert torch.equal(attribution_sweep(bridge, CORRUPTED, clean, total).values, plain)
    assert not any(hook.fwd_hooks for hook in bridge.hook_dict.values())


def test_an_initial_state_that_differs_is_refused() -> None:
    bridge = random_bridge("huginn")
    clean = run(bridge, CLEAN, initial_state=3)
    for other in (4, torch.zeros(2, 5, 24)):
        with pytest.raises(LoopedError, match=r"another initial state.*leave initial_state="):
            attribution_sweep(bridge, CORRUPTED, clean, total, initial_state=other)
    expected = attribution_sweep(bridge, CORRUPTED, clean, total, initial_state=3).values
    default = attribution_sweep(bridge, CORRUPTED, run(bridge, CLEAN), total).values
    assert torch.equal(attribution_sweep(bridge, CORRUPTED, clean, total).values, expected) and not default.equal(expected)
    state = clean["loops.0.hook_state"]
    assert torch.equal(attribution_sweep(bridge, CORRUPTED, clean, total, initial_state=state).values, expected)
    filtered = run(bridge, CLEAN, initial_state=3, names_filter="blocks.*.attn.hook_z")
    with pytest.raises(LoopedError, match="another initial state"):
        attribution_sweep(bridge, CORRUPTED, filtered, total, initial_state=0)
    assert torch.equal(attribution_sweep(bridge, CORRUPTED, filtered, total).values, expected)
    bare = LoopedCache(dict(filtered.items()), bridge)  # whose run nobody knows
    with pytest.raises(UnknownNameError, match=r"lacks loops.0.hook_state \(.*random or given state"):
        attribution_sweep(bridge, CORRUPTED, bare, total)
    bare = LoopedCache({**filtered, "loops.0.hook_state": state}, bridge)
    assert torch.equal(attribution_sweep(bridge, CORRUPTED, bare, total).values, expected)
    generator = torch.Generator().manual_seed(4)
    clean = run(bridge, CLEAN, initial_state=generator)
    found = attribution_sweep(bridge, CORRUPTED, clean, total, steps=2).values
    with pytest.raises(LoopedError, match="another initial state"):  # it has been advanced
        attribution_sweep(bridge, CORRUPTED, clean, total, steps=2, initial_state=generator)
    again = attribution_sweep(bridge, CORRUPTED, clean, total, steps=2, initial_state=generator.manual_seed(4))
    assert torch.equal(again.values, found)


def test_bad_input_is_explained(unchecked: None) -> None:
    bridge = random_bridge("ouro")
    clean = run(bridge, CLEAN)

    def sweep(tokens: object, cache: object, metric: object, *at: object, **kwargs: object) -> None:
        attribution_sweep(bridge, tokens, cache, metric, **dict(zip(("site", "axes"), at, strict=False)), **kwargs)  # pyright: ignore[reportArgumentType]

    with pytest.raises(LoopedError, match=r"\(2, 5, 3, 8\), the corrupted one \(2, 4, 3, 8\).*equally many"):
        sweep(CORRUPTED[:, :4], clean, total)
    few = run(bridge, CLEAN, names_filter="loops.1:.blocks.*.attn.hook_z")
    with pytest.raises(UnknownNameError, match=r"lacks loops.0.blocks.0.attn.hook_z, loops.0.blocks.1.attn.hook_z; name"):
        sweep(CORRUPTED, few, total)
    sweep(CORRUPTED, few, total, loops=slice(1, None))
    with pytest.raises(UnknownNameError, match="hook_embed"):
        sweep(CORRUPTED, few, total, loops=1, steps=2)
    with pytest.raises(LoopedError, match=r"returned \(5, 31\).*logits \(2, 5, 31\).*batch=2"):
        sweep(CORRUPTED, clean, lambda logits: logits[0])
    with pytest.raises(LoopedError, match="no gradient"):
        sweep(CORRUPTED, clean, lambda logits: total(logits).item())
    with pytest.raises(LoopedError, match="no gradient"):
        sweep(CORRUPTED, clean, lambda logits: total(logits).detach())
    with pytest.raises(OutOfRangeError, match="3 loops"):
        sweep(CORRUPTED, clean, total, loops=3)
    with pytest.raises(LoopedError, match=r"site='mlp'.*'resid_pre'"):
        sweep(CORRUPTED, clean, total, "mlp")
    with pytest.raises(LoopedError, match="'state' has 'loop', 'pos'"):
        sweep(CORRUPTED, clean, total, "state")
    for axes in ("loop", (), ("loop", "loop"), ("loop", "src_pos"), ("loop", "d_head")):
        with pytest.raises(LoopedError, match="'z' has 'loop', 'layer', 'pos', 'head': name some"):
            sweep(CORRUPTED, clean, total, "z", axes)
    with pytest.raises(LoopedError, match="steps=0"):
        sweep(CORRUPTED, clean, total, steps=0)
    with pytest.raises(LoopedError, match="there are 0 layers"):
        sweep(CORRUPTED, clean, total, stack="coda")
    with pytest.raises(LoopedError, match="in this ouro model nothing is injected in the passes"):
        sweep(CORRUPTED, clean, total, "injection", ["loop"])
    with pytest.raises(LoopedError, match=r"did not reach loops\.1"):
        sweep(CORRUPTED, clean, total, loop=0)
    with pytest.raises(LoopedError, match=r"from a run of 3 loops.*the model runs 2 loops"):
        attribution_sweep(bridge.unroll(2), CORRUPTED, clean, total)
    two = random_bridge("hrm_text")
    with pytest.raises(LoopedError, match="stack='L' or stack='H'"):
        whole_sweep(two, CORRUPTED, run(two, CLEAN), total)


@pytest.mark.parametrize("name", slow_but(FEW))
def test_gradients_are_not_decomposed_as_activations(name: str) -> None:
    """As TransformerLens's demo makes its gradient caches; what streams hold of gradients may be read as it is."""
    bridge, tokens = random_bridge(name), random_tokens()
    _, both = bridge.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    gradients = {n.removesuffix("_grad"): g for n, g in both.items() if n.endswith("_grad")}
    cache = ActivationCache(gradients, bridge)
    suffixed = ActivationCache({f"{n}_grad": g for n, g in gradients.items()}, bridge)
    torch.testing.assert_close(both.decompose_resid().sum(0), both["ln_final.hook_in"], atol=1e-3, rtol=1e-3)
    calls = {
        "decompose_resid": {}, "accumulated_resid": {}, "stack_head_results": {}, "stack_neuron_results": {"layer": None},
        "get_full_resid_decomposition": {}, "get_neuron_results": {"layer": 1}, "attribute_logits": {"tokens": 1},
    }  # fmt: skip
    for holder in (cache, suffixed):
        for method, arguments in calls.items():
            with pytest.raises(LoopedError, match=r"gradients.*attribution_sweep"):
                getattr(holder, method)(**arguments)
    stack = torch.zeros(1, 2, 7, 24)
    for call in (
        lambda: cache.apply_ln_to_stack(stack),
        lambda: cache.logit_attrs(stack, 1),
        lambda: cache.accumulated_resid(layer=None, apply_ln=True),
        lambda: cache.logit_lens(),
    ):
        with pytest.raises(LoopedError, match=r"gradients.*attribution_sweep"):
            call()
    as_they_are = cache.accumulated_resid(carried=False)
    assert torch.equal(as_they_are[0], gradients["blocks.0.hook_resid_pre"])
