"""Generation with loops: exit policies, reports, and arguments that hold for every token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from ..errors import LoopedError
from ..exits import ExitPolicy, Gate, GenerationReport
from ..model.early_exit import EarlyExit
from ..model.undo import undone, whole
from ..tokens import refuse_unmarked_padding
from .tokens import encode
from .weights import WeightsBridge

# What `generate` takes beside TransformerBridge's own arguments; every step must see it, with and without cache.
EXTRA = ("initial_state", "token_type_ids")


class GeneratingBridge(WeightsBridge):
    """The part of a `LoopedBridge` that writes text."""

    @property
    def exit_policy(self) -> ExitPolicy | None:
        """After how many loops `generate` reads a token: a policy of `tl_looped.exits`, or None for all loops.

        It holds for `generate` and `generate_stream`; a forward pass always runs every loop. A token read after loop `t` has
        the logits `readout(tokens, loop=t)` of the text so far, with and without KV cache.

        Raises:
            LoopedError: what is set is no policy; a policy that reads exit gates, for a model that has none.

        Example:
            >>> import torch
            >>> from tl_looped import LoopedBridge, LoopedConfig, exits
            >>> model = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=10, n_core=2, n_loops=8))
            >>> model.exit_policy = exits.StateChange(0.5)
            >>> text = model.generate(torch.tensor([[1, 2]]), 3, do_sample=False, stop_at_eos=False, verbose=False)
            >>> model.generation_report.loops_per_token.shape
            torch.Size([1, 3])
        """
        return self.__dict__.get("_exit_policy")

    @exit_policy.setter
    def exit_policy(self, policy: ExitPolicy | None) -> None:
        if policy is not None and (isinstance(policy, type) or not callable(policy)):
            raise LoopedError(
                f"exit_policy={policy!r} was given; pass a policy such as tl_looped.exits.KL(), or None to run every loop."
            )
        if isinstance(policy, Gate) and not self.looped_cfg.exit_gate:
            raise LoopedError(
                f"exit_policy={policy!r} reads exit gates, which this {self.looped_cfg.family} model does not have; "
                "use KL(), StateChange() or TwoHitAcceleration()."
            )
        if policy is not None and (why := self.plain.loop.fixed) is not None:
            raise LoopedError(f"exit_policy={policy!r} was given, but in this {self.looped_cfg.family} model {why}.")
        self.__dict__["_exit_policy"] = policy

    @property
    def generation_report(self) -> GenerationReport | None:
        """How many loops the latest `generate` or `generate_stream` spent; None before the first, and after one that failed."""
        return self.__dict__.get("_generation_report")

    def generate(self, input: Any = "", max_new_tokens: int = 10, *args: Any, **kwargs: Any) -> Any:
        """Write text, as in TransformerBridge; under `exit_policy`, with as few loops per token as it wants.

        `generation_report` then says how many loops were spent. Texts of different lengths are padded on the left, and the
        pads are masked.

        Args:
            input: text, texts or tokens. Tokens are all real unless `attention_mask` [batch, pos] says otherwise, or
                `padding_side="left"` that the pad tokens at their beginning are padding.
            max_new_tokens: how many tokens to write at most.
            *args: as in TransformerBridge.
            **kwargs: as in TransformerBridge; `initial_state` ("zero" or an int seed) and `token_type_ids` (HRM-Text's prefix,
                [batch, pos] of the prompt), which hold for every token.

        Raises:
            LoopedError: arguments that `generate` does not have; tokens that end with padding, or of which some rows begin or
                end with pad tokens and nothing says whether these are real.
        """
        extra = {name: kwargs.pop(name) for name in EXTRA if kwargs.get(name) is not None}
        if isinstance(state := extra.get("initial_state"), (Tensor, torch.Generator)):
            raise LoopedError(
                f"initial_state was given as a {type(state).__name__}, which does not say where later tokens start; "
                'pass an int seed or "zero".'
            )
        arguments = self._prompt(super().generate, (input, max_new_tokens, *args), kwargs)
        generate = partial(super().generate, *arguments.args, **arguments.kwargs)
        return whole(partial(self._while_every_run_gets, extra, generate), self._forget_generation)

    def generate_stream(self, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        """Write text piece by piece, as in TransformerBridge; prompts and exit policies are those of `generate`.

        Args:
            *args: as in TransformerBridge.
            **kwargs: as in TransformerBridge.

        Raises:
            LoopedError: as in `generate`.
        """
        arguments = self._prompt(super().generate_stream, args, kwargs)
        return super().generate_stream(*arguments.args, **arguments.kwargs)

    def _prompt(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """The arguments of a generation, which say what of the prompts is real."""
        bound = inspect.signature(generate).bind(*args, **kwargs)
        given = bound.arguments
        input, mask, side = given.get("input", ""), given.get("attention_mask"), given.get("padding_side")
        if isinstance(input, Tensor) and input.ndim == 1:
            given["input"] = input = input[None]
            given.update({} if mask is None else {"attention_mask": mask.reshape(1, -1)})
        if isinstance(input, list) and mask is None:
            tokens, mask = encode(self.tokenizer, self.cfg, input, given.get("prepend_bos"), "left")
            # TransformerLens would look for pads in any list, and find the beginnings of texts.
            bound.arguments["attention_mask"] = torch.ones_like(tokens) if mask is None else mask
        elif isinstance(input, Tensor) and mask is None and side is None:
            refuse_unmarked_padding(self.tokenizer, input, generate.__name__)
        ends = mask is not None and not bool(mask.bool()[..., -1].all())
        if side == "right" and isinstance(input, Tensor) and self.tokenizer is not None:
            ends = ends or bool((input[..., -1] == self.tokenizer.pad_token_id).any())
        if ends:
            raise LoopedError(f"{generate.__name__} was asked of prompts that end with padding; pad them on the left.")
        return bound

    def _forget_generation(self) -> None:
        """Put back what TransformerLens and the report keep of a generation that did not come to its end."""
        for name in ("_capture_hf_cache", "_last_hf_cache", "_generation_report"):
            self.__dict__.pop(name, None)

    def hf_generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: transformers' generation would need the published code, which is not run here.

        Raises:
            LoopedError: always.
        """
        raise LoopedError(
            "hf_generate was asked, which is transformers' own generate of the model inside; a looped model here is no "
            "transformers model. Use generate, which has the same sampling options and hooks in every loop."
        )

    def _generate_tokens(self, *args: Any, **kwargs: Any) -> Generator[tuple[Tensor, Tensor, bool], None, None]:
        """TransformerLens's generation loop, with the same extra arguments in every step and a count of the loops."""
        self.__dict__["_generation_report"] = None
        if wrong := sorted(kwargs["multimodal_kwargs"]):
            raise LoopedError(f"generate got {wrong}, which do not hold for every step; see TransformerLens's arguments.")
        finished, n_loops = kwargs["finished_sequences"], self.looped_cfg.n_loops
        run = None if self.exit_policy is None else EarlyExit(self.exit_policy, kwargs["use_past_kv_cache"])
        all_loops: list[Tensor] = []
        steps = super()._generate_tokens(*args, **kwargs)
        while True:
            alive = ~finished
            if run is not None:
                run.alive = alive
            given = {**self._given, "early_exit": run}
            step = whole(partial(self._while_every_run_gets, given, partial(next, steps, None)), self._forget_generation)
            if step is None:
                break
            all_loops.append(alive.long() * n_loops)
            self.__dict__["_generation_report"] = GenerationReport(
                torch.stack(all_loops if run is None else run.passes, dim=1).cpu(),
                n_loops,
                1.0 if run is None else run.n_computed / run.n_full,
            )
            yield step

    @property
    def _given(self) -> dict[str, Any]:
        return self.__dict__.get("_run_arguments", {})

    def _while_every_run_gets(self, arguments: dict[str, Any], action: Callable[[], Any]) -> Any:
        """What an action returns while every run of the model is part of a generation and gets these arguments."""
        before = self._given

        def act() -> Any:
            self.__dict__["_run_arguments"] = arguments
            return action()

        def take_back() -> None:
            self.__dict__["_run_arguments"] = before

        return undone(act, take_back)

    def _generation_arguments(self, input: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a run of the model gets because it is part of a generation."""
        added = {key: value for key, value in self._given.items() if value is not None}
        if (types := added.get("token_type_ids")) is not None:
            n_new = cast(Tensor, input).shape[1]
            types = types if kwargs.get("past_key_values") is None else types[:, :0]  # cached: new tokens only
            added["token_type_ids"] = torch.cat((types, types.new_zeros(len(types), n_new - types.shape[1])), dim=1)
        return added
