"""`LoopedBridge`: a looped model as a TransformerBridge whose blocks are virtual layers."""

from __future__ import annotations

import difflib
import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent, alias_generation
from transformer_lens.utilities.slice import Slice

from .. import checkpoints, families
from .._old_calls import accepts_old
from ..config import LoopedConfig
from ..errors import LoopedError, UnknownNameError
from ..kinds import plain
from ..model import LoopedModel
from ..model.initial_state import InitialState
from ..model.looped_model import initialise, set_mode
from ..model.undo import Snapshot, undone, whole
from ..schedule import Indices, LoopSelector, Schedule, check_count, is_pattern, virtual_layer
from . import new_caches  # noqa: F401  # pyright: ignore[reportUnusedImport]
from .adapter import LoopedArchitectureAdapter, bridge_config
from .cache import LoopedCache
from .components import InMemory, check_attn_in
from .generation import GeneratingBridge
from .hooking import Hooked, without_leftovers
from .processing import check_options, check_running_sum, check_shared, has_output_bias, process_weights, stream_break
from .run import Run
from .tokens import check_real, configured, counts_from_end, encode, real_positions, refuse_unmarked_padding

if TYPE_CHECKING:
    from ..answers import Answers

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]
T = TypeVar("T")
# TransformerLens's own tools over paths, which ask every layer whether it adds to one running sum, and refuse.
TOOLS_THAT_ASK = ("transformer_lens.patching", "transformer_lens.tools")


class LoopedBridge(InMemory, GeneratingBridge):
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

    def __init__(self, model: LoopedModel, tokenizer: Any = None, model_name: str = "looped"):
        cfg = bridge_config(model.cfg, model_name)
        parameter = model.embed.weight
        cfg.dtype, cfg.device = parameter.dtype, str(parameter.device)
        adapter = LoopedArchitectureAdapter(cfg)
        adapter.prepare_model(model)
        self.__dict__["looped_cfg"] = model.cfg
        self.__dict__["_hook_dict"] = (None, {})
        _without_collections(partial(super().__init__, model, adapter, tokenizer))
        self.eval()

    @property
    def schedule(self) -> Schedule:
        """The order in which the layers run."""
        return self.looped_cfg.schedule

    @property
    def cfg(self) -> Any:
        """TransformerLens's config; dtype and device are those of the parameters, which another unroll may have moved."""
        cfg, weight = self.__dict__["cfg"], self.plain.embed.weight
        if cfg.dtype != weight.dtype or cfg.device != str(weight.device):
            cfg.dtype, cfg.device = weight.dtype, str(weight.device)
        return cfg

    @cfg.setter
    def cfg(self, value: Any) -> None:
        self.__dict__["cfg"] = value

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, a copy with TransformerLens's settings whenever it is set; None if there is none."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = None if value is None else configured(value, self.cfg)

    @property
    def plain(self) -> LoopedModel:
        """The model that is wrapped, in plain PyTorch; hooks on the bridge act in it too."""
        return cast(LoopedModel, self.original_model)

    @property
    def n_loops(self) -> int:
        """Number of loops (of H cycles for HRM-Text)."""
        return self.looped_cfg.n_loops

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
        tokenizer: Any = None,
    ) -> LoopedBridge:
        """Load a looped checkpoint.

        Args:
            name_or_dir: a Hub id, a directory of the same layout, or a bundled toy such as "toy:hop". Only `config.json`,
                tensors and tokenizer files are read; no remote code is run.
            n_loops: how often to loop (H cycles for HRM-Text); None for what the checkpoint says.
            l_cycles: L cycles per H cycle (HRM-Text).
            revision: branch, tag or commit on the Hub.
            device: None for CUDA where there is one, else the CPU.
            dtype: None for the one the checkpoint is stored in.
            tokenizer: None for the checkpoint's own, if it has one.

        Raises:
            CheckpointError: not found, not a looped checkpoint, or tensors and config that do not fit.

        Example:
            >>> from tl_looped import LoopedBridge
            >>> model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
            >>> model.to_string(model.readout("A b B c C a ? A", loop=1)[0, -1].argmax())  # A leads to b, b to c
            'c'
        """
        checkpoint = checkpoints.open_checkpoint(name_or_dir, revision)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = checkpoints.load_model(checkpoint, device=device, dtype=dtype, n_loops=n_loops, l_cycles=l_cycles)
        if tokenizer is None and checkpoint.path is not None:
            tokenizer = checkpoints.load_tokenizer(checkpoint.path)
            checkpoint.check_unchanged()
        return cls(model, tokenizer, str(name_or_dir))

    @classmethod
    def from_hf(
        cls, hf_model: nn.Module, *, tokenizer: Any = None, n_loops: int | None = None, l_cycles: int | None = None
    ) -> LoopedBridge:
        """Make a bridge from an instantiated looped model: its config and its weights, whose memory is shared.

        Args:
            hf_model: a model of a known family with a `config`, such as transformers' `HrmTextForCausalLM`.
            tokenizer: its tokenizer.
            n_loops: how often to loop; None for what the config says.
            l_cycles: L cycles per H cycle (HRM-Text).

        Raises:
            CheckpointError: the model is of no known looped family.
            LoopedError: it has no config, or a TransformerBridge has wrapped it.

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
        return cls(checkpoints.load_model(checkpoint, n_loops=n_loops, l_cycles=l_cycles), tokenizer, type(hf_model).__name__)

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
    def loop_layers(
        cls,
        hf_model: nn.Module,
        start: int,
        stop: int,
        n_loops: int | None = None,
        *,
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

    def unroll(self, n_loops: int) -> LoopedBridge:
        """The same model with another number of loops: the same parameters, no copy, its own hooks.

        Args:
            n_loops: how often to loop (H cycles for HRM-Text).

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
        model = _without_collections(partial(self.plain.unrolled, n_loops))
        unrolled = LoopedBridge(model, None, self.cfg.model_name)
        unrolled._warned_of_paths = self._warned_of_paths
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

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"] | Float[Tensor, "batch pos d_model"],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        loop: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; `TransformerBridge.forward` with loops.

        Texts of different lengths are padded; the pads are masked and do not count in the loss. Tokens are all real unless
        `attention_mask` says otherwise, whatever their ids.

        Args:
            input: text, tokens, scaled embeddings (`hook_embed`), or with `start_at_layer` the residual stream entering it.
            return_type: "logits", "loss", "both", "logits_and_cache" (the second is the key-value cache, to be given to the
                next call as `past_key_values`) or None.
            loss_per_token: the loss of every next token, [batch, pos - 1], with 0 where it is padding, rather than their mean.
            prepend_bos: as in `to_tokens`.
            padding_side: as in `to_tokens`.
            attention_mask: [batch, pos], 1 for real tokens, over cached and new positions.
            *args: as in TransformerBridge.
            start_at_layer: first virtual layer to run; the ones before are skipped. For families that inject, later passes need
                `injection=cache["loops.{t}.hook_injection"]` of that pass, and Parcae needs `input_ids=`.
            stop_at_layer: run up to this virtual layer, exclusive, and return the residual stream entering it,
                [batch, pos, d_model]; `n_layers` for the one leaving the last layer.
            loop: stop looping after this loop (0-based; negative counts from the end) and go on to the coda and the logits, as
                `unroll(loop + 1)` does; the loss too is of these logits. What runs has its own hooks and names, and
                `run_with_cache` caches that: the prelude, the loops up to this one, the coda, the unembedding. In families
                whose last norm is the norm of every pass (Ouro, HRM-Text, Nanbeige), the logits are then read from
                `loops.{loop}.norm`, and `ln_final` does not fire.
            **kwargs: `initial_state` (tensor [batch, pos, d_model], int seed, torch.Generator or "zero"),
                `position_ids`, `token_type_ids` (HRM-Text's prefix), `past_key_values`, and the rest of TransformerBridge's;
                `on_loop`, called as `on_loop(loop, logits)` with the readout after every loop of one run; with
                `start_at_layer` also `injection` [batch, pos, d_model] and `input_ids` [batch, pos].

        Raises:
            LoopedError: inputs that do not fit the model; layers out of range; tokens of which some rows begin with pad tokens
                (with a loss, or end with them) without `attention_mask`, so that what is padding is not known.
        """
        attention_mask = kwargs.pop("one_zero_attention_mask", None) if attention_mask is None else attention_mask
        input, attention_mask = self._read(input, prepend_bos, padding_side, attention_mask)
        kwargs |= self._generation_arguments(input, kwargs)
        if isinstance(loop, str):
            raise LoopedError(f"loop={loop!r} was asked of one run; for every loop use readout(input, loop='all').")
        if loop is not None:
            kwargs["loop"] = self.schedule.loop(loop)
        if start_at_layer is not None:
            kwargs["start"] = self.schedule.layer(start_at_layer)
            if not isinstance(input, Tensor) or not input.is_floating_point():
                raise LoopedError(
                    f"start_at_layer={start_at_layer} needs the residual-stream tensor entering that layer, "
                    f"[batch, pos, d_model], such as cache['blocks.{kwargs['start']}.hook_resid_pre']."
                )
        if stop_at_layer is not None:
            kwargs["stop"] = self._stop(stop_at_layer)
            return_type = "logits"
        if return_type == "logits_and_cache":
            kwargs["use_cache"] = True
        if attention_mask is None and isinstance(input, Tensor) and not self._given and kwargs.get("past_key_values") is None:
            has_loss = return_type in ("loss", "both") and kwargs.get("labels") is None
            sides = ("left", "right") if has_loss else ("left",)
            refuse_unmarked_padding(self.tokenizer, input, "the loss" if has_loss else "a run", sides)
        return super().forward(input, return_type, loss_per_token, None, None, attention_mask, *args, **kwargs)

    def _stop(self, stop_at_layer: int) -> int:
        stop = plain(stop_at_layer)
        return stop if stop == self.schedule.n_layers else self.schedule.layer(stop)

    @accepts_old("initial_state", "attention_mask")
    def readout(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"],
        loop: int | Literal["all"],
        *,
        positions: Indices = None,
        initial_state: InitialState = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Float[Tensor, "*loop batch chosen d_vocab"]:
        """What the model would answer if it stopped after one of its loops; the later passes are not run.

        Equals `model.unroll(loop + 1)(input)` and `model(input, loop=loop)`: the family's own way from the state to the logits.

        Args:
            input: text, texts or tokens. Texts of different lengths are padded on the right, and need `positions`.
            loop: which loop, 0-based; negative counts from the end. "all" for every loop of one run.
            positions: which positions to return, in ascending order; negative ones count from the last real token of each row,
                so that -1 is every prompt's answer. None for all.
            initial_state: as in `forward`.
            attention_mask: as in `forward`.
            token_type_ids: 1 for the tokens of a bidirectional prefix (HRM-Text).

        Returns:
            Logits, [batch, chosen, d_vocab]; for "all", [loop, batch, chosen, d_vocab].

        Raises:
            OutOfRangeError: a loop or a position that the run does not have.
            LoopedError: the weights were processed, in families where earlier readouts then differ; texts of different lengths,
                and positions that are padding in some.

        Example:
            >>> import torch
            >>> from tl_looped import LoopedBridge, LoopedConfig
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=3), seed=0)
            >>> tokens = torch.tensor([[1, 2, 3]])
            >>> torch.equal(model.readout(tokens, loop=-1), model(tokens))
            True
            >>> model.readout(tokens, loop="all", positions=-1).shape
            torch.Size([3, 1, 1, 10])
        """
        if isinstance(loop, str) and loop != "all":
            raise LoopedError(f"loop={loop!r} was asked; pass an int, or 'all' for every loop.")
        loops = list(range(self.n_loops)) if isinstance(loop, str) else [self.schedule.loop(loop)]
        tokens, mask = self._read(input, None, "right" if attention_mask is None else None, attention_mask)
        if mask is None and counts_from_end(positions):
            refuse_unmarked_padding(self.tokenizer, tokens, f"a readout at positions={positions!r}")
        if positions is None and mask is not None and attention_mask is None:
            raise LoopedError(
                f"texts of {', '.join(map(str, mask.sum(1).tolist()))} tokens were given, some of which would end with "
                "padding; pass positions=-1 for each one's last token, read them out one by one, or pass tokens with "
                "attention_mask=."
            )
        given = {"attention_mask": mask, "initial_state": initial_state, "token_type_ids": token_type_ids}
        found = self._readouts(tokens, loops, positions, {name: value for name, value in given.items() if value is not None})
        return found if isinstance(loop, str) else found[0]

    def _readouts(
        self, tokens: Tensor, loops: list[int], positions: Indices, inputs: dict[str, Any]
    ) -> Float[Tensor, "loop batch chosen d_vocab"]:
        """The readouts after several loops of one run, which ends with the last of them."""
        chosen = None
        if positions is not None:
            columns = real_positions(positions, inputs.get("attention_mask"), tokens.shape[-1])
            rows = torch.arange(1 if tokens.ndim == 1 else len(tokens), device="cpu")[:, None]
            chosen = rows, columns.expand(len(rows), -1)
        found: dict[int, Tensor] = {}

        def keep(at: int, logits: Tensor) -> None:
            if at in loops:
                found[at] = logits if chosen is None else logits[tuple(index.to(logits.device) for index in chosen)]

        if len(loops) == 1:  # also of processed weights, where every earlier readout is refused
            keep(loops[0], self.forward(tokens, loop=loops[0], **inputs))
        else:
            self.forward(tokens, return_type=None, loop=max(loops), on_loop=keep, **inputs)
        return torch.stack([found[t] for t in loops])

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
        from .._depth import at_depth
        from ..answers import ask

        inputs = {"initial_state": initial_state, "token_type_ids": token_type_ids}
        model = at_depth(self, n_loops)
        return ask(model, prompts, loops=loops, top_k=top_k, targets=targets, attention_mask=attention_mask, **inputs)

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of a text, as in TransformerBridge; a text longer than the context is cut only if `truncate` is True.

        Args:
            input: a text, or several, which are padded to the longest.
            prepend_bos: put a beginning-of-sequence token first; None for the model's default.
            padding_side: "left" or "right"; None for the tokenizer's own.
            move_to_device: return the tokens where the model is.
            truncate: cut a text to the context.

        Raises:
            LoopedError: there is no tokenizer, or it has no token for a part of the text.
        """
        tokens, _ = encode(self.tokenizer, self.cfg, input, prepend_bos, padding_side, truncate)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def input_to_embed(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """The stream entering the first layer, the tokens, None, and the mask of those that are real, as in TransformerBridge.

        Args:
            input: as in `forward`.
            prepend_bos: as in `to_tokens`.
            padding_side: as in `to_tokens`.
            attention_mask: as in `forward`.
        """
        tokens, mask = self._read(input, prepend_bos, padding_side, attention_mask)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        return self.forward(tokens, attention_mask=mask, stop_at_layer=0), tokens, None, mask

    def _accepts_derived_position_ids(self) -> bool:
        """No: the model derives positions from the mask row by row, so that no row depends on the padding of its neighbours."""
        return False

    def _read(
        self, input: Any, prepend_bos: bool | None, padding_side: str | None, attention_mask: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """Texts as tokens and the mask of those that are real; what is no text as it is, with the mask it came with."""
        if not isinstance(input, (str, list, tuple)):
            if isinstance(input, Tensor) and input.ndim == 1 and attention_mask is not None and attention_mask.ndim == 1:
                attention_mask = attention_mask[None]
            return input, attention_mask
        tokens, mask = encode(self.tokenizer, self.cfg, input, prepend_bos, padding_side)
        mask = mask if attention_mask is None else attention_mask
        return tokens.to(self.cfg.device), None if mask is None else mask.to(self.cfg.device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LoopedBridge:
        def apply() -> None:
            super(LoopedBridge, self)._apply(fn, recurse)
            self.plain._apply(fn, recurse)

        whole(apply, Snapshot(self, self.plain, tensors_only=True).restore)
        return self

    def _put_back(self) -> Callable[[], None]:
        """What makes the modules hold again what they hold now."""
        return _without_collections(partial(Snapshot, self, self.plain)).restore

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> LoopedBridge:
        """Move the model or change its dtype; other unrolls of the same parameters move with it.

        Args:
            *args: as in `torch.nn.Module.to`.
            print_details: say where the model is now.
            **kwargs: as in `torch.nn.Module.to`.
        """
        nn.Module.to(self, *args, **kwargs)
        if print_details:
            print(f"Model on {self.cfg.device} in {self.cfg.dtype}")
        return self

    def train(self, mode: bool = True) -> LoopedBridge:
        """Training or evaluation mode, of the wrapped model too.

        Args:
            mode: False for evaluation.
        """
        set_mode(self, mode)
        self.plain.train(mode)
        return self

    @property
    def core_weights(self) -> dict[str, nn.Parameter]:
        """Every parameter of the looped layers once, uncopied, as in "core.3.attn.q.weight" (HRM-Text: "L.3", "H.3")."""
        stacks = tuple(f"{stack}." for stack in self.schedule.core_stacks)
        return {name: p for name, p in self.plain.canonical_parameters().items() if name.startswith(stacks)}

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerLens's compatibility mode: legacy names, and weights processed by `process_weights`.

        Args:
            disable_warnings: as in TransformerBridge.
            no_processing: leave the weights alone.
            fold_ln: see `process_weights`, as for the options below.
            center_writing_weights: as above.
            center_unembed: as above.
            fold_value_biases: as above.
            refactor_factored_attn_matrices: as above.

        Raises:
            LoopedError: processing that would change what the model computes.
        """
        options = {"fold_value_biases": fold_value_biases, "refactor_factored_attn_matrices": refactor_factored_attn_matrices}
        if not no_processing:  # before anything is switched on
            check_options(self.looped_cfg, **options)
        enable = partial(
            super().enable_compatibility_mode,
            disable_warnings, no_processing, fold_ln, center_writing_weights, center_unembed, **options,
        )  # fmt: skip
        whole(enable, self._put_back())

    def process_weights(
        self,
        verbose: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Process the weights, each parameter once: all passes still share them, and the log-probabilities stay.

        In families whose last norm is the norm of every pass (Ouro, Nanbeige), the state leaving the last pass is then without
        the weight of that norm, and earlier loops cannot be read out.

        Args:
            verbose: ignored.
            fold_ln: fold the norms before attention, MLP and unembedding into what reads them. Norms on branch outputs, on the
                stream and between passes stay.
            center_writing_weights: nothing to do for RMS norms, as in TransformerBridge.
            center_unembed: centre the unembedding over the vocabulary, unless it is tied or a softcap follows.
            fold_value_biases: move the biases of v into the biases of o.
            refactor_factored_attn_matrices: refused.

        Raises:
            LoopedError: processing that would change what the model computes.
        """
        if self._weights_processed:
            logging.warning("The weights were processed already; load the model again to process them with other options.")
            return
        check_options(
            self.looped_cfg,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )

        def process() -> None:
            process_weights(self.plain, fold_ln=fold_ln, center_unembed=center_unembed, fold_value_biases=fold_value_biases)
            self._weights_processed = True

        whole(process, self._put_back())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned, as in TransformerBridge.

        Args:
            state_dict: tensors under TransformerLens's names; those of one layer repeat in every pass.
            strict: raise if names are missing or unknown.
            assign: as in `torch.nn.Module.load_state_dict`.

        Raises:
            LoopedError: the tensors differ where this model has one parameter.
        """
        check_shared(self.plain, self._tl_key_to_actual_keys(), state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _is_valid_bridge_path(self, hf_path: str) -> bool:
        return True  # TransformerLens would leave out what it has no component for: injections, exit gates, value gates

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases written to the residual stream before a virtual layer, as in TransformerBridge.

        Args:
            layer: virtual layer; `n_layers` for the end of the stream.
            mlp_input: include the attention bias of the layer itself.
            include_mlp_biases: include the biases of the MLPs.

        Raises:
            LoopedError: biases that the stream does not simply add up on the way to that layer.
        """
        layer = self._stop(layer)
        if not has_output_bias(self.plain):
            return torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=self.cfg.dtype)
        check_running_sum(self.looped_cfg, range(layer + mlp_input), "accumulated_bias")
        return super().accumulated_bias(layer, mlp_input, include_mlp_biases)

    def all_composition_scores(self, mode: str) -> Any:
        """Composition scores of all pairs of heads, as in TransformerBridge; labels are virtual layers.

        Args:
            mode: "Q", "K" or "V".

        Raises:
            LoopedError: between two layers the stream is more than a running sum, so products of weights mean nothing.
        """
        check_running_sum(self.looped_cfg, range(self.schedule.n_layers), "all_composition_scores")
        return super().all_composition_scores(mode)

    def expand_name(self, name: str, check: bool = True) -> list[str]:
        """The TransformerLens names of all hook points that a name or pattern in either spelling stands for.

        Args:
            name: such as "blocks.3.hook_mlp_out", "loops.2.blocks.5.attn.hook_z", "loops.1:.blocks.*.attn.hook_pattern".
            check: raise if no such hook point exists.

        Raises:
            UnknownNameError: no such hook; the message has the nearest names.
            OutOfRangeError: a loop or layer that this run does not have.
        """
        names = self.schedule.expand(name)
        if self.looped_cfg.pass_norm_is_final:  # the last pass's norm is the model's last norm
            last = f"{self.schedule.pass_prefix(self.schedule.passes[-1])}.norm."
            names = [f"ln_final.{n.removeprefix(last)}" if n.startswith(last) else n for n in names]
        if check:
            known = self.hook_dict.keys()
            names = [n for n in names if n in known]
            if not names:
                raise self.unknown_name(name)
        return names

    def unknown_name(self, name: str) -> UnknownNameError:
        """The error for a hook name that this model does not have, with the nearest names that it has.

        Args:
            name: the name that was asked.
        """
        plain = list(self.hook_dict)
        known = plain if name.startswith("blocks.") else [self.schedule.loop_name(n) for n in plain]
        last = name.rsplit(".", 1)[-1]
        # Somebody who names a layer may have left out "attn."; one who names a pass, the layer.
        same = [n for n in known if n.rsplit(".", 1)[-1].removeprefix("hook_") == last.removeprefix("hook_")]
        same = [n for n in same if n.startswith(name.rpartition(".")[0] + ".")] or same
        near = difflib.get_close_matches(name, same, n=4, cutoff=0.5) or difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        if not near:  # the right layer, but a hook that is nothing like the one asked for
            stem = name.rsplit(".", 1)[0]
            near = [n for n in known if n.startswith(f"{stem}.")][:4]
        hint = f" Nearest: {', '.join(near)}." if near else ""
        if "*" in name.rsplit(".", 1)[-1]:
            hint = " A * stands for an index only; name the hook, or pass a function of names." + hint
        return UnknownNameError(f"hook {name!r} was asked, but this model has no such hook point.{hint} All: model.hook_dict.")

    def _expand_hooks(self, hooks: Iterable[Hook]) -> list[Hook]:
        expanded: list[Hook] = []
        for name, function in hooks:
            if not isinstance(name, str) and not callable(name):
                raise LoopedError(f"hook name {name!r} was given; pass a name, a pattern or a function of names.")
            where = self.expand_name(name) if isinstance(name, str) else [self._matching(name)]
            expanded += [(place, function) for place in where]
        return expanded

    def _matching(self, accepts: Callable[[str], bool]) -> Callable[[str], bool]:
        """A function of TransformerLens names from one that may be written for either spelling.

        Where it accepts no hook of a layer by its TransformerLens name, loop-indexed
        names are meant; passes have those alone.
        """
        names = list(self.hook_dict)
        plain = [n for n in names if accepts(n)]
        if any(virtual_layer(n) is not None for n in plain):
            return frozenset(plain).__contains__
        return frozenset(n for n in names if n in plain or accepts(self.schedule.loop_name(n))).__contains__

    def _expand_filter(self, names_filter: NamesFilter) -> list[str] | Callable[[str], bool] | None:
        if names_filter is None:
            return None
        if callable(names_filter):
            return self._matching(names_filter)
        names = (
            list(names_filter) if isinstance(names_filter, Iterable) and not isinstance(names_filter, str) else [names_filter]
        )
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise LoopedError(f"names_filter holds {wrong[0]!r}; pass a name, names or patterns, or one function of names.")
        return list(dict.fromkeys(n for name in names for n in self.expand_name(name)))

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """Add a hook as in TransformerBridge; a name may be loop-indexed and may be a pattern.

        Args:
            name: a name or pattern in either spelling, or a function of names (see `hooks`).
            *args: the function to call, and more as in TransformerBridge.
            **kwargs: as in TransformerBridge.

        Raises:
            LoopedError: no such hook; a loop or layer that this run does not have.
        """
        add = super().add_hook

        def add_everywhere() -> None:
            for n in self.expand_name(name) if isinstance(name, str) else [self._matching(name)]:
                add(n, *args, **kwargs)

        without_leftovers(self, add_everywhere)

    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, fwd_hooks: Iterable[Hook] = (), bwd_hooks: Iterable[Hook] = (), **kwargs: Any
    ) -> Any:
        """Context manager with hooks, as in TransformerBridge; names may be loop-indexed and may be patterns.

        Args:
            fwd_hooks: pairs of where and what to call: a name or pattern in either spelling, or a function of names; and a
                function of the activation and the hook point, `fn(tensor, hook)`. A function of names is asked about
                TransformerLens's, and about loop-indexed ones if it accepts no layer by its TransformerLens name.
            bwd_hooks: such pairs for the gradients of activations.
            **kwargs: as in TransformerBridge.

        Raises:
            LoopedError: no such hook; a loop or layer that this run does not have.
        """
        return Hooked(self, super().hooks(self._expand_hooks(fwd_hooks), self._expand_hooks(bwd_hooks), **kwargs))

    def run_with_hooks(
        self,
        input: str | list[str] | Tensor,
        fwd_hooks: Iterable[Hook] = (),
        bwd_hooks: Iterable[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run with hooks, as in TransformerBridge; names may be loop-indexed and may be patterns.

        Args:
            input: as in `forward`.
            fwd_hooks: as in `hooks`.
            bwd_hooks: as in `hooks`.
            reset_hooks_end: take these hooks off at the end.
            clear_contexts: clear the contexts of their hook points then, too.
            return_type: as in `forward`.
            stop_at_layer: as in `forward`.
            start_at_layer: as in `forward`.
            remove_batch_dim: give hooks activations without a batch dimension of 1.
            **kwargs: what `forward` takes.

        Raises:
            LoopedError: no such hook; a loop or layer that this run does not have; inputs that do not fit the model.
        """
        run = partial(
            super().run_with_hooks, input, self._expand_hooks(fwd_hooks), self._expand_hooks(bwd_hooks), reset_hooks_end,
            clear_contexts, return_type, stop_at_layer, start_at_layer, remove_batch_dim, **kwargs,
        )  # fmt: skip
        return without_leftovers(self, run)

    @overload
    def run_with_cache(
        self,
        input: Any,
        return_cache_object: Literal[True] = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, LoopedCache]: ...

    @overload
    def run_with_cache(
        self,
        input: Any,
        return_cache_object: Literal[False],
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]: ...

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, LoopedCache | dict[str, Tensor]]:
        """Run and cache, as in TransformerBridge; returns (output, `LoopedCache`).

        Args:
            input: as in `forward`.
            return_cache_object: False for a plain dict under TransformerLens names.
            remove_batch_dim: drop a batch dimension of 1 from the cache.
            names_filter: a name, names or patterns in either spelling, or a function of names (see `hooks`).
            stop_at_layer: as in `forward`.
            *args: as in TransformerBridge.
            **kwargs: as in TransformerBridge, and what `forward` takes.

        Raises:
            UnknownNameError: a name that no hook point has; the message has the nearest ones.
            OutOfRangeError: a loop or layer that this run does not have.
            LoopedError: `incl_bwd` of a run that stops.
        """
        if stop_at_layer is not None:  # the model stops by itself; TransformerLens would unwind with an exception
            if kwargs.get("incl_bwd", args[0] if args else False):
                raise LoopedError(
                    f"stop_at_layer={stop_at_layer} and incl_bwd=True were asked, but a run that stops has no loss to go back "
                    "from; leave one of them out."
                )
            kwargs |= {"stop": self._stop(stop_at_layer), "return_type": "logits"}
        mask = kwargs.pop("attention_mask", kwargs.pop("one_zero_attention_mask", None))
        input, mask = self._read(input, kwargs.pop("prepend_bos", None), kwargs.pop("padding_side", None), mask)
        if mask is not None:
            kwargs["attention_mask"] = mask
            mask = mask[:, -input.shape[1] :].clone()  # of the positions that are run
            asked = kwargs.get("pos_slice", args[1] if len(args) > 1 else None)
            positions = asked if isinstance(asked, Slice) else Slice(asked)
            check_real(positions, mask)
            mask = positions.apply(mask, dim=1) if positions.mode in ("identity", "slice") else None
        chosen = self._expand_filter(names_filter)
        record = Run.of(self, input, kwargs)
        run: Any = super().run_with_cache
        arguments = (input, return_cache_object, remove_batch_dim, chosen, None, *args)
        output, cache = without_leftovers(self, partial(run, *arguments, **kwargs))
        if not return_cache_object:
            return output, cache
        cache.run, cache.attention_mask = record, mask
        asked = None if kwargs.get("loop") is None else self.schedule.loop(kwargs["loop"])
        cache.loop = None if asked == self.n_loops - 1 else asked
        return output, cache

    def get_caching_hooks(self, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> Any:
        """Caching hooks as in TransformerBridge; names may be loop-indexed and may be patterns.

        Args:
            names_filter: as in `run_with_cache`.
            *args: as in TransformerBridge.
            **kwargs: as in TransformerBridge.
        """
        return super().get_caching_hooks(self._expand_filter(names_filter), *args, **kwargs)

    def block_hooks(self, layer_idx: int) -> list[str]:
        """The hook names of a virtual layer, relative to it.

        Args:
            layer_idx: the virtual layer; negative indices count from the end.
        """
        return super().block_hooks(self.schedule.layer(layer_idx))

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of a name in either spelling, or None.

        Args:
            hook_name: the name.
        """
        try:
            names = self.expand_name(hook_name, check=False) if not is_pattern(hook_name) else [hook_name]
        except LoopedError:
            return None
        return super().get_hook_point(names[0])

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point under its TransformerLens names; indexing also understands loop-indexed names."""
        version = (len(self._hook_registry), alias_generation())
        if self.__dict__["_hook_dict"][0] != version:
            hooks = HookDict(super().hook_dict)
            hooks.expand_name = self.expand_name
            self.__dict__["_hook_dict"] = (version, hooks)
        return self.__dict__["_hook_dict"][1]

    def _collect_hook_aliases_from_registry(self) -> dict[str, str]:
        """As in TransformerBridge, which looks for the aliases of a block among all names; here every block is asked."""
        aliases = self._collect_component_aliases(self.adapter.component_mapping)
        outside = tuple(sorted(name for name in self._hook_registry if not name.startswith("blocks.")))
        found = dict(self._compute_hook_aliases_cached(outside, tuple(sorted(aliases.items()))))
        return found | self._collect_block_instance_aliases()

    def _scan_existing_hooks(self, module: nn.Module, prefix: str = "") -> None:
        """Fill the hook registry; passes get their loop-indexed names, which are the only ones they have.

        A hook point is called what it is found as first. As in TransformerBridge, that is where it lies, and in compatibility
        mode the legacy name, which belongs to a component above.
        """
        named = {id(hook) for hook in self._hook_registry.values()}
        components = list(self._components(self, ""))
        own = [(path, component._modules) for path, component in components]
        aliases = [(path, dict(sorted(component.__dict__.items()))) for path, component in components]
        legacy = [found for both in zip(own, aliases, strict=True) for found in both]
        for path, hooks in legacy if self.compatibility_mode else own + aliases:
            for name, hook in hooks.items():
                if isinstance(hook, HookPoint):
                    full_name = f"{path}.{name}" if path else name
                    if id(hook) not in named:
                        hook.name = full_name
                        named.add(id(hook))
                    self._hook_registry[full_name] = hook

    def _components(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        """All components with their paths; the modules they wrap hold the same hook points and are left out."""
        yield path, module
        for name, child in module._modules.items():
            if isinstance(child, (GeneralizedComponent, nn.ModuleList)) and name != "_original_component":
                child_path = f"{path}.{name}" if path else name
                if path == "passes":
                    child_path = self.schedule.pass_prefix(self.schedule.passes[int(name)])
                yield from self._components(child, child_path)

    def _enumerate_blocks(self) -> list[tuple[int, Any]]:
        """The virtual layers; TransformerLens would count the ends of passes as layers without attention."""
        return list(enumerate(self.blocks))

    def _validate_attention_fork_supported(self, flag_name: str) -> None:
        """Every looped family has the forks; what tools make of them is another matter."""
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
            f"layer {layer} ({self.schedule.layer_name(layer)}) on, {why}. Use tl_looped.path_patching.edge_sweep for edges.",
            stacklevel=4,
        )


def _without_collections(make: Callable[[], T]) -> T:
    """What is made, without garbage collections, each of which would scan all virtual layers made so far; it stays alive."""

    def made() -> T:
        gc.disable()
        return make()

    return undone(made, gc.enable if gc.isenabled() else gc.disable)


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
    return checkpoints.MemoryCheckpoint({"_class_name": type(config).__name__, **values}, hf_model.state_dict())


class HookDict(dict[str, HookPoint]):
    """TransformerLens's hook dictionary; `[name]` also takes loop-indexed names."""

    expand_name: Callable[[str], list[str]]

    def __init__(self, hooks: Mapping[str, HookPoint]):
        super().__init__(hooks)
        self._names: dict[int, list[str]] = {}

    def names_of(self, hook: HookPoint) -> list[str]:
        """All TransformerLens names of a hook point.

        Args:
            hook: the hook point.
        """
        found = self._names.get(id(hook))
        if found is None or super().__getitem__(found[0]) is not hook:  # not asked before, or in the original of this copy
            self._names = {}
            for name, point in self.items():
                self._names.setdefault(id(point), []).append(name)
        return self._names[id(hook)]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and self.get(name) is not None)

    def get(self, name: str, default: Any = None) -> Any:
        """The hook point of a name in either spelling.

        Args:
            name: the name.
            default: what to return where there is no such hook.
        """
        if super().__contains__(name):
            return super().__getitem__(name)
        try:
            return self[name]
        except LoopedError:
            return default

    def __missing__(self, name: str) -> HookPoint:
        names = self.expand_name(name)
        if len(names) > 1:
            raise LoopedError(f"{name!r} stands for {len(names)} hook points, from {names[0]!r} to {names[-1]!r}; name one.")
        return self[names[0]]
