"""What is told of a model: its parts in the order of a run, what it weighs and what a loop costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Order(NamedTuple):
    """What runs from a token to the answer: names, each with a detail.

    Args:
        before: what runs once, before the loops.
        begins: how the state begins, where it is not what comes before; else "".
        loop: what every loop runs.
        after: what runs once, after the loops.
        is_injected: whether what comes before is mixed into the state in every loop.
    """

    before: list[tuple[str, str]]
    begins: str
    loop: list[tuple[str, str]]
    after: list[tuple[str, str]]
    is_injected: bool


@dataclass(frozen=True)
class Sizes:
    """Parameters and costs of a looped model.

    Args:
        parameters: number of distinct parameters by part: "embed", "prelude", the looped stacks, "coda", "unembed" where it is
            not tied, and "between" for what stands between the layers (injections, norms, gates).
        flops_per_loop: floating-point operations that one loop more costs a token, two for each weight of its matrices;
            attention over earlier tokens is not counted.
        flops_outside: the same for embedding, prelude, coda and unembedding.
        attention_flops: what attention adds to one loop for every earlier token.
        cache_per_loop: numbers that the keys and values of a token take in one loop.
    """

    parameters: dict[str, int]
    flops_per_loop: int
    flops_outside: int
    attention_flops: int
    cache_per_loop: int

    @property
    def n_parameters(self) -> int:
        """Number of distinct parameters, whatever the number of loops."""
        return sum(self.parameters.values())

    def flops(self, n_loops: int) -> int:
        """Floating-point operations per token with a number of loops, without attention over earlier tokens.

        Args:
            n_loops: how often to loop.
        """
        return self.flops_outside + n_loops * self.flops_per_loop


class Facts(NamedTuple):
    """What is told of a model.

    Args:
        family: which published models it is one of.
        n_physical: layers that have weights of their own.
        anchor_steps: of an anchored loop; None for others.
        rows: names and words, for a table.
        order: what runs from a token to the answer.
        sizes: parameters and costs.
    """

    family: str
    n_physical: int
    anchor_steps: int | None
    rows: dict[str, str]
    order: Order
    sizes: Sizes


def human(n: int | float, unit: str = "") -> str:
    """A count in three digits, as in "1.43 B".

    Args:
        n: the count.
        unit: written after it.
    """
    for size, letter in ((1e12, "T"), (1e9, "B" if not unit else "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:
            return f"{n / size:.3g} {letter}{unit}"
    return f"{n:.3g} {unit}".strip()
