"""What a user does with a model on an accelerator, with prompts that lie on the CPU: `python on_pretended_device.py`.

In a process of its own, as the device stays known to torch. Numbers are compared with those of the same model on the CPU.
"""

from __future__ import annotations

import tempfile
from typing import Any

import pretended_device
import torch
from torch import Tensor
from zoo import random_bridge, random_tokens

from tl_looped import LoopedBridge
from tl_looped.analysis import fixed_points, inference_stages
from tl_looped.attribution import weight_gradients_by_pass
from tl_looped.interventions import share_kv
from tl_looped.lenses import logit_lens
from tl_looped.patching import patch_sweep


def work(model: LoopedBridge) -> dict[str, Any]:
    """One number or tensor of everything, by what was done."""
    tokens = random_tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    metric = lambda logits: logits[:, -1, 3]  # noqa: E731
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["forward"] = model(tokens)
        found["loss"] = model(tokens, return_type="loss")
        found["masked"] = model(tokens, attention_mask=mask)
        found["positions"] = model(tokens, position_ids=torch.arange(7)[None] + 2)
        _, cache = model.run_with_cache(tokens[:1])
        found["cache"] = cache["loops.-1.blocks.0.hook_resid_post"]
        found["embedded"] = model(cache["hook_embed"].cpu())
        found["decomposed"] = cache.attribute_logits(tokens=3, positions=-1).values
        found["readout"] = model.readout(tokens, loop=0, positions=-1)
        found["answers"] = model.answers(tokens, targets=[1, 2]).probs.values
        found["lens"] = logit_lens(model, tokens, targets=torch.tensor([3, 4])).log_probs
        clean, other = random_tokens(1), random_tokens(1, seed=5)
        _, cache = model.run_with_cache(clean)
        found["sweep"] = patch_sweep(model, other, cache, metric, axes=("loop", "layer", "pos"), verbose=False).values
        stages = inference_stages(model, tokens, verbose=False)
        found["stages"], found["norm"] = stages.entropy.values, stages.norm.values
        found["fixed points"] = fixed_points(model, tokens, n_loops=5, verbose=False).norm.values
        found["generated"] = model.generate(clean, 4, stop_at_eos=False, do_sample=False, verbose=False, return_type="tokens")
        with model.hooks(share_kv(model, "last")):
            found["shared"] = model.generate(clean, 3, stop_at_eos=False, do_sample=False, verbose=False, return_type="tokens")
        model.exit_policy = lambda history: torch.tensor([history.loop >= 1])
        found["exits"] = model.generate(clean, 3, stop_at_eos=False, do_sample=False, verbose=False, return_type="tokens")
        model.exit_policy = None
    found["gradients"] = next(iter(weight_gradients_by_pass(model, tokens).values()))
    return found


def main() -> None:
    """Do it on both devices."""
    pretended_device.switch_on()
    for name in ("ouro", "huginn"):
        model = random_bridge(name)
        expected = work(model)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            there = LoopedBridge.from_pretrained(directory, device=pretended_device.NAME)
            found = work(there)
            there.save_pretrained(directory)
        assert found["forward"].device.type == pretended_device.NAME
        for what, value in expected.items():
            other = found[what]
            torch.testing.assert_close(
                other.cpu() if isinstance(other, Tensor) else other,
                value,
                equal_nan=True,
                atol=2e-4,
                rtol=1e-3,
                msg=lambda text, what=what, name=name: f"{what} of {name}: {text}",
            )


if __name__ == "__main__":
    main()
