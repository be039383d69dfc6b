"""`LoopedBridge`: a looped model as a TransformerBridge whose blocks are virtual layers, and the ways to make one."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from .. import checkpoints, families
from .._old_calls import accepts_old
from ..errors import LoopedError, UnknownFamilyError
from ..looped import require
from ..model import LoopedModel
from ..model.config import LoopedConfig
from ..model.looped_model import initialise
from ..record import InitialState
from ..schedule import LoopSelector, check_count
from . import new_caches  # noqa: F401  # pyright: ignore[reportUnusedImport]
from .adapter import LoopedArchitectureAdapter, bridge_config
from .asked import AskedBridge
from .components import InMemory, check_attn_in
from .processing import stream_break
from .published import traced_checkpoint
from .tracing import Tracing
from .weights import without_collections

if TYPE_CHECKING:
    from ..lenses.answers import Answers

# TransformerLens's own tools over paths, which ask every layer whether it adds to one running sum, and refuse.
TOOLS_THAT_ASK = ("transformer_lens.patching", "transformer_lens.tools")


class LoopedBridge(Tracing, InMemory, AskedBridge):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A looped language model in TransformerLens.

    `blocks[i]` is virtual layer `i` of the unrolled computation; all passes over a layer hold the same parameters. Hook names
    come in two spellings, `blocks.{i}.{hook}` and `loops.{t}.blocks.{j}.{hook}`, and both work wherever a name is accepted.
    Use `from_pretrained`, `from_hf`, `from_config` or `loop_layers` to make one.

    Args:
        model: the canonical model; it is wrapped, not copied.
        tokenizer: its tokenizer.
        model_name: what errors and reports call it.

    Example:
        >>> import torch
        >>> from tl_looped import LoopedBridge, LoopedConfig
        >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
        >>> logits, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]), names_filter="loops.*.hook_out")
        >>> list(cache.keys())
        ['loops.0.hook_out', 'loops.1.hook_out', 'loops.2.hook_out']
    """

    _warned_of_paths = False
    made_for: int | None = None  # loops that its checkpoint says, however often it is unrolled; None if it is of no checkpoint

    def __init__(self, model: LoopedModel, tokenizer: Any = None, model_name: str = "looped"):
        cfg = bridge_config(model.cfg, model_name)
        parameter = model.embed.weight
        cfg.dtype, cfg.device = parameter.dtype, str(parameter.device)
        cfg.n_devices = len(set(model.device_map.values()))
        adapter = LoopedArchitectureAdapter(cfg, model)
        self.__dict__["looped_cfg"] = model.cfg
        self.__dict__["_hook_dict"] = (None, {})
        model.training = False  # TransformerBridge gives its mode to all modules
        without_collections(partial(super().__init__, model, adapter, tokenizer))

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        n_loops: int | None = None,
        l_cycles: int | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        device_map: checkpoints.DeviceMap | None = None,
        max_memory: checkpoints.MaxMemory | None = None,
        tokenizer: Any = None,
    ) -> LoopedBridge:
        """Load a looped checkpoint.

        One that no family knows, but transformers does, is traced, with a warning: see `trace`.

        Args:
            name_or_dir: a Hub id, a directory of the same layout, or a bundled toy such as "toy:hop". Only `config.json`,
                tensors and tokenizer files are read; no remote code is run.
            n_loops: how often to loop (H cycles for HRM-Text); None for what the checkpoint says.
            l_cycles: L cycles per H cycle (HRM-Text).
            revision: branch, tag or commit on the Hub.
            device: None for CUDA where there is one, else the CPU.
            dtype: None for the one the checkpoint is stored in.
            device_map: instead of `device`, for a model on several: "auto" or "balanced" spreads it over the accelerators, and
                over the CPU what they cannot hold; or the device of every part, as in {"": 0, "core": 1}, whose names
                `model.device_map` has. Tokens go to the device of the embedding, `cfg.device`, and logits come back to it;
                activations lie where their layer does.
            max_memory: what each device may hold of a plan, as in {0: "20GiB", 1: "20GiB", "cpu": "60GiB"}; None for what is
                free, nearly all of which weights may then take.
            tokenizer: None for the checkpoint's own, if it has one.

        Raises:
            CheckpointError: not found, not a looped checkpoint, or tensors and config that do not fit.
            LoopedError: devices that cannot be used, or cannot hold the model.

        Example:
            >>> from tl_looped import LoopedBridge
            >>> model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
            >>> model.to_string(model.readout("A b B c C a ? A", loop=1)[0, -1].argmax())  # A leads to b, b to c
            'c'
        """
        checkpoint = checkpoints.open_checkpoint(name_or_dir, revision)
        if device is None and device_map is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        where: dict[str, Any] = {"device": device, "device_map": device_map, "max_memory": max_memory}
        asked: dict[str, Any] = {"n_loops": n_loops, "l_cycles": l_cycles}
        try:
            model = checkpoints.load_model(checkpoint, dtype=dtype, **asked, **where)
        except UnknownFamilyError as unknown:
            given = {name: value for name, value in asked.items() if value is not None}
            if tokenizer is None and checkpoint.path is not None:
                tokenizer = checkpoints.load_tokenizer(checkpoint.path)
            return cast(LoopedBridge, traced_checkpoint(checkpoint, unknown, where, dtype, given, tokenizer))
        if tokenizer is None and checkpoint.path is not None:
            tokenizer = checkpoints.load_tokenizer(checkpoint.path)
            checkpoint.check_unchanged()
        bridge = cls(model, tokenizer, str(name_or_dir))
        bridge.made_for = model.cfg.n_loops if n_loops is None else checkpoints.make_plan(checkpoint).cfg.n_loops
        return bridge

    @classmethod
    def from_hf(
        cls,
        hf_model: nn.Module,
        *,
        tokenizer: Any = None,
        n_loops: int | None = None,
        l_cycles: int | None = None,
        device_map: checkpoints.DeviceMap | None = None,
        max_memory: checkpoints.MaxMemory | None = None,
    ) -> LoopedBridge:
        """Make a bridge from an instantiated looped model: its config and its weights, whose memory is shared.

        Args:
            hf_model: a model of a known family with a `config`, such as transformers' `HrmTextForCausalLM`.
            tokenizer: its tokenizer.
            n_loops: how often to loop; None for what the config says.
            l_cycles: L cycles per H cycle (HRM-Text).
            device_map: as in `from_pretrained`; None to leave every tensor where it is, which may be on several devices too.
            max_memory: as in `from_pretrained`.

        Raises:
            CheckpointError: the model is of no known looped family.
            LoopedError: it has no config, or a TransformerBridge has wrapped it; it is offloaded; a layer of it lies on several
                devices.

        Example:
            >>> from transformers import HrmTextConfig, HrmTextForCausalLM
            >>> config = HrmTextConfig(
            ...     vocab_size=10, hidden_size=8, intermediate_size=8, num_layers_per_stack=1, num_attention_heads=2,
            ...     num_key_value_heads=2, head_dim=4, H_cycles=2, L_cycles=3,
            ... )
            >>> LoopedBridge.from_hf(HrmTextForCausalLM(config)).schedule.describe()
            '2 loops over stacks L (3 x per loop) and H of 1 layer, 0 prelude and 0 coda layers: 8 virtual layers'
        """
        checkpoint = _in_memory(hf_model)
        where: dict[str, Any] = {"device_map": device_map, "max_memory": max_memory}
        model = checkpoints.load_model(checkpoint, n_loops=n_loops, l_cycles=l_cycles, **where)
        bridge = cls(model, tokenizer, type(hf_model).__name__)
        bridge.made_for = model.cfg.n_loops if n_loops is None else checkpoints.make_plan(checkpoint).cfg.n_loops
        return bridge

    @classmethod
    def from_config(cls, cfg: LoopedConfig, *, seed: int = 0, tokenizer: Any = None) -> LoopedBridge:
        """A randomly initialised model in fp32 on the CPU: matrices from N(0, 0.02^2), norms 1.

        Args:
            cfg: the structure.
            seed: seed of the initialisation.
            tokenizer: a tokenizer for it.
        """
        with torch.device("meta"):
            model = LoopedModel(cfg)
        return cls(initialise(model, seed), tokenizer, cfg.family)

    @classmethod
    @accepts_old("n_loops")
    def loop_layers(
        cls,
        hf_model: nn.Module,
        start: int,
        stop: int,
        *,
        n_loops: int | None = None,
        strategy: str = "naive",
        beta: float | None = None,
        K: int | None = None,
        tokenizer: Any = None,
    ) -> LoopedBridge:
        """Loop layers `start .. stop - 1` of an ordinary Llama-shaped decoder (Llama, Mistral, Qwen2, Qwen3, SmolLM).

        Args:
            hf_model: an instantiated transformers model; its weights are shared, not copied.
            start: first looped layer.
            stop: end of the looped layers, exclusive.
            n_loops: how often they run; 1 is the ordinary model. Default: `K` for "anchored".
            strategy: "naive" feeds the output of the range back into it. "anchored" (arXiv 2605.23872, `block_anchored`) moves
                the state by 1/K of the way in every pass and returns `beta * first pass + (1 - beta) * last state`. The paper
                loops the prompt only; here every position is looped, so that a cached run equals a full one.
            beta: weight of the first pass ("anchored"); default: the paper's 0.5.
            K: number of steps ("anchored"); default `n_loops`, or the paper's 6.
            tokenizer: its tokenizer.

        Raises:
            LoopedError: a range or strategy that does not fit the model; a model without a config, or already in a bridge.
            CheckpointError: the model is not a decoder of a known shape.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
            >>> llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes))
            >>> LoopedBridge.loop_layers(llama, start=1, stop=3, n_loops=2).schedule.describe()
            '2 loops over one stack of 2 layers, 1 prelude and 1 coda layer: 6 virtual layers'
        """
        if strategy not in ("naive", "anchored"):
            raise LoopedError(f"strategy={strategy!r} was asked; choose 'naive' or 'anchored'.")
        if strategy == "naive" and (K is not None or beta is not None or n_loops is None):
            raise LoopedError("strategy='naive' needs n_loops= and has no K and no beta; they belong to strategy='anchored'.")
        steps = check_count("K", K) if K is not None else check_count("n_loops", n_loops) if n_loops is not None else 6
        checkpoint = _in_memory(hf_model)
        cfg = families.read(
            families.llama,
            checkpoint.config,
            checkpoint.shapes,
            start=start,
            stop=stop,
            n_loops=steps if n_loops is None else n_loops,
            strategy=strategy,
            beta=0.5 if beta is None else beta,
            anchor_steps=steps if strategy == "anchored" else 1,
        )
        return cls(checkpoints.load_model(checkpoint, cfg=cfg), tokenizer, f"looped {type(hf_model).__name__}")

    @staticmethod
    def boot_transformers(*args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as TransformerLens's other ways to make a bridge: what it loads has one name for all passes of a layer.

        Raises:
            LoopedError: always.
        """
        raise LoopedError(
            "a bridge of TransformerLens's own was asked, in which all passes of a layer have one name; use "
            "LoopedBridge.from_pretrained, from_hf, from_config or loop_layers."
        )

    boot_native: Callable[..., NoReturn] = boot_transformers
    boot_tl_legacy: Callable[..., NoReturn] = boot_transformers

    def unroll(self, n_loops: int, *, cut: bool = False) -> LoopedBridge:
        """The same model with another number of loops: the same parameters, no copy, its own hooks.

        Args:
            n_loops: how often to loop (H cycles for HRM-Text).
            cut: the first loops of this run, also where those of a shorter run would be others (LoopFormer's larger steps).

        Raises:
            LoopedError: `n_loops` is no positive int; the weights were processed, and belong to this unroll only.

        Example:
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
            >>> deeper = model.unroll(16)
            >>> deeper.n_loops, deeper.blocks[5].attn.q.weight is model.blocks[1].attn.q.weight
            (16, True)
        """
        if self._weights_processed:
            raise LoopedError("the weights of this model were processed (compatibility mode); unroll the model before that.")
        model = without_collections(partial(self.plain.unrolled, n_loops, cut))
        unrolled = LoopedBridge(model, None, self.cfg.model_name)
        unrolled._warned_of_paths = self._warned_of_paths
        unrolled.made_for = self.made_for
        unrolled._tokenizer = self.tokenizer
        unrolled.exit_policy = self.exit_policy
        for setting in ("default_prepend_bos", "tokenizer_prepends_bos", "tokenizer_appends_eos"):
            setattr(unrolled.cfg, setting, getattr(self.cfg, setting))
        for switch in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in"):
            if getattr(self.cfg, f"use_{switch}"):
                getattr(unrolled, f"set_use_{switch}")(True)
        return unrolled

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config, tensors (each once) and tokenizer; `from_pretrained` reads them back bit for bit.

        A checkpoint that lies there is replaced as a whole, its tokenizer included: whatever interrupts the save, the
        directory holds the old one, the new one, or what `from_pretrained` refuses.

        Args:
            directory: where to write; made if it does not exist.

        Raises:
            LoopedError: the weights were processed and are no longer the checkpoint's; the directory cannot be written.
        """
        if self._weights_processed:
            raise LoopedError("the weights of this model were processed (compatibility mode); save the model before that.")
        checkpoints.save_model(self.plain, directory, self.tokenizer)

    def answers(
        self,
        prompts: str | Sequence[str] | Int[Tensor, "*batch pos"] | Sequence[Int[Tensor, " _"]] | Sequence[Sequence[int]],
        *,
        loops: LoopSelector = "all",
        top_k: int = 5,
        targets: str | int | Sequence[str | int] | Int[Tensor, "*prompt"] | None = None,
        n_loops: int | None = None,
        initial_state: InitialState = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Answers:
        """What the model would say next after every prompt if it stopped after each loop, as text.

        Hooks on the model act; those on the coda act once for every loop that is read. Many prompts are run in batches.

        Args:
            prompts: a text, texts of any lengths, or token ids: a tensor [pos] or [batch, pos], or lists or tensors [pos] of
                any lengths. Each prompt is answered after its own last token.
            loops: after which loops (H cycles for HRM-Text): an int, a slice, several ints, "all" or "last".
            top_k: how many of the most probable tokens.
            targets: whose probability and rank to read too: text that is one token or a token id, for all prompts or one for
                each.
            n_loops: ask at another number of loops; None for the model's own.
            initial_state: as in `forward`.
            attention_mask: 1 for real tokens, for prompts that are one tensor.
            token_type_ids: 1 for the tokens of a bidirectional prefix (HRM-Text), for prompts that are one tensor.

        Raises:
            OutOfRangeError: a loop that the run does not have.
            LoopedError: no prompts, or an empty or too long one, named; a target that is not one token; weights that were
                processed, in families where earlier readouts then differ.

        Example:
            >>> from tl_looped import LoopedBridge
            >>> model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
            >>> found = model.answers(["A b B c C a ? A", "B c C b ? B"], targets="c", top_k=1)
            >>> found.to_dataframe()[["text", "loop", "token_1", "target_rank"]].iloc[:3].values.tolist()
            [['A b B c C a ? A', 0, 'b', 1], ['A b B c C a ? A', 1, 'c', 0], ['A b B c C a ? A', 2, 'a', 6]]
        """
        from ..lenses.answers import ask
        from ..looped import at_depth

        inputs = {"initial_state": initial_state, "token_type_ids": token_type_ids}
        model = at_depth(self, n_loops)
        return ask(model, prompts, loops=loops, top_k=top_k, targets=targets, attention_mask=attention_mask, **inputs)

    def _validate_attention_fork_supported(self, flag_name: str) -> None:
        """The forks of a branch's input by head; what tools make of them is another matter."""
        if flag_name != "use_attn_result":
            require(self, "one stream", flag_name)
        if flag_name == "use_attn_in":
            check_attn_in(self.cfg)
        if flag_name == "use_split_qkv_input" and not self._warned_of_paths:
            self._warn_of_paths()

    def _warn_of_paths(self) -> None:
        """Say once that tools which split the inputs of attention may take the stream for what it is not."""
        breaks = [(i, why) for i in range(self.schedule.n_layers) if (why := stream_break(self.looped_cfg, i)) is not None]
        callers = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_stack(None)]
        if not breaks or any(name.startswith(TOOLS_THAT_ASK) for name in callers):
            return
        self._warned_of_paths = True
        layer, why = breaks[0]
        warnings.warn(
            "set_use_split_qkv_input(True) was called, and the inputs may be edited. But tools that take the residual stream "
            f"for one running sum (edge attribution, EAP-IG) get wrong numbers in this {self.looped_cfg.family} model: from "
            f"layer {layer} ({self.schedule.layer_name(layer)}) on, {why}. Use tl_looped.attribution.edge_sweep for edges.",
            stacklevel=4,
        )


def _in_memory(hf_model: nn.Module) -> checkpoints.MemoryCheckpoint:
    """The config and tensors of an instantiated model."""
    if any(isinstance(module, GeneralizedComponent) for module in hf_model.modules()):
        raise LoopedError(
            f"a {type(hf_model).__name__} was given that a TransformerBridge has wrapped, which leaves its tensors under other "
            "names; pass a model that no bridge has wrapped."
        )
    config: Any = getattr(hf_model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(getattr(config, "__dict__", {}))
    if not values:
        raise LoopedError(
            f"a {type(hf_model).__name__} without a config was given; pass a model that has one, as in transformers."
        )
    tensors = hf_model.state_dict()
    if away := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise LoopedError(
            f"a {type(hf_model).__name__} was given that has no values here for {away[0]}: it is offloaded, or was made on the "
            "meta device. Load it without offloading, or its checkpoint with LoopedBridge.from_pretrained(device_map=)."
        )
    return checkpoints.MemoryCheckpoint({"_class_name": type(config).__name__, **values}, tensors)
