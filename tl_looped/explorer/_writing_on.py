"""Text that goes on after the prompt, with the loops that every token took."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .. import exits
from ..errors import LoopedError
from ..kinds import choice, count
from ..looped import Looped
from ._asked import a_number, words_of
from ._edits import Hooks, lacking
from ._progress import Progress

MOST_TOKENS = 256
POLICIES = {  # what each is called, and the threshold that is offered
    "none": ("every loop", 0.0),
    "gate": ("exit gate", 0.9),
    "kl": ("KL between loops", 5e-4),
    "change": ("change of the state", 0.03),
    "two_hits": ("two small accelerations", 0.1),
}
_CLASSES = {"gate": exits.Gate, "kl": exits.KL, "change": exits.StateChange, "two_hits": exits.TwoHitAcceleration}


def policies(model: Looped) -> list[dict[str, Any]]:
    """The exit policies, and for one that the model cannot have the reason.

    Args:
        model: the model.
    """
    no_gate = lacking(model, "exit gate")
    return [
        {"policy": name, "title": title, "threshold": threshold, "why": no_gate if name == "gate" else ""}
        for name, (title, threshold) in POLICIES.items()
    ]


def policy_of(message: dict[str, Any]) -> exits.ExitPolicy | None:
    """The exit policy that is asked for.

    Raises:
        LoopedError: there is no such policy, or it has no such threshold.
    """
    name = choice(*POLICIES)("policy", message.get("policy", "none"))
    return None if name == "none" else _CLASSES[name](a_number("threshold", message.get("threshold", POLICIES[name][1]), 0.0))


@torch.no_grad()
def write_on(
    model: Looped, tokens: Int[Tensor, "1 pos"], message: dict[str, Any], hooks: Hooks, progress: Progress
) -> dict[str, Any]:
    """Generate greedily, as `model.generate` does.

    Args:
        model: the model that runs.
        tokens: the prompt.
        message: "n" tokens under "policy" with a "threshold".
        hooks: what acts in every step.
        progress: is told how far it is, and may end it.

    Raises:
        LoopedError: more tokens than the context has room for; a policy that the model cannot have.
    """
    n = count(most=MOST_TOKENS)("n", message.get("n", 10))
    if tokens.shape[1] + n > model.cfg.n_ctx:
        raise LoopedError(
            f"{n} tokens after {tokens.shape[1]} are more than the context of this model, which is {model.cfg.n_ctx}; "
            "generate fewer."
        )
    before, steps = model.exit_policy, 0

    def step(x: Tensor, hook: object) -> None:
        nonlocal steps
        progress(min(1.0, steps / n), "generating")
        steps += 1

    writer: Any = model  # which generates, beside what tools ask
    writer.exit_policy = policy_of(message)
    try:
        with model.hooks(fwd_hooks=[*hooks, ("hook_embed", step)]):
            written = writer.generate(tokens, n, do_sample=False, verbose=False, stop_at_eos=model.tokenizer is not None)
        report = writer.generation_report
    finally:
        writer.exit_policy = before
    new: list[int] = written[0, tokens.shape[1] :].tolist()
    assert report is not None
    return {
        "tokens": new,
        "loops": report.loops_per_token[0, : len(new)].tolist(),
        "n_loops": report.n_loops,
        "computed": report.computed_fraction,
        "words": words_of(model, new),
        "text": "" if model.tokenizer is None else model.tokenizer.decode(new),
    }
