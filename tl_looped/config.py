"""`LoopedConfig`: everything that decides what a looped model computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args, get_type_hints

from .errors import LoopedError
from .schedule import Schedule, check_count

Projection = Literal["q", "k", "v", "o", "gate", "in", "out", "attn_gate"]


@dataclass(frozen=True)
class LoopedConfig:
    """The structure of a looped language model, validated on construction.

    The defaults describe a plain pre-norm decoder whose layers are looped; each field below is one way in which a family
    departs from it. `n_kv_heads`, `d_head` and `d_mlp` may be 0 for their usual values (`n_heads`, `d_model // n_heads`,
    `4 * d_model`).

    Example:
        >>> cfg = LoopedConfig(d_model=64, n_heads=4, d_vocab=100, n_core=2, n_loops=3)
        >>> cfg.schedule.n_layers
        6
    """

    d_model: int
    n_heads: int
    d_vocab: int
    n_core: int
    n_loops: int
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    n_ctx: int = 2048
    family: str = "custom"

    # The schedule: layers before and after the loop; runs of the L stack per H cycle (HRM-Text).
    n_prelude: int = 0
    n_coda: int = 0
    l_cycles: int | None = None

    # A block: where its norms sit ("pre": on the branch input, "branch": on the branch output, "sandwich": both, "stream": on
    # the branch input and on the stream after the addition), and what its attention and MLP add to the usual ones.
    norm: Literal["pre", "branch", "sandwich", "stream"] = "pre"
    norm_eps: float = 1e-6
    norm_weight: bool = True
    qk_norm: Literal["none", "head", "flat", "after_rope"] = "none"
    qk_norm_eps: float | None = None  # None: norm_eps, and for "after_rope" the resolution of the dtype, as in Parcae
    attn_gate: bool = False
    mlp: Literal["gated", "relu_squared"] = "gated"
    act_fn: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    biases: tuple[Projection, ...] = ()
    windows: tuple[int | None, ...] = ()
    value_embed_layers: tuple[int, ...] = ()
    value_gate_width: int = 0

    # Positions.
    rope_layout: Literal["half", "pairs", "none"] = "half"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    # The loop: what enters every pass, the state before the first, what is done to the state leaving a pass or the loop.
    injection: Literal["none", "add", "concat", "decay"] = "none"
    prelude_norm: bool = False
    initial_state: Literal["embedding", "noise", "learned"] = "embedding"
    noise_std: float = 1.0
    noise_scale: float = 1.0
    pass_norm: bool = False
    after_loop: Literal["none", "final_norm", "linear"] = "none"
    final_norm: bool = True
    exit_gate: bool = False
    # "anchored" (arXiv 2605.23872): every pass moves the state by 1/anchor_steps of the way, and the loop's output is
    # beta * first pass + (1 - beta) * state.
    strategy: Literal["naive", "anchored"] = "naive"
    anchor_steps: int = 1
    beta: float = 0.5

    # Input and output.
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    tied: bool = False
    prefix_lm: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_vocab", "n_core", "n_loops", "n_ctx", "anchor_steps"):
            check_count(name, getattr(self, name))
        usual = {"n_kv_heads": self.n_heads, "d_head": self.d_model // self.n_heads, "d_mlp": 4 * self.d_model}
        for name, default in usual.items():
            object.__setattr__(self, name, getattr(self, name) or default)
            check_count(name, getattr(self, name))
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            choices = get_args(hints[field.name])
            if choices and isinstance(choices[0], str) and getattr(self, field.name) not in choices:
                raise LoopedError(
                    f"{field.name}={getattr(self, field.name)!r} was asked; choose one of {', '.join(map(repr, choices))}."
                )
        numbers = ["norm_eps", "rope_theta", "noise_std", "noise_scale", "beta", "embed_scale"]
        for name in numbers if self.qk_norm_eps is None else [*numbers, "qk_norm_eps"]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise LoopedError(f"{name}={value!r} was asked, but {name} must be a finite number >= 0.")
        _ = self.schedule  # checks its own counts
        if self.n_heads % self.n_kv_heads:
            self._refuse(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.d_model % self.n_heads and self.d_head == self.d_model // self.n_heads:
            self._refuse(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; give d_head")
        if self.rope_layout != "none" and self.d_head % 2:
            self._refuse(f"rotary positions need an even d_head, got {self.d_head}")
        two_stacks = self.l_cycles is not None
        if two_stacks != (self.initial_state == "learned") or (two_stacks and self.injection != "add"):
            self._refuse(
                "two stacks (l_cycles) go with injection='add' and initial_state='learned', and a learned state only with them"
            )
        if self.l_cycles is not None and (self.n_prelude or self.n_coda or self.prelude_norm or not self.pass_norm):
            self._refuse("two stacks (l_cycles) go with pass_norm and without prelude, prelude_norm and coda")
        if self.initial_state == "noise" and self.injection == "none":
            self._refuse("a random initial state without injection would ignore the prompt")
        if self.strategy == "anchored" and (self.injection != "none" or self.pass_norm):
            self._refuse("strategy='anchored' goes with injection='none' and without pass_norm")
        if not self.final_norm and not self.pass_norm_is_final:
            self._refuse(
                "without final_norm, the norm of the last pass must be the last norm: pass_norm, no coda, no after_loop"
            )
        if self.windows and len(self.windows) != self.n_physical:
            self._refuse(f"windows has {len(self.windows)} entries for {self.n_physical} physical layers")
        for window in self.windows:
            check_count("a window", 1 if window is None else window)
        if wrong := sorted(set(self.biases) - set(get_args(Projection))):
            self._refuse(f"biases names {wrong}; choose from {get_args(Projection)}")
        if self.value_embed_layers and not 0 < self.value_gate_width <= self.d_model:
            self._refuse(f"value embeddings need 0 < value_gate_width <= d_model, got {self.value_gate_width}")
        if wrong := [i for i in self.value_embed_layers if not 0 <= i < self.n_physical]:
            self._refuse(f"value_embed_layers names {wrong}, but the physical layers are 0..{self.n_physical - 1}")

    def _refuse(self, why: str) -> None:
        raise LoopedError(f"this LoopedConfig ({self.family}) contradicts itself: {why}.")

    @cached_property
    def schedule(self) -> Schedule:
        """The order in which the layers run."""
        return Schedule(self.n_core, self.n_loops, self.n_prelude, self.n_coda, self.l_cycles)

    @property
    def n_physical(self) -> int:
        """Number of distinct layers."""
        return sum(self.schedule.stacks.values())

    @property
    def pass_norm_is_final(self) -> bool:
        """Whether the norm of the last pass is also the last norm before the unembedding (Ouro, HRM-Text)."""
        return self.pass_norm and not self.final_norm and not self.n_coda and self.after_loop == "none"

    def replace(self, **changes: Any) -> LoopedConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopedConfig:
        """Inverse of `to_dict`.

        Raises:
            LoopedError: a field that this version does not know, or values that contradict each other.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise LoopedError(f"unknown LoopedConfig fields {unknown}; this version knows {sorted(known)}.")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoopedConfig:
        return self  # immutable
