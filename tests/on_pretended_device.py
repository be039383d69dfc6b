"""What a user does with a model that lies on one device or on several, with prompts that lie on the CPU.

`python on_pretended_device.py PLACE/MODEL... [WORK...]`, in a process of its own, as the devices stay known to torch. PLACE is
"one" or "several", or where there is a GPU "gpu" or "gpu-and-cpu"; a model is one of the zoo or a golden checkpoint, and WORK
what is done, by default everything below. Numbers, and refusals, are those of the same model on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pretended_device
import torch
from helpers import metric, tiny_llama, word_tokenizer
from torch import Tensor
from zoo import GOLDEN, ZOO, random_bridge

from tl_looped import LoopedBridge, LoopedError, collect, exits, interventions
from tl_looped.analysis import (
    attention_distances,
    attention_stability,
    exit_steps,
    fixed_points,
    inference_stages,
    injection_effect,
    limiting_behaviour,
    local_stability,
    looped_floorplan,
    more_loops,
    output_neurons,
    path_independence,
    state_similarity,
    step_geometry,
    trajectories,
)
from tl_looped.analysis.side_by_side import compare
from tl_looped.attribution import attribution_sweep, edge_sweep, influence, path_patch, weight_gradients_by_pass
from tl_looped.explorer import Session
from tl_looped.lenses import logit_lens
from tl_looped.patching import ablation_sweep, patch_between_loops, patch_sweep
from tl_looped.report import report

PLACES = {
    "one": (pretended_device.NAME,),
    "several": (pretended_device.NAME, pretended_device.SECOND, "cpu"),
    "gpu": ("cuda",),
    "gpu-and-cpu": ("cuda", "cpu"),
}
QUIET = {"verbose": False}
WRITE = {"stop_at_eos": False, "do_sample": False, "verbose": False, "return_type": "tokens"}


def tokens(batch: int = 2, pos: int = 7, seed: int = 0) -> Tensor:
    """Tokens that every model here has, [batch, pos]."""
    return torch.randint(3, 30, (batch, pos), generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
CLEAN, OTHER = tokens(1), tokens(1, seed=5)


def stack(model: LoopedBridge) -> dict[str, Any]:
    """Which of two stacks is meant."""
    return {"stack": "H"} if len(model.schedule.core_stacks) == 2 else {}


def loop(model: LoopedBridge, t: int) -> str:
    """The name of a pass."""
    return f"{'H.' * len(stack(model))}loops.{t}"


def cached(model: LoopedBridge, prompt: Tensor = CLEAN, **more: Any) -> Any:
    """The cache of a run."""
    return model.run_with_cache(prompt, **more)[1]


def parts_of_cache(model: LoopedBridge) -> Any:
    """What a cache makes of its activations."""
    cache = cached(model)
    return [
        cache.attribute_logits(tokens=3, positions=-1),
        cache.decompose_resid(),
        cache.stack_loops("resid_post", layer=0, **stack(model)),
        cache.logit_attrs(cache.decompose_resid(), tokens=3),
    ]


def stacks_of_cache(model: LoopedBridge) -> Any:
    """TransformerLens's ways to stack what a cache holds."""
    cache = cached(model)
    return [
        cache.stack_activation("resid_post"),
        cache.stack_loops("resid_post", **stack(model)),
        cache.stack_loops("hook_out", **stack(model)),
        cache.stack_head_results(),
        cache.stack_neuron_results(-1, neuron_slice=2),
        cache.get_full_resid_decomposition(expand_neurons=False, apply_ln=True),
        cache.accumulated_resid(),
        cache.attribute_logits(tokens=3, unit="head"),
        cache.get_neuron_results(1, neuron_slice=2),
    ]


def gradients_in_cache(model: LoopedBridge) -> Any:
    """Gradients by name, as TransformerLens caches them."""
    _, cache = model.run_with_cache(CLEAN, incl_bwd=True, return_type="loss")
    model.zero_grad()
    return [value for name, value in cache.items() if name.endswith("hook_resid_post_grad")]


def gradient_cache(model: LoopedBridge) -> Any:
    """Gradients by name, of a run that goes back from a metric."""
    found: list[Tensor] = []
    hooks = [(f"{loop(model, 0)}.hook_out", lambda grad, hook: found.append(grad.detach()))]
    model.run_with_hooks(CLEAN, return_type="loss", bwd_hooks=hooks)
    with model.hooks(bwd_hooks=hooks):
        model(CLEAN, return_type="loss").backward()
    model.zero_grad()
    return found


def through_hooks(hooks: Callable[[LoopedBridge], Any], write: bool = True, run: bool = True) -> Callable[[LoopedBridge], Any]:
    """A run, and a text, with these hooks."""

    def act(model: LoopedBridge) -> Any:
        made = hooks(model)
        with model.hooks(fwd_hooks=made):
            return model(tokens()) if run else None, model.generate(tokens(), 3, **WRITE) if write else None

    return act


def written_by(policy: Any) -> Callable[[LoopedBridge], Any]:
    """A text under an exit policy, with and without a key-value cache."""

    def act(model: LoopedBridge) -> Any:
        model.exit_policy = policy
        try:
            found = [model.generate(tokens(), 4, use_past_kv_cache=cache, **WRITE) for cache in (True, False)]
            return found, model.generation_report.loops_per_token
        finally:
            model.exit_policy = None

    return act


def asked(model: LoopedBridge) -> Any:
    """What the explorer answers."""
    session, found = Session(model), []
    text = " ".join(f"t{token}" for token in CLEAN[0].tolist())
    state = {"prompt": text, "other": text.replace(text.split()[0], "t29"), "edits": [{"kind": "ablate_mlp", "loops": "1"}]}
    for what in ("describe", "grid", "sweep", "attention", "generate", "script", "token"):
        reply = session.answer({"ask": what, "state": state, "layer": 0, "row": 0, "pos": 1, "token": 5, "lens": "native"})
        found.append(reply.get("error", sorted(reply)))
    return found


def collected(model: LoopedBridge) -> Any:
    """What a store of activations holds."""
    with tempfile.TemporaryDirectory() as folder:
        store = collect(model, list(tokens()), "resid_post", out=folder, **stack(model), **QUIET)
        return [store.of_prompt(name, 0) for name in store.names]


def trained(model: LoopedBridge) -> Any:
    """The loss after a step, and the loss before."""
    before = {name: p.detach().clone() for name, p in model.plain.canonical_parameters().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(tokens(), return_type="loss")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    with torch.no_grad():
        for name, p in model.plain.canonical_parameters().items():
            p.copy_(before[name])
    return losses


WORK: dict[str, Callable[[LoopedBridge], Any]] = {
    "forward": lambda m: m(tokens()),
    "loss": lambda m: m(tokens(), return_type="loss", loss_per_token=True),
    "masked": lambda m: m(tokens(), attention_mask=MASK),
    "positions": lambda m: m(tokens(), position_ids=torch.arange(7)[None] + 2),
    "seed": lambda m: m(tokens(), initial_state=3),
    "zero state": lambda m: m(tokens(), initial_state="zero"),
    "deeper": lambda m: m.unroll(m.n_loops + 2)(tokens()),
    "shorter": lambda m: m.unroll(1)(tokens()),
    "text": lambda m: m("t3 t4 t5"),
    "texts": lambda m: m(["t3 t4 t5", "t7 t8"]),
    "written text": lambda m: m.generate("t3 t4 t5", 3, stop_at_eos=False, do_sample=False, verbose=False),
    "cache": lambda m: dict(cached(m, tokens()).items()),
    "cache on the cpu": lambda m: m.run_with_cache(tokens(), device="cpu")[1]["hook_embed"],
    "cache of gradients": lambda m: gradients_in_cache(m),
    "embedded": lambda m: m(cached(m)["hook_embed"].cpu(), **({"input_ids": CLEAN} if m.looped_cfg.value_embed_layers else {})),
    "stopped": lambda m: m(tokens(), stop_at_layer=m.cfg.n_layers - 1),
    "restarted": lambda m: m(
        m(CLEAN, stop_at_layer=m.cfg.n_layers - 1).cpu(),
        start_at_layer=m.cfg.n_layers - 1,
        **({"input_ids": CLEAN} if m.looped_cfg.value_embed_layers else {}),
    ),
    "restarted with injection": lambda m: m(
        cached(m)[f"{loop(m, 0)}.blocks.1.hook_resid_pre"],
        start_at_layer=m.schedule.n_prelude + 1,
        injection=cached(m)[f"{loop(m, 0)}.hook_injection"].cpu(),
        **({"input_ids": CLEAN} if m.looped_cfg.value_embed_layers else {}),
    ),
    "parts of a cache": parts_of_cache,
    "stacks of a cache": stacks_of_cache,
    "injected parts": lambda m: cached(m).decompose_resid(injections=True),
    "layer parts": lambda m: cached(m).decompose_resid(layer=m.schedule.n_prelude + 1),
    "floorplan": lambda m: looped_floorplan(m, CLEAN),
    "accumulated": lambda m: cached(m).accumulated_resid(apply_ln=True),
    "readout": lambda m: m.readout(tokens(), loop=0, positions=-1),
    "readouts": lambda m: m.readout(tokens(), loop="all", attention_mask=MASK, positions=-1),
    "answers": lambda m: m.answers(tokens(), targets=[4, 5], n_loops=3).probs,
    "native lens": lambda m: logit_lens(m, tokens(), lens="native", targets=torch.tensor([3, 4])).log_probs,
    "logit lens": lambda m: logit_lens(m, tokens(), lens="logit", attention_mask=MASK).entropy,
    "sweep": lambda m: patch_sweep(m, OTHER, cached(m), metric, **stack(m), axes=("loop", "layer", "pos"), **QUIET),
    "sweep of heads": lambda m: patch_sweep(m, OTHER, cached(m), metric, **stack(m), site="z", axes=("loop", "head"), **QUIET),
    "sweep at a loop": lambda m: patch_sweep(
        m, OTHER, cached(m), metric, **stack(m), axes=("loop", "layer"), at_loop=0, **QUIET
    ),
    "ablation": lambda m: ablation_sweep(m, tokens(), metric, **stack(m), **QUIET),
    "ablation by mean": lambda m: ablation_sweep(
        m, tokens(), metric, part="mlp", mode="mean", reference=tokens(seed=3), **QUIET
    ),
    "between loops": lambda m: patch_between_loops(m, CLEAN, metric, **stack(m), **QUIET),
    "attribution": lambda m: attribution_sweep(m, OTHER, cached(m), metric, **stack(m), axes=("loop", "layer", "pos")),
    "integrated": lambda m: attribution_sweep(
        m, OTHER, cached(m), metric, **stack(m), site="resid_pre", axes=("loop", "layer"), steps=3
    ),
    "edges": lambda m: edge_sweep(m, OTHER, cached(m), metric),
    "path": lambda m: path_patch(
        m, OTHER, cached(m), metric, sources=f"{loop(m, 0)}.blocks.0.head.0", receivers=f"{loop(m, 1)}.blocks.1.*"
    ),
    "weight gradients": lambda m: weight_gradients_by_pass(m, tokens()),
    "influence": lambda m: influence(m, tokens(), tokens(seed=9), **stack(m)),
    "gradients": gradient_cache,
    "training": trained,
    "ablate": through_hooks(lambda m: interventions.ablate(m, "head", heads=0, loops=1, **stack(m))),
    "ablate by mean": through_hooks(
        lambda m: interventions.ablate(m, "mlp", mode="mean", loops=1, cache=cached(m, tokens(4, seed=2)), **stack(m))
    ),
    "resample": through_hooks(
        lambda m: interventions.ablate(m, "attn", mode="resample", cache=cached(m, tokens(seed=2)), **stack(m)), write=False
    ),
    "skip layer": through_hooks(lambda m: interventions.skip_layer(m, layers=0, loops=1, **stack(m))),
    "skip loop": through_hooks(lambda m: interventions.skip_loop(m, 0, **stack(m))),
    "freeze attention": through_hooks(lambda m: interventions.freeze_attention(m, 0, **stack(m))),
    "freeze injection": through_hooks(lambda m: interventions.freeze_injection(m, 0, **stack(m))),
    "drop injection": through_hooks(lambda m: interventions.drop_injection(m, loops=1, **stack(m))),
    "replace injection": through_hooks(
        lambda m: interventions.replace_injection(m, cached(m, tokens(seed=4)), **stack(m)), write=False
    ),
    "initial state": through_hooks(lambda m: interventions.set_initial_state(m, torch.ones(m.cfg.d_model), **stack(m))),
    "steer": through_hooks(lambda m: interventions.steer(m, torch.ones(m.cfg.d_model), relative_to_rms=True, **stack(m))),
    "shared keys": through_hooks(lambda m: interventions.share_kv(m, "mean"), run=False),
    "repeated loop": lambda m: (lambda twin, hooks: twin.run_with_hooks(tokens(), hooks))(*interventions.repeat_loop(m, 0)),
    "generated": lambda m: m.generate(tokens(), 4, **WRITE),
    "generated without cache": lambda m: m.generate(tokens(), 4, use_past_kv_cache=False, **WRITE),
    "generated, masked": lambda m: m.generate(tokens(), 3, attention_mask=MASK, **WRITE),
    "streamed": lambda m: list(m.generate_stream(CLEAN, 3, **WRITE)),
    "state policy": written_by(exits.StateChange(0.5)),
    "odd policy": written_by(lambda history: torch.tensor([history.loop >= 1])),
    "KL policy": written_by(exits.KL(0.5)),
    "gate policy": lambda m: written_by(exits.Gate(0.5))(m),
    "fixed points": lambda m: fixed_points(m, tokens(), **stack(m), n_loops=5, patterns=True, **QUIET),
    "stages": lambda m: inference_stages(m, tokens(), **QUIET),
    "distances": lambda m: attention_distances(m, tokens(), **QUIET),
    "attention": lambda m: attention_stability(m, tokens(), **stack(m), **QUIET),
    "exit steps": lambda m: exit_steps(m, tokens(), policies={"state": exits.StateChange(0.5)}, **QUIET),
    "injection effect": lambda m: injection_effect(m, tokens(), **stack(m), from_loop=1, replacement="mean", **QUIET),
    "limits": lambda m: limiting_behaviour(m, tokens(), **stack(m), n_loops=30, **QUIET),
    "local": lambda m: local_stability(m, CLEAN, n_loops=4, n_exponents=2, iterations=3, **QUIET),
    "more loops": lambda m: more_loops(m, tokens(), n_loops=5, **QUIET),
    "neurons": output_neurons,
    "paths": lambda m: path_independence(m, tokens(), **stack(m), n_loops=30, **QUIET),
    "geometry": lambda m: step_geometry(m, tokens(), **stack(m), n_loops=4, **QUIET),
    "similarity": lambda m: state_similarity(m, tokens(), **QUIET),
    "collected": collected,
    "trajectories": lambda m: trajectories(m, tokens(), **stack(m), n_loops=4, **QUIET),
    "compared": lambda m: compare(m, tokens(), n_loops=(2, 3), **QUIET),
    "explorer": asked,
    "report": lambda m: [
        (s.name, " ".join(s.reading))
        for s in report(m, tokens(), n_loops=3, clean=CLEAN[0], corrupted=OTHER[0], **QUIET).sections
    ],
    "fingerprint": lambda m: m.fingerprint().sums,
    "weights": lambda m: (m.W_Q, m.W_out, m.W_U, m.W_E, m.core_weights),
    "dtype": lambda m: m.unroll(2).to(m.cfg.dtype)(tokens()),
}


def outcome(work: Callable[[LoopedBridge], Any], model: LoopedBridge) -> Any:
    """What came of it, or the refusal."""
    try:
        return work(model)
    except (LoopedError, ValueError) as error:
        return f"refused: {error}"


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Everything in a result, by where it is."""
    if isinstance(value, Tensor):
        return {at: value.detach().cpu()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return {k: v for name, one in value.items() for k, v in flat(one, f"{at}.{name}").items()}
    return {at: value} if isinstance(value, (int, float, str)) else {}


def model_of(name: str) -> LoopedBridge:
    """A model by its name."""
    model = random_bridge(name) if name in ZOO else LoopedBridge.from_pretrained(GOLDEN / name, device="cpu")
    model.tokenizer = word_tokenizer()
    return model


def scattered(model: LoopedBridge, devices: tuple[str, ...]) -> dict[str, str]:
    """A map that puts every part beside others of another device."""
    return {part: devices[i % len(devices)] for i, part in enumerate(model.device_map)}


def check_moves(there: LoopedBridge) -> None:
    """A model on several devices stays there, in other dtypes and copies too."""
    for move in (lambda: there.to("cpu"), there.cpu, lambda: there.to(pretended_device.NAME, torch.float64), there.cuda):
        try:
            move()
        except LoopedError as error:
            assert "was loaded on several devices (cpu, lazy:0, pretended:0), where it stays" in str(error), error
        else:
            raise AssertionError("it was moved")
    copied = copy.deepcopy(there).to(torch.float64)
    assert copied.device_map == there.device_map and copied.cfg.dtype == torch.float64
    assert copied.unroll(there.n_loops).device_map == there.device_map
    torch.testing.assert_close(copied(CLEAN).cpu().float(), there(CLEAN).cpu(), atol=2e-4, rtol=1e-3)


def check_models_in_memory() -> None:
    """A model that lies on several devices is taken as it lies there, if no layer is split; ints are accelerators."""
    llama, tokens = tiny_llama(), CLEAN
    expected = LoopedBridge.loop_layers(llama, 1, 3, n_loops=2)(tokens)
    for i, layer in enumerate(llama.model.layers):
        layer.to(PLACES["several"][i % 3])
    llama.lm_head.to(pretended_device.SECOND)
    there = LoopedBridge.loop_layers(llama, 1, 3, n_loops=2)
    assert there.cfg.n_devices == 3 and there.blocks[1].attn.q.weight.device.type == pretended_device.SECOND
    torch.testing.assert_close(there(tokens).cpu(), expected)
    llama.model.layers[2].mlp.to(pretended_device.NAME)
    try:
        LoopedBridge.loop_layers(llama, 1, 3, n_loops=2)
    except LoopedError as error:
        assert "core.1 lies on cpu and, with core.1.mlp." in str(error), error
    else:
        raise AssertionError("a split layer was taken")
    placed = LoopedBridge.from_pretrained("toy:hop", device_map={"": 0, "core.1": pretended_device.SECOND})
    assert str(placed.device_map["embed"]) == "pretended:0" and str(placed.device_map["core.1"]) == "lazy:0"
    assert placed(tokens % 13).device.type == pretended_device.NAME


def main(asked: list[str], only: list[str]) -> None:
    """Do it on the CPU and there, and say all that differs."""
    failed, places = False, [one.split("/") for one in asked]
    if not all(place.startswith("gpu") for place, _ in places):
        pretended_device.switch_on()
    for place, name in places:
        model, devices = model_of(name), PLACES[place]
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            where = {"device": devices[0]} if len(devices) == 1 else {"device_map": scattered(model, devices)}
            there = LoopedBridge.from_pretrained(directory, **where)
        assert {str(at).partition(":")[0] for at in there.device_map.values()} == set(devices)
        assert there.cfg.n_devices == len(devices)
        for what in only or WORK:
            try:
                expected, found = (flat(outcome(WORK[what], one)) for one in (model, there))
                assert expected, "nothing came of it"
                assert_same(found, expected)
            except Exception as error:
                frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
                print(f"{name}, {what}: {type(error).__name__}: {str(error)[:400]}\n    {' '.join(frames[-7:])}", flush=True)
                failed = True
        if place == "several":
            check_moves(there)
            check_models_in_memory()
        with tempfile.TemporaryDirectory() as directory:
            there.save_pretrained(directory)
            back = LoopedBridge.from_pretrained(directory, device="cpu").plain.canonical_parameters()
        assert all(torch.equal(p, back[key]) for key, p in model.plain.canonical_parameters().items()), name
    sys.exit(failed)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same numbers and the same refusals; other texts may tell numbers that differ in their last digits."""
    assert found.keys() == expected.keys(), f"{found} where it was {expected}"[:900]
    for key, value in expected.items():
        if not isinstance(value, str):
            torch.testing.assert_close(found[key], value, equal_nan=True, atol=2e-4, rtol=1e-3)
        elif value.startswith("refused: "):
            assert found[key][:60] == value[:60], f"{found[key]} where it was {value}"


if __name__ == "__main__":
    main([one for one in sys.argv[1:] if one not in WORK], [one for one in sys.argv[1:] if one in WORK])
