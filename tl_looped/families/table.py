"""The table of families: which there are, in the order in which they are asked, and what is told of them.

The README, the documentation, `tl-looped info` and errors have it from here. A new family is one row;
`python docs/_build/families.py` then writes it into the pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..model.config import LoopedConfig
from . import (
    canonical,
    dory,
    hrm_text,
    huginn,
    inkling2_loop,
    llama,
    llama_rrt,
    loopcoder,
    looped_nanochat,
    loopformer,
    loopus,
    mor,
    nanbeige,
    ouro,
    parcae,
    retrofit,
)

_SMALL: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_vocab": 8, "n_core": 1, "n_loops": 2}


@dataclass(frozen=True)
class Row:
    """One family.

    Args:
        name: `LoopedConfig.family` of its models.
        title: what people call it.
        checkpoints: where its checkpoints are, in Markdown.
        loop: how it loops.
        module: its family file; None where no file describes it and its modules are traced.
        since: the version of this package that came with it.
        transformers: the version of transformers from which on that has the architecture too; None if it has not.
        fields: fields of `LoopedConfig` in which it departs from a Llama that loops, as far as tools care. From them comes what
            its models lack. None where that depends on the model.
        refused: values in config.json that are refused, beside those that no family has; one example each.
    """

    name: str
    title: str
    checkpoints: str
    loop: str
    module: ModuleType | None = None
    since: str = "0.1"
    transformers: str | None = None
    fields: Mapping[str, Any] | None = None
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def made(self) -> str:
        """How a model is made: by a forward of this package, or by tracing the published one."""
        return "traced" if self.module is None else "native"

    @property
    def small(self) -> LoopedConfig | None:
        """The structure of a tiny model of it; None where that depends on the model."""
        return None if self.fields is None else LoopedConfig(family=self.name, **(_SMALL | dict(self.fields)))


TABLE: tuple[Row, ...] = (
    Row(
        "ouro", "Ouro", "`ByteDance/Ouro-*`", "sandwich norms, a norm and an exit gate after every pass", ouro,
        fields={"norm": "sandwich", "pass_norm": True, "final_norm": False, "exit_gate": True},
        refused={"early_exit_threshold": 0.9, "early_exit_step": 1},
    ),
    Row(
        "huginn", "Huginn", "`tomg-group-umd/huginn-0125`",
        "prelude, concat-linear injection, random state, norms on the stream, coda", huginn,
        fields={"norm": "stream", "injection": "concat", "initial_state": "noise", "after_loop": "final_norm"},
        refused={"injection_type": "add", "test_time_noise": 0.1},
    ),
    Row(
        "retrofit", "retrofitted recurrence", "`smcleish/Recurrent-{Llama,TinyLlama,OLMo}-*`",
        "Huginn's loop around the blocks of Llama, TinyLlama or OLMo-2", retrofit,
        fields={"injection": "concat", "initial_state": "noise"},
        refused={"injection_type": "add", "test_time_noise": 0.1},
    ),
    Row(
        "hrm_text", "HRM-Text", "`sapientinc/HRM-Text-1B`",
        "two stacks: `l_cycles` runs of L, then one of H, per loop", hrm_text, transformers="5.9",
        fields={"l_cycles": 2, "pass_norm": True, "final_norm": False, "injection": "add", "initial_state": "learned",
                "prefix_lm": True},
    ),
    Row(
        "parcae", "Parcae", "`SandyResearch/parcae-*`", "decay injection, value embeddings", parcae,
        fields={"n_prelude": 1, "injection": "decay", "initial_state": "noise", "prelude_norm": True, "after_loop": "linear",
                "mlp": "relu_squared", "value_embed_layers": (0,), "value_gate_width": 4},
        refused={"injection_type": "add", "logit_scale": 2},
    ),
    Row(
        "nanbeige", "Nanbeige4.2", "`Nanbeige/Nanbeige4.2-*`", "a Llama run twice, a norm after every pass", nanbeige,
        fields={"pass_norm": True, "final_norm": False},
        refused={"loop_share_kv": True, "enable_hyper_connection": True},
    ),
    Row(
        "dory", "Dory", "`nvidia/NVIDIA-Nemotron-Labs-Dory1.0-4B-BF16`",
        "a looped nGPT: states on the unit sphere, steps at learned rates", dory, transformers="5.24",
        fields={"norm": "sandwich", "norm_kind": "l2", "norm_weight": False, "residual": "interpolate", "injection": "add",
                "prelude_norm": True, "entry_norm": True},
        refused={"hybrid_layer_pattern": "S-*-"},
    ),
    Row(
        "inkling2_loop", "Inkling-2 loop", "`thinkingmachines/Inkling-2-Mini`",
        "passes that start again from the prelude and read messages of the one before; attention over depth", inkling2_loop,
        transformers="5.24", fields={"n_prelude": 1, "windows": (None, 2), "attn_gate": True, "rope_layout": "none",
                                     "loop": "from_prelude", "options": inkling2_loop.SMALL},
        refused={"scoring_func": "softmax"},
    ),
    Row(
        "loopus", "LoopUS", "`Thrillcrazyer/*LoopUS*`",
        "the middle of a Qwen3 or Llama behind a gate that opens as far as the state moves", loopus,
        fields={"loop": "gated", "options": {"gate_rank": 2}, "exit_gate": True},
    ),
    Row(
        "loopformer", "LoopFormer", "of `armenjeddi/loopformer`",
        "a GPT whose norms and gains know the time and the size of every step", loopformer,
        fields={"loop": "timed", "mlp": "plain", "rope_layout": "none", "learned_positions": True,
                "options": {"steps": [0.5, 0.5]}},
    ),
    Row(
        "looped_nanochat", "looped_nanochat", "of `kschwethelm/looped_nanochat`",
        "norms on the stream, the prelude's output joined to the state at every pass", looped_nanochat,
        fields={"norm": "stream", "injection": "concat", "pass_norm": True},
    ),
    Row(
        "llama_rrt", "Relaxed recursive Llama", "of `axolotl-ai-cloud/axolotl`",
        "a Llama whose loops add low-rank matrices and norms of their own", llama_rrt,
        fields={"own_layers": True},
        refused={"use_dora": False},
    ),
    Row(
        "loopcoder", "LoopCoder", "`IQuestLab/IQuest-Coder-V1-*-Loop-*`",
        "a Llama whose later loops also attend to the keys and values of the first", loopcoder,
        fields={"loop": "two_sources", "options": {"window": 2, "gate": "query"}},
    ),
    Row(
        "loopcoder_v2", "LoopCoder-V2", "`Multilingual-Multimodal-NLP/LoopCoder-V2`",
        "the same, and a loop reads the state of the position before", loopcoder,
        fields={"loop": "two_sources_shifted", "options": {"window": 2, "gate": "stream"}},
    ),
    Row(
        "mor_token", "MoR, token choice", "of `raymin0223/mixture_of_recursions`",
        "a router gives every token a depth; a recursion runs the tokens that go as deep", mor,
        fields={"loop": "token_choice", "options": {"n_recursions": 2, "router": "linear", "router_func": "softmax",
                                                    "alpha": 1.0, "bias": False}},
        refused={"attention_bias": True, "mlp_bias": True},
    ),
    Row(
        "mor_expert", "MoR, expert choice", "of `raymin0223/mixture_of_recursions`",
        "every recursion keeps the best tokens of those that the one before kept, and has attention of its own", mor,
        fields={"loop": "expert_choice", "own_layers": True, "own_parts": ("attn",),
                "options": {"n_recursions": 2, "router": "linear", "router_func": "sigmoid", "alpha": 0.1, "temp": 1.0,
                            "capacity": [1.0, 0.5], "weighted": True}},
        refused={"attention_bias": True, "mlp_bias": True},
    ),
    Row(
        "tah", "Think-at-Hard", "`nics-efc/TaH-plus-1.7B`",
        "tokens that need it go through a Qwen3 again, from an embedding made of what it would say, with an adapter",
    ),
    Row(
        "tl_looped", "tl_looped", "what `save_pretrained` writes", "that of the model that was saved", canonical,
    ),
    Row(
        "looped_llama", "any Llama-shaped decoder", ", ".join(f"`{kind}`" for kind in llama.MODEL_TYPES),
        "`LoopedBridge.loop_layers(hf_model, start=10, stop=20, n_loops=4)`, naive or anchored", llama,
        fields={},
    ),
    Row(
        "traced", "any module that loops", "in memory, or of an architecture that transformers knows",
        "`LoopedBridge.trace(module, tokens)`: hooks at every call of its layers",
    ),
)  # fmt: skip
