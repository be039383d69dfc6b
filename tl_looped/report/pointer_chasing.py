"""What a report can say of the toys of pointer chasing, whose right answers are known after every loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..looped import Looped
from ..panels import Axis, Mark, Panel, heat_map
from ..results import Estimate, Grid
from ..toys.hop import WORDS, HopPrompts, hop_prompts
from .drawing import with_axes
from .question import Question
from .section import Figure, Numbers, Part, Reading, listed, share

OTHER = {"toy:hop": "toy:hop-noinject", "toy:hop-noinject": "toy:hop"}  # the toy that differs in the injection alone
N_FRESH, FRESH_SEED = 200, 77
EXAMPLES, EXAMPLE_SEED, OTHER_SEED = 32, 7, 5
NO_RIGHT_ANSWERS = (
    "This prompt has no right answers to compare with: those have a mapping that leads from each of its queries for as many "
    "hops as there are loops, such as “A b B c C a ? A”."
)


def example() -> tuple[HopPrompts, tuple[Tensor, Tensor]]:
    """Mappings to ask for, and the first of them beside the same prompt with another mapping.

    A walk over the first mapping that goes on over the other one never ends where it does by itself: otherwise a patch at the
    last query could restore the clean answer by chance.
    """
    prompts, other = hop_prompts(EXAMPLES, seed=EXAMPLE_SEED), hop_prompts(seed=OTHER_SEED)
    order = (prompts.keys[:1, :, None] == other.keys[:, None]).long().argmax(-1)
    corrupted = HopPrompts(prompts.keys[:1], other.values.gather(1, order), prompts.queries[:1])
    return prompts, (prompts.tokens[:1], corrupted.tokens)


def right_answers(tokens: Int[Tensor, " pos"], n_loops: int) -> Int[Tensor, "loop pos"] | None:
    """The right answers at the queries of a prompt such as `A b B a ? A`; -1 elsewhere.

    Args:
        tokens: the prompt.
        n_loops: how many loops.

    Returns:
        None where the prompt has no right answers: it is no mapping with queries, or a walk from a query leaves the mapping.
    """
    words = [WORDS[token] for token in tokens.tolist()][1:]  # without BOS
    if words.count("?") != 1:
        return None
    mark = words.index("?")
    keys, values, queries = words[:mark:2], words[1:mark:2], words[mark + 1 :]
    step = {key.lower(): value for key, value in zip(keys, values, strict=False)}
    is_mapping = len(keys) == len(values) == len(step) and all(map(str.isupper, keys)) and all(map(str.islower, values))
    if not queries or not is_mapping or not all(query.isupper() and query.lower() in step for query in queries):
        return None
    right, at = torch.full((n_loops, len(tokens)), -1, device="cpu"), [query.lower() for query in queries]
    for loop in range(n_loops):
        if not all(symbol in step for symbol in at):
            return None
        at = [step[symbol] for symbol in at]
        right[loop, -len(at) :] = torch.tensor([WORDS.index(symbol) for symbol in at], device="cpu")
    return right


def count_right(answers: Int[Tensor, "loop pos"], right: Int[Tensor, "loop pos"]) -> Numbers:
    """How many queries are answered rightly after every loop.

    Args:
        answers: the answers.
        right: the right ones, -1 where there is none.
    """
    asked = right[0] >= 0
    return {"queries": int(asked.sum()), "right_by_loop": (answers == right)[:, asked].sum(1).tolist()}


def say_right(numbers: Numbers, own: int, made_for: int | None) -> tuple[str, str]:
    """The same in a sentence and a headline.

    Args:
        numbers: of `count_right`.
        own: the number of loops up to the answer that is measured.
        made_for: the number of loops the model was trained for.
    """
    n, counts = numbers["queries"], numbers["right_by_loop"]
    least, most = min(counts[:own]), max(counts[:own])
    said = f"{n}" if least == n else f"{least}" if least == most else f"{least} to {most}"
    trained = "trained loops" if own == made_for else "loops"
    beyond = f", and after loop {len(counts) - 1} at {counts[-1]}." if len(counts) > own else "."
    return (
        "The prompt lists a mapping, then asks for keys; after loop t the model should name hop t + 1 from each. It is right "
        f"at {said} of {n} queries in each of its {own} {trained}{beyond}",
        f"Every loop names one hop more of the mapping: right at {said} of {n} queries after each of the {own} {trained}. "
        "So its answer changes from loop to loop.",
    )


def _measure_accuracy(asked: Question) -> tuple[Numbers, dict[str, Estimate]] | None:
    """Accuracy by loop on fresh mappings, beyond the trained loops, beside the toy with or without injection."""
    if asked.hops is None:
        return None
    prompts, name = hop_prompts(N_FRESH, seed=FRESH_SEED), str(asked.model.cfg.model_name)
    found = {name: _accuracy(asked.deep, prompts, name)}
    if twin := OTHER.get(name):
        from .. import LoopedBridge

        other = LoopedBridge.from_pretrained(twin, n_loops=asked.n_loops, device=asked.model.cfg.device)
        found[twin] = _accuracy(other, prompts, twin)
    return {**found, "trained": min(asked.own, asked.n_loops), "mappings": N_FRESH, "chance": 1 / 8}, found


def _read_accuracy(asked: Question, numbers: Numbers, found: dict[str, Estimate]) -> Reading:
    trained, n_loops, said, headline = numbers["trained"], asked.n_loops, list[str](), ""
    for one, estimate in found.items():
        last = f"; after loop {n_loops - 1} {_percent(estimate, -1)}" if n_loops > trained else ""
        least = int(estimate.values[:trained].argmin())
        said.append(
            f"{one}{_injected(one)}: {_percent(estimate, least)} of the answers are right at the worst of the {trained} "
            f"trained loops{last}."
        )
    if n_loops > trained:
        ends = [f"{share(estimate.values[-1])}{_injected(one)}" for one, estimate in found.items()]
        headline = (
            f"Looped {n_loops} times, more often than the {trained} it was made for, {listed(ends)} of the answers are right "
            f"({N_FRESH} mappings)."
        )
    basis = f"Measured on {N_FRESH} mappings drawn for this page, with standard errors over them; chance is {share(1 / 8)}."
    return Reading([*said, basis], headline)


def _draw_accuracy(asked: Question, numbers: Numbers, found: dict[str, Estimate]) -> list[Figure]:
    lines = [
        {"name": one, "x": list(range(asked.n_loops)), "y": estimate.values.tolist(), "band": estimate.stderr.tolist()}
        for one, estimate in found.items()
    ]
    roles = {"x": Axis("loop", form="count"), "y": Axis("right answers", form="%")}
    caption, marks = "Share of right answers after each loop; a loop names one hop more.", list[Mark]()
    if asked.n_loops > numbers["trained"]:
        marks.append(Mark(x=numbers["trained"] - 0.5, look="dotted"))
        caption += " Right of the dotted line the models loop more often than they were trained to."
    return [Figure(caption, [Panel("lines", lines, roles, marks)])]


ACCURACY = Part(_measure_accuracy, _read_accuracy, _draw_accuracy)


def _injected(name: str) -> str:
    return " (without injection)" if name.endswith("noinject") else " (with injection)"


def _percent(estimate: Estimate, k: int) -> str:
    return f"{float(estimate.values[k]):.2%} ± {float(estimate.stderr[k]):.2%}"


def _accuracy(model: Looped, prompts: HopPrompts, name: str) -> Estimate:
    return Estimate.of(
        (_answers(model, prompts) == prompts.answers(model.n_loops)).double().mean(-1).T,
        ("loop",),
        {"loop": list(range(model.n_loops))},
        f"accuracy of {name}",
    )


@torch.no_grad()
def _answers(model: Looped, prompts: HopPrompts, hooks: Sequence[Any] = ()) -> Int[Tensor, "loop batch query"]:
    tokens = prompts.tokens.to(model.cfg.device)
    return torch.stack(model.readouts(tokens, lambda loop, logits: logits[:, prompts.query_pos].argmax(-1).cpu(), hooks))


def _measure_transplants(asked: Question) -> tuple[Numbers, None] | None:
    """The causal picture: the queries get the states that they have after a loop in a run of another mapping.

    If the state of a query is the symbol it has reached, the answer of that loop becomes the other run's, and later ones are
    hops from there in the prompt's own mapping.
    """
    if asked.hops is None or asked.pair is None:
        return None
    model, here = asked.model, asked.hops
    n_loops, (batch, n_symbols) = model.n_loops, here.keys.shape
    other = hop_prompts(batch, n_symbols, seed=EXAMPLE_SEED + 1)
    step = torch.arange(len(WORDS), device="cpu").repeat(batch, 1)
    first = WORDS.index("a")
    step.scatter_(1, here.keys + first, here.values + first)  # from an answer to the next in the prompt's own mapping
    with torch.no_grad():
        _, cache = model.run_with_cache(other.tokens.to(model.cfg.device), names_filter="loops.*.hook_out")
    own, theirs = here.answers(n_loops), other.answers(n_loops)
    as_the_task_says = torch.zeros(n_loops, n_loops, dtype=torch.float64, device="cpu")
    changed = torch.zeros_like(as_the_task_says)
    for t in range(n_loops):
        name = f"loops.{t}.hook_out"

        def transplant(state: Tensor, hook: object, name: str = name) -> Tensor:
            state[:, here.query_pos] = cache[name][:, other.query_pos]
            return state

        found = _answers(model, here, [(name, transplant)])
        expected = own.clone()
        expected[t] = theirs[t]
        for s in range(t + 1, n_loops):
            expected[s] = step.gather(1, expected[s - 1])
        as_the_task_says[t] = (found == expected).double().mean((1, 2))
        changed[t] = (found != own).double().mean((1, 2))
    axes = ("transplanted_after_loop", "answer_of_loop")
    labels = {axis: list(range(n_loops)) for axis in axes}
    before = torch.ones_like(changed, dtype=torch.bool).tril(-1)  # the answer of an earlier loop
    return {
        "transplants": Grid(as_the_task_says, axes, labels, "as the task says"),
        "transplants_changed": Grid(changed, axes, labels, "changed answers"),
        "transplanted_mappings": batch,
        "changed_before": max(changed[before].tolist(), default=0.0),
        "changed_after": float(changed[~before].min()),
        "worst_as_the_task_says": float(as_the_task_says.min()),
    }, None


def _read_transplants(asked: Question, numbers: Numbers, result: None) -> Reading:
    kept, worst = numbers["changed_before"], numbers["worst_as_the_task_says"]
    unmoved = "every one" if kept == 0 else f"at most {share(kept)} change"
    return Reading([
        f"In {numbers['transplanted_mappings']} mappings drawn for this page: with the states that its queries have after loop "
        f"t in a run of another mapping, a prompt keeps its answers of earlier loops ({unmoved}), while at least "
        f"{share(numbers['changed_after'])} of the later ones change. They are those that the task demands if the state at a "
        "query is the symbol it has reached: the other run's symbol at loop t, then hops from there in the prompt's own "
        f"mapping, in {'all' if worst == 1 else f'at least {share(worst)}'} of the cases for every pair of loops."
    ])  # fmt: skip


def _draw_transplants(asked: Question, numbers: Numbers, result: None) -> list[Figure]:
    says = heat_map(numbers["transplants"])
    says = with_axes(says, colour=replace(says.roles["colour"], range=(0.0, 1.0)))
    after = "by the loop after which the queries' states were transplanted"
    return [
        Figure(f"Share of the answers that change, {after}.", [heat_map(numbers["transplants_changed"])]),
        Figure("Share of the answers that are what the task demands after the transplant.", [says]),
    ]


TRANSPLANTS = Part(_measure_transplants, _read_transplants, _draw_transplants)
