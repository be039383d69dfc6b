"""What tools may ask of a looped model: patching, attribution, lenses, interventions and analyses know nothing else of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from .errors import LoopedError
from .facts import Facts
from .record import InitialState, Run
from .running import first_hooked
from .schedule import Schedule, check_count, check_index

# The unrolls that `unrolls_kept` keeps, with their models, whose ids would else be given anew.
_unrolls: ContextVar[dict[tuple[int, int, bool], tuple[Any, Any]] | None] = ContextVar("unrolls", default=None)
Ability = Literal[
    "causal attention",
    "causal runs",
    "early readouts",
    "entry",
    "equal heads",
    "equal loops",
    "equal passes",
    "every position",
    "exact decomposition",
    "exit gate",
    "gradients",
    "injection",
    "last readout",
    "lens",
    "neurons",
    "one embedding",
    "one pattern",
    "one stream",
    "other depths",
    "rows apart",
    "shared weights",
    "state",
    "weights by pass",
]
Lens = Literal["logit", "native"]
T = TypeVar("T")
AnyLooped = TypeVar("AnyLooped", bound="Looped")


@runtime_checkable
class _Able(Protocol):
    def lacks(self, ability: Ability) -> str | None: ...


@runtime_checkable
class Hooked(Protocol):
    """A model with TransformerLens's hooks, looped or not."""

    @property
    def cfg(self) -> Any:
        """TransformerLens's config: sizes, dtype and device."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None for none."""
        ...

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Every hook point by name."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Attach hooks for a while."""
        ...

    def run_with_hooks(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Run with hooks."""
        ...

    def run_with_cache(self, input: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Run and cache."""
        ...

    def to_tokens(self, input: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens of texts, [batch, pos]."""
        ...

    def to_str_tokens(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """The text of every token."""
        ...


@runtime_checkable
class Looped(Hooked, Protocol):
    """A looped model, as tools see it; a `LoopedBridge` is one."""

    @property
    def schedule(self) -> Schedule:
        """The order in which the layers run, and what they are called."""
        ...

    @property
    def n_loops(self) -> int:
        """How often it loops."""
        ...

    @property
    def starts_from(self) -> str:
        """The state before the first pass: "embedding", "noise" or "learned"."""
        ...

    @property
    def entrance(self) -> str:
        """The hook of a pass that holds the state entering it."""
        ...

    @property
    def exit_policy(self) -> Any:
        """After how many loops `generate` reads a token; None for all."""
        ...

    def lacks(self, ability: Ability) -> str | None:
        """Why the model cannot do something; None if it can."""
        ...

    def unroll(self, n_loops: int, *, cut: bool = False) -> Any:
        """The same model with another number of loops, or (`cut`) its first ones as they are."""
        ...

    def expand_name(self, name: Any) -> list[str]:
        """The hooks that a name or a pattern stands for."""
        ...

    def read(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Any, Tensor | None]:
        """Texts as tokens, and the mask of those that are real; tokens as they are."""
        ...

    def readout(self, input: Any, loop: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What the model would answer if it stopped after a loop."""
        ...

    def readouts(self, input: Any, read: Callable[[int, Tensor], T], *args: Any, **kwargs: Any) -> list[T]:
        """What a function makes of the readout after every loop of one run."""
        ...

    def readouts_at(self, tokens: Tensor, loops: list[int], positions: Any, inputs: dict[str, Any]) -> Tensor:
        """The readouts after several loops of one run, [loop, batch, chosen, d_vocab]."""
        ...

    def as_cache(self, activations: Mapping[str, Tensor], has_batch_dim: bool = True) -> Cache:
        """Activations by name as the cache of a run of this model."""
        ...

    def facts(self) -> Facts:
        """What is told of it: a table, the order of its parts, what it weighs and what a loop costs."""
        ...

    @property
    def made_for(self) -> int | None:
        """Loops that its checkpoint says; None if it is of none."""
        ...

    def fingerprint(self) -> Any:
        """What tells its weights from others."""
        ...

    def last_norm(self, x: Tensor) -> Tensor:
        """The norm before the unembedding, without firing its hooks."""
        ...

    def record(
        self, input: Any, hooks: Sequence[str], initial_state: InitialState, is_causal: bool, inputs: dict[str, Any]
    ) -> Recorded:
        """Run once, so that parts of the run can be run again, many copies at once."""
        ...

    def step_map(self, tokens: Int[Tensor, "batch pos"], initial_state: InitialState = None) -> StepMap:
        """One loop as a function of the state."""
        ...

    def way_out(self, schedule: Schedule, tokens: Int[Tensor, "batch pos"], inputs: dict[str, Any]) -> WayOut:
        """The ways from a residual stream to the output, for runs of its first loops, prelude and coda."""
        ...

    def paths_need(self, layers: Iterable[int], norms: Iterable[tuple[int | None, str]]) -> list[str]:
        """The activations that `direct_paths` needs, for changes of heads in some layers and norms in some."""
        ...

    def direct_paths(self, activations: Mapping[str, Tensor], to_first_order: bool) -> DirectPaths:
        """What changes of the residual stream become on their way through a run."""
        ...

    def with_weights_of_their_own(
        self, action: Callable[[dict[str, list[nn.Parameter]]], T]
    ) -> tuple[dict[str, list[nn.Parameter]], T]:
        """What an action returns while every use of a looped parameter holds a view of its own."""
        ...


@runtime_checkable
class Cache(Protocol):
    """The activations of one run of a looped model; a `LoopedCache` is one."""

    model: Any
    run: Run | None
    attention_mask: Tensor | None
    has_batch_dim: bool

    def __getitem__(self, key: Any) -> Tensor: ...

    def __contains__(self, key: object) -> bool: ...

    def __iter__(self) -> Iterator[Any]: ...

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """Names and activations."""
        ...

    def padding(self) -> Tensor | None:
        """Which positions are real, [batch, pos]; None where all are."""
        ...

    def check_weights(self, what: str, model: Any = None) -> None:
        """Refuse to go on if other weights made the activations."""
        ...


@runtime_checkable
class Recorded(Protocol):
    """One run, kept so that parts of it can be run again.

    Attributes:
        logits: of the run, [batch, pos, d_vocab].
        cache: its activations.
        state: what it started from, before hooks, [batch, pos, d_model].
    """

    logits: Tensor
    cache: Any
    state: Tensor

    def again(self, entries: Sequence[int], start: int, fwd_hooks: Any) -> Float[Tensor, "row pos d_model"]:
        """Copies of the run, each from the layer after its entry on and from a position on, up to the last layer."""
        ...

    def read(self, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_vocab"]:
        """The logits of what leaves the last layer."""
        ...


@runtime_checkable
class StepMap(Protocol):
    """The map from the states entering a loop to those leaving it, one state per looped stack.

    Attributes:
        start: the states before the first loop, [stack, batch, pos, d_model].
    """

    start: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """The states after one more loop."""
        ...

    def jvp(self, states: Tensor, tangents: Tensor) -> Tensor:
        """The Jacobian at a state times each of several directions."""
        ...


@runtime_checkable
class WayOut(Protocol):
    """The ways from the residual stream of a run to the unembedding."""

    def run(
        self, cells: Sequence[tuple[Lens, int]], positions: Int[Tensor, "batch chosen"], initial_state: InitialState
    ) -> Float[Tensor, "cell batch chosen d_model"]:
        """Run once and bring each (lens, virtual layer) to the input of the unembedding, at the chosen positions."""
        ...

    def logits(self, x: Float[Tensor, "row d_model"], start: int, width: int) -> Float[Tensor, "row width"]:
        """The logits of one block of the vocabulary, in fp32 or wider."""
        ...


@runtime_checkable
class DirectPaths(Protocol):
    """What changes of the residual stream become on their way through a run in which all components write what they wrote.

    Attributes:
        like: the embedding, [batch, pos, d_model], in fp32 or wider.
    """

    like: Tensor

    def value(self, name: str, dim: int = -2) -> Tensor:
        """An activation of the run, in fp32 or wider."""
        ...

    def heads(self, layer: int, heads: Sequence[int], change: Tensor) -> Tensor:
        """What changes of `hook_z` change in the stream, head by head, [head, batch, pos, d_model]."""
        ...

    def carried(
        self, n_rows: int, changes: Callable[[str], Iterable[tuple[int, Tensor]]]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every stream that a component reads: its hook, the changes [row, batch, pos, d_model], and the stream itself."""
        ...

    def norm(self, layer: int | None, name: str, stream: Tensor) -> Any:
        """The norm before a component, where it stands in the run."""
        ...

    def check(self, hook: str, total: Tensor) -> None:
        """Refuse a run in which the input of a component is no sum of what components wrote."""
        ...

    def projection(self, layer: int, letter: str, head: int) -> Float[Tensor, "d_head d_model"]:
        """The weights by which one head reads its queries, keys or values."""
        ...


def require(model: _Able, ability: Ability, what: str) -> None:
    """Refuse what a model cannot do, with its reason.

    Args:
        model: the model.
        ability: what it takes.
        what: what was asked.

    Raises:
        LoopedError: the model lacks the ability.
    """
    if (why := model.lacks(ability)) is not None:
        raise LoopedError(f"{what} was asked, but {why}")


def check_model(model: object) -> None:
    """Refuse what is no looped model, in a sentence.

    Args:
        model: what was given.

    Raises:
        LoopedError: it is none.
    """
    if not isinstance(model, Looped) or isinstance(model, type):  # a class has the names too
        raise LoopedError(
            f"a {type(model).__name__} was given as the model; pass a LoopedBridge, from LoopedBridge.from_pretrained(name) or "
            "LoopedBridge.from_hf(model)."
        )


def at_depth(model: AnyLooped, n_loops: int | None, cut: bool = False) -> AnyLooped:
    """The model with `n_loops` loops: itself where that is its own number or None, else an unroll without its hooks.

    Args:
        model: the model.
        n_loops: the number asked for.
        cut: as in `LoopedBridge.unroll`.

    Raises:
        LoopedError: `n_loops` is no positive int; the model has hooks, which would silently not act on the unroll.
    """
    check_model(model)
    if n_loops is None or check_count("n_loops", n_loops) == model.n_loops:
        return model
    if hooked := first_hooked(model):
        raise LoopedError(
            f"{n_loops} loops were asked of a model of {model.n_loops} that has hooks, such as at {hooked}; they would not act "
            f"on that run. Hook other = model.unroll({n_loops}) and ask that."
        )
    unrolls = _unrolls.get()
    if unrolls is None:
        return model.unroll(n_loops, cut=cut)
    key = (id(model), n_loops, cut)
    if key not in unrolls:
        unrolls[key] = (model, model.unroll(n_loops, cut=cut))
    return unrolls[key][1]


@contextmanager
def unrolls_kept() -> Generator[None, None, None]:
    """While this lasts, `at_depth` unrolls a model to a depth once: 128 loops of 24 layers take seconds and 260 MB."""
    outer = _unrolls.get()
    kept: dict[tuple[int, int, bool], tuple[Any, Any]] = {} if outer is None else outer
    token = _unrolls.set(kept)
    try:
        yield
    finally:
        _unrolls.reset(token)
        if outer is None and kept:
            kept.clear()
            gc.collect()  # a model and its hooks refer to each other


def stopping(model: AnyLooped, at_loop: int | None, n_loops: int | None) -> AnyLooped:
    """The model that answers after one of the loops: itself where that is its own last one, else an unroll without its hooks.

    Args:
        model: the model.
        at_loop: after which loop (0-based; negative counts from the end); None for the last.
        n_loops: of how many loops; None for the model's own number.

    Raises:
        LoopedError: a loop or a number that does not exist; the model has hooks, which would silently not act on the unroll.
    """
    check_model(model)
    if at_loop is None:
        return at_depth(model, n_loops)
    total = model.n_loops if n_loops is None else check_count("n_loops", n_loops)
    asked = check_index(at_loop, total, "loop") + 1
    if asked == total or model.lacks("equal loops") is None:
        return at_depth(model, asked)
    return at_depth(at_depth(model, n_loops), asked, cut=True)
