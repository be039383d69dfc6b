"""`LoopedBridge.trace`: any module that calls its layers several times, as a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .traced import TracedBridge


class Tracing:
    """The part of a `LoopedBridge` that makes models of modules that no family knows."""

    @staticmethod
    def trace(
        module: nn.Module,
        example: Tensor | str | Mapping[str, Any],
        *,
        layers: str | nn.Module | Iterable[str | nn.Module] | None = None,
        prelude: int | None = None,
        norm: str | Callable[[Tensor], Tensor] | None = None,
        head: str | Callable[[Tensor], Tensor] | None = None,
        parts: Mapping[str, str] | None = None,
        set_loops: str | Callable[[nn.Module, int], object] | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        verbose: bool = True,
    ) -> TracedBridge:
        """Make a model of any module that calls its layers several times, from one run that is recorded.

        The module itself is run, so that logits are its own; hooks are on it only while it runs through the model that is
        returned. Its layers and their order are found from its calls, and what was found is printed; the arguments correct it.
        At once it is run again: two runs must be equal to the bit, with hooks everywhere that change nothing too; gradients
        must reach the loops, or tools that need them refuse; and so on.

        Args:
            module: what is traced: any looped PyTorch model that returns logits [batch, pos, d_vocab], as a tensor, or in a
                mapping or a tuple.
            example: token ids [batch, pos] on which it loops as often as it will; a text, with `tokenizer`; or the keyword
                arguments of a run, of which one holds the token ids.
            layers: the modules that are layers: paths or modules, a list of modules standing for those in it; None to find
                them.
            prelude: how many layers run before the loop; None for those that run once before the first repetition.
            norm: the norm before the unembedding: a path, or a function of the stream; None to find it.
            head: the unembedding (with a softcap, if there is one): a path, or a function; None to find it.
            parts: which submodules of a layer its parts are: by hook ("hook_attn_out", "hook_mlp_out", "attn.hook_q", ...,
                "attn.hook_z" for the map that is given the heads), the path in the layer; None for what can be told.
            set_loops: where the number of loops is, such as "config.n_loops", or a function of the module and the number.
            seed: for a module that draws random numbers: every run begins from this seed.
            tokenizer: its tokenizer.
            verbose: print what was found.

        Returns:
            A model with loop-indexed hooks (`loops.2.blocks.5.hook_resid_pre`, `loops.2.blocks.5.moe.router.hook_out`).

        Raises:
            LoopedError: nothing runs twice; two runs differ; hooks that change nothing change the logits; a compiled, scripted
                or parallel wrapper.

        Example:
            >>> from tl_looped import LoopedBridge
            >>> from transformers import HrmTextConfig, HrmTextForCausalLM
            >>> config = HrmTextConfig(
            ...     vocab_size=10, hidden_size=8, intermediate_size=8, num_layers_per_stack=1, num_attention_heads=2,
            ...     num_key_value_heads=2, head_dim=4, H_cycles=2, L_cycles=3,
            ... )
            >>> model = LoopedBridge.trace(HrmTextForCausalLM(config).eval(), torch.tensor([[1, 2, 3]]), verbose=False)
            >>> model.schedule.describe()
            '2 loops over stacks L (3 x per loop) and H of 1 layer, 0 prelude and 0 coda layers: 8 virtual layers'
        """
        return TracedBridge.of(
            module,
            example,
            layers=layers,
            prelude=prelude,
            norm=norm,
            head=head,
            parts=parts,
            set_loops=set_loops,
            seed=seed,
            tokenizer=tokenizer,
            verbose=verbose,
        )
