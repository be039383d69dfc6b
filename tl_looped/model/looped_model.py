"""The canonical looped model: unrolled into virtual layers that share their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import LoopedError
from ..record import InitialState
from ..running import KeyValueCache
from ..schedule import Pass, check_count
from ..tokens import check_tokens
from .config import LoopedConfig
from .crossings import Begin, crossings
from .devices import Carried, device_of
from .early_exit import EarlyExit
from .embedding import Embedding
from .initial_state import NoiseTable, initial_state
from .inputs import Part, masks_of, positions_of
from .layers import Block, Inputs, each_module
from .loops import Parts, Repeat, Stream, loop_of, run_part
from .norms import RMSNorm, norm_of
from .passes import PASS_NAMES, PassEnds
from .placed import PlacedModel
from .rotary import Rotary

AnyModule = TypeVar("AnyModule", bound=nn.Module)


OnLoop = Callable[[int, Tensor], None]
OnLayer = Callable[[int, "Stream", Inputs], None]


class LoopedOutput(NamedTuple):
    """What a run returns.

    Args:
        logits: [batch, pos, d_vocab]; when the run was stopped, the residual stream entering layer `stop`,
            [batch, pos, d_model].
        past_key_values: the key-value cache, one slot per virtual layer, if one was asked for.
    """

    logits: Tensor
    past_key_values: KeyValueCache | None = None


class LoopedModel(PlacedModel):
    """A looped language model in plain PyTorch.

    `blocks[i]` is virtual layer `i`; the blocks of one physical layer, and the ends of all passes, hold the same `Parameter`
    objects. `parameter_slots` gives the name of every distinct parameter and the modules that hold it.

    Args:
        cfg: the structure.
    """

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        self.cfg: LoopedConfig = cfg
        schedule = cfg.schedule
        self.embed: Embedding = Embedding(cfg)
        self.loop: Repeat = loop_of(cfg)
        first: dict[str, Block] = {}
        blocks: list[Block] = []
        for slot, (i, site) in enumerate(zip(schedule.physical, schedule.sites, strict=True)):
            name = self.layer_name(site)
            blocks.append(_share(first[name]) if name in first else first.setdefault(name, self.loop.block(i)))
            blocks[-1].place(slot, site.loop)
        self.blocks: nn.ModuleList = nn.ModuleList(blocks)
        ends, last = (PassEnds(cfg, self.loop.pass_parts(is_last)) for is_last in (False, True))
        made = [
            PassEnds(cfg, self.loop.pass_parts(False)) if self.loop.own_ends else _share(ends) for _ in schedule.passes[:-1]
        ]
        self.passes: nn.ModuleList = nn.ModuleList([*made, last])
        for p, ends in zip(schedule.passes, self.passes, strict=True):
            self.loop.place(ends, p)
        self.prelude_norm: RMSNorm | None = None
        if cfg.prelude_norm:
            self.prelude_norm = norm_of(cfg)
        self.learned_state: nn.Parameter | None = None
        if cfg.initial_state == "learned":
            self.learned_state = nn.Parameter(torch.zeros(cfg.d_model))
        self.value_embeds: nn.ModuleDict = nn.ModuleDict(
            {str(i): nn.Embedding(cfg.d_vocab, cfg.n_kv_heads * cfg.d_head) for i in cfg.value_embed_layers}
        )
        self.after_loop: nn.Module | None = None
        if cfg.after_loop == "linear":
            self.after_loop = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        elif cfg.after_loop == "final_norm":
            self.after_loop = norm_of(cfg)
        for name, part in self.loop.model_parts().items():
            setattr(self, name, part)
        self.ln_final: RMSNorm = norm_of(cfg)
        self.unembed: nn.Linear = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self.rotary: Rotary = Rotary(cfg)
        self.noise: NoiseTable = NoiseTable(cfg)
        self.pass_starting: dict[int, Pass] = {p.first: p for p in schedule.passes}
        self.pass_ending: dict[int, Pass] = {p.layers.stop - 1: p for p in schedule.passes}
        self.parameter_slots: dict[str, list[tuple[nn.Module, str]]] = self._find_parameter_slots()
        for name, parameter in [(n, getattr(*holders[0])) for n, holders in self.parameter_slots.items()]:
            self.set_parameter(name, parameter)
        self.find_layers()

    def get_input_embeddings(self) -> nn.Module:
        """The scaled token embedding, under the name that TransformerLens asks for when it generates from embeddings."""
        return self.embed

    def train(self, mode: bool = True) -> LoopedModel:
        """Training or evaluation mode.

        Args:
            mode: False for evaluation.
        """
        for module in each_module(self):
            module.__dict__["training"] = mode
        return self

    def _find_parameter_slots(self) -> dict[str, list[tuple[nn.Module, str]]]:
        """For every distinct parameter, its canonical name and all (module, attribute) pairs that hold it."""
        schedule = self.cfg.schedule
        holders: dict[str, list[nn.Module]] = {"embed": [self.embed]}
        for site, block in zip(schedule.sites, self.blocks, strict=True):
            holders.setdefault(self.layer_name(site), []).append(block)
        for p, ends in zip(schedule.passes, self.passes, strict=True):
            for part, module in ends.named_children():
                if not part.startswith("hook_"):
                    name = PASS_NAMES.get(part, part)
                    holders.setdefault(f"{name}.loops.{p.loop}" if name in self.loop.own_ends else name, []).append(module)
        if self.prelude_norm is not None:
            holders["prelude_norm"] = [self.prelude_norm]
        holders["value_embeds"] = [self.value_embeds]
        if self.cfg.pass_norm_is_final:  # one norm serves every pass, the last included
            holders.setdefault("pass_norm", []).append(self.ln_final)
        else:
            holders["ln_final"] = [self.ln_final]
        for name in self.loop.model_parts():
            holders[name] = [getattr(self, name)]
        if self.after_loop is not None:
            holders.setdefault("ln_final" if self.cfg.after_loop == "final_norm" else "after_loop", []).append(self.after_loop)
        holders.setdefault("embed" if self.cfg.tied else "unembed", []).append(self.unembed)
        slots: dict[str, list[tuple[nn.Module, str]]] = {}
        for prefix, modules in holders.items():
            for module in modules:
                for path, owner in module.named_modules():
                    for attribute in owner._parameters:
                        if owner._parameters[attribute] is not None:
                            name = self.cfg.shared_name(".".join(filter(None, (prefix, path, attribute))))
                            slots.setdefault(name, []).append((owner, attribute))
        if self.learned_state is not None:
            slots["learned_state"] = [(self, "learned_state")]
        return slots

    def unrolled(self, n_loops: int, cut: bool = False) -> LoopedModel:
        """The same model with another number of loops, holding the same parameters.

        Args:
            n_loops: how often to loop (H cycles for HRM-Text).
            cut: the first loops of this run, also where those of a shorter run would be others.

        Raises:
            LoopedError: `n_loops` is no positive int, or more than there are layers for, where loops do not share them.
        """
        if self.cfg.own_layers and check_count("n_loops", n_loops) > self.cfg.n_loops:
            raise LoopedError(
                f"n_loops={n_loops} was asked, but every loop of this {self.cfg.family} model has weights of its own, and "
                f"there are those of {self.cfg.n_loops}; choose at most as many (of an unroll, unroll the model it came from)."
            )
        with torch.device("meta"):
            model = LoopedModel(self.loop.first(n_loops) if cut else self.cfg.replace(n_loops=n_loops))
        parameters = self.canonical_parameters()
        for name in model.parameter_slots:
            model.set_parameter(name, parameters[name])
        return model

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Bool[Tensor, "batch key"] | Int[Tensor, "batch key"] | Float[Tensor, "batch key"] | None = None,
        position_ids: Int[Tensor, "#batch pos"] | None = None,
        token_type_ids: Int[Tensor, "batch pos"] | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool = False,
        initial_state: InitialState = None,
        loop: int | None = None,
        start: int | None = None,
        stop: int | None = None,
        injection: Float[Tensor, "batch pos d_model"] | None = None,
        carried: dict[str, Tensor] | None = None,
        on_loop: OnLoop | None = None,
        on_layer: OnLayer | None = None,
        early_exit: EarlyExit | None = None,
    ) -> LoopedOutput:
        """Run the model, or a part of it.

        Args:
            input_ids: token ids.
            inputs_embeds: scaled embeddings (what `embed` returns) instead of tokens; with `start`, the residual stream
                entering that layer.
            attention_mask: 1 for real tokens, over cached and new positions.
            position_ids: default: counted from the first real token.
            token_type_ids: 1 for the tokens of a bidirectional prefix (HRM-Text).
            past_key_values: a cache from an earlier call.
            use_cache: return a cache.
            initial_state: see `tl_looped.model.initial_state.initial_state`.
            loop: read out after this loop and skip the later ones; the coda runs.
            start: first virtual layer to run.
            stop: run up to this virtual layer, exclusive, and return its input.
            injection: with `start`, what is injected in the pass of that layer, for families that inject.
            carried: with `start`, what lies beside the stream there (`Stream.carried`, which `on_layer` is given).
            on_loop: called with (loop, logits) after every loop, with what the model would answer if it stopped there.
            on_layer: called with (layer, stream, inputs) before a virtual layer runs, and with `n_layers` after the last one;
                first with -1, when the stream is the embedding. It may read them, or change them.
            early_exit: a generation under an exit policy, which keeps its own cache; the logits are those of the last position.

        Raises:
            LoopedError: inputs that do not fit the model.
        """
        schedule = self.cfg.schedule
        if self.loop.fixed is not None and (early_exit or on_loop or loop not in (None, schedule.n_loops - 1)):
            raise LoopedError(
                f"an answer before the last loop was asked of this {self.cfg.family} model, but {self.loop.fixed}. Run it to "
                "its end, and read the states of its loops (hook_out)."
            )
        if self.loop.sees_ahead is not None and (use_cache or past_key_values is not None):
            raise LoopedError(
                f"a key-value cache was asked of this {self.cfg.family} model, but {self.loop.sees_ahead}: a text cannot be "
                "run piece by piece. Run the whole text; generate(use_past_kv_cache=False) does."
            )
        if early_exit is not None:
            if not (loop is start is stop is injection is on_loop is on_layer is None):
                raise LoopedError(
                    "an exit policy decides which loop is read; loop=, start=, stop=, on_loop=, on_layer= do not go with it."
                )
            x = self._embed(input_ids, inputs_embeds, start, position_ids, attention_mask, early_exit.n_positions)
            x = early_exit.step(self, x, input_ids, attention_mask, position_ids, token_type_ids, initial_state)
            return LoopedOutput(x, early_exit.key_values)
        if (start is not None and loop is not None) or (on_loop is not None and (start, stop) != (None, None)):
            raise LoopedError(
                "loop= and on_loop= read out runs from their beginning; start= does not go with them, nor stop= with on_loop=."
            )
        if on_loop is not None and self.cfg.n_coda and (use_cache or past_key_values is not None):
            raise LoopedError("on_loop= runs the coda after every loop, for which a cache has no slots; run without a cache.")
        part = Part.of(schedule, start, stop)
        entry = schedule.pass_of_layer(part.first) if part.is_restart else None
        if injection is not None and (entry is None or self.cfg.injection == "none"):
            raise LoopedError("injection= goes with a start= inside a pass, in a model whose passes have a hook_injection.")
        if initial_state is not None and part.is_restart and part.first >= schedule.n_prelude:
            raise LoopedError(f"initial_state= was given, but a run from start={part.first} on does not read it; leave it out.")
        last = schedule.pass_of_loop(-1 if loop is None else loop)
        if part.stop is not None and last.layers.stop <= part.stop < schedule.first_coda_layer:
            raise LoopedError(
                f"stop={part.stop} was asked, but a run that is read out after loop {last.loop} skips the layers "
                f"{last.layers.stop} to {schedule.first_coda_layer - 1}; choose a layer before or after them."
            )
        past = 0 if past_key_values is None else self._cached(past_key_values, part, last)
        x = self._embed(input_ids, inputs_embeds, start, position_ids, attention_mask, past)
        if use_cache and past_key_values is None:
            from transformers import DynamicCache

            past_key_values = DynamicCache()
        positions = positions_of(self.cfg, x, position_ids, attention_mask, past)
        inputs = Inputs(
            rope=self.rotary(positions),
            masks=masks_of(self.cfg, x, attention_mask, token_type_ids, past),
            cache=past_key_values,
            value_embeds=self._value_embeds(input_ids),
            past=past,
            real=None if attention_mask is None else attention_mask != 0,
            positions=positions,
        )

        stream = Stream(x, Carried(carried))
        if part.first and carried is None and (why := self.loop.mixes) is not None:
            raise LoopedError(
                f"start={part.first} was asked, but in this {self.cfg.family} model {why}, which the residual stream does not "
                "hold; start at 0, or pass carried=, as on_layer= is given it."
            )
        if entry is not None and carried is None:
            x, injection = x.to(self.home), None if injection is None else injection.to(self.home)
            stream.carried.update(self.loop.resume(Parts(self, entry, run_part), entry, last, x, injection))
        layers = [i for i in (*range(last.layers.stop), *self._coda) if i >= part.first]
        if on_layer is not None:
            on_layer(-1, stream, inputs)
        for i in self.steps(stream, layers, inputs, part.is_restart, lambda x: self.begin(x, initial_state, positions)):
            if on_layer is not None:
                on_layer(i, stream, inputs)
            if i == part.stop:
                return LoopedOutput(stream.x, inputs.cache)
            if on_loop is not None and (p := self._pass_before(i)) is not None and p.stack == last.stack:
                parts = Parts(self, None, run_part)
                inputs.carried = Carried(stream.carried, self.home)  # a copy, to which the coda may write
                x = self.loop.finish(parts, p, inputs.carried)
                for j in self._coda:
                    x = self.layer(j, x, inputs)
                on_loop(p.loop, self._logits(self.loop.read(parts, x, inputs.carried)))
        x = self._logits(stream.x)
        if on_loop is not None:
            on_loop(last.loop, x)
        return LoopedOutput(x, inputs.cache)

    def steps(self, stream: Stream, layers: Sequence[int], inputs: Inputs, is_restart: bool, begin: Begin) -> Iterator[int]:
        """Run virtual layers, and what lies between them, on a stream.

        Before a layer runs, its index is yielded and `stream.x` is its input; whoever iterates may read the stream, or change
        it and the inputs. Then `n_layers` is yielded, with the output of the last layer, and in the end `stream.x` is what the
        last norm reads.

        Args:
            stream: what the first of the layers reads; changed in place.
            layers: which ones, in the order of the run.
            inputs: what they read beside the stream.
            is_restart: whether `stream.x` is the input of the first layer already.
            begin: from the prelude's output to what is carried before the first pass.
        """
        inputs.carried = stream.carried
        inputs.enter()
        for i in crossings(self, stream, layers, run_part, begin, is_restart):
            yield i
            if i < self.cfg.schedule.n_layers:
                inputs.carried = stream.carried
                stream.x = self.layer(i, stream.x, inputs)
                inputs.enter()

    def _pass_before(self, layer: int) -> Pass | None:
        """The pass that ends where another begins with this layer."""
        started = self.pass_starting.get(layer)
        return self.cfg.schedule.passes[started.index - 1] if started and started.index else None

    def begin(self, x: Tensor, asked: InitialState, positions: Tensor) -> dict[str, Tensor]:
        """What is carried before the first pass, from the prelude's output.

        Args:
            x: the output of the prelude, [batch, pos, d_model].
            asked: see `tl_looped.model.initial_state.initial_state`.
            positions: the position of every token, [batch, pos].
        """
        parts, x = Parts(self, self.cfg.schedule.passes[0], run_part), x.to(self.home)
        return self.loop.begin(parts, x, lambda default, like: self._initial_state(asked, default, like, positions))

    @property
    def _coda(self) -> range:
        return range(self.cfg.schedule.first_coda_layer, self.cfg.schedule.n_layers)

    def _cached(self, cache: KeyValueCache, part: Part, last: Pass) -> int:
        """How many positions the cache holds, in every layer that will run."""
        schedule = self.cfg.schedule
        stop = schedule.n_layers if part.stop is None else part.stop
        layers = [i for i in range(part.first, stop) if not last.layers.stop <= i < schedule.first_coda_layer]
        lengths = {cache.get_seq_length(slot) for i in layers for slot in (i, *self.blocks[i].slots)} or {0}  # type: ignore[misc]
        if len(lengths) > 1:
            raise LoopedError(
                f"past_key_values holds {sorted(lengths)} positions, depending on the layer: it was filled by a run with "
                "another n_loops, loop=, start= or stop=; make a new cache, or run the same layers."
            )
        return lengths.pop()

    def _initial_state(self, asked: InitialState, default: Tensor | None, like: Tensor, positions: Tensor) -> Tensor:
        state = initial_state(asked, default, like, positions, self.noise).to(like.device)
        if torch.is_grad_enabled() and not state.requires_grad and (like.requires_grad or self._is_trained()):
            return state.detach().requires_grad_()  # backward hooks on the first pass's state need a gradient to see
        return state

    def _is_trained(self) -> bool:
        """Whether some parameter is not frozen."""
        return any(getattr(*holders[0]).requires_grad for holders in self.parameter_slots.values())

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.unembed(self.before_unembedding(x)).to(device_of(self.embed))
        cap = self.cfg.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def before_unembedding(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What the unembedding reads, from the end of the residual stream.

        Args:
            x: the stream, which in some families the norm of the last pass has normed already.
        """
        x = x if self.cfg.pass_norm_is_final else self.ln_final(x.to(device_of(self.ln_final)))
        return x.to(self.unembed.weight.device, self.unembed.weight.dtype)

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        start: int | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past: int,
    ) -> Tensor:
        cfg = self.cfg
        if input_ids is not None:
            check_tokens(input_ids, cfg.d_vocab)
        both_read = bool(cfg.value_embed_layers) or start is not None
        if inputs_embeds is None and input_ids is not None and start is None:
            if not cfg.learned_positions:
                return self.embed(input_ids)
            positions = positions_of(cfg, input_ids, position_ids, attention_mask, past)
            return self.embed(input_ids, position_ids=positions)
        if inputs_embeds is None or (input_ids is not None and not both_read):
            wanted = "inputs_embeds, the residual stream" if start is not None else "either input_ids or inputs_embeds"
            raise LoopedError(f"pass {wanted} [batch, pos, d_model={cfg.d_model}].")
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != cfg.d_model or not inputs_embeds.shape[1]:
            raise LoopedError(
                f"inputs_embeds of shape {tuple(inputs_embeds.shape)} was given; "
                f"this model needs [batch, pos, d_model={cfg.d_model}]."
            )
        return inputs_embeds

    def _value_embeds(self, input_ids: Tensor | None) -> dict[int, Tensor]:
        if self.cfg.value_embed_layers and input_ids is None:
            raise LoopedError(f"{self.cfg.family} layers also read the token ids (value embeddings); pass input_ids too.")
        tables = {i: self.value_embeds[str(i)] for i in self.cfg.value_embed_layers}
        return {i: table(cast(Tensor, input_ids).to(device_of(table))) for i, table in tables.items()}


def _share(module: AnyModule) -> AnyModule:
    """A copy of the module tree that holds the same parameters and buffers (a deep copy would take seconds for 100 layers)."""
    twin = module.__class__.__new__(module.__class__)
    for key, value in module.__dict__.items():
        twin.__dict__[key] = value.copy() if isinstance(value, dict) else value
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _share(child)
    return twin


@torch.no_grad()
def initialise(model: LoopedModel, seed: int, std: float = 0.02) -> LoopedModel:
    """Draw all parameters in fp32, in the order of their names: matrices from N(0, std^2), norms 1, the rest 0."""
    check_count("seed", seed, 0)
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, parameter in sorted(model.canonical_parameters().items()):
        value = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
        if parameter.ndim >= 2:
            value.normal_(0, std, generator=generator)
        elif name.endswith(".weight"):
            value.fill_(1)
        model.set_parameter(name, nn.Parameter(value))
    return model
