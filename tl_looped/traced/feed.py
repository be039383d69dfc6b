"""How a module is called: which argument the tokens are, what else it takes, and which tensor of its output the logits are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoopedError

TOKENS = ("input_ids", "tokens", "idx", "ids", "x", "inputs", "input")
LOGITS = ("logits", "lm_logits", "prediction_scores", "prediction_logits", "output", "out")


@dataclass(frozen=True, eq=False)
class Feed:
    """How tokens go into a module.

    Args:
        keyword: the argument that the tokens are; None for the first positional one.
        always: what every run is given beside the tokens.
        accepted: the arguments that it takes by name; None where it takes any.
        vocabularies: the sizes of its embeddings, by which logits are told from states.
    """

    keyword: str | None
    always: dict[str, Any] = field(default_factory=dict[str, Any])
    accepted: frozenset[str] | None = None
    vocabularies: frozenset[int] = frozenset()

    def __call__(self, module: nn.Module, tokens: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Run a module.

        Args:
            module: the module.
            tokens: [batch, pos].
            inputs: what else this run is given.
        """
        given = {**self.always, **inputs}
        return module(tokens, **given) if self.keyword is None else module(**{self.keyword: tokens}, **given)

    def takes(self, name: str) -> bool:
        """Whether there is an argument of a name.

        Args:
            name: of the argument.
        """
        return self.accepted is None or name in self.accepted

    def logits(self, output: Any, shape: torch.Size) -> Tensor:
        """The logits in what a module returned; of several tensors the first that is as wide as an embedding has rows.

        Args:
            output: a tensor, or a mapping or sequence that holds one.
            shape: of the tokens, [batch, pos].

        Raises:
            LoopedError: none is [batch, pos, vocabulary].
        """
        found: list[Any] = [output]
        if isinstance(output, Mapping):
            found = [output[key] for key in LOGITS if key in output] or list(output.values())
        elif any(hasattr(output, name) for name in LOGITS):
            found = [getattr(output, name) for name in LOGITS if hasattr(output, name)]
        elif isinstance(output, (tuple, list)):
            found = list(output)
        logits = [x for x in found if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3 and x.shape[:2] == shape]
        if not logits:
            raise LoopedError(
                f"the module returned a {type(output).__name__} that holds no logits [batch, pos, vocabulary] for tokens "
                f"{list(shape)}; wrap it in a module that returns them for every position."
            )
        return next((x for x in logits if x.shape[-1] in self.vocabularies), logits[0])


def feed_of(module: nn.Module, example: Tensor | Mapping[str, Any]) -> tuple[Feed, Tensor, dict[str, Any]]:
    """How a module is called, the tokens of an example, and what else only the example is given.

    Args:
        module: the module.
        example: tokens, or keyword arguments of which one holds them.

    Raises:
        LoopedError: no argument holds tokens.
    """
    parameters = inspect.signature(module.forward).parameters
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = None if is_open else frozenset(named)
    always = {"use_cache": False} if "use_cache" in named else {}
    sizes = frozenset(m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding))
    if isinstance(example, Tensor):
        positional = any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
        if positional:
            return Feed(None, always, accepted, sizes), _batch(example), {}
        keyword = next((name for name in TOKENS if name in named), named[0] if named else "input_ids")
        return Feed(keyword, always, accepted, sizes), _batch(example), {}
    keys = [key for key, value in example.items() if isinstance(value, Tensor) and not value.is_floating_point()]
    keyword = next((name for name in (*TOKENS, *keys) if name in keys), None)
    if keyword is None:
        raise LoopedError(
            f"example={{{', '.join(map(repr, example))}}} was given, in which no argument holds token ids; "
            "pass token ids [batch, pos]."
        )
    others = {key: value for key, value in example.items() if key != keyword}
    always |= {key: value for key, value in others.items() if not isinstance(value, Tensor)}
    own = {key: value for key, value in others.items() if isinstance(value, Tensor)}
    return Feed(keyword, always, accepted, sizes), _batch(example[keyword]), own


def _batch(tokens: Tensor) -> Tensor:
    if tokens.ndim == 0 or not tokens.numel():
        raise LoopedError(
            f"example of shape {tuple(tokens.shape)} was given; pass token ids [batch, pos] on which the module runs."
        )
    return (tokens[None] if tokens.ndim == 1 else tokens).detach().clone()
