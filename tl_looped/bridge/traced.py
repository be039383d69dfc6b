"""What tools ask of a `TracedBridge`, beside running it; see `tl_looped.looped`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import LoopedError
from ..facts import Facts, Order, Sizes, human
from ..looped import Ability, Lens, require
from ..record import InitialState
from ..schedule import Schedule, check_count
from ..traced.depth import set_loops as set_loops_of
from ..traced.feed import feed_of
from .fingerprint import Fingerprint
from .traced_bridge import Asked
from .traced_cache import TracedCache
from .traced_readouts import ReadTrace


class TracedBridge(ReadTrace):
    """Any module that calls its layers several times, with TransformerLens's hooks at every call; made by `LoopedBridge.trace`.

    It runs the module itself, so that its logits are the module's own. Sweeps, interventions, lenses and analyses that need no
    more than hooks work as on a `LoopedBridge`; what needs more says so.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tl_looped import LoopedBridge
        >>> class Loop(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        ...         self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        ...     def forward(self, tokens):
        ...         x = self.embed(tokens)
        ...         for _ in range(3):
        ...             for layer in self.layers:
        ...                 x = x + layer(x)
        ...         return self.head(x)
        >>> model = LoopedBridge.trace(Loop().eval(), torch.tensor([[1, 2, 3]]), verbose=False)
        >>> model.schedule.describe()
        '3 loops over one stack of 2 layers, 0 prelude and 0 coda layers: 6 virtual layers'
        >>> logits, cache = model.run_with_cache(torch.tensor([[4, 5]]), names_filter="loops.*.blocks.1.hook_out")
        >>> list(cache)
        ['blocks.1.hook_out', 'blocks.3.hook_out', 'blocks.5.hook_out']
    """

    _cache_class: type[TracedCache] = TracedCache
    made_for: int | None = None
    starts_from: str = "embedding"

    @classmethod
    def of(
        cls,
        module: nn.Module,
        example: Any,
        *,
        tokenizer: Any = None,
        verbose: bool = True,
        **settings: Any,
    ) -> TracedBridge:
        """Trace a module; the arguments are those of `LoopedBridge.trace`."""
        if isinstance(example, str):
            if tokenizer is None:
                raise LoopedError(f"example={example!r} was given without a tokenizer; pass tokenizer=, or token ids.")
            example = torch.tensor([tokenizer(example)["input_ids"]])
        if not isinstance(example, (Tensor, Mapping)):
            raise LoopedError(f"example={example!r} was given; pass token ids [batch, pos], or the keyword arguments of a run.")
        if not isinstance(module, nn.Module):
            raise LoopedError(f"a {type(module).__name__} was given to be traced; pass a torch.nn.Module that returns logits.")
        feed, tokens, own = feed_of(module, example)
        weight = next(module.parameters(), None)
        if weight is not None:
            tokens = tokens.to(weight.device)
        asked, set_loops = Asked(tokens, own, **settings), settings.get("set_loops")
        found = cls(module, feed, asked, tokenizer)
        if set_loops is not None:
            found._depth = found.n_loops
            before = set_loops_of(module, set_loops, found.n_loops)
            if before not in (None, found.n_loops):
                set_loops_of(module, set_loops, before)
                raise LoopedError(
                    f"set_loops={set_loops!r} was given, which is {before}, but the module loops {found.n_loops} times; name "
                    "where the number of its loops is, or pass a function of the module and the number."
                )
        if verbose:
            print(found.trace.table())
        return found

    @property
    def entrance(self) -> str:
        """The hook of a pass that holds the state entering it."""
        return self.trace.places.entrance

    @property
    def exit_policy(self) -> None:
        """A traced module runs all of its loops."""
        return None

    def lacks(self, ability: Ability) -> str | None:
        """Why the model cannot do something, to follow "... was asked, but"; None if it can.

        Args:
            ability: what it would take.
        """
        name, trace = type(self.module).__name__, self.trace
        traced = f"{name} was traced, and of a traced module only calls are known"
        if ability == "exact decomposition":
            return f"{traced}, not what it adds up. For first-order effects use tl_looped.attribution.attribution_sweep."
        if ability in ("equal loops", "entry"):
            return f"{traced}; a run cannot be entered in the middle. Patch or cache the states of whole runs."
        if ability in ("weights by pass", "shared weights"):
            return f"{traced}; its weights cannot be given to one pass alone. Take their gradients by autograd."
        if ability == "other depths" and self.asked.set_loops is None:
            return f"nobody has said how {name} is told how often to loop; trace it with set_loops=, a path or a function."
        if ability in ("early readouts", "last readout", "lens") and trace.out.why_not is not None:
            return f"in this {name} {trace.out.why_not}."
        if ability == "early readouts" and self.schedule.n_coda and not trace.is_closed:
            return (
                f"what follows the loops of this {name} depends on more than what their last layer returned, and {traced}; "
                "trace it with fewer loops (set_loops=, unroll)."
            )
        if ability == "gradients" and trace.ungraded:
            return f"no gradient reaches {trace.ungraded[0]} of this {name}, which runs it under no_grad or detaches its state."
        if ability == "gradients" and trace.recomputes:
            return f"{name} runs its layers again for gradients (checkpointing), where no hook acts; switch that off."
        if ability == "exit gate":
            return f"{traced}; it has no exit gate that is known."
        if ability == "injection":
            return f"{traced}, not what it injects. Hook the state instead: steer."
        if ability in ("causal attention", "causal runs") and not trace.is_causal:
            return f"positions of this {name} see later ones."
        if ability == "every position" and not trace.is_whole:
            return f"not every layer of this {name} takes every position."
        if ability == "state" and trace.places.unnamed:
            return f"in this {name}, {trace.places.unnamed}."
        if ability == "state" and trace.places.entrance != "hook_state":
            return f"{name} mixes something into the state between its passes, and {traced}: what it mixes in is in no hook."
        if ability == "rows apart" and not trace.rows_apart:
            return f"the rows of a batch depend on each other in this {name}."
        return None

    def unroll(self, n_loops: int, *, cut: bool = False) -> TracedBridge:
        """The same module with another number of loops, which is set before every run and put back after it.

        Args:
            n_loops: how often to loop.
            cut: refused, unless the number stays.

        Raises:
            LoopedError: nobody has said how the number is set; the module does not loop as often as it was set to.
        """
        if check_count("n_loops", n_loops) == self.n_loops:
            cut = False
        if cut:
            require(self, "entry", f"the first {n_loops} loops alone")
        require(self, "other depths", f"{n_loops} loops")
        try:
            layers = list(dict.fromkeys(self.trace.order))
            other = type(self)(
                self.module, self.feed, replace(self.asked, layers=layers), self.tokenizer, n_loops, self.schedule
            )
        except LoopedError:
            raise
        except Exception as error:  # whatever the module raises
            raise LoopedError(f"{n_loops} loops were asked, with which {type(self.module).__name__} fails: {error}") from error
        if other.n_loops != n_loops:
            raise LoopedError(
                f"{n_loops} loops were set by {self.asked.set_loops!r}, but the module looped {other.n_loops} times."
            )
        return other

    def to(self, *args: Any, **kwargs: Any) -> TracedBridge:
        """Move the module, as `torch.nn.Module.to`.

        Args:
            *args: as there.
            **kwargs: as there.
        """
        self.module.to(*args, **kwargs)
        return self

    def as_cache(self, activations: Mapping[str, Tensor], has_batch_dim: bool = True) -> TracedCache:
        """Activations by name as a cache of this model.

        Args:
            activations: by name.
            has_batch_dim: whether they have a batch axis.
        """
        return TracedCache(dict(activations.items()), self, has_batch_dim)

    def facts(self) -> Facts:
        """What is told of this model: what the trace found, and what it weighs."""
        sizes, schedule = self._sizes(), self.schedule
        rows = {name: text for name, text in self.trace.rows()} | {
            "width": str(self.cfg.d_model),
            "parameters": human(sizes.n_parameters),
        }
        loop = [(stack, f"{schedule.stacks[stack]} layers") for stack in schedule.core_stacks]
        before = [("embedding", "the token"), *([("prelude", str(schedule.n_prelude))] if schedule.n_prelude else [])]
        after = [*([("coda", str(schedule.n_coda))] if schedule.n_coda else []), ("answer", "unembedding")]
        n_physical = len(dict.fromkeys(self.trace.order))
        return Facts(
            f"traced {type(self.module).__name__}", n_physical, None, rows, Order(before, "", loop, after, False), sizes
        )

    def _sizes(self) -> Sizes:
        schedule, order = self.schedule, self.trace.order
        of_layer = {path: stack for path, stack in zip(order, [site.stack for site in schedule.sites], strict=True)}
        counts, per_loop, outside = dict[str, int](), 0, 0
        times = {path: order.count(path) / schedule.n_loops for path in of_layer}
        for name, parameter in self.module.named_parameters():
            layer = next((path for path in of_layer if name.startswith(f"{path}.")), None)
            stack = "between" if layer is None else of_layer[layer]
            counts[stack] = counts.get(stack, 0) + parameter.numel()
            if parameter.ndim < 2:
                continue
            if stack in schedule.core_stacks and layer is not None:
                per_loop += round(times[layer] * parameter.numel())
            else:
                outside += parameter.numel()
        layers = sum(1 for site in schedule.sites if site.loop is not None) // schedule.n_loops
        attention = 4 * layers * self.cfg.n_heads * self.cfg.d_head
        cache = 2 * layers * self.cfg.n_key_value_heads * self.cfg.d_head
        return Sizes(counts, 2 * per_loop, 2 * outside, attention, cache)

    def fingerprint(self) -> Fingerprint:
        """What tells the weights of this module from others."""
        return Fingerprint.of(f"traced {type(self.module).__name__}", dict(self.module.named_parameters()))

    def record(
        self, input: Any, hooks: Sequence[str], initial_state: InitialState, is_causal: bool, inputs: dict[str, Any]
    ) -> TracedRun:
        """Run once, so that copies of the run can be run side by side.

        Args:
            input: text or tokens.
            hooks: the activations that are kept.
            initial_state: refused.
            is_causal: without meaning here; copies are whole runs.
            inputs: what else the run takes.
        """
        return TracedRun(self, input, hooks, initial_state, inputs)

    def way_out(self, schedule: Schedule, tokens: Int[Tensor, "batch pos"], inputs: dict[str, Any]) -> TracedWayOut:
        """The ways from a residual stream to the output.

        Args:
            schedule: the model's own.
            tokens: what the model runs on.
            inputs: what else the run takes.
        """
        require(self, "lens", "a lens")
        if schedule != self.schedule:
            require(self, "entry", "the run that stops after an earlier loop")
        return TracedWayOut(self, tokens, inputs)

    def step_map(self, tokens: Tensor, initial_state: InitialState = None) -> NoReturn:
        """Refused: a run cannot be entered in the middle.

        Raises:
            LoopedError: always.
        """
        require(self, "entry", "one loop as a function of the state")
        raise AssertionError

    def paths_need(self, layers: Iterable[int], norms: Iterable[tuple[int | None, str]]) -> NoReturn:
        """Refused: what the module adds up is not known.

        Raises:
            LoopedError: always.
        """
        require(self, "exact decomposition", "direct paths")
        raise AssertionError

    def direct_paths(self, activations: Mapping[str, Tensor], to_first_order: bool) -> NoReturn:
        """Refused: what the module adds up is not known.

        Raises:
            LoopedError: always.
        """
        require(self, "exact decomposition", "direct paths")
        raise AssertionError

    def with_weights_of_their_own(self, action: Callable[..., Any]) -> NoReturn:
        """Refused: the weights of one pass are those of all.

        Raises:
            LoopedError: always.
        """
        require(self, "weights by pass", "the weights of one pass")
        raise AssertionError


class TracedRun:
    """A run of a traced module, and copies of it.

    Args:
        model: the traced module.
        input: text or tokens.
        hooks: the activations that are kept.
        initial_state: refused.
        inputs: what else the run takes.
    """

    def __init__(
        self, model: TracedBridge, input: Any, hooks: Sequence[str], initial_state: InitialState, inputs: dict[str, Any]
    ):
        self.model: TracedBridge = model
        entered = model.schedule.name(model.schedule.passes[0].first, "hook_resid_pre")
        kept = list(dict.fromkeys([*hooks, entered]))
        logits, cache = model.run_with_cache(input, names_filter=kept, initial_state=initial_state, **inputs)
        self.logits: Float[Tensor, "batch pos d_vocab"] = logits
        self.cache: TracedCache = cache
        self.state: Float[Tensor, "batch pos d_model"] = cache[entered]

    @torch.no_grad()
    def again(self, entries: Sequence[int], start: int, fwd_hooks: Any) -> Float[Tensor, "row pos d_vocab"]:
        """Copies of the run, side by side: copy `c` holds the rows `c * batch .. (c + 1) * batch - 1`.

        Args:
            entries: one for every copy; all of a copy is run.
            start: 0.
            fwd_hooks: what makes the copies differ.
        """
        run = self.cache.run
        assert run is not None and start == 0
        times = len(entries)
        tokens = run.input[None] if run.input.ndim == 1 else run.input
        given = {name: _repeated(value, times) for name, value in run.inputs.items()}
        if self.cache.attention_mask is not None:
            given["attention_mask"] = self.cache.attention_mask.repeat(times, 1)
        return self.model.run_with_hooks(tokens.repeat(times, 1), fwd_hooks, **given)

    def read(self, x: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row pos d_vocab"]:
        """The logits of what `again` returned: that itself.

        Args:
            x: some rows of it.
        """
        return x


class TracedWayOut:
    """The way from a stream to the logits by the last norm and the unembedding.

    Args:
        model: the traced module.
        tokens: what it runs on.
        inputs: what else the run takes.
    """

    def __init__(self, model: TracedBridge, tokens: Int[Tensor, "batch pos"], inputs: dict[str, Any]):
        self.model: TracedBridge = model
        self.tokens: Int[Tensor, "batch pos"] = tokens
        self.inputs: dict[str, Any] = inputs

    def run(
        self, cells: Sequence[tuple[Lens, int]], positions: Int[Tensor, "batch chosen"], initial_state: InitialState
    ) -> Float[Tensor, "cell batch chosen d_model"]:
        """Run once and bring each (lens, virtual layer) to the input of the unembedding, at the chosen positions.

        Where layers follow, the native lens takes a state for what the last layer before them returned, and runs the module
        once more for every state.

        Args:
            cells: which lens to read which virtual layer with.
            positions: which positions of every row.
            initial_state: refused.
        """
        model, schedule = self.model, self.model.schedule
        for lens, layer in cells:
            if lens == "native":
                self._check_native(layer)
        rows = torch.arange(len(self.tokens), device=self.tokens.device)[:, None]
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[Tensor, Any], None]:
            def hook(x: Tensor, hook: Any) -> None:
                for row, (_, i) in enumerate(cells):
                    if i == layer:
                        found[row] = x.detach().clone()

            return hook

        hooks: list[Any] = [(schedule.name(i, "hook_resid_post"), keep(i)) for i in sorted({i for _, i in cells})]
        model.run_with_hooks(self.tokens, hooks, initial_state=initial_state, **self.inputs)
        for row, (lens, i) in enumerate(cells):
            if lens == "native" and schedule.n_coda and i < schedule.n_layers - 1:
                ends = max(i, schedule.first_coda_layer - 1)
                found[row] = model.ending(self.tokens, self.inputs, ends, found[row])[1]
            found[row] = model.last_norm(found[row])[rows, positions.to(self.tokens.device)]
        return torch.stack([found[row] for row in range(len(cells))])

    def _check_native(self, layer: int) -> None:
        """Refuse what no hook can bring to the end as the module would."""
        model, schedule = self.model, self.model.schedule
        require(model, "last readout", "lens='native'")
        if layer < schedule.first_coda_layer and schedule.n_coda:
            require(model, "early readouts", "lens='native' before the last layers")
        stack = schedule.site(layer).stack
        if stack in schedule.core_stacks[:-1]:
            require(model, "entry", f"lens='native' of the stack {stack}, which others follow in every loop,")

    def logits(self, x: Float[Tensor, "row d_model"], start: int, width: int) -> Float[Tensor, "row width"]:
        """The logits of one block of the vocabulary.

        Args:
            x: what the unembedding reads.
            start: the first token of the block.
            width: how many tokens.
        """
        logits = self.model._logits(x[None])[0, :, start : start + width]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _repeated(value: Any, times: int) -> Any:
    return value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
