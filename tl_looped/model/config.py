"""`LoopedConfig`: everything that decides what a looped model computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import LoopedError
from ..kinds import Kind, choice, count, flag, json_table, number, optional, several, shown, table, text
from ..schedule import Schedule, check_count

Projection = Literal["q", "k", "v", "o", "gate", "in", "out", "attn_gate"]
# Scaling rules whose frequencies do not depend on the length of the prompt, and their parameters. The other rules would make an
# activation depend on how much text follows it.
_FACTOR = number(above=True)
_SCALING: dict[str, dict[str, Kind[Any]]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "llama3": {
        **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _FACTOR),
        "original_max_position_embeddings": count(),
    },
    "yarn": {
        "factor": _FACTOR,
        **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), optional(_FACTOR)),
        **dict.fromkeys(("mscale", "mscale_all_dim"), optional(number())),
        "original_max_position_embeddings": optional(count()),
        "truncate": optional(flag),
    },
}


def scaling(name: str, value: object) -> dict[str, Any]:
    """Check transformers' description of scaled rotary frequencies.

    Args:
        name: what the error calls it.
        value: the description.

    Raises:
        LoopedError: a rule that is not implemented; parameters that it does not have or lacks, or of the wrong kind.
    """
    given = table(name, value)
    rule = next((given[key] for key in ("rope_type", "type") if given.get(key) is not None), "default")
    if not isinstance(rule, str) or rule not in _SCALING:
        raise LoopedError(f"rope scaling {shown(rule)} was asked; supported are {', '.join(_SCALING)}.")
    parameters = {key: value for key, value in given.items() if key not in ("rope_type", "type") and value is not None}
    if unknown := [key for key in parameters if key not in _SCALING[rule]]:
        raise LoopedError(
            f"{name} has {unknown[0]}={shown(parameters[unknown[0]])}, which the rule {rule!r} does not have and is not "
            f"implemented; it has {', '.join(_SCALING[rule]) or 'no parameter'}."
        )
    checked = {key: kind(f"{name}[{key!r}]", parameters.get(key)) for key, kind in _SCALING[rule].items()}
    if rule == "llama3" and checked["high_freq_factor"] <= checked["low_freq_factor"]:
        raise LoopedError(
            f"{name} has low_freq_factor={checked['low_freq_factor']} and "
            f"high_freq_factor={checked['high_freq_factor']}; the second must be the greater one."
        )
    return {"rope_type": rule, **{key: value for key, value in checked.items() if value is not None}}


@dataclass(frozen=True)
class LoopedConfig:
    """The structure of a looped language model, validated on construction.

    The defaults describe a plain pre-norm decoder whose layers are looped; each field is one way in which a family departs
    from it.

    Args:
        d_model: width of the residual stream.
        n_heads: number of query heads.
        d_vocab: size of the vocabulary.
        n_core: layers in the loop (in each of HRM-Text's two stacks).
        n_loops: how often they run (cycles of H for HRM-Text).
        n_kv_heads: number of key and value heads; 0 for `n_heads`.
        d_head: width of a head; 0 for `d_model // n_heads`.
        d_mlp: width of the MLP; 0 for `4 * d_model`.
        n_ctx: greatest number of positions.
        family: what errors and reports call the model; it decides nothing.
        n_prelude: layers before the loop.
        n_coda: layers after the loop.
        l_cycles: with two stacks, runs of L before each run of H; None for one stack.
        norm: where the norms of a block sit: "pre" on the input of each branch, "branch" on its output, "sandwich" on both,
            "stream" on its input and on the stream after the addition.
        norm_eps: added to the mean square in every norm; None for the resolution of the dtype.
        norm_kind: what a norm divides by: the root of the mean square ("rms") or of the sum of squares ("l2").
        norm_weight: whether norms have a weight.
        inner_norm: norms over all heads before `o`, and over the MLP's neurons before `down`.
        residual: what a branch returns is added to the stream ("add"), or the stream after the branch's norm moves towards it
            at a learned rate ("interpolate").
        qk_norm: norm of queries and keys: of each head ("head"), over all heads ("flat"), or of each head after the rotation,
            without a weight ("after_rope").
        qk_norm_eps: its epsilon; None for `norm_eps`, and for "after_rope" for the resolution of the dtype.
        qk_norm_weight: whether those norms have a weight.
        query_gain: a factor on every entry of the queries, after the rotation.
        attn_gate: a sigmoid gate from the attention's input multiplies its output before `o`.
        mlp: "gated", `down(act(gate(x)) * up(x))`; "plain", `down(act(up(x)))`; or "relu_squared", `down(relu(up(x))^2 / 2)`.
        act_fn: activation of the first two.
        biases: which projections have a bias.
        windows: for every physical layer, the number of positions it may look at, its own included; None for all. Empty: every
            layer sees all positions.
        value_embed_layers: physical layers whose values get a gated embedding of the token added (Parcae).
        value_gate_width: how many leading entries of the attention's input that gate reads.
        rope_layout: rotary pairs: entry i with entry i + d_head / 2 ("half"), neighbours ("pairs"), or no positions ("none").
        rope_theta: base of the rotary frequencies.
        rope_theta_windowed: their base in layers that have a window; None for `rope_theta`.
        rope_scaling: transformers' description of scaled frequencies.
        rope_precision: to what cosines and sines are rounded, whatever the dtype.
        learned_positions: the embedding is the sum of that of the token and that of its position.
        injection: what enters every pass beside the state: nothing, a sum with it ("add"), a linear map of state and injection
            side by side ("concat"), or Parcae's decay ("decay").
        prelude_norm: whether what is injected is normed first.
        initial_state: the state before the first pass: the prelude's output ("embedding"), noise, or a vector that is learned.
        noise: the kind of noise: normal, and truncated at three standard deviations or not.
        noise_std: standard deviation of the noise.
        noise_scale: factor on the noise.
        own_layers: every loop has layers with weights of its own, instead of sharing them.
        own_parts: with `own_layers`, the parts of a layer that are a loop's own, such as "attn"; the others are shared. Empty:
            all are its own.
        loop: the loop kind: "repeat", where every pass continues the stream of the one before, or a name given to
            `tl_looped.model.register_loop`.
        options: what a registered loop kind or a family needs to know beside these fields, by name.
        entry_norm: a norm of the state before every pass.
        pass_norm: a norm of the state after every pass.
        after_loop: what the state goes through after the last pass: nothing, the last norm ("final_norm"), a map ("linear").
        final_norm: a norm before the unembedding; False where that of the last pass is the last.
        exit_gate: a linear gate reads the state after every pass (Ouro).
        strategy: "naive", or "anchored" (arXiv 2605.23872): every pass moves the state `1 / anchor_steps` of the way from
            what entered it to what its layers return, and the output of the loop is `beta * first pass + (1 - beta) * state`.
        anchor_steps: passes that an anchored loop would need to go all the way.
        beta: weight of the first pass in the output of an anchored loop.
        embed_scale: factor on the embedding.
        logit_softcap: logits are `cap * tanh(logits / cap)`; None for no cap.
        tied: the unembedding is the embedding.
        prefix_lm: `token_type_ids` may mark a prefix whose positions look at each other both ways.

    Raises:
        LoopedError: a value of the wrong kind or outside its range, or fields that contradict each other.

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
    n_prelude: int = 0
    n_coda: int = 0
    l_cycles: int | None = None
    norm: Literal["pre", "branch", "sandwich", "stream"] = "pre"
    norm_kind: Literal["rms", "l2"] = "rms"
    norm_eps: float | None = 1e-6
    norm_weight: bool = True
    inner_norm: bool = False
    residual: Literal["add", "interpolate"] = "add"
    qk_norm: Literal["none", "head", "flat", "after_rope"] = "none"
    qk_norm_eps: float | None = None
    qk_norm_weight: bool = True
    query_gain: bool = False
    attn_gate: bool = False
    mlp: Literal["gated", "plain", "relu_squared"] = "gated"
    act_fn: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    biases: tuple[Projection, ...] = ()
    windows: tuple[int | None, ...] = ()
    value_embed_layers: tuple[int, ...] = ()
    value_gate_width: int = 0
    rope_layout: Literal["half", "pairs", "none"] = "half"
    rope_theta: float = 10000.0
    rope_theta_windowed: float | None = None
    rope_scaling: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    rope_precision: Literal["float32", "bfloat16"] = "float32"
    learned_positions: bool = False
    injection: Literal["none", "add", "concat", "decay"] = "none"
    prelude_norm: bool = False
    initial_state: Literal["embedding", "noise", "learned"] = "embedding"
    noise: Literal["truncated", "normal"] = "truncated"
    noise_std: float = 1.0
    noise_scale: float = 1.0
    own_layers: bool = False
    own_parts: tuple[str, ...] = ()
    loop: str = "repeat"
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    entry_norm: bool = False
    pass_norm: bool = False
    after_loop: Literal["none", "final_norm", "linear"] = "none"
    final_norm: bool = True
    exit_gate: bool = False
    strategy: Literal["naive", "anchored"] = "naive"
    anchor_steps: int = 1
    beta: float = 0.5
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    tied: bool = False
    prefix_lm: bool = False

    def __post_init__(self) -> None:
        for name, kind in _FIELDS.items():
            object.__setattr__(self, name, kind(name, getattr(self, name)))
        for name, default in self._usual_widths().items():
            object.__setattr__(self, name, getattr(self, name) or default)
            check_count(name, getattr(self, name))
        if self.logit_softcap == 0:
            self._refuse("logit_softcap=0 would make every logit 0; None is no cap")
        if self.initial_state == "noise" and self.noise_std == 0:
            self._refuse('initial_state="noise" needs noise_std > 0')
        if self.mlp != "gated" and "gate" in self.biases:
            self._refuse(f'biases names "gate", which mlp="{self.mlp}" does not have')
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
        if two_stacks and self.own_layers:
            self._refuse("own_layers goes with one looped stack")
        if self.own_parts and not self.own_layers:
            self._refuse("own_parts goes with own_layers")
        if self.initial_state == "noise" and self.injection == "none":
            self._refuse("a random initial state without injection would ignore the prompt")
        if self.strategy == "anchored" and (self.injection != "none" or self.pass_norm):
            self._refuse("strategy='anchored' goes with injection='none' and without pass_norm")
        if self.loop != "repeat" and (two_stacks or self.strategy == "anchored"):
            self._refuse(f"loop={self.loop!r} goes with one stack (no l_cycles) and strategy='naive'")
        if self.residual == "interpolate" and self.norm == "stream":
            self._refuse("residual='interpolate' goes with norms on branches, not on the stream")
        if not self.final_norm and not self.pass_norm_is_final:
            self._refuse(
                "without final_norm, the norm of the last pass must be the last norm: pass_norm, no coda, no after_loop"
            )
        if self.windows and len(self.windows) != self.n_physical:
            self._refuse(f"windows has {len(self.windows)} entries for {self.n_physical} physical layers")
        if self.value_embed_layers and not 0 < self.value_gate_width <= self.d_model:
            self._refuse(f"value embeddings need 0 < value_gate_width <= d_model, got {self.value_gate_width}")
        if wrong := [i for i in self.value_embed_layers if i >= self.n_physical]:
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

    def layer_names(self, stack: str, layer: int) -> list[str]:
        """What the parameters of a physical layer are called by: one name, or with `own_layers` one for every loop.

        Args:
            stack: its stack.
            layer: its index in the stack.
        """
        if not self.own_layers or stack not in self.schedule.core_stacks:
            return [f"{stack}.{layer}"]
        return [f"{stack}.{layer}.loops.{t}" for t in range(self.schedule.n_loops_of(stack))]

    def shared_name(self, name: str) -> str:
        """What a parameter of a layer is called: without its loop, if it is of a part that all loops share.

        Args:
            name: its name with that of `layer_names` before it.

        Example:
            >>> cfg = LoopedConfig(d_model=8, n_heads=2, d_vocab=9, n_core=1, n_loops=2, own_layers=True, own_parts=("attn",))
            >>> cfg.shared_name("core.0.loops.1.attn.q.weight"), cfg.shared_name("core.0.loops.1.ln1.weight")
            ('core.0.loops.1.attn.q.weight', 'core.0.ln1.weight')
        """
        stack, layer, *rest = name.split(".")
        if not self.own_parts or rest[:1] != ["loops"] or rest[2] in self.own_parts:
            return name
        return ".".join((stack, layer, *rest[2:]))

    def rope_base(self, physical: int) -> float:
        """The base of the rotary frequencies of a physical layer."""
        windowed = bool(self.windows) and self.windows[physical] is not None
        return self.rope_theta_windowed if windowed and self.rope_theta_windowed is not None else self.rope_theta

    @property
    def pass_norm_is_final(self) -> bool:
        """Whether the norm of the last pass is also the last norm before the unembedding (Ouro, HRM-Text)."""
        return self.pass_norm and not self.final_norm and not self.n_coda and self.after_loop == "none"

    def replace(self, **changes: Any) -> LoopedConfig:
        """A copy with some fields changed, validated again.

        `n_kv_heads`, `d_head` and `d_mlp` follow `n_heads` and `d_model` where they have the values that follow from those.

        Args:
            **changes: fields and their new values.

        Raises:
            LoopedError: as for a new config.

        Example:
            >>> cfg = LoopedConfig(d_model=64, n_heads=4, d_vocab=100, n_core=2, n_loops=3)
            >>> cfg.replace(d_model=128).d_head
            32
        """
        following = {name: 0 for name, usual in self._usual_widths().items() if getattr(self, name) == usual}
        return dataclasses.replace(self, **{**following, **changes})

    def _usual_widths(self) -> dict[str, int]:
        return {"n_kv_heads": self.n_heads, "d_head": self.d_model // self.n_heads, "d_mlp": 4 * self.d_model}

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopedConfig:
        """Inverse of `to_dict`.

        Raises:
            LoopedError: a field that this version does not know or that is missing, or values of the wrong kind or that
                contradict each other.
        """
        fields = table("the fields of a LoopedConfig", values)
        if unknown := sorted(set(fields) - set(_FIELDS)):
            raise LoopedError(f"unknown LoopedConfig fields {shown(unknown)}; this version knows {sorted(_FIELDS)}.")
        needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in needed if name not in fields]:
            raise LoopedError(f"a LoopedConfig needs {', '.join(missing)}, which these fields lack: {shown(sorted(fields))}.")
        return cls(**{name: _FIELDS[name](name, value) for name, value in fields.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> LoopedConfig:
        return self  # immutable


_FLAGS = (
    "norm_weight inner_norm qk_norm_weight query_gain attn_gate prelude_norm entry_norm pass_norm final_norm exit_gate tied "
    "prefix_lm learned_positions own_layers"
)
# What every field may be. A choice is declared by its annotation alone.
_FIELDS: dict[str, Kind[Any]] = {
    **{name: choice(*get_args(hint)) for name, hint in get_type_hints(LoopedConfig).items() if get_origin(hint) is Literal},
    **dict.fromkeys("d_model n_heads d_vocab n_core n_loops n_ctx anchor_steps".split(), count()),
    **dict.fromkeys("n_kv_heads d_head d_mlp n_prelude n_coda value_gate_width".split(), count(0)),
    **dict.fromkeys(_FLAGS.split(), flag),
    **dict.fromkeys("noise_std noise_scale embed_scale".split(), number()),
    "norm_eps": optional(number()),
    "family": text,
    "loop": text,
    "options": json_table,
    "own_parts": several(text),
    "rope_theta_windowed": optional(number(1.0, above=True)),
    "l_cycles": optional(count()),
    "qk_norm_eps": optional(number()),
    "logit_softcap": optional(number()),
    "beta": number(0.0, 1.0),
    "rope_theta": number(1.0, above=True),
    "rope_scaling": optional(scaling),
    "biases": several(choice(*get_args(Projection))),
    "windows": several(optional(count())),
    "value_embed_layers": several(count(0)),
}
