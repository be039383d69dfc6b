"""What is measured of every prompt, several measures on one run, and what is measured once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..analysis import random_init_sweep, trajectories
from ..analysis._streaming import Plan, need_loops, together
from ..analysis.attention_distances import AttentionDistancesMeasure
from ..analysis.fixed_points import FixedPointsMeasure
from ..analysis.inference_stages import InferenceStagesMeasure
from ..analysis.limiting_behaviour import LimitingBehaviourMeasure, checked
from ..analysis.state_similarity import StateSimilarityMeasure
from ..errors import LoopedError
from ..interventions import ablate
from ..looped import Hooked, Looped, at_depth
from ..runs.prompts import token_batches
from ..schedule import Schedule
from .bound import AttentionBound
from .findings import Findings

PAIRS = (8, 32)  # loops in which all pairs of layers are compared
MOST_COMPARED = 200  # layers run, of which all pairs are compared: their squares are kept for every prompt
PATH = 32  # loops of the paths in a plane
PERIOD, WINDOW, SETTLE = 6, 24, 0.1  # as in `limiting_behaviour`
STAGES = InferenceStagesMeasure(0.3, False, "nats", None, None)
TEXTS = ("Hello! I've been well. I hope that you're doing well.", "The square root of 16 is")  # the paper's own
N_INIT, INIT_LAYERS, INIT_SEEDS = 64, (12, 4, 16), (0, 1, 2)  # loops that a layout needs to show what it does


@dataclass(frozen=True)
class OfPrompt:
    """Everything that is measured of one prompt, on as few runs as it takes.

    Args:
        n_loops: how far to loop.
    """

    n_loops: int

    def __call__(self, model: Looped, prompt: Any) -> Findings:
        """Measure one prompt.

        Args:
            model: the model.
            prompt: a text, or tokens.

        Raises:
            LoopedError: nothing could be measured.
        """
        (tokens,) = token_batches(model, prompt, what="paper")
        parts: dict[str, Any] = {}
        refused: dict[str, dict[str, int]] = {}

        def see(deep: Hooked, plans: Mapping[str, Plan[Any]]) -> None:
            found, why = together(deep, tokens, plans)
            parts.update(found)
            refused.update({name: {str(error): len(tokens)} for name, error in why.items()})

        deep = at_depth(model, self.n_loops)
        see(deep, dict(self._of_all_loops(deep, tokens)))
        for n in pairs_of(self.n_loops):
            try:
                some = at_depth(model, n)
            except LoopedError as error:
                refused |= {f"{kind}_{n}": {str(error): len(tokens)} for kind in ("patterns", "states")}
                continue
            layers = compared_layers(some.schedule)
            patterns, states = AttentionDistancesMeasure(False, None, layers), StateSimilarityMeasure(None, layers)
            see(some, {f"patterns_{n}": patterns.plan(some, tokens), f"states_{n}": states.plan(some, tokens)})
        see(model, {"stages": STAGES.plan(model, tokens)})
        try:
            with model.hooks(fwd_hooks=without_second_mlp(model)):
                see(model, {"stages_without_mlp": STAGES.plan(model, tokens)})
        except LoopedError as error:
            refused["stages_without_mlp"] = {str(error): len(tokens)}
        if not parts:
            raise LoopedError(next(iter(refused["stages"])))
        return Findings(parts, refused, len(tokens))

    def _of_all_loops(self, deep: Looped, tokens: Any) -> Iterable[tuple[str, Plan[Any]]]:
        yield "stages_deep", STAGES.plan(deep, tokens)
        for stack in deep.schedule.core_stacks:
            n, end = deep.schedule.n_loops_of(stack), stack_suffix(deep, stack)
            yield f"fixed_points{end}", _fixed_points(deep, stack, n)
            yield f"behaviour{end}", _behaviour(deep, tokens, stack)
            yield f"bound{end}", AttentionBound(stack).plan(deep)


def compared_layers(schedule: Schedule) -> tuple[int, ...] | None:
    """The layers whose pairs are compared: all (None), or of a long run every so manieth of the block in every loop.

    Args:
        schedule: what runs.
    """
    step = -(-schedule.n_layers // MOST_COMPARED)
    if step == 1:
        return None
    return tuple(i for i, site in enumerate(schedule.sites) if site.loop is None or site.layer % step == 0)


def _fixed_points(deep: Looped, stack: str, n: int) -> Plan[Any]:
    need_loops(n, 2, "a fixed point", "a distance between loops")
    return (yield from FixedPointsMeasure(n, "token", True, None, stack, None).plan(deep))


def _behaviour(deep: Looped, tokens: Any, stack: str) -> Plan[Any]:
    if (n := deep.schedule.n_loops_of(stack)) < WINDOW:
        raise LoopedError(f"how a token ends is seen in {WINDOW} loops or more, and there are {n}; pass --loops 128")
    rule, _ = checked(deep, None, None, PERIOD, WINDOW, stack)
    return (yield from LimitingBehaviourMeasure(rule, PERIOD, WINDOW, SETTLE, False, stack, None).plan(deep, tokens))


def pairs_of(n_loops: int) -> list[int]:
    """The numbers of loops in which all pairs of layers are compared.

    Args:
        n_loops: how far to loop.
    """
    return sorted({min(n, n_loops) for n in PAIRS})


def stack_suffix(model: Looped, stack: str) -> str:
    """How the names of parts of a looped stack end, where there are several.

    Args:
        model: the model.
        stack: one of its looped stacks.
    """
    return f".{stack}" if len(model.schedule.core_stacks) > 1 else ""


def without_second_mlp(model: Looped) -> list[Any]:
    """Hooks that zero what the MLP of the second executed layer writes.

    Args:
        model: the model.

    Raises:
        LoopedError: one layer is executed.
    """
    if model.schedule.n_layers < 2:
        raise LoopedError("the model executes one layer, and the second layer's MLP was to be zeroed")
    stack, loop, layer = model.schedule.site(1)
    if loop is None:
        return ablate(model, "mlp", layers=layer, stack=stack)
    return ablate(model, "mlp", loops=loop, layers=layer, stack=stack)


@dataclass(frozen=True)
class OfTwin:
    """The stages of a feed-forward model, to compare with."""

    def __call__(self, model: Hooked, prompt: Any) -> Findings:
        """Measure one prompt.

        Args:
            model: the feed-forward model.
            prompt: a text, or tokens.
        """
        (tokens,) = token_batches(model, prompt, what="paper")
        return Findings({"stages_feed_forward": STAGES(model, tokens)}, {}, 0)


@dataclass(frozen=True)
class OfPath:
    """The path of the last token of single prompts.

    Args:
        n_loops: how far to loop.
    """

    n_loops: int

    def __call__(self, model: Looped, asked: tuple[str, Any]) -> Findings:
        """Follow one prompt.

        Args:
            model: the model.
            asked: the name of the part, and the prompt.
        """
        name, prompt = asked
        try:
            found = trajectories(model, prompt, n_components=2, n_loops=self.n_loops, verbose=False)
        except LoopedError as error:
            return Findings({}, {name: {str(error): 1}}, 0)
        return Findings({name: found}, {}, 0)


def followed(model: Looped, prompts: list[Any]) -> list[tuple[str, Any]]:
    """The prompts that are followed: the first one and the paper's two, or without a tokenizer the first three.

    Args:
        model: the model.
        prompts: all of them.
    """
    chosen = prompts[:3] if model.tokenizer is None else [prompts[0], *TEXTS]
    return [(f"path_{k}", prompt) for k, prompt in enumerate(chosen)]


class Initial(NamedTuple):
    """An initialisation of the layouts.

    Args:
        n_layers: layers in the loop.
        seed: of the weights and of the initial noise.
    """

    n_layers: int
    seed: int

    @property
    def weight(self) -> int:
        """How much work it is."""
        return self.n_layers


INITIALS = [Initial(n_layers, seed) for seed in INIT_SEEDS for n_layers in INIT_LAYERS]


@dataclass(frozen=True)
class OfInitial:
    """Layouts at random initialisation, which are of no model.

    Args:
        n_loops: how far to loop.
    """

    n_loops: int

    def __call__(self, model: Looped, initial: Initial) -> Findings:
        """Draw one initialisation of every layout.

        Args:
            model: not looked at.
            initial: which.
        """
        n_layers, seed = initial
        found = random_init_sweep(n_layers=n_layers, n_loops=self.n_loops, seeds=[seed], verbose=False)
        return Findings({f"init_{n_layers}": found}, {}, 0)
