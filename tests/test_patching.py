"""Sweeps of patches: every cell equals a run with that patch alone."""

from __future__ import annotations

from functools import cache as once
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import metric, word_tokenizer
from peak_memory import PeakMemory
from safetensors.torch import load_file
from zoo import GOLDEN, PUBLISHED, ZOO, random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.interventions import freeze_attention, skip_loop
from tl_looped.patching import batches, patch_between_loops, patch_sweep
from tl_looped.sites import HEADS, PASSES, STREAMS

CLEAN, CORRUPTED = random_tokens(2, 5, seed=1), random_tokens(2, 5)
CORRUPTED[:, 0] = CLEAN[:, 0]
quiet_sweep = partial(patch_sweep, verbose=False)
quiet_between = partial(patch_between_loops, verbose=False)


def zoo(name: str) -> LoopedBridge:
    return shared_bridge(name, torch.float64)  # in fp32, rounding alone moves the metric of some structures by 1e-3


@once
@torch.no_grad()
def clean_cache(name: str) -> Any:
    return zoo(name).run_with_cache(CLEAN)[1]


def hooks_of(bridge: LoopedBridge, site: str, at: dict[str, Any], stack: str | None) -> list[str]:
    """The loop-indexed names of what a cell patches."""
    schedule = bridge.schedule
    hook = f"attn.hook_{site}" if site in HEADS else f"hook_{site}"
    if (edge := at.get("loop", stack)) in ("prelude", "coda"):
        layers = [at["layer"]] if "layer" in at else range(schedule.stacks[edge])
        return [f"{edge}.blocks.{j}.{hook}" for j in layers]
    if "virtual_layer" in at:
        return [schedule.name(at["virtual_layer"], hook)]
    prefix = "" if stack in (None, "core") else f"{stack}."
    loops = [at["loop"]] if "loop" in at else range(schedule.n_loops_of(schedule.looped_stack(stack)))
    if site in PASSES:
        return [f"{prefix}loops.{t}.{hook}" for t in loops]
    layers = [at["layer"]] if "layer" in at else range(schedule.n_core)
    return [f"{prefix}loops.{t}.blocks.{j}.{hook}" for t in loops for j in layers]


def by_hand(bridge: LoopedBridge, cache: Any, site: str, at: dict[str, Any], stack: str | None, tokens=CORRUPTED) -> Any:
    """The metric of one run with one patch."""

    def patch(tensor: torch.Tensor, hook: object, value: torch.Tensor) -> torch.Tensor:
        everything = slice(None)
        pos, head, key = (at.get(axis, everything) for axis in ("pos", "head", "src_pos"))
        where = (everything, head, pos, key) if site == "pattern" else (everything, pos, head)[: 3 if site in HEADS else 2]
        tensor[where] = value[where]
        return tensor

    hooks = [(name, partial(patch, value=cache[name])) for name in hooks_of(bridge, site, at, stack)]
    return metric(bridge.run_with_hooks(tokens, fwd_hooks=hooks))


def check_some(
    bridge: LoopedBridge, found: Any, cache: Any, site: str, stack: str | None, tokens=CORRUPTED, n: int = 3
) -> None:
    there = found.values[..., 0].isfinite().nonzero()
    for index in map(tuple, there[torch.randperm(len(there))[:n]].tolist()):
        at = dict(zip(found.axes, index, strict=False))
        if "loop" in at and found.labels["loop"][at["loop"]] in ("prelude", "coda"):
            at["loop"] = found.labels["loop"][at["loop"]]
        elif "loop" in at:
            at["loop"] = int(found.labels["loop"][at["loop"]])
        expected = by_hand(bridge, cache, site, at, stack, tokens)
        torch.testing.assert_close(found.values[index], expected, atol=1e-9, rtol=1e-9)


ALL_SITES = (*STREAMS, *HEADS, *PASSES)
# Four families for every site, every family with its share.
SHARE = [(name, site) for i, site in enumerate(ALL_SITES) for name in sorted(ZOO)[i % 3 :: 3]]
SHARE = [(name, site) for name, site in SHARE if site != "injection" or ZOO[name].injection != "none"]


@pytest.mark.parametrize("stack", ["prelude", "coda"])
def test_layers_that_run_once(stack: str) -> None:
    with torch.no_grad():
        found = quiet_sweep(zoo("huginn"), CORRUPTED, clean_cache("huginn"), metric, site="z", stack=stack)
        assert found.labels["loop"] == [stack]
        check_some(zoo("huginn"), found, clean_cache("huginn"), "z", stack)


@pytest.mark.parametrize("name", ["huginn", "parcae", "looped_qwen", "retrofit_llama"])
def test_prelude_and_coda_are_swept_with_the_loops(name: str, unchecked: None) -> None:
    bridge, cache = zoo(name), clean_cache(name)
    schedule = bridge.schedule
    with torch.no_grad():
        found = quiet_sweep(bridge, CORRUPTED, cache, metric, site="resid_mid", axes=("loop", "layer"))
        assert list(map(str, found.labels["loop"])) == ["prelude", "0", "1", "2", "coda"]
        n_layers = [schedule.n_prelude, *[schedule.n_core] * 3, schedule.n_coda]
        assert found.values[..., 0].isfinite().sum(1).tolist() == n_layers
        check_some(bridge, found, cache, "resid_mid", None, n=5)
        for stack, rows in (("prelude", slice(0, 1)), ("core", slice(1, 4)), ("coda", slice(4, 5))):
            part = quiet_sweep(bridge, CORRUPTED, cache, metric, site="resid_mid", axes=("loop", "layer"), stack=stack)
            torch.testing.assert_close(part.values, found.values[rows, : schedule.stacks[stack]], atol=1e-9, rtol=1e-9)
        whole = quiet_sweep(bridge, CORRUPTED, cache, metric, site="z", axes=("head", "loop"))
        check_some(bridge, whole, cache, "z", None, n=5)
        some = quiet_sweep(bridge, CORRUPTED, cache, metric, axes=("loop", "layer"), loops=np.array([0, 2]))
        assert list(map(str, some.labels["loop"])) == ["0", "2"]
        # A layer in all its loops is one of the loop's.
        by_layer = quiet_sweep(bridge, CORRUPTED, cache, metric, site="z", axes=("layer",))
        assert len(by_layer.labels["layer"]) == schedule.n_core
        figure = found.plot()  # the rows of layers that are, and bold lines where stacks meet
        assert len(figure.data[0].y if hasattr(figure.data[0], "y") else []) == 5
        of_heads = quiet_sweep(bridge, CORRUPTED, cache, metric, site="z").plot()
        assert len(of_heads.data[0].z) == sum(n_layers)
        lines = {shape.y0 + 0.5: shape.line.width for shape in of_heads.layout.shapes}
        edges = [schedule.n_prelude, sum(n_layers) - schedule.n_coda]
        assert lines == {i: 3 if i in edges else 1.5 for i in (*edges, *(edges[0] + k * schedule.n_core for k in (1, 2)))}


@pytest.mark.parametrize(("name", "site"), SHARE)
def test_every_site_equals_a_patch_by_hand(name: str, site: str) -> None:
    bridge = zoo(name)
    stack = None if bridge.looped_cfg.l_cycles is None else "LH"[len(site) % 2]
    axes: tuple[str, ...] = ("loop", "pos") if site in PASSES else ("pos", "virtual_layer")
    axes = ("src_pos", "layer", "head") if site == "pattern" else axes
    where = None if "virtual_layer" in axes else stack
    with torch.no_grad():
        cache = clean_cache(name)
        found = quiet_sweep(bridge, CORRUPTED, cache, metric, site=site, axes=axes, stack=where)
        assert found.axes == (*axes, "example")
        check_some(bridge, found, cache, site, where)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_structures(name: str) -> None:
    path = GOLDEN / name
    bridge = LoopedBridge.from_pretrained(path, dtype=torch.float64)
    clean = load_file(path / "golden.safetensors")["input_ids"]
    corrupted = clean.roll(3, 1)
    stack = None if bridge.looped_cfg.l_cycles is None else "H"
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        for site in ("resid_pre", "z", "out"):
            found = quiet_sweep(bridge, corrupted, cache, metric, site=site, stack=stack)
            check_some(bridge, found, cache, site, stack, corrupted)
            own = quiet_sweep(bridge, clean, cache, metric, site=site, stack=stack)
            cells = own.values[own.values[..., 0].isfinite()]
            assert torch.equal(cells, own.baseline_corrupted.expand_as(cells))
            assert torch.equal(own.baseline_clean, own.baseline_corrupted) and torch.equal(
                own.baseline_clean, found.baseline_clean
            )


@pytest.mark.parametrize("name", ["ouro", "huginn", "looped_qwen"])
def test_batches_of_any_size_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = zoo(name)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN)
        found = [quiet_sweep(bridge, CORRUPTED, cache, metric, max_batch=rows).values for rows in (None, 1, 7)]
        monkeypatch.setattr(batches, "LOGITS_AT_ONCE", 1)
        found.append(quiet_sweep(bridge, CORRUPTED, cache, metric).values)
    for values in found[1:]:
        torch.testing.assert_close(values, found[0], atol=1e-9, rtol=1e-9, equal_nan=True)


def test_a_choice_of_cells_is_a_part_of_the_whole_grid() -> None:
    bridge = zoo("looped_qwen")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN)
        whole = quiet_sweep(bridge, CORRUPTED, cache, metric, site="z", axes=("loop", "layer", "pos", "head"), stack="core")
        part = quiet_sweep(
            bridge, CORRUPTED, cache, metric, site="z", axes=("head", "loop", "layer", "pos"),
            loops=slice(1, None), layers=-1, positions=[4, 2], heads=[0, 2],
        )  # fmt: skip
    assert part.labels["loop"] == [1, 2] and part.labels["pos"] == [2, 4] and part.labels["head"] == [0, 2]
    torch.testing.assert_close(part.values, whole.values[1:, 1:][:, :, [2, 4]][..., [0, 2], :].permute(3, 0, 1, 2, 4))
    together = quiet_sweep(bridge, CORRUPTED, cache, metric, site="z", axes=("loop",), layers=0, positions=[2, 4], heads=[0, 2])

    def patch(z: torch.Tensor, hook: object, value: torch.Tensor) -> torch.Tensor:
        for pos in (2, 4):
            for head in (0, 2):
                z[:, pos, head] = value[:, pos, head]
        return z

    for t in range(3):
        site = f"loops.{t}.blocks.0.attn.hook_z"
        expected = metric(bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(site, partial(patch, value=cache[site]))]))
        torch.testing.assert_close(together.values[t], expected)


@pytest.mark.parametrize("name", ["ouro", "huginn", "hrm_text"])
def test_padding_and_prefixes(name: str) -> None:
    """Rows with different padding, and with a prefix that sees what comes after it."""
    bridge = zoo(name)
    stack = "L" if name == "hrm_text" else None
    given: dict[str, Any] = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}
    if stack:
        given = {"token_type_ids": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])}
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN, **given)
        found = quiet_sweep(bridge, CORRUPTED, cache, metric, stack=stack or "core", **given)
        for index in ((0, 1, 2), (2, 0, 4), (1, 1, 3)):
            at = hooks_of(bridge, "resid_pre", dict(zip(("loop", "layer"), index, strict=False)), stack)[0]

            def patch(x: torch.Tensor, hook: object, at: str = at, pos: int = index[2]) -> torch.Tensor:
                x[:, pos] = cache[at][:, pos]
                return x

            expected = metric(bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(at, patch)], **given))
            torch.testing.assert_close(found.values[index], expected, atol=1e-9, rtol=1e-9)
        assert torch.equal(found.baseline_clean, metric(bridge(CLEAN, **given)))


def test_hooks_that_are_attached_act_in_every_cell() -> None:
    bridge = zoo("huginn")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN)

        def halve(z: torch.Tensor, hook: object) -> torch.Tensor:
            assert z.shape[:2] == CLEAN.shape
            return z * torch.tensor([0.5, 1.0])[:, None, None, None]

        with bridge.hooks(fwd_hooks=[("loops.1.blocks.2.attn.hook_z", halve), ("coda.blocks.0.attn.hook_z", halve)]):
            found = quiet_sweep(bridge, CORRUPTED, cache, metric)
            check_some(bridge, found, cache, "resid_pre", None)
            assert found.baseline_clean is None
            with pytest.raises(LoopedError, match="metric of the clean run is not known"):
                found.normalised()
        assert quiet_sweep(bridge, CORRUPTED, cache, metric, site="out").baseline_clean is not None
        # Hooks that carry something from an early pass to later ones meet a whole run in every cell.
        with bridge.hooks(fwd_hooks=freeze_attention(bridge, 0) + skip_loop(bridge, 1)):
            check_some(bridge, quiet_sweep(bridge, CORRUPTED, cache, metric, site="z"), cache, "z", None)


def test_what_is_edited_after_the_run_changes_nothing() -> None:
    bridge, tokens, mask = zoo("ouro"), CLEAN.clone(), torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, attention_mask=mask)
        tokens.fill_(1)
        mask[0, 0] = 0
        assert torch.equal(quiet_sweep(bridge, CORRUPTED, cache, metric, site="out").baseline_clean, metric(bridge(CLEAN)))


def test_results_have_scales_labels_and_a_figure() -> None:
    bridge = random_bridge("ouro")
    bridge.tokenizer = word_tokenizer()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN[:1])
        found = quiet_sweep(bridge, CORRUPTED[:1], cache, lambda logits: logits[0, -1, 3])
    assert found.values.shape == (3, 2, 5) and found.labels["loop"] == [0, 1, 2]
    assert [label.split()[-1] for label in found.labels["pos"]] == ["0", "1", "2", "3", "4"]
    scaled = found.normalised()
    torch.testing.assert_close(scaled.values[:, :, 0][0], torch.zeros(2))  # the first tokens are the same
    assert found.to_dataframe().shape == (30, 4) and len(found.plot().data) == 1
    _, whole = bridge.run_with_cache(CLEAN[:1])
    full = quiet_sweep(bridge, CORRUPTED[:1], whole, lambda logits: logits[0, -1, 3], axes=("loop",), site="resid_post")
    torch.testing.assert_close(full.normalised().values, torch.ones(3))


def test_an_interrupted_sweep_leaves_no_hooks() -> None:
    bridge = random_bridge("ouro")
    calls = []

    def impatient(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return logits[0, -1, 3]

    with torch.no_grad():
        before, cache = bridge.run_with_cache(CLEAN)
        with pytest.raises(KeyboardInterrupt):
            quiet_sweep(bridge, CORRUPTED, cache, impatient)
        assert not any(hook._forward_hooks for hook in bridge.hook_dict.values())
        assert torch.equal(bridge(CLEAN), before)


def test_random_states_are_the_same_or_refused() -> None:
    bridge = random_bridge("huginn")
    patch_in = partial(quiet_sweep, metric=metric, site="out")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN, initial_state=7)
        seven = patch_in(bridge, CORRUPTED, cache)
        assert torch.equal(seven.baseline_corrupted, metric(bridge(CORRUPTED, initial_state=7)))
        with pytest.raises(LoopedError, match="another initial state"):
            patch_in(bridge, CORRUPTED, cache, initial_state=8)
        _, drawn = bridge.run_with_cache(CLEAN, initial_state=torch.Generator().manual_seed(3))
        found = patch_in(bridge, CORRUPTED, drawn)
        assert torch.equal(found.baseline_corrupted, metric(bridge(CORRUPTED, initial_state=torch.Generator().manual_seed(3))))
        assert torch.equal(found.baseline_clean, metric(bridge(CLEAN, initial_state=torch.Generator().manual_seed(3))))
        # A cache without a record: its state is used, or missing.
        _, plain = bridge.run_with_cache(CLEAN, initial_state=7, return_cache_object=False)
        assert torch.equal(patch_in(bridge, CORRUPTED, plain).values, seven.values)
        some = {name: value for name, value in plain.items() if name.endswith("hook_out")}
        with pytest.raises(LoopedError, match=r"lacks loops\.0\.hook_state"):
            patch_in(bridge, CORRUPTED, some)
        with pytest.raises(LoopedError, match="another initial state"):
            patch_in(bridge, CORRUPTED, plain, initial_state=8)


def test_what_cannot_be_patched_is_refused(unchecked: None) -> None:
    bridge = random_bridge("looped_qwen")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN)
        _, short = bridge.run_with_cache(CLEAN[:, :4])
        _, few = bridge.run_with_cache(CLEAN, names_filter="loops.0.blocks.*.hook_resid_pre")
        _, deeper = bridge.unroll(5).run_with_cache(CLEAN)
        refused: list[tuple[str, dict[str, Any]]] = [
            ("equally many rows and tokens", {"clean_cache": short}),
            (r"lacks loops\.1\.blocks\.0\.hook_resid_pre", {"clean_cache": few, "stack": "core"}),
            (r"lacks prelude\.blocks\.0\.hook_resid_pre, loops\.1", {"clean_cache": few}),
            ("5 loops over one stack", {"clean_cache": deeper}),
            (r"returned \(2, 5\)", {"metric": lambda logits: logits[..., 0]}),
            ("loop 3 is out of range", {"loops": 3}),
            ("positions 5 is out of range", {"positions": 5}),
            ("has no head axis", {"heads": 0}),
            ("heads 3 is out of range", {"heads": 3, "site": "z"}),
            ("heads 1 is out of range", {"heads": 1, "site": "k"}),
            ("site='resid' was asked", {"site": "resid"}),
            ("has the axes loop, layer, virtual_layer, pos,", {"axes": ("loop", "head")}),
            ("stands for loop and layer", {"axes": ("loop", "virtual_layer")}),
            ("nothing is injected", {"site": "injection"}),
            ("belongs to a pass; leave layers out", {"site": "out", "layers": 0}),
            ("choose virtual layers by layers=", {"axes": "virtual_layer", "loops": 1}),
            ("leave loops out", {"stack": "coda", "loops": 0}),
            ("loop was given; patches are made in whole runs", {"loop": 1}),
            ("max_batch=0 was asked", {"max_batch": 0}),
            ("this model loops 'core'", {"stack": "L"}),
        ]
        for message, change in refused:
            given = {"clean_cache": cache, "metric": metric, "corrupted_tokens": CORRUPTED, **change}
            with pytest.raises(LoopedError, match=message):
                quiet_sweep(bridge, **given)
        with pytest.raises(LoopedError, match="pass stack='L' or stack='H'"):
            hrm = random_bridge("hrm_text")
            quiet_sweep(hrm, CORRUPTED, hrm.run_with_cache(CLEAN)[1], metric)
        for change in ({"site": "z"}, {"site": "out", "layer": 0}):
            with pytest.raises(LoopedError, match="layer="):
                quiet_between(bridge, CORRUPTED, metric, **change)


@pytest.mark.parametrize("name", ["huginn", "hrm_text", "anchored"])
@pytest.mark.parametrize("onwards", [False, True])
def test_passes_written_into_passes(name: str, onwards: bool) -> None:
    bridge = zoo(name)
    stack = "L" if name == "hrm_text" else None
    n = bridge.schedule.n_loops_of(stack or "core")
    with torch.no_grad():
        for site, layer, source in (
            (("out", None, CLEAN), ("q", 1, CLEAN)) if onwards else (("state", None, None), ("v", 0, None))
        ):
            found = quiet_between(
                bridge,
                CORRUPTED,
                metric,
                site=site,
                layer=layer,
                source_tokens=source,
                onwards=onwards,
                positions=[1, 3],
                stack=stack,
            )
            _, cache = bridge.run_with_cache(CORRUPTED if source is None else source)
            for s, t in ((0, n - 1), (n - 1, 0), (1, 1)):
                at = {} if layer is None else {"layer": layer}
                value = cache[hooks_of(bridge, site, {**at, "loop": s}, stack)[0]]

                def patch(x: torch.Tensor, hook: object, value: torch.Tensor = value) -> torch.Tensor:
                    x[:, [1, 3]] = value[:, [1, 3]]
                    return x

                names = [hooks_of(bridge, site, {**at, "loop": k}, stack)[0] for k in range(t, n if onwards else t + 1)]
                expected = metric(bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(name, patch) for name in names]))
                torch.testing.assert_close(found.values[s, t], expected, atol=1e-9, rtol=1e-9)
            if source is None:
                assert found.baseline_clean is None
                if not onwards:
                    assert torch.equal(found.values[1, 1], found.baseline_corrupted)
            else:
                assert torch.equal(found.baseline_clean, metric(bridge(CLEAN)))


@pytest.mark.parametrize("name", ["huginn", "hrm_text", "parcae"])
def test_a_batch_needs_no_more_memory_than_estimated(name: str) -> None:
    bridge, rows = random_bridge(name), 64
    hook = "blocks.0.hook_resid_pre"
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN[:1])
        patcher = batches.Patcher(bridge, CORRUPTED[:1], lambda logits: logits[0, -1, 0], [hook], None, {}, rows)
        edit = batches.Edit(hook, cache[hook], torch.ones(5, 1, dtype=torch.bool))
        with PeakMemory(bridge) as live:
            patcher.run([batches.Cell([edit], 0, 0)] * rows, False, "")
    assert rows * patcher._row_bytes(5) / 4 < live.nbytes <= rows * patcher._row_bytes(5)


def test_onwards_reaches_the_end_of_the_run_whatever_loops_are_swept() -> None:
    bridge = zoo("looped_qwen")
    every = patch_between_loops(bridge, CORRUPTED, metric, source_tokens=CLEAN, onwards=True, verbose=False)
    some = patch_between_loops(bridge, CORRUPTED, metric, source_tokens=CLEAN, onwards=True, loops=[0, 1], verbose=False)
    assert torch.equal(some.values, every.values[:2, :2])
    alone = patch_between_loops(bridge, CORRUPTED, metric, source_tokens=CLEAN, loops=[0, 1], verbose=False)
    assert not torch.allclose(alone.values, some.values)


def test_positions_are_called_by_the_tokens_that_ran() -> None:
    cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=31, n_core=1, n_loops=2)
    model = LoopedBridge.from_config(cfg, tokenizer=word_tokenizer())
    text, other = "t3 t4", "t5 t6"
    for prepend_bos in (True, False):
        _, cache = model.run_with_cache(text, prepend_bos=prepend_bos)
        sweep = patch_sweep(model, other, cache, lambda x: x[0, -1, 0], verbose=False, prepend_bos=prepend_bos)
        ran = model.to_str_tokens(model.to_tokens(other, prepend_bos=prepend_bos)[0])
        assert sweep.labels["pos"] == [f"{word} {i}" for i, word in enumerate(ran)]


def test_a_number_of_python_is_a_metric_and_text_is_no_cache(unchecked: None) -> None:
    bridge = zoo("looped_qwen")
    found = patch_sweep(bridge, CORRUPTED, clean_cache("looped_qwen"), lambda x: float(x[0, -1, 0]), verbose=False)
    same = patch_sweep(bridge, CORRUPTED, clean_cache("looped_qwen"), lambda x: x[0, -1, 0], verbose=False)
    torch.testing.assert_close(found.values.double(), same.values.double(), atol=1e-6, rtol=0, equal_nan=True)
    with pytest.raises(LoopedError, match="a str was given for the clean cache; run the clean prompt first"):
        patch_sweep(bridge, CORRUPTED, "some text", metric, verbose=False)  # pyright: ignore[reportArgumentType]
