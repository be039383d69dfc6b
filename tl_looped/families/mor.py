"""Mixture-of-Recursions (arXiv 2507.10524): a router decides how deep every token goes.

With token choice the router assigns a depth to every token before the first recursion. A recursion runs the tokens that go at
least as deep, attention is among them, and at its own depth a token leaves: the state before the recursions plus what the
layers return, scaled by the router's weight. It waits there for the others.

`loops.{t}.hook_active` is 1 where recursion `t` runs a token; elsewhere the activations of its layers are zero (see
`tl_looped.model.routing`). `hook_mix` holds how the state is made that leaves: the shares of what the layers return, of the
state before the recursions, and of the state that entered. `router.hook_logit`, `router.hook_depth` (the last recursion of
every token) and `router.hook_weight` are those of the router, in loop 0. An edit of any of them acts on what follows.

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
from ..kinds import choice, count, flag, number, shown, table, text
from ..model.config import LoopedConfig
from ..model.layers import Block
from ..model.loops import Parts, Repeat, register_loop
from ..model.routing import ACTIVE, Remembered, RoutedBlock
from ..model.slots import observe
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
        slots: dict[str, nn.Module] = {name: nn.Identity() for name in self.held}
        return {**super().pass_parts(is_last), "router": DepthRouter(self.cfg), "remembered": Remembered(), **slots}

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
    mix = parts("hook_mix", torch.cat(shares, dim=-1))
    found = torch.zeros_like(states[0])
    for share, state in zip(mix.expand(*mix.shape[:-1], len(states)).split(1, dim=-1), states, strict=True):
        found = found + share * state
    return found


register_loop("token_choice", TokenChoice)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether this has the tensors of a router; config.json is that of a Llama."""
    return any(".mor_router." in name for name in shapes)


def looped_config(config: Mapping[str, Any], shapes: Shapes) -> LoopedConfig:
    """What the checkpoint computes."""
    recipe = _recipe(config)
    only(config, attention_bias=False, mlp_bias=False)
    recursive, mor = (need(recipe, part, table) for part in ("recursive", "mor"))
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
    n_loops = need(recursive, "num_recursion", count())
    n_layers = need(config, "num_hidden_layers", count())
    sharing = need(recursive, "sharing", choice("cycle", "middle_cycle"))
    ends = 1 if sharing == "middle_cycle" else 0
    if (n_layers - 2 * ends) % n_loops or n_layers <= 2 * ends:
        raise CheckpointError(
            f"config.json has num_hidden_layers={n_layers}, which counts the layers of all {n_loops} recursions"
            f"{' and one before and after them' if ends else ''}, but cannot be divided so; restore the published files."
        )
    kind = need(mor, "type", choice("expert", "token"))
    options = _token_options(mor, shapes)
    return LoopedConfig(
        family=f"mor_{kind}",
        n_prelude=ends,
        n_core=(n_layers - 2 * ends) // n_loops,
        n_coda=ends,
        n_loops=n_loops,
        loop=f"{kind}_choice",
        options={"n_recursions": n_loops, "router": get(mor, "router_type", "linear", choice(*ROUTERS)), **options},
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


def _token_options(mor: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What the router of token choice computes."""
    token = need(mor, "token", table)
    if (temp := get(mor, "temp", 1.0, number())) != 1:
        raise CheckpointError(f"{RECIPE} has mor.temp={temp}, which is not implemented for token choice; only 1 is.")
    gating = get(token, "gating", "weighted", text)
    if gating != "weighted":
        raise CheckpointError(
            f"{RECIPE} has mor.token.gating={shown(gating)}, which is not implemented; only 'weighted' is. Load a model that "
            "was trained so."
        )
    return {
        "router_func": get(token, "router_func", "softmax", choice("softmax", "sigmoid")),
        "alpha": get(token, "alpha", 1.0, number()),
        "bias": get(token, "balancing", "loss", text) == "loss_free",
    }


def sources(cfg: LoopedConfig, shapes: Shapes) -> dict[str, Source | Computed]:
    """Where every parameter is stored: those of the recursions once for each of them, though they share them."""
    found: dict[str, Source | Computed] = {}
    found |= modules(cfg, {**readout(cfg, shapes, "model.embed_tokens", "lm_head"), "ln_final": "model.norm"})
    at_router = f"model.layers.{cfg.n_prelude}"
    router = ("",) if cfg.options["router"] == "linear" else ("0.", "2.")
    for i, stored in zip((0, 2), router, strict=False):
        found[f"router.map.{i}.weight"] = Source(f"{at_router}.mor_router.router.{stored}weight")
    if cfg.options["bias"]:
        found["router.bias"] = Source(f"{at_router}.router_bias")
    shapes_of = _layer_shapes(cfg)
    for at, stack, j, _ in layers(cfg):
        for ours, theirs in LLAMA_BLOCK.items():
            if stack == "core":
                copies = [f"{at_router}.block_list.{t}.{j}.{theirs}.weight" for t in range(cfg.n_loops)]
                found[f"{at}.{ours}.weight"] = Computed(_the_same(copies), dict.fromkeys(copies, shapes_of[ours]))
            else:
                number = 0 if stack == "prelude" else cfg.n_prelude + 1
                found[f"{at}.{ours}.weight"] = Source(f"model.layers.{number}.{theirs}.weight")
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
