"""A copied, pickled or frozen model computes what the model does."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from zoo import FEW, ZOO, random_bridge, random_tokens, slow_but

from tl_looped import LoopedBridge, LoopedError, exits
from tl_looped.attribution import attribution_sweep
from tl_looped.model import LoopedModel


def _answers(model: LoopedBridge, tokens: Tensor) -> dict[str, Tensor]:
    """What a model says, caches, attributes, learns and writes."""
    logits, cache = model.run_with_cache(tokens)
    stack = "L" if len(model.schedule.core_stacks) > 1 else None
    found = {name: cache[name] for name in cache.keys()}
    found |= {"logits": logits.detach(), "by loop": cache.stack_loops("resid_post", stack=stack)}
    found |= {"parts": cache.decompose_resid(), "heads": cache.attribute_logits(3, unit="head").values}
    model(tokens, return_type="loss").backward()
    for name, parameter in model.original_model.canonical_parameters().items():
        found[f"gradient of {name}"] = torch.zeros(0) if parameter.grad is None else parameter.grad.clone()
    model.zero_grad()
    model.exit_policy = exits.KL(0.5)
    found["text"] = model.generate(tokens, 3, do_sample=False, stop_at_eos=False, verbose=False)
    found["loops"] = model.generation_report.loops_per_token
    model.exit_policy = None
    return found


def _differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("name", slow_but(FEW))
def test_a_deep_copy_computes_the_same_and_is_a_model_of_its_own(name: str) -> None:
    # What is right is what the original says: the same computation on copied values. Without the last norm, which a copy
    # once skipped, the logits of the small Ouro are off by 6.8.
    model, tokens = random_bridge(name), random_tokens()
    right = _answers(model, tokens)
    fired: list[str] = []
    model.add_hook("blocks.1.hook_resid_pre", lambda x, hook: fired.append(hook.name))
    twin = copy.deepcopy(model)
    model.reset_hooks()
    twin(tokens)
    assert len(fired) == 1  # the copy has the hook, and loses it by itself
    twin.reset_hooks()
    assert not _differing(right, _answers(twin, tokens)) and len(fired) == 1
    assert torch.equal(model.unroll(4)(tokens), copy.deepcopy(twin.unroll(4))(tokens))
    assert torch.equal(copy.deepcopy(model.original_model)(tokens).logits, right["logits"])
    for holders in twin.original_model.parameter_slots.values():
        assert len({id(getattr(*holder)) for holder in holders}) == 1  # the passes of the copy share their parameters
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(twin(tokens), right["logits"])
    assert torch.equal(model(tokens), right["logits"])
    model.enable_compatibility_mode(disable_warnings=True)
    processed = model(tokens)
    assert torch.equal(copy.deepcopy(model)(tokens), processed)
    late = copy.deepcopy(random_bridge(name))
    late.enable_compatibility_mode(disable_warnings=True)
    assert torch.equal(late(tokens), processed)


def test_pickling_a_bridge_or_a_part_of_it_is_refused_and_names_what_to_do() -> None:
    model = random_bridge("ouro")
    _, cache = model.run_with_cache(random_tokens())
    for held in (model, model.original_model, model.blocks, model.blocks[1], cache):
        for save in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
            with pytest.raises(LoopedError, match="save_pretrained"):
                save(held)
    for cfg in ZOO.values():  # a model that no bridge has wrapped goes there and back
        plain = LoopedModel(cfg.replace(act_fn="gelu_tanh"))
        for parameter in plain.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        again = pickle.loads(pickle.dumps(plain))
        assert torch.equal(again(random_tokens()).logits, plain(random_tokens()).logits)
        assert len(list(again.parameters())) == len(list(plain.parameters()))


@pytest.mark.parametrize("name", slow_but({*FEW, "parcae"}))
def test_the_logits_of_a_frozen_model_have_no_gradient(name: str) -> None:
    model, tokens = random_bridge(name), random_tokens()
    _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    first = model.schedule.pass_prefix(model.schedule.passes[0])
    assert bool(cache[f"{first}.hook_state_grad"].any())  # a state that no parameter made has a gradient too
    model.zero_grad()
    model.requires_grad_(False)
    assert not model(tokens).requires_grad
    assert not model(tokens, initial_state="zero").requires_grad
    with pytest.raises(ValueError, match="requires_grad=False"):  # TransformerLens's own words
        model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    assert model.context_level == 0 and not any(point.has_hooks() for point in model.hook_dict.values())

    # A dictionary that is trained on activations, by two backward passes over what one run returned.
    _, cache = model.run_with_cache(tokens, names_filter="blocks.3.hook_resid_post")
    seen: list[Tensor] = []
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.hook_resid_post", lambda x, hook: seen.append(x))])
    learned = nn.Linear(24, 24)
    for _ in range(2):
        (learned(seen[0]) - seen[0]).square().sum().backward()
    assert torch.equal(seen[0], cache["blocks.3.hook_resid_post"])

    # An input that asks for a gradient gets it, at every hook: d loss / d embedding by central differences in fp64.
    wide = random_bridge(name, torch.float64)
    wide.requires_grad_(False)
    if wide.looped_cfg.value_embed_layers:
        return  # these read tokens beside embeddings
    embeds = wide.run_with_cache(tokens, names_filter="hook_embed")[1]["hook_embed"].clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return wide(x)[:, -1, 3].sum()

    (gradient,) = torch.autograd.grad(loss(embeds), embeds)
    step = torch.zeros_like(embeds)
    step[0, 2, 5] = 1e-6
    with torch.no_grad():
        expected = (loss(embeds + step) - loss(embeds - step)) / 2e-6
    assert gradient[0, 2, 5].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7)


def test_estimates_on_a_frozen_model_are_those_on_a_trained_one() -> None:
    for name in ("huginn", "hrm_text", "retrofit_llama"):
        model, clean, corrupted = random_bridge(name), random_tokens(seed=1), random_tokens(seed=2)
        stack = "L" if len(model.schedule.core_stacks) > 1 else None
        found = []
        for trained in (True, False):
            model.requires_grad_(trained)
            _, cache = model.run_with_cache(clean)
            for site in ("state", "resid_pre"):
                sweep = attribution_sweep(
                    model, corrupted, cache, lambda logits: logits[:, -1, 3].sum(), site=site, axes=("loop",), stack=stack
                )
                found.append(sweep.values)
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]) and bool(found[0].any())
