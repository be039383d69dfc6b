"""Ablation sweeps: every cell, joint group and standard error against hooks by hand, one prompt at a time."""

from __future__ import annotations

from functools import cache as once
from functools import partial
from typing import Any

import pytest
import torch
from helpers import word_tokenizer
from zoo import FAMILIES, ZOO, random_bridge

from tl_looped import LoopedBridge, LoopedError
from tl_looped.errors import OutOfRangeError
from tl_looped.interventions import ablate
from tl_looped.metrics import kl_to, logit_diff, prob
from tl_looped.patching import ablation_sweep, patch_sweep
from tl_looped.toys.hop import hop_prompts

TEXTS = ["t3 t4 t5", "t6 t7 t8 t9", "t10 t5 t11", "t4 t4"]
RIGHT, WRONG = [4, 9, 7, 3], [7, 3, 9, 5]
quiet = partial(ablation_sweep, verbose=False)


@once
def zoo(name: str) -> LoopedBridge:
    made = random_bridge(name, torch.float64)
    made.tokenizer = word_tokenizer()
    return made


def score(logits: torch.Tensor, i: int) -> torch.Tensor:
    return logits[0, -1, RIGHT[i]] - logits[0, -1, WRONG[i]]


@torch.no_grad()
def by_hand(bridge: LoopedBridge, names: list[tuple[str, list[int] | None]], positions: Any, mean: bool) -> torch.Tensor:
    """The metric of every prompt, with some heads (None: a whole activation) of some hooks replaced."""
    means: dict[str, torch.Tensor] = {}
    if mean:
        caches = [bridge.run_with_cache(text, names_filter=[name for name, _ in names])[1] for text in TEXTS]
        means = {name: torch.cat([cache[name][0] for cache in caches]).mean(0) for name, _ in names}

    def replace(x: torch.Tensor, hook: object, name: str, heads: list[int] | None) -> torch.Tensor:
        new = means[name] if mean else torch.zeros_like(x[0, 0])
        for pos in range(x.shape[1])[positions]:
            if heads is None:
                x[:, pos] = new
            for head in heads or ():
                x[:, pos, head] = new[head]
        return x

    hooks = [(name, partial(replace, name=name, heads=heads)) for name, heads in names]
    return torch.stack([score(bridge.run_with_hooks(text, fwd_hooks=hooks), i) for i, text in enumerate(TEXTS)])


def hooks_of(loop: Any, layer: Any, part: str, stack: str | None = None) -> list[str]:
    prefix = f"{loop}." if loop in ("prelude", "coda") else f"{stack + '.' if stack else ''}loops.{loop}."
    ends = {"head": ["attn.hook_z"], "attn": ["hook_attn_out"], "mlp": ["hook_mlp_out"]}.get(
        part, ["hook_attn_out", "hook_mlp_out"]
    )
    return [f"{prefix}blocks.{layer}.{end}" for end in ends]


@pytest.mark.parametrize("mode", ["zero", "mean"])
@FAMILIES
def test_cells_equal_hooks_by_hand(name: str, mode: str) -> None:
    bridge, mean = zoo(name), mode == "mean"
    stack = "H" if name == "hrm_text" else None
    part = "head" if mean == (sorted(ZOO).index(name) % 2 == 0) else ("layer", "attn", "mlp")[sorted(ZOO).index(name) % 3]
    positions = slice(-2, None) if name == "ouro" else slice(None)
    found = quiet(
        bridge, TEXTS, logit_diff(RIGHT, WRONG), part=part, mode=mode, stack=stack, positions=positions,
        joint=[[(0, 0, 0), (1, 1, 2)] if part == "head" else [(0, 0), (1, 1)]],
    )  # fmt: skip
    plain = by_hand(bridge, [], positions, False)
    check = partial(torch.testing.assert_close, atol=1e-8, rtol=1e-8)
    check(found.whole.values, plain.mean())
    there = found.change.values.isfinite().nonzero().tolist()
    cells = [there[0], there[-1], there[len(there) // 2]]
    for index in cells:
        at = dict(zip(found.change.axes, index, strict=True))
        loop, layer = found.change.labels["loop"][at["loop"]], found.change.labels["layer"][at["layer"]]
        heads = [at["head"]] if part == "head" else None
        names = [(hook, heads) for hook in hooks_of(loop, layer, part, stack)]
        change = by_hand(bridge, names, positions, mean) - plain
        check(found.change.values[tuple(index)], change.mean())
        check(found.change.stderr[tuple(index)], change.std() / 2)  # of four prompts
    both = [(hook, [(0, 2)[k]] if part == "head" else None) for k in (0, 1) for hook in hooks_of(k, k, part, stack)]
    joint = by_hand(bridge, both, positions, mean) - plain
    assert found.joint is not None
    check(found.joint.values[0], joint.mean())
    check(found.joint.stderr[0], joint.std() / 2)


def test_edges_and_axes() -> None:
    bridge = zoo("huginn")
    full = quiet(bridge, TEXTS, logit_diff(RIGHT, WRONG))
    assert list(map(str, full.change.labels["loop"])) == ["prelude", "0", "1", "2", "coda"]
    assert full.change.values.isfinite().sum().item() == (2 + 3 * 3 + 1) * 3
    frame = full.to_dataframe()  # without the layers that a stack lacks
    assert len(frame) == 36 and frame.notna().all(axis=None) and set(frame.loop) == set(full.change.labels["loop"])
    at = frame[(frame.loop == "coda") & (frame["head"] == full.change.labels["head"][2])].iloc[0]
    assert at["logit difference change"] == full.change.values[4, 0, 2].item()
    assert at["logit difference change_stderr"] == full.change.stderr[4, 0, 2].item()
    assert len(full.plot().data[0].z) == 12
    by_loop = quiet(bridge, TEXTS, logit_diff(RIGHT, WRONG), by=("loop",), joint=[["0", 2], ["all"]])
    every = [(hook, [0, 1, 2]) for layer in range(3) for hook in hooks_of(1, layer, "head")]
    change = by_hand(bridge, every, slice(None), False) - by_hand(bridge, [], slice(None), False)
    torch.testing.assert_close(by_loop.change.values[2], change.mean())
    assert by_loop.joint is not None and by_loop.joint.labels["joint"] == ["(0) + (2)", "(all)"]
    torch.testing.assert_close(by_loop.joint.values[1], by_loop.removed.values - by_loop.whole.values)
    some = quiet(bridge, TEXTS, logit_diff(RIGHT, WRONG), by=("head", "layer"), loops=[1, 2], layers=[0, 2], heads=[2])
    assert some.change.axes == ("layer", "head") and some.change.values.shape == (2, 1)
    names = [(hook, [2]) for loop in (1, 2) for hook in hooks_of(loop, 2, "head")]
    change = by_hand(bridge, names, slice(None), False) - by_hand(bridge, [], slice(None), False)
    torch.testing.assert_close(some.change.values[1, 0], change.mean())


def test_positions_are_an_axis() -> None:
    """Every position by itself: of prompts of one length from the start, of others from the end."""
    bridge, metric = zoo("huginn"), logit_diff(RIGHT, WRONG)
    plain = by_hand(bridge, [], slice(None), False)
    heads = quiet(bridge, TEXTS, metric, by=("loop", "head", "pos"), heads=[0, 2], positions=[-2, -1], joint=[[(1, 2, "all")]])
    assert heads.change.axes == ("loop", "head", "pos") and heads.change.labels["pos"] == [-2, -1]
    layers = quiet(bridge, TEXTS, metric, by=("layer", "pos"), part="layer", stack="core", positions=[-1, -2], mode="mean")
    core = [(hook, [2]) for layer in range(3) for hook in hooks_of(1, layer, "head")]
    for pos, at in ((-2, slice(-2, -1)), (-1, slice(-1, None))):
        change = by_hand(bridge, core, at, False) - plain
        cell = heads.change.sel(loop=1, head=2, pos=[pos])
        torch.testing.assert_close(cell.values[0], change.mean())
        torch.testing.assert_close(heads.change.stderr[2, 1, pos], change.std() / 2)
        every: list[Any] = [(hook, None) for loop in range(3) for hook in hooks_of(loop, 1, "layer")]
        torch.testing.assert_close(
            layers.change.sel(layer=1, pos=[pos]).values[0], (by_hand(bridge, every, at, True) - plain).mean()
        )
    assert heads.joint is not None
    torch.testing.assert_close(heads.joint.values[0], (by_hand(bridge, core, slice(-2, None), False) - plain).mean())
    one = quiet(bridge, TEXTS[0], logit_diff(RIGHT[0], WRONG[0]), by="pos", part="mlp")
    assert one.change.axes == ("pos",) and one.change.labels["pos"] == list(range(bridge.to_tokens(TEXTS[0]).shape[1]))
    kept = quiet(bridge, TEXTS[0], logit_diff(RIGHT[0], WRONG[0]), by="pos", part="mlp", stack="core", restore=True)
    mlps: list[Any] = [(hook, None) for loop in range(3) for layer in range(3) for hook in hooks_of(loop, layer, "mlp")]
    n = len(kept.change.values)
    but_last, whole = by_hand(bridge, mlps, slice(n - 1), False)[0], by_hand(bridge, mlps, slice(None), False)[0]
    torch.testing.assert_close(kept.change.values[-1], but_last - whole)
    for asked, says in (
        ({"by": "pos"}, "that all have, such as"),
        ({"by": "pos", "positions": slice(-2, None)}, "that all have, such as"),
        ({"by": ("layer", "neuron"), "part": "mlp"}, "every neuron would be a run of its own"),
    ):
        with pytest.raises(LoopedError, match=says):
            quiet(bridge, TEXTS, metric, **asked)
    with pytest.raises(OutOfRangeError, match="positions"):
        quiet(bridge, TEXTS, metric, by="pos", positions=[-40])


def test_restored_alone() -> None:
    """Everything is removed but one cell."""
    bridge = zoo("looped_qwen")
    found = quiet(bridge, TEXTS, logit_diff(RIGHT, WRONG), stack="core", restore=True, joint=[[(1, 0, "all")], [("all",) * 3]])
    every = {(loop, layer): [0, 1, 2] for loop in range(3) for layer in range(2)}

    def run(kept: dict[tuple[int, int], list[int]]) -> torch.Tensor:
        left = {key: [h for h in heads if h not in kept.get(key, [])] for key, heads in every.items()}
        return by_hand(bridge, [(hooks_of(*key, "head")[0], heads) for key, heads in left.items()], slice(None), False)

    nothing, whole = run({}), by_hand(bridge, [], slice(None), False)
    torch.testing.assert_close(found.removed.values, nothing.mean())
    torch.testing.assert_close(found.change.values[2, 1, 0], (run({(2, 1): [0]}) - nothing).mean())
    assert found.joint is not None
    torch.testing.assert_close(found.joint.values[0], (run({(1, 0): [0, 1, 2]}) - nothing).mean())
    torch.testing.assert_close(found.joint.values[1], (whole - nothing).mean())
    share = found.normalised()
    torch.testing.assert_close(share.values, found.change.values / (whole - nothing).mean())


def test_prompts_in_any_form_and_results_that_add_up() -> None:
    bridge = zoo("looped_qwen")
    whole = quiet(bridge, TEXTS, logit_diff(RIGHT, WRONG))
    parts = [quiet(bridge, TEXTS[a:b], logit_diff(RIGHT[a:b], WRONG[a:b])) for a, b in ((0, 1), (1, 4))]
    added = parts[0] + parts[1]
    assert added.change.count == 4
    torch.testing.assert_close(added.change.values, whole.change.values, equal_nan=True)
    torch.testing.assert_close(added.change.stderr, whole.change.stderr, equal_nan=True)
    rows = [bridge.to_tokens(text)[0] for text in TEXTS]
    of_tokens = quiet(bridge, rows, logit_diff(RIGHT, WRONG))
    torch.testing.assert_close(of_tokens.change.values, whole.change.values, equal_nan=True)
    for side in ("left", "right"):
        tokens = torch.zeros(4, 5, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            where = slice(5 - len(row), None) if side == "left" else slice(len(row))
            tokens[i, where], mask[i, where] = row, 1
        padded = quiet(bridge, tokens, logit_diff(RIGHT, WRONG), attention_mask=mask)
        torch.testing.assert_close(padded.change.values, whole.change.values, equal_nan=True)
    means = [quiet(bridge, TEXTS[a:b], prob(RIGHT[a:b]), mode="mean", reference=TEXTS) for a, b in ((0, 2), (2, 4))]
    of_all = quiet(bridge, TEXTS, prob(RIGHT), mode="mean")
    torch.testing.assert_close((means[0] + means[1]).change.values, of_all.change.values, equal_nan=True)
    with pytest.raises(LoopedError, match="means="):
        _ = of_all + quiet(bridge, TEXTS[:2], prob(RIGHT[:2]), mode="mean")


def test_at_loop_is_a_run_of_that_many_loops() -> None:
    bridge = zoo("huginn")
    metric = logit_diff(RIGHT, WRONG)
    at_loop = quiet(bridge, TEXTS, metric, at_loop=1)
    torch.testing.assert_close(at_loop.change.values, quiet(bridge.unroll(2), TEXTS, metric).change.values, equal_nan=True)
    assert at_loop.n_loops == 2
    deeper = quiet(bridge, TEXTS, metric, n_loops=5, by="loop")
    assert list(map(str, deeper.change.labels["loop"])) == ["prelude", *"01234", "coda"]


def test_a_divergence_from_the_whole_run_is_none_without_ablation() -> None:
    bridge = zoo("ouro")
    found = quiet(bridge, TEXTS, kl_to(TEXTS))
    assert abs(float(found.whole.values)) < 1e-12 and bool((found.change.values > 0).all())
    plain = quiet(bridge, TEXTS[0], lambda logits: logits[0, -1, 4])
    torch.testing.assert_close(plain.whole.values, bridge(TEXTS[0])[0, -1, 4].detach().double())


def test_hooks_that_are_attached_act_in_every_run() -> None:
    bridge, metric = zoo("ouro"), logit_diff(RIGHT, WRONG)
    hooks = ablate(bridge, "mlp", loops=1)
    with bridge.hooks(fwd_hooks=hooks):
        found = quiet(bridge, TEXTS, metric, by="loop", joint=[[0, 2]])
    names: list[tuple[str, list[int] | None]] = [(name, None) for name, _ in hooks]
    both = [(hook, [0, 1, 2]) for loop in (0, 2) for layer in (0, 1) for hook in hooks_of(loop, layer, "head")]
    change = by_hand(bridge, names + both, slice(None), False) - by_hand(bridge, names, slice(None), False)
    assert found.joint is not None
    torch.testing.assert_close(found.joint.values[0], change.mean())


def test_the_heads_of_hop_three_work_together() -> None:
    """Of the four heads of a loop none is needed, but all of them are: what single ablations do not show."""
    model, prompts = LoopedBridge.from_pretrained("toy:hop", device="cpu"), hop_prompts(16)
    right = prompts.answers(3)[2, :, -1]
    joint = [[(loop, 0, "all")] for loop in range(3)]
    found = quiet(model, prompts.tokens, prob(right), at_loop=2, joint=joint, stack="core")
    assert float(found.whole.values) > 0.99 and float(found.change.values.abs().max()) < 0.1
    assert found.joint is not None and float(found.joint.values[2]) < -0.5
    # The state of another prompt at loop 2 moves the answer, by the same metric of texts.
    _, cache = model.run_with_cache(prompts.tokens[:1])
    moved = patch_sweep(model, prompts.tokens[1:2], cache, prob(right[:1]), at_loop=2, verbose=False)
    assert moved.baseline_clean is not None and float(moved.baseline_clean) > 0.99


def test_what_cannot_be_ablated_is_refused(unchecked: None) -> None:
    bridge, metric = zoo("ouro"), logit_diff(RIGHT, WRONG)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("part='heads' and mode='zero' were asked", {"part": "heads"}),
        ("mode='resample' were asked", {"mode": "resample"}),
        ("has the axes loop, layer,", {"part": "mlp", "by": ("loop", "head")}),
        ("heads=0 was asked of part='mlp'", {"part": "mlp", "heads": 0}),
        (r"names the cell \(5, 0, 0\), which this sweep does not have", {"joint": [[(5, 0, 0)]]}),
        (r"joint= holds 5; pass a list of groups", {"joint": [5]}),
        ("4 answers were given for 2 prompts", {"prompts": TEXTS[:2]}),
        ("prompts='' is empty|prompt 0 of prompts is empty", {"prompts": [torch.zeros(0, dtype=torch.long)]}),
        (r"prompts=\[\] was given", {"prompts": []}),
        ("prompt 1 of prompts is 3", {"prompts": ["t3", 3, "t4", "t5"]}),
        ("one number for several prompts", {"metric": lambda logits: logits.sum(), "prompts": ["t3 t4", "t5 t6"]}),
        ("reference= was given with mode='zero'", {"reference": TEXTS}),
        ("loop 7 is out of range", {"at_loop": 7}),
        ("positions 9 is out of range", {"positions": 9}),
        ("prompts of different lengths", {"metric": kl_to(torch.zeros(4, 5, 31))}),
        ("attention_mask= was given with prompts that are no tokens", {"attention_mask": torch.ones(4, 5)}),
    ]
    for message, change in cases:
        with pytest.raises(LoopedError, match=message):
            quiet(bridge, **{"prompts": TEXTS, "metric": metric, **change})
