"""What happens between the layers of a loop: before the first pass, on the way into a pass, out of it, and out of the loop.

A loop kind says it once. It calls the modules around the layers by name, through `Parts`; a run passes the modules themselves,
whoever follows a frozen stream passes the same maps with norms and gates held. So the forward pass, generation under an exit
policy, the native lens, runs that enter in the middle and exact attribution read the same lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import LoopedError
from ..schedule import Pass
from .config import LoopedConfig
from .devices import Carried, device_of
from .layers import Block
from .norms import norm_of
from .passes import INJECTIONS
from .slots import observe

Initial = Callable[[Tensor | None, Tensor], Tensor]  # of its default, if it has one, and of a tensor like it
Apply = Callable[[nn.Module, str, tuple[Tensor, ...]], Tensor]
OF_MODEL = ("prelude_norm", "after_loop")  # parts that the whole model has once
OPTIONAL = (*OF_MODEL, "entry_norm", "norm")  # and that a model may lack


@dataclass
class Stream:
    """What a run carries from layer to layer; with `Inputs`, all that later layers depend on.

    Args:
        x: the residual stream entering the next layer.
        carried: what the loop kind keeps beside it: the state of every looped stack as its latest pass left it, by the name of
            the stack; what is injected ("embed"); the state that entered the current pass ("entered"); and more, by kind.
            [batch, pos, ...], but for what the kind says `is_whole`.
    """

    x: Tensor
    carried: Carried = field(default_factory=Carried)


class Parts:
    """The modules around the layers, by the names that loop kinds call them by.

    Args:
        model: a `LoopedModel`.
        p: the pass whose modules come first; None for those of the whole model alone.
        apply: runs a module, which is given with the name of its hooks and its inputs.
    """

    def __init__(self, model: Any, p: Pass | None, apply: Apply):
        self.model: Any = model
        self.p: Pass | None = p
        self.apply: Apply = apply

    def __call__(self, name: str, *inputs: Tensor) -> Tensor:
        """What a module makes of its inputs, [..., d_model]; the first of them where this model lacks it.

        Args:
            name: the module or slot.
            *inputs: what it reads.

        Raises:
            LoopedError: no model has a part of this name.
        """
        schedule, prefix, module = self.model.cfg.schedule, "", None
        if self.p is None or name in OF_MODEL:
            module = getattr(self.model, name, None)
        else:
            module, prefix = getattr(self.model.passes[self.p.index], name, None), f"{schedule.pass_prefix(self.p)}."
            if module is None and name == "norm" and self.model.cfg.pass_norm_is_final:  # of the last pass
                module, prefix, name = self.model.ln_final, "", "ln_final"
        if module is None and name not in OPTIONAL:
            raise LoopedError(
                f"the loop kind {type(self.model.loop).__name__} called the part {name!r}, which a pass of this model does not "
                "have; pass_parts makes the modules of a pass."
            )
        return inputs[0] if module is None else self.apply(module, prefix + name, inputs)


class Repeat:
    """One stack whose passes continue the stream, with or without injection, pass norm and anchor.

    Args:
        cfg: the structure.
    """

    lag: int = 0  # how many positions further on what a pass leaves is read by the next
    own_ends: tuple[str, ...] = ()  # parts of a pass of which every loop has parameters of its own
    held: tuple[str, ...] = ()  # slots of a pass whose values count as given where a frozen stream is followed

    def __init__(self, cfg: LoopedConfig):
        self.cfg = cfg
        self.stack: str = cfg.schedule.core_stacks[0]

    def pass_parts(self, is_last: bool) -> dict[str, nn.Module]:
        """The modules of one pass; those of all passes share their parameters.

        Args:
            is_last: whether it is the last pass.
        """
        cfg, parts = self.cfg, dict[str, nn.Module]()
        if cfg.injection != "none":
            parts["inject"] = INJECTIONS[cfg.injection](cfg.d_model)
        if cfg.entry_norm:
            parts["entry_norm"] = norm_of(cfg)
        if cfg.pass_norm and not (is_last and cfg.pass_norm_is_final):
            parts["norm"] = norm_of(cfg)
        if cfg.exit_gate:
            parts["exit_gate"] = nn.Linear(cfg.d_model, 1)
        return parts

    def model_parts(self) -> dict[str, nn.Module]:
        """The modules that the whole model has once, beside those of a pass; `read` may call them."""
        return {}

    def block(self, physical: int) -> Block:
        """One layer.

        Args:
            physical: its index among all physical layers.
        """
        return Block(self.cfg, physical)

    def alike(self, physical: int) -> object:
        """What the shapes of a layer's parameters depend on.

        Args:
            physical: its index among all physical layers.
        """
        return physical in self.cfg.value_embed_layers

    def place(self, ends: nn.Module, p: Pass) -> None:
        """Tell the modules of a pass which one it is.

        Args:
            ends: the modules, by the names that `pass_parts` gives them.
            p: the pass.
        """

    def first(self, n_loops: int) -> LoopedConfig:
        """The structure of the first loops of a run, which need not be those of a run of so many.

        Args:
            n_loops: how many.
        """
        return self.cfg.replace(n_loops=n_loops)

    @property
    def windows(self) -> set[int | None]:
        """The windows of attention that some layer has; None for all positions."""
        return set(self.cfg.windows) or {None}

    def is_whole(self, name: str) -> bool:
        """Whether something carried belongs to the whole text up to now, and not to the positions that are run.

        Args:
            name: under which it is carried.
        """
        return False

    @property
    def mixes(self) -> str | None:
        """Why what a layer reads is not the stream that enters it alone; None if it is."""
        return None

    @property
    def heads_differ(self) -> str | None:
        """Which layers have other heads than the rest; None if all have the same."""
        return None

    @property
    def no_neurons(self) -> str | None:
        """Why an MLP has no neurons that all positions go through; None if it has."""
        return None

    @property
    def scaled(self) -> str | None:
        """What happens to the output of a branch before it is added to the stream; None for nothing but a norm."""
        return None

    @property
    def patterns(self) -> str | None:
        """Why a head has more than one attention pattern; None if it has one."""
        return None

    @property
    def not_injected(self) -> str | None:
        """Why a pass has no injection that can be edited; None if all have."""
        return "nothing is injected in the passes: they read the state alone" if self.cfg.injection == "none" else None

    @property
    def changes(self) -> str | None:
        """Why one loop is not the same map of the state as the next; None if it is."""
        return "every loop has weights of its own" if self.cfg.own_layers else None

    @property
    def fixed(self) -> str | None:
        """Why no other number of loops has a meaning, nor an answer after an earlier one; None if they have."""
        return None

    @property
    def partial(self) -> str | None:
        """Why a loop does not run every position; None if it does."""
        return None

    @property
    def sees_ahead(self) -> str | None:
        """Why a position depends on later ones, whatever the attention; None if it does not."""
        return None

    def begin(self, parts: Parts, x: Tensor, initial: Initial) -> dict[str, Tensor]:
        """What is carried before the first pass.

        Args:
            parts: the modules around the layers.
            x: the output of the prelude.
            initial: makes the state before the first pass.
        """
        embed = parts("prelude_norm", x)
        own = x if self.cfg.entry_norm else embed
        return {"embed": embed, self.stack: initial(own if self.cfg.initial_state == "embedding" else None, x)}

    def enter(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor:
        """The input of the first layer of a pass.

        Args:
            parts: the modules around the layers.
            p: the pass.
            carried: what is carried; changed in place.
        """
        state = parts("hook_state", parts("entry_norm", carried[p.stack]))
        carried["entered"] = state
        if self.cfg.injection == "none":
            return parts("hook_in", state)
        return parts("hook_in", parts("inject", state, parts("hook_injection", carried[self.injected_from(p)])))

    def injected_from(self, p: Pass) -> str:
        """The name under which is carried what a pass is injected.

        Args:
            p: the pass.
        """
        return "embed"

    def leave(self, parts: Parts, p: Pass, x: Tensor, carried: dict[str, Tensor]) -> None:
        """Keep the state that leaves a pass.

        Args:
            parts: the modules around the layers.
            p: the pass.
            x: the output of its last layer.
            carried: what is carried; changed in place.
        """
        entered = carried.pop("entered", None)
        if self.cfg.strategy == "anchored":
            carried.setdefault("anchor", x)
        x = self.written(parts, parts("norm", x), entered)
        carried[p.stack] = parts("hook_out", x)

    def written(self, parts: Parts, x: Tensor, entered: Tensor | None) -> Tensor:
        """The state that a pass leaves, [..., d_model].

        Args:
            parts: the modules around the layers.
            x: what its layers return, after the pass norm.
            entered: the state that entered it; None in a run that starts inside the pass.
        """
        if self.cfg.strategy == "anchored" and entered is not None:
            return entered + (x - entered) * (1 / self.cfg.anchor_steps)
        return x

    def exit_logit(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor | None:
        """The logit of stopping after a pass, [batch, pos]; None without an exit gate.

        Args:
            parts: the modules around the layers.
            p: the pass.
            carried: what is carried.
        """
        if not self.cfg.exit_gate:
            return None
        return parts("hook_exit_logit", parts("exit_gate", carried[p.stack]).squeeze(-1))

    def finish(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor:
        """What the coda reads if the loop ends after a pass.

        Args:
            parts: the modules around the layers.
            p: the pass.
            carried: what is carried.
        """
        state = carried[p.stack]
        if "anchor" in carried:
            state = self.cfg.beta * carried["anchor"] + (1 - self.cfg.beta) * state
        return parts("after_loop", state)

    def read(self, parts: Parts, x: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """What the last norm reads.

        Args:
            parts: the modules around the layers.
            x: the output of the last layer, or of the loop.
            carried: what is carried.
        """
        return x

    def resume(self, parts: Parts, p: Pass, last: Pass, x: Tensor, injection: Tensor | None) -> dict[str, Tensor]:
        """What is carried into a run that starts inside a pass, from the residual stream there.

        Args:
            parts: the modules around the layers.
            p: the pass.
            last: the last pass of the run.
            x: the residual stream.
            injection: what is injected in it, if that was given.

        Raises:
            LoopedError: later passes need what such a run does not have.
        """
        prefix = self.cfg.schedule.pass_prefix(p)
        where = f"layer {p.first} to {p.layers.stop - 1} lie in pass {prefix}"
        if (why := self.reads_the_past()) is not None:
            raise LoopedError(f"{where} of {why}; start before or after the loop.")
        if injection is None and self.cfg.injection != "none" and p.index < last.index:
            raise LoopedError(
                f"{where}, and later passes read an injection that cannot be recomputed from the residual stream; "
                f"pass injection=cache['{prefix}.hook_injection']."
            )
        return {} if injection is None else {self.injected_from(p): injection}

    def reads_the_past(self) -> str | None:
        """Which loop needs more than the residual stream inside a pass, and what; None if this one does not."""
        if self.cfg.strategy == "anchored":
            return "an anchored loop, whose output also needs earlier passes"
        return f"a loop of the kind {self.cfg.loop!r}, whose state also needs what entered the pass" if self._is_own else None

    @property
    def _is_own(self) -> bool:
        """Whether a kind has a way of its own into a pass, out of it or out of the loop."""
        return self._has_own("enter", "leave", "written", "finish")

    def _has_own(self, *ways: str) -> bool:
        return any(getattr(type(self), way) is not getattr(Repeat, way) for way in ways)

    def between(self, p: Pass) -> str | None:
        """Why what the layers of a pass write is not simply added to what is read after it; None if it is.

        Args:
            p: the pass.
        """
        cfg, is_last = self.cfg, self.cfg.schedule.is_last(p)
        if self._has_own("leave", "written", "finish") or (not is_last and self._is_own):
            return f"a loop of the kind {cfg.loop!r} changes what its passes write"
        if cfg.strategy == "anchored":
            return "an anchored loop scales what its passes write"
        if cfg.pass_norm and not (is_last and cfg.pass_norm_is_final):
            return "the state is normed after every pass"
        if cfg.entry_norm and not is_last:
            return "the state is normed before every pass"
        if cfg.injection != "none" and not is_last:
            return "the state goes through the injection of the next pass"
        return None if cfg.after_loop == "none" else "the state leaving the loop goes through another map"

    @property
    def state_before(self) -> tuple[str, str]:
        """The hooks of the state before the first pass, and of what it is where the model has no state of its own."""
        cfg = self.cfg
        before = f"blocks.{cfg.n_prelude - 1}.hook_resid_post" if cfg.n_prelude else "hook_embed"
        before = "prelude_norm.hook_out" if cfg.prelude_norm and not cfg.entry_norm else before
        return f"{cfg.schedule.pass_prefix(cfg.schedule.passes[0])}.{self.entrance}", before

    @property
    def entrance(self) -> str:
        """The hook, of a pass, of the state that enters it."""
        return "entry_norm.hook_in" if self.cfg.entry_norm else "hook_state"


class TwoStacks(Repeat):
    """Two stacks that are injected each other's state (HRM-Text): `l_cycles` passes of L, then one of H."""

    def begin(self, parts: Parts, x: Tensor, initial: Initial) -> dict[str, Tensor]:
        """What is carried before the first pass: a learned state of L, the embedding as that of H."""
        return {"L": initial(parts.model.learned_state.expand_as(x), x), "H": x}

    def injected_from(self, p: Pass) -> str:
        """The other stack."""
        return "H" if p.stack == "L" else "L"


def run_part(module: nn.Module, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """A module around the layers, as a run calls it; a hook in a slot gets a tensor of its own.

    It runs where its parameters lie, and what it returns goes to where its first input was.
    """
    home = inputs[0].device
    at = device_of(module) or home
    here = [x.to(at) for x in inputs]
    return (observe(module, *here) if name.rpartition(".")[2].startswith("hook_") else module(*here)).to(home)


_KINDS: dict[str, type[Repeat]] = {"repeat": Repeat}


def register_loop(name: str, kind: type[Repeat]) -> None:
    """Make a loop kind known under a name, which `LoopedConfig.loop` may then have.

    Args:
        name: what configs call it.
        kind: the class; it derives from `Repeat` and says what differs.

    Raises:
        LoopedError: another kind has that name.

    Example:
        >>> from tl_looped.model import Repeat, register_loop
        >>> class Halfway(Repeat):
        ...     def written(self, parts, x, entered):
        ...         return 0.5 * (x + entered)
        >>> register_loop("halfway", Halfway)
    """
    if _KINDS.get(name, kind).__qualname__ != kind.__qualname__:  # a notebook's cell may run again
        raise LoopedError(
            f"{name!r} was registered as a loop kind, but is the name of {_KINDS[name].__qualname__}; choose another."
        )
    _KINDS[name] = kind


def loop_of(cfg: LoopedConfig) -> Repeat:
    """The loop kind of a model.

    Args:
        cfg: the structure.

    Raises:
        LoopedError: nobody has registered it.
    """
    if cfg.l_cycles is not None:
        return TwoStacks(cfg)
    if cfg.loop not in _KINDS:
        raise LoopedError(f"loop={cfg.loop!r} was asked, which is no loop kind; known are {', '.join(_KINDS)}.")
    return _KINDS[cfg.loop](cfg)
