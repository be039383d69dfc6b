"""Mixture-of-Recursions (arXiv 2507.10524): a router decides how deep every token goes.

With token choice a router assigns a depth to every token before the first recursion. A recursion runs the tokens that go at
least as deep, attention is among them, and at its own depth a token leaves: the state before the recursions plus what the
layers return, scaled by the router's weight. It waits there for the others.

With expert choice every recursion has a router of its own, which keeps the best tokens of those that the one before kept: a
share of the text, as `options["capacity"]` says. A token that is kept has what the layers return added to its state, scaled by
the router's weight. Recursions share their MLPs and norms, but not their attention. Which tokens are kept depends on the whole
text, later positions included: a text cannot be run piece by piece with a key-value cache (generate with
`use_past_kv_cache=False`, which runs the text anew for every token), and the logits of a prefix are others than those of
the same positions in a longer text. The loss of a text is that of the training: what is kept depends on the tokens that are to
be predicted, too. Padding is never kept, and does not count in the share.

`loops.{t}.hook_active` is 1 where recursion `t` runs a token; elsewhere the activations of its layers are zero (see
`tl_looped.model.routing`). `hook_mix` holds how the state is made that leaves: the shares of what the layers return, of the
state before the recursions (token choice alone), and of the state that entered. `router.hook_logit`, `router.hook_weight` and
with token choice `router.hook_depth` (the last recursion of every token) are those of a router: in loop 0, or with expert
choice in every loop, where logits are zero at tokens that are out already. An edit of any of them acts on what follows.

Only all recursions have a meaning: how tokens are routed was learned for that number.

config.json says that it is a Llama; the recipe of the training (config.yaml) says how it recurs, and must lie beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import CheckpointError, LoopedError
from ..kinds import Kind, choice, count, flag, number, several, shown, table, text
from ..model.config import LoopedConfig
from ..model.layers import Block
from ..model.loops import Initial, Parts, Repeat, register_loop
from ..model.routing import ACTIVE, Remembered, RoutedBlock
from ..model.slots import observe
from ..running import running
from ..schedule import Pass
from ._common import LLAMA_BLOCK, Computed, Shapes, Source, decoder_fields, layers, modules, readout
from ._read import get, need, only

TIED = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = ("*.rotary_emb.inv_freq",)
RECIPE = "config.yaml"
FILES = (RECIPE,)  # read beside config.json
ROUTERS = ("linear", "mlp")
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


class Router(nn.Sequential):
    """Logits of a position.

    Args:
        cfg: the structure; its option "router" is "linear" or "mlp".
        n_out: how many logits.
    """

    def __init__(self, cfg: LoopedConfig, n_out: int):
        kind, width = choice(*ROUTERS)("options['router']", cfg.options.get("router")), cfg.d_model
        if kind == "linear":
            super().__init__(nn.Linear(width, n_out, bias=False))
        else:
            super().__init__(nn.Linear(width, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, n_out, bias=False))


class DepthRouter(nn.Module):
    """The depth of every token, and the weight of what it returns there (token choice).

    Args:
        cfg: the structure; its options are "router", "router_func", "alpha" and "bias".
    """

    BESIDE: bool = True  # no part of the stream goes through it

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        self.map: Router = Router(cfg, cfg.n_loops)
        self.func: str = choice("softmax", "sigmoid")("options['router_func']", cfg.options.get("router_func"))
        self.alpha: float = number()("options['alpha']", cfg.options.get("alpha"))
        self.bias: nn.Parameter | None = None
        if flag("options['bias']", cfg.options.get("bias")):
            self.bias = nn.Parameter(torch.zeros(cfg.n_loops))
        self.hook_logit: nn.Module = nn.Identity()
        self.hook_depth: nn.Module = nn.Identity()
        self.hook_weight: nn.Module = nn.Identity()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos 2"]:
        """Depth and weight."""
        scores = self.alpha * FUNCTIONS[self.func](observe(self.hook_logit, self.map(x)))
        depth = (scores if self.bias is None else scores + self.bias).argmax(-1)
        depth = observe(self.hook_depth, depth.to(x.dtype))
        index = depth.detach().long().clamp(0, scores.shape[-1] - 1)
        weight = observe(self.hook_weight, scores.gather(-1, index[..., None]).squeeze(-1))
        return torch.stack((depth, weight), dim=-1)


class SideBySide(nn.Module):
    """Several values of every position, [batch, pos, value]."""

    BESIDE: bool = True  # no part of the stream goes through it

    def forward(self, *values: Float[Tensor, "batch pos one"]) -> Float[Tensor, "batch pos value"]:
        """The values side by side."""
        return torch.cat(values, dim=-1)


class TokenChoice(Repeat):
    """Recursions that every token leaves at a depth of its own."""

    held: tuple[str, ...] = ("hook_active", "hook_mix")

    def __init__(self, cfg: LoopedConfig):
        super().__init__(cfg)
        trained = count()("options['n_recursions']", cfg.options.get("n_recursions"))
        if cfg.n_loops != trained:
            raise LoopedError(
                f"{cfg.n_loops} loops were asked, but this {cfg.family} model routes tokens through {trained} recursions, and "
                f"was trained for that number: fewer or more have no meaning. Leave it at {trained}."
            )

    @property
    def fixed(self) -> str | None:
        """Why no other number of loops has a meaning."""
        return "how it routes tokens was trained for all of its recursions, and fewer or more of them have no meaning"

    @property
    def changes(self) -> str | None:
        """Why one loop is not the same map of the state as the next."""
        return "a recursion runs some of the tokens only, which ones a router decides"

    @property
    def partial(self) -> str | None:
        """Why a loop does not run all positions."""
        return "a recursion runs some of the positions only (hook_active)"

    def block(self, physical: int) -> Block:
        """One layer."""
        return RoutedBlock(self.cfg, physical)

    def pass_parts(self, is_last: bool) -> dict[str, nn.Module]:
        """The modules of one pass."""
        return {**self._slots(is_last), "router": DepthRouter(self.cfg), "remembered": Remembered()}

    def _slots(self, is_last: bool) -> dict[str, nn.Module]:
        slots: dict[str, nn.Module] = {name: nn.Identity() for name in self.held}
        return {**super().pass_parts(is_last), **slots, "side_by_side": SideBySide()}

    def place(self, ends: nn.Module, p: Pass) -> None:
        """Tell the modules of a pass which one it is; tokens are routed before the first."""
        remembered: Any = ends.remembered
        remembered.slot = self.cfg.schedule.n_layers + p.loop
        if p.loop:
            del ends._modules["router"]

    def is_whole(self, name: str) -> bool:
        """Which positions are active is known of the whole text."""
        return name == ACTIVE

    def enter(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor:
        """The input of the first layer of a pass: zero where it does not run."""
        carried["entered"] = state = parts("hook_state", carried[p.stack])
        if p.loop == 0:
            carried["before"], carried["route"] = state, parts("router", state)
        active = parts("hook_active", (carried["route"][..., :1] >= p.loop).to(state.dtype))
        carried[ACTIVE] = parts("remembered", active)
        return parts("hook_in", active * state)

    def leave(self, parts: Parts, p: Pass, x: Tensor, carried: dict[str, Tensor]) -> None:
        """Keep the state that leaves a pass."""
        del carried[ACTIVE]
        depth, weight = carried["route"][..., :1], carried["route"][..., 1:]
        ends, goes_on = depth == p.loop, depth > p.loop
        shares = (torch.where(ends, weight, goes_on.to(weight.dtype)), ends.to(weight.dtype), (depth < p.loop).to(weight.dtype))
        carried[p.stack] = parts("hook_out", mixed(parts, shares, (x, carried["before"], carried.pop("entered"))))


def mixed(parts: Parts, shares: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Tensor:
    """The sum of states, each times its share of every position, [batch, pos, 1], which hooks see side by side."""
    mix = parts("hook_mix", parts("side_by_side", *shares))
    found = torch.zeros_like(states[0])
    for share, state in zip(mix.expand(*mix.shape[:-1], len(states)).split(1, dim=-1), states, strict=True):
        found = found + share * state
    return found


class KeepRouter(nn.Module):
    """Which tokens a recursion keeps, and the weight of what it returns for them (expert choice).

    Args:
        cfg: the structure; its options are "router", "temp", "router_func" and "alpha".
    """

    BESIDE: bool = True  # no part of the stream goes through it

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        self.map: Router = Router(cfg, 1)
        self.temp: float = number(above=True)("options['temp']", cfg.options.get("temp"))
        self.func: str = choice("sigmoid", "tanh", "none")("options['router_func']", cfg.options.get("router_func"))
        self.alpha: float = number()("options['alpha']", cfg.options.get("alpha")) if self.func != "none" else 1.0
        self.share: float = 1.0  # of the text that is kept
        self.hook_logit: nn.Module = nn.Identity()
        self.hook_weight: nn.Module = nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], alive: Float[Tensor, "batch pos one"]
    ) -> Float[Tensor, "batch pos 2"]:
        """Which are kept, and the weights."""
        run = running()
        real = None if run is None or run.real is None else run.real.to(x.device).repeat(len(x) // len(run.real), 1)
        logit = observe(self.hook_logit, (self.map(x / self.temp) * alive).squeeze(-1))
        weight = observe(self.hook_weight, self.alpha * FUNCTIONS[self.func](logit))
        candidates = alive.squeeze(-1) != 0 if real is None else (alive.squeeze(-1) != 0) & real
        n_real = [x.shape[1]] * len(x) if real is None else real.sum(-1).tolist()
        n_kept = torch.tensor([max(1, int(self.share * n)) for n in n_real], device=x.device)
        order = logit.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        kept = (order.argsort(-1) < n_kept[:, None]) & candidates
        return torch.stack((kept.to(x.dtype), weight), dim=-1)


class ExpertChoice(TokenChoice):
    """Recursions that keep the best tokens of those that the recursion before kept."""

    own_ends: tuple[str, ...] = ("router",)

    def __init__(self, cfg: LoopedConfig):
        super().__init__(cfg)
        self.capacity: tuple[float, ...] = several(number(0.0, 1.0))("options['capacity']", cfg.options.get("capacity"))
        if len(self.capacity) != cfg.n_loops:
            raise LoopedError(
                f"options['capacity']={[*self.capacity]} was asked with {cfg.n_loops} recursions; name what each keeps."
            )
        self.is_weighted: bool = flag("options['weighted']", cfg.options.get("weighted"))

    @property
    def sees_ahead(self) -> str | None:
        """Why a position depends on later ones."""
        return "which tokens a recursion keeps depends on the whole text, later positions included"

    def pass_parts(self, is_last: bool) -> dict[str, nn.Module]:
        """The modules of one pass."""
        return {**self._slots(is_last), "router": KeepRouter(self.cfg)}

    def place(self, ends: nn.Module, p: Pass) -> None:
        """Tell the modules of a pass which one it is."""
        router: Any = ends.router
        router.share = self.capacity[p.loop]

    def begin(self, parts: Parts, x: Tensor, initial: Initial) -> dict[str, Tensor]:
        """What is carried before the first pass: all are in."""
        return {**super().begin(parts, x, initial), "alive": torch.ones_like(x[..., :1])}

    def enter(self, parts: Parts, p: Pass, carried: dict[str, Tensor]) -> Tensor:
        """The input of the first layer of a pass: zero where it does not run."""
        carried["entered"] = state = parts("hook_state", carried[p.stack])
        carried["route"] = parts("router", state, carried["alive"])
        carried["alive"] = carried[ACTIVE] = active = parts("hook_active", carried["route"][..., :1])
        return parts("hook_in", active * state)

    def leave(self, parts: Parts, p: Pass, x: Tensor, carried: dict[str, Tensor]) -> None:
        """Keep the state that leaves a pass."""
        kept, weight = carried.pop(ACTIVE), carried.pop("route")[..., 1:]
        shares = (kept * weight if self.is_weighted else kept, torch.ones_like(kept))
        carried[p.stack] = parts("hook_out", mixed(parts, shares, (x, carried.pop("entered"))))


register_loop("token_choice", TokenChoice)
register_loop("expert_choice", ExpertChoice)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this has the tensors of a router; config.json is that of a Llama."""
    return any(".mor_router." in name for name in shapes)


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    recipe = _recipe(config)
    only(config, attention_bias=False, mlp_bias=False)
    recursive, mor = (_needed(recipe, part, table) for part in ("recursive", "mor"))
    for part in ("kv_sharing", "relaxation"):
        if get(get(recipe, part, {}, table), "enable", False, flag):
            raise CheckpointError(
                f"{RECIPE} has {part}.enable=true, a variant of MoR that is not implemented; load a model that was trained "
                "without it."
            )
    for part, option, implemented in ((recursive, "enable", True), (recursive, "ln_share", True), (mor, "enable", True),
                                      (mor, "rand_router", False)):  # fmt: skip
        if get(part, option, implemented, flag) != implemented:
            raise CheckpointError(
                f"{RECIPE} has {option}={shown(part[option])}, which is not implemented; only {implemented} is. "
                "Load another model."
            )
    n_loops = _needed(recursive, "num_recursion", count(), "recursive")
    n_layers = need(config, "num_hidden_layers", count())
    sharing = _needed(recursive, "sharing", choice("cycle", "middle_cycle"), "recursive")
    ends = 1 if sharing == "middle_cycle" else 0
    if (n_layers - 2 * ends) % n_loops or n_layers <= 2 * ends:
        raise CheckpointError(
            f"config.json has num_hidden_layers={n_layers}, which counts the layers of all {n_loops} recursions"
            f"{' and one before and after them' if ends else ''}, but cannot be divided so; restore the published files."
        )
    kind = _needed(mor, "type", choice("expert", "token"), "mor")
    fields: dict[str, Any]
    if kind == "token":
        fields = {"options": _token_options(mor)}
    else:
        fields = {"options": _expert_options(mor, n_loops), "own_layers": True, "own_parts": ("attn",)}
    fields["options"] |= {"n_recursions": n_loops, "router": get(mor, "router_type", "linear", choice(*ROUTERS))}
    return LoopedConfig(
        family=f"mor_{kind}",
        n_prelude=ends,
        n_core=(n_layers - 2 * ends) // n_loops,
        n_coda=ends,
        n_loops=n_loops,
        loop=f"{kind}_choice",
        **fields,
        **decoder_fields(config, default_theta=10000.0),
    )


def _recipe(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of config.yaml."""
    recipe = get(config, RECIPE, None, table)
    if recipe is None:
        raise CheckpointError(
            f"this checkpoint has the routers of a Mixture-of-Recursions, but no {RECIPE} beside config.json, which says how "
            "it recurs. Put the recipe that it was trained with there."
        )
    return recipe


def _needed(values: Mapping[str, Any], key: str, kind: Kind[Any], part: str = "") -> Any:
    """The value of a key that the recipe must have, in a part of it."""
    name = f"{part}.{key}" if part else key
    if values.get(key) is None:
        raise CheckpointError(
            f"{RECIPE} has no {name}, which a Mixture-of-Recursions needs; restore the recipe of its training."
        )
    return kind(name, values[key])


def _token_options(mor: Mapping[str, Any]) -> dict[str, Any]:
    """What the router of token choice computes."""
    token = _needed(mor, "token", table, "mor")
    if (temp := get(mor, "temp", 1.0, number())) != 1:
        raise CheckpointError(f"{RECIPE} has mor.temp={temp}, which is not implemented for token choice; only 1 is.")
    gating = token.get("gating", "weighted")
    if gating != "weighted":
        raise CheckpointError(
            f"{RECIPE} has mor.token.gating={shown(gating)}, which is not implemented; only 'weighted' is. Load a model that "
            "was trained so."
        )
    return {
        "router_func": _needed(token, "router_func", choice("softmax", "sigmoid"), "mor.token"),
        "alpha": _needed(token, "alpha", number(), "mor.token"),
        "bias": get(token, "balancing", "loss", text) == "loss_free",
    }


def _expert_options(mor: Mapping[str, Any], n_loops: int) -> dict[str, Any]:
    """What the routers of expert choice compute."""
    expert, capacity = _needed(mor, "expert", table, "mor"), mor.get("capacity")
    if isinstance(capacity, str):
        try:
            capacity = [float(part) for part in capacity.split(",")]
        except ValueError as error:
            raise CheckpointError(f"{RECIPE} has mor.capacity={shown(capacity)}, which is no list of numbers.") from error
    if capacity is None:
        capacity = [(n_loops - t) / n_loops for t in range(n_loops)]
    capacity = several(number(0.0, 1.0))("mor.capacity", capacity)
    if len(capacity) != n_loops:
        raise CheckpointError(
            f"{RECIPE} has mor.capacity={[*capacity]} for {n_loops} recursions; restore the recipe of its training."
        )
    func = _needed(expert, "router_func", text, "mor.expert") if "router_func" not in expert else expert["router_func"]
    return {
        "temp": get(mor, "temp", 1.0, number(above=True)),
        "router_func": choice("sigmoid", "tanh", "none")("mor.expert.router_func", "none" if func is None else func),
        "alpha": 1.0 if func is None else _needed(expert, "alpha", number(), "mor.expert"),
        "capacity": list(capacity),
        "weighted": expert.get("gating", "weighted") == "weighted",
    }


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source | Computed]:
    """Where every parameter is stored: those of the recursions once for each of them, though they share them."""
    found: dict[str, Source | Computed] = {}
    found |= modules(cfg, {**readout(cfg, shapes, "model.embed_tokens", "lm_head"), "ln_final": "model.norm"})
    first, by_token = cfg.n_prelude, cfg.loop == "token_choice"
    routers = {"router": first} if by_token else {f"router.loops.{t}": first + t for t in range(cfg.n_loops)}
    for ours, layer in routers.items():
        for i, stored in ((0, "0."), (2, "2.")) if cfg.options["router"] == "mlp" else ((0, ""),):
            found[f"{ours}.map.{i}.weight"] = Source(f"model.layers.{layer}.mor_router.router.{stored}weight")
    if cfg.options.get("bias"):
        found["router.bias"] = Source(f"model.layers.{first}.router_bias")
    recursions = [f"{first}.block_list.{t}" if by_token else f"{first + t}.block" for t in range(cfg.n_loops)]
    coda, shapes_of = first + (1 if by_token else cfg.n_loops), _layer_shapes(cfg)
    for at, stack, j, _ in layers(cfg):
        for ours, theirs in LLAMA_BLOCK.items():
            copies = [f"model.layers.{recursion}.{j}.{theirs}.weight" for recursion in recursions]
            if stack != "core":
                found[f"{at}.{ours}.weight"] = Source(f"model.layers.{0 if stack == 'prelude' else coda}.{theirs}.weight")
            elif ours.split(".")[0] in cfg.own_parts:
                found |= {f"{at}.loops.{t}.{ours}.weight": Source(name) for t, name in enumerate(copies)}
            else:
                found[f"{at}.{ours}.weight"] = Computed(_the_same(copies), dict.fromkeys(copies, shapes_of[ours]))
    return found


def _layer_shapes(cfg: LoopedConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a layer."""
    q, kv, width = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head, cfg.d_model
    found: dict[str, tuple[int, ...]] = {"ln1": (width,), "ln2": (width,)}
    found |= {"attn.q": (q, width), "attn.k": (kv, width), "attn.v": (kv, width), "attn.o": (width, q)}
    return found | {"mlp.gate": (cfg.d_mlp, width), "mlp.up": (cfg.d_mlp, width), "mlp.down": (width, cfg.d_mlp)}


def _the_same(names: list[str]) -> Callable[..., Tensor]:
    """The one tensor that is stored under several names."""

    def first(*copies: Tensor) -> Tensor:
        for name, copy in zip(names, copies, strict=True):
            if not torch.equal(copy, copies[0]):
                raise CheckpointError(
                    f"{names[0]} and {name} differ, but the recursions of this MoR share their layers. Save the model again, "
                    "with one tensor under both names."
                )
        return copies[0]

    return first
