"""What tools ask of a `LoopedBridge`, beside running it; see `tl_looped.looped`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import LoopedError
from ..facts import Facts
from ..looped import Ability, require
from ..model.facts import facts_of
from ..model.own_weights import with_weights_of_their_own
from ..model.step_map import StepMap
from ..record import InitialState
from ..running import first_hooked
from ..schedule import Schedule
from .cache import LoopedCache
from .direct_paths import DirectPaths
from .fingerprint import Fingerprint
from .processing import last_norm_is_folded
from .recorded import Recorded
from .running import RunningBridge
from .way_out import WayOut

T = TypeVar("T")


class AskedBridge(RunningBridge):
    """The part of a `LoopedBridge` that tools are built on."""

    _cache_class: type[LoopedCache] = LoopedCache

    @property
    def starts_from(self) -> str:
        """The state before the first pass: the prelude's output ("embedding"), "noise", or a "learned" one."""
        return self.looped_cfg.initial_state

    @property
    def entrance(self) -> str:
        """The hook of a pass that holds the state entering it, such as `hook_state`."""
        return self.plain.loop.entrance

    def lacks(self, ability: Ability) -> str | None:
        """Why the model cannot do something, to follow "... was asked, but"; None if it can.

        Args:
            ability: what it would take.

        Example:
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3)).lacks("exit gate")
            'this custom model has no exit gate; use a policy without one, such as exits.KL().'
        """
        cfg = self.looped_cfg
        if ability in ("early readouts", "lens") and self._weights_processed:
            return "the weights of this model were processed (compatibility mode); ask the model before that."
        if ability == "equal passes" and last_norm_is_folded(self.plain):
            return (
                "the weights were processed (compatibility mode): the norm of the last pass has given its weight to the "
                "unembedding, those of the passes before have not. Ask a model without weight processing, or use fold_ln=False."
            )
        if ability == "equal loops" and (why := self.plain.loop.changes) is not None:
            return (
                f"in this {cfg.family} model {why}, so that the loops are not one map applied again. Compare or patch the "
                "states of a run instead: step_geometry, patch_between_loops."
            )
        if ability == "every position" and (why := self.plain.loop.partial) is not None:
            return (
                f"in this {cfg.family} model {why}: at the others its layers compute nothing. Read hook_state and hook_out of "
                "the loops, which every position has."
            )
        if ability == "other depths" and (why := self.plain.loop.fixed) is not None:
            return f"this {cfg.family} model cannot stop after an earlier loop or loop further: {why}."
        if ability == "one pattern" and (why := self.plain.loop.patterns) is not None:
            return f"in this {cfg.family} model {why}."
        if ability == "equal heads" and (why := self.plain.loop.heads_differ) is not None:
            return (
                f"in this {cfg.family} model {why}. Use patch_sweep, which goes through the heads of every layer, or hook "
                "layers one by one."
            )
        if ability == "one stream" and (why := self.plain.loop.mixes) is not None:
            return f"in this {cfg.family} model {why}. Patch activations, or decompose a cache, which follows the mixtures."
        if ability == "neurons" and (why := self.plain.loop.no_neurons) is not None:
            return f"in this {cfg.family} model {why}. Read or patch mlp.hook_expert_weights, or the whole hook_mlp_out."
        if ability == "shared weights" and cfg.own_layers:
            which = f"all their weights (their own: {', '.join(cfg.own_parts)})" if cfg.own_parts else "their weights"
            return f"the loops of this {cfg.family} model do not share {which}; take their gradients by autograd."
        if ability == "exit gate" and not cfg.exit_gate:
            return f"this {cfg.family} model has no exit gate; use a policy without one, such as exits.KL()."
        if ability == "injection" and (why := self.plain.loop.not_injected) is not None:
            return f"in this {cfg.family} model {why}. Hook the state instead: steer, set_initial_state."
        if ability in ("causal attention", "causal runs") and (why := self.plain.loop.sees_ahead) is not None:
            return f"in this {cfg.family} model {why}."
        if ability == "causal attention" and cfg.prefix_lm:
            return f"the tokens of a prefix see each other in this {cfg.family} model."
        if ability == "one embedding" and cfg.value_embed_layers:
            return f"the layers of this {cfg.family} model also read the token ids (value embeddings)."
        return None

    def as_cache(self, activations: Mapping[str, Tensor], has_batch_dim: bool = True) -> LoopedCache:
        """Activations by name as a cache of this model, taken for those of its weights as they are.

        Args:
            activations: by name.
            has_batch_dim: whether they have a batch axis.
        """
        return LoopedCache(dict(activations.items()), self, has_batch_dim)

    def facts(self) -> Facts:
        """What is told of this model: a table, the order of its parts, what it weighs and what a loop costs."""
        return facts_of(self.looped_cfg, self.cfg.dtype)

    def fingerprint(self) -> Fingerprint:
        """What tells the weights of this model from others."""
        return Fingerprint.of(self.looped_cfg, self.plain.canonical_parameters())

    def last_norm(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The model's last norm (in Ouro, HRM-Text and Nanbeige the norm of every pass), without firing its hooks.

        Args:
            x: states.
        """
        norm: Any = self.ln_final.original_component
        return norm.unhooked(x)

    def record(
        self, input: Any, hooks: Sequence[str], initial_state: InitialState, is_causal: bool, inputs: dict[str, Any]
    ) -> Recorded:
        """Run once, so that parts of the run can be run again, many copies at once.

        Args:
            input: text or tokens.
            hooks: the activations that are kept.
            initial_state: as in `forward`.
            is_causal: no position sees later ones, so that copies may leave out the first ones.
            inputs: what else the run takes.
        """
        return Recorded(self, input, hooks, initial_state, is_causal, inputs)

    def step_map(self, tokens: Int[Tensor, "batch pos"], initial_state: InitialState = None) -> StepMap:
        """One loop as a function of the state, at any state and with gradients.

        Args:
            tokens: what the model runs on.
            initial_state: as in `forward`.

        Raises:
            LoopedError: the model has hooks, which would silently not act.
        """
        if hooked := first_hooked(self):
            raise LoopedError(
                f"one loop as a function of the state was asked of a model that has hooks, such as at {hooked}, which would "
                "not act on it; take them off (model.reset_hooks())."
            )
        require(self, "equal loops", "one loop as a function of the state")
        require(self, "early readouts", "one loop as a function of the state")
        return StepMap(self.plain, tokens, initial_state)

    def way_out(self, schedule: Schedule, tokens: Int[Tensor, "batch pos"], inputs: dict[str, Any]) -> WayOut:
        """The ways from a residual stream to the output.

        Args:
            schedule: of what is decoded: the model's own, or that of its first loops, prelude and coda.
            tokens: what the model runs on.
            inputs: what else the run takes.
        """
        return WayOut(self, schedule, tokens, inputs)

    def paths_need(self, layers: Iterable[int], norms: Iterable[tuple[int | None, str]]) -> list[str]:
        """The activations that `direct_paths` needs.

        Args:
            layers: the virtual layers whose heads change.
            norms: those that are asked for, by virtual layer (None: before the unembedding) and name in the layer.
        """
        require(self, "one stream", "paths between components")
        return DirectPaths.needs(self, layers, norms)

    def direct_paths(self, activations: Mapping[str, Tensor], to_first_order: bool) -> DirectPaths:
        """What changes of the residual stream become on their way through a run.

        Args:
            activations: of the run, those that `paths_need` names among them.
            to_first_order: take the changes for small.
        """
        return DirectPaths(self, activations, to_first_order)

    def with_weights_of_their_own(
        self, action: Callable[[dict[str, list[nn.Parameter]]], T]
    ) -> tuple[dict[str, list[nn.Parameter]], T]:
        """What an action returns while every use of a looped parameter holds a view of its own.

        Args:
            action: called with the views by canonical name, in the order of the run.

        Returns:
            The views, and what the action returned.
        """
        return with_weights_of_their_own(self.plain, action)
