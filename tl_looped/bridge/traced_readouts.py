"""What a traced module would answer after each of its loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..errors import LoopedError
from ..looped import require
from ..running import is_observed
from ..schedule import virtual_layer
from ..traced.places import Place
from ..traced.watch import Watch
from .names import Hook
from .traced_bridge import HookedTrace


class ReadTrace(HookedTrace):
    """The part of a `TracedBridge` that reads out loops."""

    def readouts(
        self, input: Any, read: Callable[[int, Tensor], Any], fwd_hooks: Iterable[Hook] = (), **kwargs: Any
    ) -> list[Any]:
        """What a function makes of the readout after every loop of one run: the last norm and the unembedding on its state.

        Where layers follow the loops, the module is run once more for every loop, with its state in the place of what the last
        loop returns.

        Args:
            input: as in `forward`.
            read: called with the loop and its logits, [batch, pos, d_vocab].
            fwd_hooks: as in `hooks`; none on layers that follow the loops.
            **kwargs: what `forward` takes.

        Raises:
            LoopedError: the module's way from a state to its logits is not known; hooks on layers that follow the loops.
        """
        model: Any = self
        require(model, "early readouts", "a readout after every loop")
        kwargs.pop("loop", None)
        schedule, found = self.schedule, dict[int, Any]()

        tokens, mask = self.read(
            input, kwargs.pop("prepend_bos", None), kwargs.pop("padding_side", None), kwargs.pop("attention_mask", None)
        )
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        given = {**kwargs, **({} if mask is None else {"attention_mask": mask})}
        inputs = {name: value for name, value in given.items() if name not in ("return_type", "initial_state")}
        after = [name for name in self._hooked_names(fwd_hooks) if (virtual_layer(name) or 0) >= schedule.first_coda_layer]
        if schedule.n_coda and after:
            raise LoopedError(
                f"a readout after every loop was asked with a hook at {schedule.loop_name(after[0])}, which would not act: the "
                "module is run to its end without hooks. Ask model.unroll(t + 1), or take it off."
            )
        states: dict[int, Tensor] = {}

        def keep(loop: int, x: Tensor, hook: Any) -> None:
            if schedule.n_coda:
                states[loop] = x.detach().clone()
            else:
                found[loop] = read(loop, self._logits(self.last_norm(x)))

        ends = [
            (schedule.name(schedule.pass_of_loop(t).layers[-1], "hook_resid_post"), partial(keep, t))
            for t in range(self.n_loops)
        ]
        options: dict[str, Any] = {"return_type": None, **given}
        self.run_with_hooks(tokens, [*fwd_hooks, *ends], **options)
        for loop, x in sorted(states.items()):
            found[loop] = read(loop, self.ending(tokens, inputs, schedule.first_coda_layer - 1, x)[0])
        return [found[t] for t in range(self.n_loops)]

    def ending(
        self, tokens: Tensor, inputs: Mapping[str, Any], layer: int, x: Tensor
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], Float[Tensor, "batch pos d_model"]]:
        """The logits, and what the last layer returns, of a run in which one layer returns what is given; without hooks.

        Args:
            tokens: [batch, pos].
            inputs: what else the run takes, `attention_mask` among it.
            layer: the virtual layer.
            x: what it returns, [batch, pos, d_model].
        """
        given = {**self._masked(inputs.get("attention_mask")), **{k: v for k, v in inputs.items() if k != "attention_mask"}}
        hooks: Any = self.hook_dict
        places = [hooks[f"blocks.{i}.hook_resid_post"].place for i in (layer, self.schedule.n_layers - 1)]
        last: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            last.append(value)
            return value

        points: list[tuple[Place, Callable[[Tensor], Tensor]]] = [(places[0], lambda value: x), (places[1], keep)]
        output = Watch(self.module, self.trace.order, points, None).run(partial(self._run, tokens, given))
        return self.feed.logits(output, tokens.shape[:2]), last[0]

    def last_norm(self, x: Tensor) -> Tensor:
        """The module's last norm, without hooks; what is given where it has none.

        Args:
            x: states.
        """
        norm = self.trace.out.norm
        return x if norm is None else norm(x)

    def _logits(self, x: Tensor) -> Tensor:
        head = self.trace.out.head
        if head is None:
            raise LoopedError(f"logits were asked of a state, but in this module {self.trace.out.why_not}.")
        return head(x)

    def _hooked_names(self, fwd_hooks: Iterable[Hook]) -> list[str]:
        """Where hooks are or would be."""
        asked = [place for place, _ in self._expand_hooks(fwd_hooks)]
        named = [name for name in self.hook_dict if any(name == one if isinstance(one, str) else one(name) for one in asked)]
        return [*named, *(point.name for point in self._hooked.values() if point.name and is_observed(point))]
