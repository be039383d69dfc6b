"""Pointer chasing: one lookup per loop.

A prompt lists a random mapping as pairs of a key and a value, in random order, then asks for every key: `A c C b B a ? B A C`.
After loop `t` (0-based) a model answers at a query with hop `t + 1`: hop 1 of `A` is `c`, hop 2 is the value of `C`, `b`. Keys
are capital letters and values small ones, so that a token says which of the two it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .._old_calls import accepts_old
from ..bridge.looped_bridge import LoopedBridge
from ..errors import LoopedError
from ..schedule import check_count

Kind = Literal["cycle", "function"]

BOS = "<s>"
N_SYMBOLS = 8
WORDS = [BOS, "?", *"ABCDEFGH", *"abcdefgh"]  # a token is its place in this list
_FIRST_KEY, _FIRST_VALUE = WORDS.index("A"), WORDS.index("a")


@dataclass(frozen=True)
class HopPrompts:
    """Prompts of pointer chasing and their answers. Symbols are 0 for A and a, 1 for B and b, ...

    Args:
        keys: the symbols in the order of their pairs.
        values: what each of them maps to.
        queries: the symbols in the order in which they are asked for.
    """

    keys: Int[Tensor, "batch symbol"]
    values: Int[Tensor, "batch symbol"]
    queries: Int[Tensor, "batch symbol"]

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """BOS, the pairs, "?", the queries; `1 + 2 * symbol + 1 + symbol` positions."""
        pairs = torch.stack((self.keys + _FIRST_KEY, self.values + _FIRST_VALUE), dim=-1).flatten(1)
        bos, mark = (torch.full_like(self.keys[:, :1], WORDS.index(word)) for word in (BOS, "?"))
        return torch.cat((bos, pairs, mark, self.queries + _FIRST_KEY), dim=1)

    @property
    def query_pos(self) -> slice:
        """The positions of the queries."""
        return slice(2 * self.keys.shape[1] + 2, None)

    @property
    def texts(self) -> list[str]:
        """The prompts without BOS, which `to_tokens` prepends."""
        return [" ".join(WORDS[token] for token in row[1:]) for row in self.tokens.tolist()]

    def answers(self, n_hops: int) -> Int[Tensor, "hop batch symbol"]:
        """The tokens that hops `1 .. n_hops` from every query name; row `t` is what to answer after loop `t`.

        Args:
            n_hops: how many.
        """
        mapping = self.keys.new_zeros(len(self.keys), N_SYMBOLS).scatter(1, self.keys, self.values)
        hops = [self.queries]
        for _ in range(check_count("n_hops", n_hops)):
            hops.append(mapping.gather(1, hops[-1]))
        return torch.stack(hops[1:]) + _FIRST_VALUE


@accepts_old("kind", "seed")
def hop_prompts(
    batch: int = 1, n_symbols: int = N_SYMBOLS, *, kind: Kind = "cycle", seed: int | torch.Generator = 0
) -> HopPrompts:
    """Draw prompts of pointer chasing.

    Args:
        batch: how many.
        n_symbols: size of the mapping, 2 to 8; which of the letters A to H it has is drawn.
        kind: "cycle" for one cycle through all symbols, so that the first `n_symbols` hops from a query all differ and hop
            `n_symbols` names the query itself; "function" for values drawn independently, where hops soon coincide.
        seed: an int, or a generator that is advanced.

    Raises:
        LoopedError: a number of symbols or a kind that does not exist.

    Example:
        >>> from tl_looped.toys.hop import WORDS, hop_prompts
        >>> prompts = hop_prompts(n_symbols=3, seed=1)
        >>> prompts.texts
        ['B g E b G e ? G B E']
        >>> [WORDS[token] for token in prompts.answers(n_hops=4)[:, 0, 0]]  # from the first query, G
        ['e', 'b', 'g', 'e']
    """
    check_count("batch", batch)
    if check_count("n_symbols", n_symbols, 2) > N_SYMBOLS:
        raise LoopedError(f"n_symbols={n_symbols} was asked; the toys know {N_SYMBOLS}, A to H.")
    if kind not in get_args(Kind):
        raise LoopedError(f"kind={kind!r} was asked; choose one of {', '.join(map(repr, get_args(Kind)))}.")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator("cpu").manual_seed(seed)

    def shuffled(symbols: Tensor) -> Tensor:
        return symbols.gather(1, torch.rand(symbols.shape, generator=generator, dtype=torch.float32, device="cpu").argsort(-1))

    cycle = shuffled(torch.arange(N_SYMBOLS, device="cpu").expand(batch, -1))[:, :n_symbols]
    order = shuffled(torch.arange(n_symbols, device="cpu").expand(batch, -1))
    if kind == "cycle":
        values = cycle.roll(-1, 1).gather(1, order)
    else:
        values = cycle.gather(1, torch.randint(n_symbols, (batch, n_symbols), generator=generator, device="cpu"))
    keys = cycle.gather(1, order)
    return HopPrompts(keys, values, shuffled(keys))


@torch.no_grad()
def hop_accuracy(model: LoopedBridge, prompts: HopPrompts) -> Float[Tensor, " loop"]:
    """Fraction of queries that the model answers with hop `t + 1` after each loop `t`.

    Args:
        model: a toy of pointer chasing, with any number of loops.
        prompts: what to ask.
    """
    found = torch.stack(model.readouts(prompts.tokens, lambda loop, logits: logits[:, prompts.query_pos].argmax(-1)))
    return (found == prompts.answers(model.n_loops)).float().mean((1, 2))


def hop_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; a word outside `WORDS` is an error."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, WORDS.index(BOS))])
    tokenizer.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)
