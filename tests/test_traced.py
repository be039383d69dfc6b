"""Modules that the package does not know, traced: their own logits, and hooks that act where their names say."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any, cast

import looped_modules
import pytest
import torch
from looped_modules import VOCAB
from torch import Tensor, nn
from tracing import ALL, CLEAN, CORRUPTED, metric, module_of, own_logits, traced
from transformers import AutoModelForCausalLM
from zoo import GOLDEN

from tl_looped import LoopedBridge
from tl_looped.analysis import fixed_points, step_geometry
from tl_looped.attribution import attribution_sweep, edge_sweep
from tl_looped.errors import LoopedError
from tl_looped.interventions import skip_loop, steer
from tl_looped.lenses import logit_lens
from tl_looped.patching import ablation_sweep, patch_sweep


class Counting:
    """Replaces what one call of a submodule takes or gives, counted by hand."""

    def __init__(self, module: nn.Module, path: str, number: int, change: Callable[[Tensor], Tensor], side: str = "in"):
        self.n, self.number, self.change = 0, number, change
        submodule = module.get_submodule(path)
        if side == "in":
            self.handle = submodule.register_forward_pre_hook(self.before)
        else:
            self.handle = submodule.register_forward_hook(lambda m, args, out: self.changed(cast(Tensor, out)))

    def changed(self, x: Tensor) -> Tensor:
        self.n += 1
        return self.change(x.clone()) if self.n - 1 == self.number else x

    def before(self, submodule: nn.Module, args: Any) -> Any:
        return (self.changed(args[0]), *args[1:])

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_are_the_modules_own_and_patches_act_in_one_call(name: str) -> None:
    model = traced(name)
    assert torch.equal(model(CLEAN), own_logits(model, CLEAN)) and torch.equal(model(CLEAN), own_logits(model, CLEAN))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    _, cache = model.run_with_cache(CLEAN)
    stack = model.schedule.core_stacks[0]
    sweep = patch_sweep(model, CORRUPTED, cache, metric, axes=("loop", "layer", "pos"), stack=stack, verbose=False)
    loops, order = sweep.labels["loop"], model.trace.order
    for i, loop in enumerate(loops):
        for j in range(model.schedule.stacks[stack]):
            layer = model.schedule.passes_of(loop, stack)[0].layers[j]
            for pos in (1, 5):

                def change(x: Tensor, at: int = pos, value: Tensor = cache["resid_pre", layer]) -> Tensor:
                    x[:, at] = value[:, at]
                    return x

                with Counting(model.module, order[layer], order[:layer].count(order[layer]), change):
                    expected = metric(own_logits(model, CORRUPTED))
                assert torch.isclose(sweep.values[i, j, pos], expected, atol=1e-5), (loop, j, pos)


@torch.no_grad()
def test_activations_inside_layers_are_those_of_the_modules() -> None:
    model = traced("NanoLoop")
    seen: dict[str, list[Tensor]] = {"attn": [], "c_proj": [], "mlp": []}
    block = model.module.transformer.h[1]
    handles = [
        block.attn.register_forward_hook(lambda m, args, out: seen["attn"].append(out)),
        block.attn.c_proj.register_forward_hook(lambda m, args, out: seen["c_proj"].append(args[0])),
        block.mlp.register_forward_hook(lambda m, args, out: seen["mlp"].append(out)),
    ]
    own_logits(model, CLEAN)
    for handle in handles:
        handle.remove()
    _, cache = model.run_with_cache(CLEAN)
    for loop in range(4):
        at = cache.at(loop, layer=1)
        assert torch.equal(at["hook_attn_out"], seen["attn"][loop]) and torch.equal(at["hook_mlp_out"], seen["mlp"][loop])
        assert torch.equal(at["attn.hook_z"].flatten(2), seen["c_proj"][loop])
        mixed = torch.einsum("bhqk,bkhd->bqhd", at["attn.hook_pattern"], at["attn.hook_v"])
        assert torch.allclose(mixed, at["attn.hook_z"], atol=1e-6)
        scores = torch.einsum("bqhd,bkhd->bhqk", at["attn.hook_q"], at["attn.hook_k"]) / at["attn.hook_q"].shape[-1] ** 0.5
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        assert torch.allclose(scores.masked_fill(~mask, -torch.inf).softmax(-1), at["attn.hook_pattern"], atol=1e-6)
    assert cache["loops.2.blocks.1.attn.hook_out"] is cache["loops.2.blocks.1.hook_attn_out"]
    assert torch.equal(cache["loops.1.hook_state"], cache["loops.0.hook_out"])


@torch.no_grad()
def test_heads_are_those_that_attend_and_names_of_loops_are_of_their_loops() -> None:
    model, seen = traced("Parallel"), list[Tensor]()
    handle = model.module.blocks[1].mixer.Wqkv.register_forward_hook(lambda m, args, out: seen.append(out))
    own_logits(model, CLEAN)
    handle.remove()
    _, cache = model.run_with_cache(CLEAN)
    angles = torch.arange(6)[:, None] * torch.tensor([1.0, 0.1])
    for loop in range(2):
        at = cache.at(loop, layer=1)
        q, k, v = (x.unflatten(-1, (-1, 4)) for x in seen[loop].split([16, 8, 8], -1))
        assert torch.equal(at["attn.hook_v"], v)
        for name, x in (("rot_q", q), ("rot_k", k)):
            assert torch.equal(at[f"attn.hook_{name}"], looped_modules.rotated(x.transpose(1, 2), angles).transpose(1, 2))
        mixed = torch.einsum("bhqk,bkhd->bqhd", at["attn.hook_pattern"], v.repeat_interleave(2, 2))
        assert torch.allclose(mixed, at["attn.hook_z"], atol=1e-6)
    assert not {"loops.0.blocks.0.attn.hook_k", "loops.0.drop.hook_out"} & set(model.hook_dict)
    assert model.trace.out.names == ("norm", "head") and "drop.call1.hook_out" in model.hook_dict
    assert logit_lens(model, CLEAN, positions=-1, top_k=1).top_tokens[-1, 0, 0, 0] == model(CLEAN)[0, -1].argmax()


@pytest.mark.parametrize("name", ["NanoLoop", "Capped"])
def test_patterns_act_and_have_gradients(name: str) -> None:
    model = traced(name)
    with torch.no_grad():  # all on one key: every head reads that value
        one = torch.zeros(1, 2, 6, 6)
        one[..., 0] = 1.0
        hooks = [("loops.2.blocks.0.attn.hook_pattern", lambda x, hook: one)]
        with_one, cache = {}, {}
        model.run_with_hooks(CLEAN, [*hooks, ("loops.2.blocks.0.attn.hook_z", lambda x, hook: with_one.update(z=x))])
        model.run_with_hooks(CLEAN, [("loops.2.blocks.0.attn.hook_v", lambda x, hook: cache.update(v=x))])
    assert torch.allclose(with_one["z"].unflatten(-1, (-1,)), cache["v"][:, :1].expand_as(cache["v"]), atol=1e-6)
    held: dict[str, Tensor] = {}

    def see(x: Tensor, hook: Any) -> Tensor:
        held["x"] = x
        return x

    logits = model.run_with_hooks(CLEAN, [("loops.1.blocks.1.attn.hook_pattern", see)])
    assert torch.equal(logits, model(CLEAN))
    (gradient,) = torch.autograd.grad(metric(logits), [held["x"]])

    def nudged(size: float) -> Tensor:
        def nudge(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[0, 1, 4, 2] += size
            return x

        return metric(model.double_().run_with_hooks(CLEAN, [("loops.1.blocks.1.attn.hook_pattern", nudge)]))

    model.double_ = lambda: model.to(torch.float64)
    with torch.no_grad():
        slope = (nudged(1e-4) - nudged(-1e-4)) / 2e-4
    assert torch.isclose(gradient[0, 1, 4, 2].double(), slope, atol=1e-5)


@torch.no_grad()
def test_activations_that_change_in_place_are_kept_as_they_were() -> None:
    model = traced("InPlace")
    _, cache = model.run_with_cache(CLEAN)
    assert torch.equal(cache["loops.0.blocks.0.hook_resid_pre"], model.module.emb(CLEAN))
    assert torch.allclose(0.9 * cache["loops.0.blocks.1.hook_resid_post"], cache["loops.1.blocks.0.hook_resid_pre"])
    with pytest.raises(LoopedError, match="changes tensors in place and relies on others seeing it"):
        traced("LooksAway")


@torch.no_grad()
def test_readouts_and_lenses() -> None:
    model = traced("NanoLoop", set_loops="n_loops")
    every = model.readout(CLEAN, loop="all")
    assert torch.allclose(every[-1], model(CLEAN), atol=1e-5)
    for loop in range(3):
        shorter = module_of("NanoLoop", n_loops=loop + 1)
        assert torch.allclose(every[loop], shorter(CLEAN)[0], atol=1e-5)
        assert torch.equal(model.unroll(loop + 1)(CLEAN), shorter(CLEAN)[0])
    assert model.module.n_loops == 4 and torch.equal(model(CLEAN), own_logits(model, CLEAN))
    found = logit_lens(model, CLEAN, loops=[0, 3], positions=-1, top_k=1)
    assert found.labels[-1] == "loops.3.blocks.2" and found.top_tokens[-1, 0, 0, 0] == model(CLEAN)[0, -1].argmax()
    with pytest.raises(LoopedError, match="nobody has said how Halting is told"):
        traced("Halting").unroll(3)


@torch.no_grad()
def test_states_go_through_the_layers_that_follow_the_loops() -> None:
    module: Any = module_of("NanoLoop", n_coda=2)
    model = LoopedBridge.trace(module, CLEAN, set_loops="n_loops", verbose=False)
    every, found = model.readout(CLEAN, loop="all"), logit_lens(model, CLEAN, targets=3, lens="native")
    _, cache = model.run_with_cache(CLEAN)

    def by_hand(x: Tensor, coda: int = 0) -> Tensor:
        for block in module.transformer.last[coda:]:
            x = block(x)
        return module.lm_head(module.transformer.ln_f(x))

    for loop in range(4):
        assert torch.allclose(every[loop], by_hand(cache[f"loops.{loop}.blocks.2.hook_resid_post"]), atol=1e-5)
        assert torch.allclose(every[loop], model.unroll(loop + 1)(CLEAN), atol=1e-5)
    for row, layer in enumerate(found.layers):
        logits = by_hand(cache["resid_post", layer], max(0, layer - model.schedule.first_coda_layer + 1))
        assert torch.allclose(found.log_probs[row, ..., 0], logits.log_softmax(-1)[..., 3], atol=1e-5), found.labels[row]
    with (
        pytest.raises(LoopedError, match=r"with a hook at coda\.blocks\.0\.hook_mlp_out"),
        model.hooks([("coda.blocks.0.hook_mlp_out", lambda x, hook: 0 * x)]),
    ):
        model.readout(CLEAN, loop="all")


@torch.no_grad()
def test_what_follows_the_loops_may_need_more_than_their_state() -> None:
    torch.manual_seed(0)
    model = LoopedBridge.trace(Remembering(n_coda=1).eval(), CLEAN, verbose=False)
    with pytest.raises(LoopedError, match="depends on more than what their last layer returned"):
        model.readout(CLEAN, loop=0)
    with pytest.raises(LoopedError, match="depends on more than what their last layer returned"):
        logit_lens(model, CLEAN, lens="native")
    with pytest.raises(LoopedError, match="lens='native' of the stack L"):
        logit_lens(traced("Hierarchical"), CLEAN, lens="native")


class Remembering(looped_modules.NanoLoop):
    """What follows the loops also reads the state of the first one."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        parts: Any = self.transformer
        x, states = parts.wte(idx), list[Tensor]()
        for _ in range(3):
            for block in parts.h:
                x = block(x)
            states.append(x)
        return self.lm_head(parts.ln_f(parts.last[0](x + states[0]))), None


def test_another_number_of_loops_is_seen() -> None:
    model = traced("Halting")  # the first token decides: 2 -> 4 loops
    other = torch.tensor([[3, 7, 1]])
    assert torch.equal(model(other), model.module(other))
    hooks = [("loops.0.blocks.0.hook_resid_pre", lambda x, hook: None)]
    with pytest.raises(LoopedError, match="after the 4 layers that it ran when it was traced"):
        model.run_with_hooks(other, hooks)
    with pytest.raises(LoopedError, match="ran 2 layers, but 4 when it was traced"):
        model.run_with_hooks(torch.tensor([[4, 7, 1]]), hooks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert model.run_with_hooks(CLEAN, hooks).shape == (1, 6, VOCAB)


@torch.no_grad()
def test_runs_are_counted_anew_after_errors_in_threads_and_while_writing() -> None:
    model = traced("NanoLoop")

    def fails(x: Tensor, hook: Any) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.run_with_hooks(CLEAN, [("loops.1.blocks.0.hook_attn_out", fails)])
    seen: list[tuple[int, ...]] = []
    hooks = [("loops.1.blocks.0.hook_resid_pre", lambda x, hook: seen.append(tuple(x.shape)))]
    with model.hooks(hooks):
        text = model.generate(CLEAN, 3, do_sample=False)
    assert seen == [(1, 6, 16), (1, 7, 16), (1, 8, 16)] and text.shape == (1, 9)
    assert text[0, 6] == model(CLEAN)[0, -1].argmax()

    found: dict[int, Tensor] = {}

    def run(k: int) -> None:
        for _ in range(5):
            with torch.no_grad():
                found[k] = model.module(CLEAN + k)[0]

    with torch.no_grad():
        expected = {k: model.module(CLEAN + k)[0] for k in range(3)}
    threads = [threading.Thread(target=run, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    zeroed = expected[0]
    for _ in range(5):
        zeroed = model.run_with_hooks(CLEAN, [("loops.*.blocks.*.hook_attn_out", lambda x, hook: torch.zeros_like(x))])
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], expected[k]) for k in range(3)) and not torch.equal(zeroed, expected[0])


def test_random_modules_need_a_seed() -> None:
    with pytest.raises(LoopedError, match="pass seed="):
        LoopedBridge.trace(module_of("Noisy"), CLEAN, verbose=False)
    model = traced("Noisy")
    assert model.lacks("rows apart") is not None
    before = torch.get_rng_state()
    model(CLEAN)
    assert torch.equal(before, torch.get_rng_state())


def test_what_gradients_do_not_reach_refuses() -> None:
    model = traced("Hierarchical")
    assert model.trace.ungraded[0] == "L.loops.0" and "H.loops.2" not in model.trace.ungraded
    _, cache = model.run_with_cache(CLEAN)
    with pytest.raises(LoopedError, match=r"no gradient reaches L\.loops\.0"):
        attribution_sweep(model, CORRUPTED, cache, metric, stack="L")


def test_gradients_are_autograds() -> None:
    model = traced("NanoLoop")
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN)
    found = attribution_sweep(model, CORRUPTED, cache, metric, site="resid_pre", axes=("loop", "layer", "pos"))
    held: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        held.append(x)
        return x

    with Counting(model.module, "transformer.h.1", 2, keep):
        (gradient,) = torch.autograd.grad(metric(own_logits(model, CORRUPTED)), held)
    with torch.no_grad():
        difference = cache["loops.2.blocks.1.hook_resid_pre"] - held[0]
    at = found.labels["loop"].index(2)
    assert torch.allclose(found.values[at, 1], (gradient * difference).sum(-1)[0], atol=1e-5)


def test_what_needs_more_than_hooks_refuses() -> None:
    model = traced("NanoLoop")
    _, cache = model.run_with_cache(CLEAN)
    for ask in (
        cache.decompose_resid,
        lambda: cache.logit_attrs(None, 3),
        lambda: edge_sweep(model, CORRUPTED, cache, metric),
        lambda: model.step_map(CLEAN),
    ):
        with pytest.raises(LoopedError, match="of a traced module only calls are known"):
            ask()


@torch.no_grad()
def test_analyses_and_interventions() -> None:
    model = traced("NanoLoop", set_loops="n_loops")
    found = fixed_points(model, CLEAN, n_loops=6, patterns=True, verbose=False)
    assert found.norm.values.shape == (6, 3)
    _, cache = model.unroll(6).run_with_cache(CLEAN)
    expected = cache["loops.5.blocks.2.hook_resid_post"].norm(dim=-1).mean()
    assert torch.isclose(found.norm.values[5, 2].float(), expected, rtol=1e-5)
    assert step_geometry(model, CLEAN, n_loops=None, verbose=False) is not None
    skipped = model.run_with_hooks(CLEAN, skip_loop(model, 1))
    assert torch.allclose(skipped, module_of("NanoLoop", n_loops=3)(CLEAN)[0], atol=1e-5)
    direction = torch.ones(16)

    def add(x: Tensor) -> Tensor:
        return x + direction

    with Counting(model.module, "transformer.h.0", 2, add):
        expected = own_logits(model, CLEAN)
    assert torch.allclose(model.run_with_hooks(CLEAN, steer(model, direction, loops=2)), expected, atol=1e-5)
    swept = ablation_sweep(model, CLEAN, metric, part="mlp", verbose=False)
    with Counting(model.module, "transformer.h.2.mlp", 3, torch.zeros_like, "out"):
        expected = metric(own_logits(model, CLEAN))
    assert torch.isclose(
        swept.change.values[swept.change.labels["loop"].index(3), 2] + swept.whole.values, expected.double(), atol=1e-5
    )


def test_tokens_with_depths_of_their_own() -> None:
    model = traced("PerToken")
    assert "loops.0.blocks.0.hook_resid_pre" in model.hook_dict and "loops.1.blocks.0.hook_resid_pre" not in model.hook_dict
    _, cache = model.run_with_cache(CLEAN)
    assert cache["loops.2.blocks.1.hook_out"].shape == (1, 2, 16)
    with pytest.raises(LoopedError, match=r"loops\.1\.blocks\.0\.hook_resid_pre"):
        patch_sweep(model, CORRUPTED, cache, metric, verbose=False)
    with pytest.raises(LoopedError, match="a lens was asked, but in this PerToken"):
        logit_lens(model, CLEAN)


@pytest.mark.parametrize("name", ["hrm_text"])
@torch.no_grad()
def test_native_and_traced_agree(name: str) -> None:
    hf = AutoModelForCausalLM.from_pretrained(GOLDEN / name).eval()
    native, model = LoopedBridge.from_hf(hf), LoopedBridge.trace(hf, CLEAN, verbose=False)
    assert native.schedule == model.schedule
    (logits, cache), (other, others) = native.run_with_cache(CLEAN), model.run_with_cache(CLEAN)
    assert torch.allclose(logits, other, atol=1e-5)
    shared = [key for key in others if key in cache.cache_dict]
    assert {"resid_pre", "resid_post", "attn_out", "mlp_out"} <= {key.rpartition("hook_")[2] for key in shared}
    shared += [f"{native.schedule.pass_prefix(p)}.{hook}" for p in native.schedule.passes for hook in ("hook_in", "hook_out")]
    for key in shared:
        assert torch.allclose(cache[key], others[key], atol=1e-5), key
    sweeps = [patch_sweep(m, CORRUPTED, c, metric, stack="H", verbose=False) for m, c in ((native, cache), (model, others))]
    assert torch.allclose(sweeps[0].values, sweeps[1].values, atol=1e-5)
    lenses = [logit_lens(m, CLEAN, targets=3) for m in (native, model)]
    assert torch.allclose(lenses[0].log_probs, lenses[1].log_probs, atol=1e-5)


def test_nothing_is_kept_between_runs() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(x) is Tensor and x.shape == (1, 6, 16) for x in gc.get_objects())

    model, seen = traced("NanoLoop"), list[int]()
    before = alive()
    model.run_with_hooks(CLEAN, [("loops.*.blocks.*.hook_resid_post", lambda x, hook: seen.append(x.numel()))])
    model.run_with_cache(CLEAN)
    assert alive() == before and len(seen) == 12


def test_checks_hold_in_half_precision() -> None:
    """A tolerance in units of bfloat16 as wide as that of float32 would let everything pass."""
    model = LoopedBridge.trace(module_of("Capped").to(torch.bfloat16), CLEAN, verbose=False)
    assert model.lacks("causal attention") is not None
    with pytest.raises(LoopedError, match="relies on others seeing it"):
        LoopedBridge.trace(module_of("LooksAway").to(torch.bfloat16), CLEAN, verbose=False)
    model = LoopedBridge.trace(module_of("NanoLoop").to(torch.bfloat16), CLEAN, verbose=False)
    assert model.lacks("causal attention") is None and "loops.1.hook_out" in model.hook_dict


class Gated(looped_modules.NanoLoop):
    """A gate decides how far the state moves; no module does it."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        parts: Any = self.transformer
        x = parts.wte(idx)
        for _ in range(3):
            entered = x
            for block in parts.h:
                x = block(x)
            gate = torch.sigmoid(x - entered)
            x = gate * x + (1 - gate) * entered
        return self.lm_head(parts.ln_f(x)), None


def test_gates_of_large_states_are_seen() -> None:
    torch.manual_seed(0)
    module: Any = Gated().eval()
    module.transformer.wte.weight.data.mul_(500)
    assert "loops.1.hook_out" not in LoopedBridge.trace(module, CLEAN, verbose=False).hook_dict


def test_what_no_hook_sees_between_passes_has_no_name() -> None:
    torch.manual_seed(0)
    model = LoopedBridge.trace(Gated().eval(), CLEAN, verbose=False)
    assert "loops.1.hook_out" not in model.hook_dict and "loops.1.hook_state" not in model.hook_dict
    assert "loops.1.hook_in" in model.hook_dict and "loops.1.hook_out" in traced("Noisy").hook_dict  # an injection only
    with pytest.raises(LoopedError, match="mixes something into the state between its passes"):
        skip_loop(model, 1)
    with pytest.raises(LoopedError, match=r"Something is made of what the layers of a pass return"):
        model.run_with_hooks(CLEAN, [("loops.1.hook_out", lambda x, hook: None)])
